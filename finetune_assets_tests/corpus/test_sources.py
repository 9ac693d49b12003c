from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.schema import SOURCE
from finetune_assets.corpus.sources import SourceTables, read_source
from finetune_assets.errors import SourceError
from finetune_assets.storage import Store
from finetune_assets_tests.corpus.exports import KEY, SGD, conversation, export, made, message, write, write_table


def read(folder: Path) -> SourceTables:
    return read_source([str(folder)])


def build(home: Path, source: SourceTables) -> None:
    store = Store(home)
    weeks = stale_weeks(store, source).stale
    ingest_conversations(store, source, weeks, KEY)
    ingest_feedback(store, source, weeks, KEY)
    build_examples(store, weeks)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl", ".ndjson"])
def test_every_format_gives_the_same_tables(tmp_path: Path, suffix: str) -> None:
    tables = export()
    tables["messages"][0]["content"] = 'dijo: "hola",\r\ny se fue\n— ¿sí? \u2028 😀'
    wanted = read(write(tmp_path / "parquet", tables))
    found = read(write(tmp_path / "other", tables, suffix))
    for table in ("conversations", "messages", "feedback"):
        assert getattr(found, table).equals(getattr(wanted, table)), table


def test_a_table_may_be_a_folder_of_files_of_several_formats(tmp_path: Path) -> None:
    tables = export()
    whole = read(write(tmp_path / "whole", tables)).messages
    write(tmp_path / "parts", {k: v for k, v in tables.items() if k != "messages"})
    (tmp_path / "parts" / "messages").mkdir()
    write_table(tmp_path / "parts" / "messages" / "a.csv", "messages", tables["messages"][:5])
    write_table(tmp_path / "parts" / "messages" / "b.parquet", "messages", tables["messages"][5:])
    (tmp_path / "parts" / "messages" / "_SUCCESS").touch()
    (tmp_path / "parts" / "messages" / ".b.parquet").touch()
    assert read(tmp_path / "parts").messages.equals(whole)


def test_several_sources_are_read_together(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", export(2)), write(tmp_path / "two", export(3), ".csv")
    assert read_source([str(one), str(two)]).conversations.height == 5


def test_feedback_may_have_the_platforms_name(tmp_path: Path) -> None:
    write(tmp_path, export())
    (tmp_path / "feedback.parquet").rename(tmp_path / "ai_rlhf_feedback.parquet")
    assert read(tmp_path).feedback.height == 3


def test_a_bad_cell_breaks_no_table(tmp_path: Path) -> None:
    tables = export()
    tables["messages"][1]["created_at"] = "yesterday"
    tables["messages"][2]["created_at"] = "2026-09-07T09:00:00"
    tables["messages"][3]["created_at"] = 1_700_000_000
    tables["conversations"][0]["satisfaction_score"] = "great"
    found = read(write(tmp_path, tables, ".jsonl"))
    assert found.messages["created_at_problem"].to_list()[:4] == [None, "invalid", "naive", "invalid"]
    assert found.conversations["satisfaction_score_problem"].to_list() == ["invalid", None, None]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("2026-09-07T09:00:00Z", None),
        ("2026-09-07 09:00:00.123456+00", None),
        ("2026-09-07 06:00:00.000 -0300", None),
        ("2026-09-07 09:00:00 UTC", None),
        ("2026-09-07", "naive"),
        ("2026-09-07T09:00", "naive"),
        ("2026-13-07T09:00:00Z", "invalid"),
        ("1970-01-01T00:00:00Z", "absurd"),
        ("2100-01-01T00:00:00Z", "absurd"),
        ("9999-12-31T23:59:59Z", "absurd"),
    ],
)
def test_times(tmp_path: Path, text: str, problem: str | None) -> None:
    tables = export(1)
    tables["conversations"][0]["started_at"] = text
    row = read(write(tmp_path, tables, ".csv")).conversations.row(0, named=True)
    assert row["started_at_problem"] == problem
    assert (row["started_at"] is None) == (problem is not None)
    if problem is None:
        assert row["started_at"].isoformat()[:16] == "2026-09-07T09:00"


def test_a_timestamp_column_without_a_zone_is_naive_in_every_row(tmp_path: Path) -> None:
    write(tmp_path, export())
    path = tmp_path / "messages.parquet"
    pl.read_parquet(path).with_columns(pl.col("created_at").dt.replace_time_zone(None)).write_parquet(path)
    assert read(tmp_path).messages["created_at_problem"].unique().to_list() == ["naive"]


