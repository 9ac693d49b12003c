"""A repository as a source: what is left out and why, and what its rows say."""

from __future__ import annotations

import json
import subprocess
from datetime import date
from pathlib import Path

import pytest
from click.testing import CliRunner

from finetune_assets.cli import main
from finetune_assets.corpus import imports
from finetune_assets.corpus.repositories import Repository, choose_files, rows, write_texts
from finetune_assets.corpus.sources import read_source
from finetune_assets.corpus.validation import validate
from finetune_assets.errors import SourceError

CODE = '''"""A module."""


def price(code: str) -> int:
    """The price of a treatment in euros, by its code."""
    return {"A1": 30}[code]


def undocumented():
    pass
'''
FILES = {
    "app/prices.py": CODE,
    "app/old/prices.py": CODE,
    "app/broken.py": "def (",
    "app/moved.py": '"""Deprecated: use prices."""\n' + CODE,
    "app/keys.py": 'API_KEY = "sk-proj-Zm9vYmFyYmF6cXV4MTIzNDU2Nzg5MGFiY2RlZg"\n',
    "app/empty.py": "\n",
    "app/latin.py": b"# a\xf1o\n",
    "README.md": "# Clinic\nWrite to ana.perez@example.org.\n\n## Prices\n```\n# no heading\n```\nSee `price`.\n",
    "tests/test_prices.py": CODE,
    "untracked.py": CODE,
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    subprocess.run(["git", "-C", str(root), "add", "app", "README.md", "tests"], check=True)
    return root


def test_what_is_left_out_has_its_reason(repository: Path) -> None:
    chosen = choose_files(repository, Repository(exclude=["tests/**"]))
    assert sorted(chosen.texts) == ["README.md", "app/broken.py", "app/prices.py"]
    assert {name: reason for name, reason, _ in chosen.left_out} == {
        "app/old/prices.py": "deprecated",
        "app/moved.py": "deprecated",
        "app/keys.py": "secret",
        "app/empty.py": "empty",
        "app/latin.py": "not_text",
    }
    assert "sk-proj" not in str(chosen)
    assert sorted(choose_files(repository, Repository(include=["*.md"])).texts) == ["README.md"]
    with pytest.raises(SourceError, match="holds no file"):
        choose_files(repository, Repository(include=["**/*.rs"]))
    with pytest.raises(SourceError, match="does not exist"):
        choose_files(repository / "no", Repository())


TREE = ("top.py", "src/top.py", "src/a/one.py", "src/a/b/two.py", "app/secrets/s1.py", "app/secrets/deep/s2.py", "vendor/v.py")


@pytest.mark.parametrize(
    ("include", "exclude", "named"),
    [
        (["src/**/*.py"], [], TREE[1:4]),
        (["src/*.py"], [], TREE[1:2]),
        (["src"], [], TREE[1:4]),
        (["/top.py"], [], TREE[:1]),
        (["top.py"], [], TREE[:2]),
        (["*.py"], ["**/secrets/**"], (*TREE[:4], TREE[6])),
        (["*.py"], ["app/secrets"], (*TREE[:4], TREE[6])),
        (["*.py"], ["secrets/"], (*TREE[:4], TREE[6])),
        (["*.py"], ["vendor/"], TREE[:6]),
        (["*.py"], ["src/*", "!src/top.py", "app", "vendor"], TREE[:2]),
    ],
)
def test_patterns_are_those_of_git(tmp_path: Path, include: list[str], exclude: list[str], named: tuple[str, ...]) -> None:
    for name in TREE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(CODE, encoding="utf-8")
    chosen = choose_files(tmp_path, Repository(include=include, exclude=exclude))
    assert sorted(chosen.texts) == sorted(named)
    assert not chosen.left_out


def test_a_pattern_that_names_nothing_is_told(repository: Path, tmp_path: Path) -> None:
    chosen = choose_files(repository, Repository(include=["*.md", "./app/*.py"], exclude=["nosuch/**", "secrets/**"]))
    assert [(name, reason) for name, reason, _ in chosen.left_out] == [
        ("include ./app/*.py", "pattern_unmatched"),
        ("exclude nosuch/**", "pattern_unmatched"),
        ("exclude secrets/**", "pattern_unmatched"),
    ]
    with pytest.raises(SourceError, match="exclude '!' is no pattern"):
        choose_files(repository, Repository(exclude=["!"]))
    command = [
        "import",
        str(repository),
        "--exclude",
        "tests",
        "--exclude",
        "nosuch",
        "--to",
        str(tmp_path / "to"),
        "--tenant",
        "a",
    ]
    for more in ([], ["--texts"]):
        done = CliRunner().invoke(main, [*command, "--vertical", "code", "--date", "2026-10-21", *more])
        assert done.exit_code == 0
        assert "exclude nosuch: pattern_unmatched" in done.stderr


@pytest.mark.parametrize("tracked", [True, False])
def test_links_are_left_out(repository: Path, tmp_path: Path, tracked: bool) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "private.py").write_text(CODE, encoding="utf-8")
    (repository / "app" / "more").mkdir()
    (repository / "app" / "more" / "private.py").write_text(CODE, encoding="utf-8")
    (repository / "app" / "link.py").symlink_to(outside / "private.py")
    (repository / "app" / "gone.py").symlink_to(outside / "no.py")
    subprocess.run(["git", "-C", str(repository), "add", "app"], check=True)
    (repository / "app" / "more" / "private.py").unlink()
    (repository / "app" / "more").rmdir()
    (repository / "app" / "more").symlink_to(outside)  # after it was added: git still lists app/more/private.py
    if not tracked:
        (repository / ".git").rename(tmp_path / "git")
    chosen = choose_files(repository, Repository(include=["app/*.py", "app/more"]))
    links = {name for name, reason, _ in chosen.left_out if reason == "link"}
    assert links == {"app/link.py", "app/gone.py", "app/more/private.py" if tracked else "app/more"}
    assert sorted(chosen.texts) == ["app/broken.py", "app/prices.py"]
    origin = imports.Origin(tenant="a", vertical="b", date=date(2026, 10, 21), repository=Repository(path=str(repository)))
    assert not {"link.py", "gone.py", "private.py"} & {path.name for path in imports.files_of(repository, origin)}


