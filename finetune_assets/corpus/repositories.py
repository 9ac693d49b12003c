"""A code repository as a source: which of its files are fit, and what an assistant can learn from them.

`choose_files` leaves out what git does not track, what the patterns (git's own: those of a `.gitignore`) do not name, and, each
with its reason: `deprecated` (a folder or file called so, or a first line that says it), `secret` (a key, token or password: the
whole file stays out), `link` (it may lead out of the repository), `not_text`, `too_long`, `empty`. A pattern that names nothing
is told (`pattern_unmatched`). Of the rest are made

- instruction rows (`rows`), a source like any file of the form instruction/input/output: of Python every documented function,
  method and class (asked for by name, signature and docstring; answered by its source), of Markdown every section (asked for by
  its heading);
- plain texts (`write_texts`), a folder for the objective `continued_pretraining`: each file beneath its path, personal data
  replaced.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pathspec import GitIgnoreSpec
from pydantic import BaseModel, ConfigDict, Field

from finetune_assets.corpus.code_secrets import first_secret
from finetune_assets.corpus.personal_data import scrub_conversation
from finetune_assets.errors import SourceError
from finetune_assets.storage import write_text

MAX_CHARS = 200_000
_DEPRECATED_NAME = re.compile(r"(?i)(^|[/_.-])(deprecated|legacy|obsolete|archived?|old)([/_.-]|$)")
_DEPRECATED_HEAD = re.compile(r"(?i)^\W*(@?deprecated|this (module|file|package) is (deprecated|obsolete))\b")
HEAD_LINES = 5
MARKDOWN = (".md", ".markdown")
_HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$")


class Repository(BaseModel):
    """Which files of which folder; the key `repository` of a `source.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(default=".", description="The repository, relative to the folder of `source.yaml`.")
    include: list[str] = Field(
        default_factory=lambda: ["**/*.py", "**/*.md"], description="Files to read, as patterns of a .gitignore."
    )
    exclude: list[str] = Field(default_factory=list, description="Files and folders to leave out, as patterns of a .gitignore.")


@dataclass(frozen=True)
class Chosen:
    """Files that are fit, with their text, and (path, reason, detail) of those that are not, by path, after patterns that name
    nothing."""

    texts: dict[str, str]
    left_out: list[tuple[str, str, str]]


def choose_files(root: Path, repository: Repository) -> Chosen:
    """Reads the files that the patterns name. Raises SourceError where there is no such folder, or nothing is named."""
    texts: dict[str, str] = {}
    names, left_out = _named(root, repository)
    for name in names:
        text, problem = _read(root, name)
        if problem is None:
            texts[name] = text
        else:
            left_out.append((name, *problem))
    return Chosen(texts, left_out)


def named_files(root: Path, repository: Repository) -> list[str]:
    """The tracked files that the patterns name, sorted. Raises SourceError where there is none."""
    return _named(root, repository)[0]


def _named(root: Path, repository: Repository) -> tuple[list[str], list[tuple[str, str, str]]]:
    """The tracked files that the patterns name, and (pattern, reason, detail) of patterns that name nothing."""
    if not root.is_dir():
        raise SourceError(f"Repository {root} does not exist; correct `repository.path`.")
    tracked = _tracked(root)
    unmatched = [
        (f"{key} {pattern}", "pattern_unmatched", "it names no file that git tracks here; correct it, or take it out")
        for key in ("include", "exclude")
        if key in repository.model_fields_set
        for pattern in getattr(repository, key)
        if not _matched(tracked, key, [pattern.removeprefix("!")])
    ]
    names = _matched(tracked, "include", repository.include) - _matched(tracked, "exclude", repository.exclude)
    if not names:
        raise SourceError(
            f"Repository {root} holds no file that include {repository.include} names and exclude {repository.exclude} leaves."
        )
    return sorted(names), unmatched


def _matched(names: Sequence[str], key: str, patterns: Sequence[str]) -> set[str]:
    """The names that git would match: the last pattern that fits a name, or a folder above it, decides; `!` takes it back."""
    for pattern in patterns:
        try:
            GitIgnoreSpec.from_lines([pattern])
        except ValueError:
            raise SourceError(
                f"{key} {pattern!r} is no pattern; write it as in a .gitignore, `src/**/*.py` or `vendor/`."
            ) from None
    return set(GitIgnoreSpec.from_lines(patterns).match_files(names))


def _tracked(root: Path) -> list[str]:
    """What git tracks; where it is no repository, every file without a hidden part."""
    try:
        done = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], check=False, capture_output=True)
        listed = done.stdout.decode("utf-8", "surrogateescape").split("\0") if done.returncode == 0 else []
    except FileNotFoundError:
        listed = []
    names = [name for name in listed if name and ((root / name).is_file() or is_link(root, name))]
    if not names:
        found = (path.relative_to(root) for path in root.rglob("*") if path.is_file() or path.is_symlink())
        names = [path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)]
    return sorted(names)


def is_link(root: Path, name: str) -> bool:
    """Whether a file of a repository is a symbolic link, or stands below one."""
    path = PurePosixPath(name)
    return any((root / part).is_symlink() for part in (path, *path.parents[:-1]))


def _read(root: Path, name: str) -> tuple[str, tuple[str, str] | None]:
    if is_link(root, name):
        return "", ("link", "a symbolic link is not followed")
    if _DEPRECATED_NAME.search(name):
        return "", ("deprecated", "its name says so")
    try:
        text = (root / name).read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return "", ("not_text", "it is no UTF-8")
    return text, _problem(text, name.endswith(".py"))


def _problem(text: str, python: bool) -> tuple[str, str] | None:
    """Reason and detail of the first rule that a file's text breaks."""
    kind, line = first_secret(text[:MAX_CHARS], python) or ("", 0)
    deprecated = any(_DEPRECATED_HEAD.match(line) for line in text.splitlines()[:HEAD_LINES])
    rules = (
        (not text.strip(), "empty", "it holds no text"),
        ("\0" in text, "not_text", "it holds NUL"),
        (len(text) > MAX_CHARS, "too_long", f"{len(text):,} characters, at most {MAX_CHARS:,}"),
        (deprecated, "deprecated", f"one of its first {HEAD_LINES} lines says so"),
        (bool(kind), "secret", f"it holds a value of the kind {kind} (line {line})"),
    )
    return next(((reason, detail) for holds, reason, detail in rules if holds), None)


# --- rows of the form instruction/input/output


def rows(chosen: Chosen) -> Iterator[tuple[str, dict[str, str]]]:
    """(path:line, row) of each documented definition and each section."""
    for name, text in chosen.texts.items():
        made = _definitions(text) if name.endswith(".py") else _sections(text) if name.endswith(MARKDOWN) else ()
        for line, asked, said, answer in made:
            yield f"{name}:{line}", {"instruction": f"{asked} ({name})", "input": said, "output": answer}


def _definitions(text: str) -> Iterator[tuple[int, str, str, str]]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        documented, source = ast.get_docstring(node), ast.get_source_segment(text, node)
        if documented and source:
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            yield node.lineno, f"Write the {kind} `{node.name}`", documented, source


def _sections(text: str) -> Iterator[tuple[int, str, str, str]]:
    title, start, lines, fenced = "", 0, list[str](), False
    for number, line in enumerate([*text.splitlines(), "# "], start=1):
        fenced ^= line.lstrip().startswith("```")
        heading = None if fenced else _HEADING.match(line)
        if heading or line == "# ":
            body = "\n".join(lines).strip()
            if title and body:
                yield start, f"What does the documentation say under “{title}”?", "", body
            title, start, lines = heading.group(1) if heading else "", number, []
        else:
            lines.append(line)


# --- plain texts


def write_texts(chosen: Chosen, folder: Path) -> int:
    """Writes each file beneath its path as `<path>.txt`, personal data replaced; how many."""
    for name, text in chosen.texts.items():
        scrubbed = scrub_conversation([text])[0][0]
        write_text(folder / f"{name}.txt", f"# {name}\n{scrubbed}")
    return len(chosen.texts)