def test_numeric_ids_agree_whatever_their_column_type(tmp_path: Path) -> None:
    write(tmp_path, {"conversations": [conversation(1)], "messages": [message(0, 1)], "feedback": []})
    for name, dtype in (("conversations", pl.Int64), ("messages", pl.Float64)):
        path = tmp_path / f"{name}.parquet"
        pl.read_parquet(path).with_columns(pl.lit(17).cast(dtype).alias("conversation_id")).write_parquet(path)
    found = read(tmp_path)
    assert found.conversations["conversation_id"].to_list() == found.messages["conversation_id"].to_list() == ["17"]


def test_unknown_columns_are_named_and_left_aside(tmp_path: Path) -> None:
    tables = export()
    for row in tables["conversations"]:
        row.update(phone="+59170123456", training_consent=row["conversation_id"] != "conv_0001")
    found = read(write(tmp_path, tables))
    assert found.unknown_columns == {"conversations": ["phone"], "messages": [], "feedback": []}
    assert "phone" not in found.conversations.columns
    assert found.conversations["training_consent"].to_list() == [True, False, True]


def read_all(source: str) -> None:
    found = read_source([source])
    for table in ("conversations", "messages", "feedback"):
        getattr(found, table)


def error(source: Path | str) -> str:
    with pytest.raises(SourceError) as caught:
        read_all(str(source))
    return str(caught.value)


def test_missing_columns_are_all_named_with_their_table_and_file(tmp_path: Path) -> None:
    write(tmp_path, export())
    for table, columns in (("messages", ["role", "content"]), ("feedback", ["rating"])):
        path = tmp_path / f"{table}.parquet"
        pl.read_parquet(path).drop(columns).write_parquet(path)
    text = error(tmp_path)
    assert "messages.parquet (table messages) lacks the column(s) role, content" in text
    assert "feedback.parquet (table feedback) lacks the column(s) rating" in text


def test_missing_folder_empty_folder_and_a_missing_table(tmp_path: Path) -> None:
    assert "does not exist" in error(tmp_path / "nowhere")
    assert "empty" in error(tmp_path)
    write(tmp_path, export())
    (tmp_path / "messages.parquet").unlink()
    text = error(tmp_path)
    assert "lacks messages" in text
    assert "messages{.parquet,.jsonl,.ndjson,.csv}" in text
    assert "is a file" in error(tmp_path / "feedback.parquet")


def test_a_table_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path, export())
    write(tmp_path, {"messages": export()["messages"]}, ".csv")
    assert "more than once (messages.parquet, messages.csv)" in error(tmp_path)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_no_rows(tmp_path: Path, suffix: str) -> None:
    tables = {**export(), "feedback": []}
    assert read(write(tmp_path / "no feedback", tables, suffix)).feedback.height == 0
    assert "empty" in error(write(tmp_path / "no messages", {**tables, "messages": []}, suffix))
    assert "empty" in error(write(tmp_path / "nothing", {table: [] for table in tables}, suffix))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_parquet_names_the_file_the_cause_and_the_mend(tmp_path: Path, share: float) -> None:
    write(tmp_path, export(50))
    path = tmp_path / "messages.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    text = error(tmp_path)
    assert str(path) in text
    assert "no whole Parquet file" in text
    assert "again" in text


def test_a_damaged_parquet_is_no_panic(tmp_path: Path) -> None:
    write(tmp_path, export(50))
    path = tmp_path / "messages.parquet"
    content = bytearray(path.read_bytes())
    for at in range(len(content) - 600, len(content) - 8, 3):  # the footer
        content[at] ^= 0xFF
    path.write_bytes(bytes(content))
    assert str(path) in error(tmp_path)


def test_broken_lines_are_named_and_not_quoted(tmp_path: Path) -> None:
    write(tmp_path, export(), ".jsonl")
    path = tmp_path / "messages.jsonl"
    path.write_text(path.read_text() + '{"content": "mi correo es ana@example.org')
    text = error(tmp_path)
    assert f"{path}:13" in text
    assert "ana@example.org" not in text
    path.write_text('[1, "ana@example.org"]\n')
    assert "not an object" in error(tmp_path)
    path.unlink()
    (tmp_path / "messages.csv").write_text(f"{','.join(SOURCE['messages'])}\n1,ana@example.org,2,3,4,5,6,7,8,9\n")
    text = error(tmp_path)
    assert "more fields than the header" in text
    assert "ana@" not in text
    (tmp_path / "messages.csv").write_text("")
    assert "empty" in error(tmp_path)