@pytest.mark.parametrize(
    "line",
    [
        'SECRET_KEY = "django-insecure-8#k2l!v9(qx&0)"',
        "DB_PASSWORD: str = 'correcthorse'",
        'self.api_key = "9f8e7d6c5b4a"',
        "const accessToken = 'a81bc81b-dead-4e5d';",
        'client = Client(auth_token="tok_1a2b3c4d")',
        '{"client_secret": "Zm9vYmFyYmF6cXV4"}',
        "# run it with password=hunter2hunter2",
        "token = 'ghp_Zm9vYmFyYmF6cXV4MTIzNDU2Nzg5MGFiY2Rl'",
        'KEY = os.environ.get("SECRET_KEY", "s3cr3t-default!")',
        'if given == "x" or admin_password == "hunter2hunter2":',
    ],
)
def test_a_value_assigned_to_a_secret_name_is_one(tmp_path: Path, line: str) -> None:
    (tmp_path / "settings.py").write_text(f"import os\n{line}\n{CODE}", encoding="utf-8")
    chosen = choose_files(tmp_path, Repository())
    assert [(name, reason) for name, reason, _ in chosen.left_out] == [("settings.py", "secret")]
    assert chosen.left_out[0][2].endswith("(line 2)")


@pytest.mark.parametrize(
    "line",
    [
        'SECRET_KEY = os.environ["SECRET_KEY_2026"]',
        'SECRET_KEY = "<your key, 32 characters>"',
        'API_KEY = "YOUR_API_KEY_1"',
        'api_key="${API_KEY_1}"',
        'API_KEY = "OPENAI_API_KEY_2"',
        'DB_PASSWORD = "************"',
        'DB_PASSWORD = "change-me-1"',
        'TOKEN_URL = "https://example.org/oauth2/token"',
        'token_type = "bearer_2_legged"',
        'tokenizer = "gpt2-medium-v2"',
        'eos_token="<|endoftext_1|>"',
        'max_tokens: "1024000000"',
        'PRIVATE_KEY = "/etc/keys/server-1.pem"',
        'password_field = "password_input1"',
        'field_token = "csrfmiddlewaretoken"',
        'auth_token = f"{prefix}-{number:08}"',
        'the_secret = "ab1"',
        "token = secrets.token_urlsafe(32)",
        "user.password = new_password",
        "token = hashlib.sha256(f'{name}1').hexdigest()[:40]",
        'labels = {"db_password": "Enter your password 1"}',
    ],
)
def test_names_and_placeholders_are_no_secrets(tmp_path: Path, line: str) -> None:
    (tmp_path / "settings.py").write_text(f"import os\n{line}\n{CODE}", encoding="utf-8")
    assert not choose_files(tmp_path, Repository()).left_out


def test_rows_and_texts(repository: Path, tmp_path: Path) -> None:
    chosen = choose_files(repository, Repository(exclude=["tests/**"]))
    made = dict(rows(chosen))
    assert made["app/prices.py:4"] == {
        "instruction": "Write the function `price` (app/prices.py)",
        "input": "The price of a treatment in euros, by its code.",
        "output": CODE[CODE.index("def price") : CODE.index("\n\n\ndef undoc")],
    }
    assert made["README.md:4"]["output"] == "```\n# no heading\n```\nSee `price`."
    assert set(made) == {"app/prices.py:4", "README.md:1", "README.md:4"}
    assert write_texts(chosen, tmp_path / "texts") == 3
    assert "[EMAIL]" in (tmp_path / "texts" / "README.md.txt").read_text(encoding="utf-8")


def test_as_a_source_and_imported(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    settings = "tenant: a\nvertical: code\ndate: 2026-10-21\nrepository: {path: ../repository, exclude: ['tests/**']}\n"
    (tmp_path / "own" / "source.yaml").write_text(settings, encoding="utf-8")
    valid = validate(read_source([str(tmp_path / "own")]))
    assert valid.conversations.height == 3
    assert set(valid.rejected["reason"]) == {"deprecated", "secret", "empty", "not_text"}
    command = ["import", str(repository), "--exclude", "tests/**", "--to", str(tmp_path / "to"), "--tenant", "a"]
    done = CliRunner().invoke(main, [*command, "--vertical", "code", "--date", "2026-10-21", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["added"] == 3
    assert "app/keys.py: secret" in done.stderr
    texts = [*command[:5], str(tmp_path / "texts"), *command[6:], "--vertical", "code", "--date", "2026-10-21", "--texts"]
    assert CliRunner().invoke(main, texts).stdout.startswith("3 texts written")
