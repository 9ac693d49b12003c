"""Fine-tuning files (`forms`) as a source: written into a folder of exports, or read where they are by a `source.yaml`.

`import_files` adds to a folder of the three tables; `read_folder` gives the same tables of a folder whose `source.yaml` says

    tenant: clinic_aurora
    vertical: dental
    date: 2026-10-19             # rows without a `timestamp` count in this week
    form: user/assistant         # default: found by each row's keys
    files: ["*.jsonl"]           # default: every .jsonl, .ndjson, .json, .csv and .parquet, sub-folders included
    repository: {path: ../app}   # instead of files: rows made of a code repository (see `repositories`)

One row is one conversation of the kind `imported`, which needs no satisfaction score. Its id is a hash of tenant, vertical and
turns: the same row is the same conversation, in whatever file, order or run. A row that cannot be read is a message without
text, `<file>:<line>` its id and `<reason>: <detail>` its problem, so it ends in `rejected` under that name like any other row.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune_assets.corpus.forms import FORMS, Record, Unusable, record_of
from finetune_assets.corpus.repositories import Chosen, Repository, choose_files, is_link, named_files, rows
from finetune_assets.corpus.row_files import SUFFIXES, read_rows
from finetune_assets.corpus.schema import FILE_NAMES, SOURCE, TABLES, TIME
from finetune_assets.errors import SourceError
from finetune_assets.storage import write_parquet

SETTINGS = "source.yaml"
_KINDS: dict[str, Any] = {"text": pl.String, "time": TIME, "score": pl.Int8, "flag": pl.Boolean}
LEFT_OUT = ("training_consent", "tool_calls", "tool_name")  # a file's consent is its import; its calls are texts already
COLUMNS: dict[str, dict[str, Any]] = {
    table: {name: _KINDS[column.kind] for name, column in SOURCE[table].items() if name not in LEFT_OUT} for table in TABLES
}
"""Columns and types of the written tables."""


class Origin(BaseModel):
    """What the rows of a file cannot say themselves; the keys of a `source.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: str = Field(min_length=1, max_length=100, description="Tenant of every row.")
    vertical: str = Field(min_length=1, max_length=100, description="Vertical of every row.")
    date: dt.date = Field(description="Day of rows without a `timestamp`; its week is the corpus partition.")
    form: str | None = Field(default=None, description="One of the forms; default: found by each row's keys.")
    files: list[str] = Field(
        default_factory=lambda: [f"**/*{suffix}" for suffix in SUFFIXES],
        description="Globs of the files, relative to the folder of `source.yaml`.",
    )
    repository: Repository | None = Field(default=None, description="A code repository to make rows of, instead of `files`.")


@dataclass(frozen=True)
class Problem:
    """A row that was not taken."""

    place: str  # <file>:<line>
    reason: str
    detail: str


@dataclass(frozen=True)
class Converted:
    """The three tables of some files, and what was not taken."""

    tables: dict[str, pl.DataFrame]
    read: int
    problems: list[Problem]
    left_aside: dict[str, int]  # `system`, `tools`, `timestamp`, `label`: rows in which they stood

    @property
    def rows(self) -> int:
        """Rows that became conversations."""
        return self.tables["conversations"].height


@dataclass(frozen=True)
class Imported:
    """What an import did: `read = added + already there + problems`."""

    converted: Converted
    added: int

    @property
    def already_there(self) -> int:
        """Rows that the folder held before."""
        return self.converted.rows - self.added


# --- rows as tables


def convert(files: Sequence[tuple[str, Path]], origin: Origin) -> Converted:
    """The rows of some (name, file) as conversations. Raises SourceError for a file that cannot be read."""
    return tables_of(((f"{name}:{line}", row) for name, path in files for line, row in read_rows(path)), origin)


def convert_repository(chosen: Chosen, origin: Origin) -> Converted:
    """The rows of a repository as conversations; its files that were left out are problems."""
    left_out = ((name, Unusable(reason, detail)) for name, reason, detail in chosen.left_out)
    return tables_of(chain(left_out, rows(chosen)), origin)


def tables_of(given: Iterator[tuple[str, Any]], origin: Origin) -> Converted:
    """Named rows as conversations."""
    found: dict[str, Record] = {}
    places: dict[str, str] = {}
    problems: list[Problem] = []
    left_aside: Counter[str] = Counter()
    read = 0
    for place, row in given:
        read += 1
        try:
            if isinstance(row, Unusable):
                raise row
            record = record_of(row, origin.form)
        except Unusable as unusable:
            problems.append(Problem(place, unusable.reason, unusable.detail))
            continue
        name = conversation_id(record, origin)
        if name not in found:
            found[name], places[name] = record, place
            continue
        found[name], places[name], repeated = _first((found[name], places[name]), (record, place))
        problems.append(Problem(repeated, "row_repeated", "another row has the same turns, and counts"))
    for name in _continued(found):
        del found[name]
        problems.append(Problem(places[name], "row_continued", "another row begins with all of its turns, and goes on"))
    for record in found.values():
        left_aside.update(record.left_aside)
    start = dt.datetime(origin.date.year, origin.date.month, origin.date.day, tzinfo=dt.UTC)
    begun = {
        name: start if record.seconds is None else dt.datetime.fromtimestamp(record.seconds, dt.UTC)
        for name, record in found.items()
    }
    conversations = [_conversation(name, record, origin, begun[name]) for name, record in found.items()]
    messages = [message for name, record in found.items() for message in _messages(name, record, begun[name])]
    feedback = [row for name, record in found.items() for row in _feedback(name, record, origin, begun[name])]
    messages += [_unread(problem, start) for problem in problems]
    tables = {
        "conversations": _table("conversations", conversations),
        "messages": _table("messages", messages),
        "feedback": _table("feedback", feedback),
    }
    return Converted(tables, read, problems, dict(sorted(left_aside.items())))


def _first(one: tuple[Record, str], other: tuple[Record, str]) -> tuple[Record, str, str]:
    """Of two rows with the same turns the one that counts and its place, and the other's place, whatever their order."""
    (kept, place), (_, repeated) = sorted((one, other), key=lambda each: _rank(each[0]))
    return kept, place, repeated


def _rank(record: Record) -> tuple[Any, ...]:
    """Feedback counts as that of one message does: a correction, else a thumb, of several the newest, at the same instant the bad
    one. Of rows without feedback the earliest counts; a row without a `timestamp` is the oldest."""
    corrected = record.correction is not None
    judged = corrected or record.good is not None
    seconds = record.seconds or 0.0
    texts = (text or "" for text in (record.correction, record.user_id, record.intent))
    praised = record.good is True and not corrected
    return (not corrected, not judged, -seconds if judged else seconds, praised, *texts, record.left_aside)


def _continued(found: Mapping[str, Record]) -> list[str]:
    """Rows without feedback whose turns begin another's, as logs of single requests have them: nothing of theirs is lost there.

    Kept, they would be conversations of their own, and the same talk could stand in both train and test.
    """
    beginnings: set[bytes] = set()
    whole: dict[str, bytes] = {}
    for name, record in found.items():
        digest = hashlib.blake2b(digest_size=16)
        for number, turn in enumerate(record.turns, start=1):
            digest.update(json.dumps(turn).encode())
            if number < len(record.turns):
                beginnings.add(digest.digest())
        whole[name] = digest.digest()
    judged = {name for name, record in found.items() if record.correction is not None or record.good is not None}
    return [name for name, digest in whole.items() if digest in beginnings and name not in judged]


def conversation_id(record: Record, origin: Origin) -> str:
    """A hash of tenant, vertical and turns."""
    content = json.dumps([origin.tenant, origin.vertical, record.turns]).encode()
    return f"imp_{hashlib.blake2b(content, digest_size=12).hexdigest()}"


def _conversation(name: str, record: Record, origin: Origin, start: dt.datetime) -> dict[str, Any]:
    return {
        "conversation_id": name,
        "tenant_id": origin.tenant,
        "user_id": _clean(record.user_id),
        "vertical": origin.vertical,
        "channel": "import",
        "started_at": start,
        "ended_at": start + dt.timedelta(seconds=len(record.turns)),
        "kind": "imported",
    }


def _messages(name: str, record: Record, start: dt.datetime) -> Iterator[dict[str, Any]]:
    for number, (role, content) in enumerate(record.turns, start=1):
        yield {
            "message_id": f"{name}_{number}",
            "conversation_id": name,
            "role": role,
            "content": _clean(content),
            "intent": _clean(record.intent) if role == "user" else None,
            "created_at": start + dt.timedelta(seconds=number),
        }


def _feedback(name: str, record: Record, origin: Origin, start: dt.datetime) -> Iterator[dict[str, Any]]:
    """What a row said of its last reply: a thumb, or the better reply."""
    if record.correction is None and record.good is None:
        return
    place = max(number for number, (role, _) in enumerate(record.turns, start=1) if role == "assistant")
    yield {
        "feedback_id": f"{name}_feedback",
        "tenant_id": origin.tenant,
        "conversation_id": name,
        "message_id": f"{name}_{place}",
        "feedback_type": "positive" if record.good and record.correction is None else "negative",
        "expected_response": _clean(record.correction),
        "created_at": start + dt.timedelta(seconds=len(record.turns) + 1),
    }


def _unread(problem: Problem, start: dt.datetime) -> dict[str, Any]:
    return {"message_id": _clean(problem.place), "problem": f"{problem.reason}: {problem.detail}", "created_at": start}


def _clean(text: str | None) -> str | None:
    """Without lone surrogates, which no Parquet file can hold."""
    return None if text is None else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _table(name: str, rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame([{column: row.get(column) for column in COLUMNS[name]} for row in rows], schema=COLUMNS[name])


# --- into a folder of exports


def import_files(files: Sequence[Path], folder: Path, origin: Origin) -> Imported:
    """Adds the rows of some files to a folder of imported tables, which is made if it is missing; twice adds nothing.

    Raises SourceError for a file that cannot be read, a folder of other exports, or files without a single usable row. A kill in
    between leaves whole files, and the same import again completes them.
    """
    converted = convert([(path.name, path) for path in files], origin)
    return add(converted, folder)


def add(converted: Converted, folder: Path) -> Imported:
    """Adds conversations to a folder of imported tables."""
    if not converted.rows:
        first = f" The first: {_named(converted.problems[0])}." if converted.problems else ""
        raise SourceError(f"None of {converted.read} rows can be imported.{first} The forms are {', '.join(FORMS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".import.lock"):
        there = {table: _there(folder, table) for table in TABLES}
        new = converted.tables["conversations"].join(there["conversations"], on="conversation_id", how="anti")
        keys = {"conversations": "conversation_id", "messages": "message_id", "feedback": "feedback_id"}
        for table in (
            "feedback",
            "messages",
            "conversations",
        ):  # a message that waits for its conversation is completed by a rerun
            whole = pl.concat([converted.tables[table], there[table]])
            if table == "feedback":  # as in `_rank`; "negative" sorts before "positive"
                uncorrected = pl.col("expected_response").is_null()
                order = [uncorrected, -pl.col("created_at").dt.epoch("us"), pl.col("feedback_type"), pl.col("expected_response")]
                whole = whole.sort(order, maintain_order=True)
            whole = whole.unique(keys[table], keep="first", maintain_order=True)
            write_parquet(folder / f"{table}.parquet", whole.sort(keys[table]))
    return Imported(converted, new.height)


def _there(folder: Path, table: str) -> pl.DataFrame:
    """What a folder holds of a table. Raises SourceError where another than `import_files` wrote it."""
    path = folder / f"{table}.parquet"
    others = [
        str(other.relative_to(folder))
        for name in FILE_NAMES[table]
        for other in (folder / name, *(folder / f"{name}{suffix}" for suffix in SUFFIXES))
        if other.exists() and other != path
    ]
    frame = pl.read_parquet(path) if path.exists() else _table(table, [])
    imported = dict(frame.schema) == COLUMNS[table] and (table != "conversations" or (frame["kind"] == "imported").all())
    if others or not imported:
        raise SourceError(
            f"{folder} holds an export ({', '.join(others) or path.name}) that no import wrote; it stays as it is. Name another "
            "folder with --to, and list both in FINETUNE_SOURCE."
        )
    return frame


def _named(problem: Problem) -> str:
    return f"{problem.place} {problem.reason} ({problem.detail})"


# --- as a source of their own


def read_folder(folder: Path) -> Iterator[tuple[str, str, list[str], pl.DataFrame]]:
    """(table, place, column names, frame) of each table of a folder with a `source.yaml`. Raises SourceError."""
    origin = read_origin(folder)
    if origin.repository is not None:
        converted = convert_repository(choose_files(repository_of(folder, origin.repository), origin.repository), origin)
    else:
        converted = convert([(path.relative_to(folder).as_posix(), path) for path in files_of(folder, origin)], origin)
    for table, frame in converted.tables.items():
        yield table, str(folder), list(SOURCE[table]), frame


def files_of(folder: Path, origin: Origin) -> list[Path]:
    """The files that a folder with a `source.yaml` is made from, sorted. Raises SourceError where there is none."""
    if origin.repository is not None:
        root = repository_of(folder, origin.repository)
        return [root / name for name in named_files(root, origin.repository) if not is_link(root, name)]
    found = {path for pattern in origin.files for path in folder.glob(pattern) if path.is_file()}
    files = sorted(path for path in found if path.suffix.lower() in SUFFIXES and not path.name.startswith((".", "_")))
    if not files:
        raise SourceError(f"Source {folder} is empty: no file matches `files: {origin.files}` of its {SETTINGS}.")
    return files


def repository_of(folder: Path, repository: Repository) -> Path:
    """Where the repository of a `source.yaml` is."""
    return (folder / repository.path).resolve()


def read_origin(folder: Path) -> Origin:
    """The `source.yaml` of a folder. Raises SourceError."""
    path = folder / SETTINGS
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        origin = Origin.model_validate(given if isinstance(given, Mapping) else {})
    except ValidationError as error:
        causes = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise SourceError(f"{path}: {causes}. It needs tenant, vertical and date (YYYY-MM-DD).") from None
    except (OSError, yaml.YAMLError) as error:
        raise SourceError(f"{path} cannot be read as YAML ({type(error).__name__}); correct it.") from None
    if origin.form is not None and origin.form not in FORMS:
        raise SourceError(f"{path}: form {origin.form!r} is unknown; the forms are {', '.join(FORMS)}.")
    return origin