def test_bytes_that_are_no_utf8_become_broken_text_not_an_error(tmp_path: Path) -> None:
    write(tmp_path, export(1), ".csv")
    path = tmp_path / "messages.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"mensaje 0", b"mensaj\xe9 0"))
    assert read(tmp_path).messages["content"].to_list()[0] == "mensaj\ufffd 0"
    write(tmp_path / "lines", export(1), ".jsonl")
    path = tmp_path / "lines" / "messages.jsonl"
    path.write_bytes(path.read_bytes().replace(b"mensaje 0", b"mensaj\xe9 0").replace(b'"mensaje 1"', rb'"\ud800 x"'))
    found = read(tmp_path / "lines").messages["content"].to_list()
    assert found[0] == "mensaj\ufffd 0"
    assert "\ufffd" in found[1]


def test_sqlite(tmp_path: Path) -> None:
    tables = export()
    path = tmp_path / "platform 1.db"
    with sqlite3.connect(path) as connection:
        for table, rows in tables.items():
            name = {"feedback": "ai_rlhf_feedback"}.get(table, table)
            connection.execute(f"CREATE TABLE {name} ({', '.join([*rows[0], 'extra'])})")
            values = [[json.loads(json.dumps(v, default=str)) for v in row.values()] + [None] for row in rows]
            connection.executemany(f"INSERT INTO {name} VALUES ({', '.join('?' * (len(rows[0]) + 1))})", values)
    connection.close()
    wanted = read(write(tmp_path / "files", tables))
    found = read_source([f"sqlite:///{path}"])
    for table in tables:
        assert getattr(found, table).equals(getattr(wanted, table)), table
        assert found.unknown_columns[table] == ["extra"]


def test_databases_that_cannot_be_read_tell_no_password(tmp_path: Path) -> None:
    assert "does not exist" in error(f"sqlite:///{tmp_path}/nothing.db")
    assert not (tmp_path / "nothing.db").exists()
    sqlite3.connect(tmp_path / "empty.db").close()
    (tmp_path / "empty.db").touch()
    assert "lacks the table conversations" in error(f"sqlite:///{tmp_path}/empty.db")
    (tmp_path / "none.db").write_text("this is no database " * 100)
    assert "cannot be read" in error(f"sqlite:///{tmp_path}/none.db")
    for url in (
        "mysql://root:hunter2@db/x",
        "postgresql://root:hunter2@localhost:notaport/x",
        "postgresql://root:hunter2@127.0.0.1:9/x",
    ):
        text = error(url)
        assert "hunter2" not in text
    assert "supported are a folder" in error("mysql://root:hunter2@db/x")


@pytest.mark.skipif(not SGD.is_dir(), reason="the shared export data/sgd is not here")
def test_the_real_export_reads_without_a_problem() -> None:
    found = read(SGD)
    assert (found.conversations.height, found.messages.height, found.feedback.height) == (2_114, 41_446, 699)
    assert found.messages["created_at_problem"].null_count() == found.messages.height


def test_a_file_that_disappears_or_changes_midway_changes_nothing(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", write(tmp_path / "source", export())
    build(home, read(folder))
    before = made(home)
    pl.read_parquet(folder / "messages.parquet").reverse().write_parquet(folder / "messages.parquet")
    source = read(folder)
    (folder / "messages.parquet").rename(tmp_path / "aside.parquet")
    with pytest.raises(SourceError, match=r"messages.parquet cannot be read: No such file"):
        build(home, source)
    other = write(tmp_path / "other", export())
    source = read(other)
    pl.read_parquet(other / "messages.parquet").drop("content").write_parquet(other / "messages.parquet")
    with pytest.raises(SourceError, match=r"lacks the column\(s\) content"):
        build(home, source)
    assert made(home) == before


def test_a_locked_sqlite_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_SOURCE_SECONDS", "1")
    path = tmp_path / "platform.db"
    said = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('CREATE TABLE a (b)'); "
    said += "c.execute('BEGIN EXCLUSIVE'); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", said, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        try:
            assert "another program holds it" in error(f"sqlite:///{path}")
        finally:
            writer.kill()
