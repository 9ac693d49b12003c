from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from finetune_assets.corpus.mapping import SourceMapping
from finetune_assets.corpus.requests import Requests, read_requests
from finetune_assets.errors import SettingsError, SourceError
from finetune_assets_tests.corpus.exports import export, write

ANA = Requests(frozenset({"ana"}))


def asked(folder: Path, name: str, text: str) -> str:
    """A folder of exports with one more file."""
    path = write(folder, export(1)) / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(folder)


def database(folder: Path, *statements: str) -> str:
    path = folder / "source.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        for statement in ("CREATE TABLE conversations (conversation_id)", *statements):
            connection.execute(statement)
        connection.commit()
    return f"sqlite:///{path}"


def mapped(**table: Any) -> SourceMapping:
    return SourceMapping.model_validate({"tables": {"erasure_requests": table}})


def refusal(source: str, mapping: SourceMapping | None = None) -> str:
    with pytest.raises(SourceError) as caught:
        read_requests([source], mapping or SourceMapping())
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("erasure_requests.csv", "\ufeffuser_id,requested_at\nana,2026-10-01\n"),
        ("erasure_requests.jsonl", '{"user_id": "ana", "because": "GDPR"}\n'),
        ("erasure_requests/october.csv", "user_id\nana\n"),
    ],
)
def test_requests_of_a_folder(tmp_path: Path, name: str, text: str) -> None:
    assert read_requests([asked(tmp_path, name, text)], SourceMapping()) == ANA


def test_no_table_of_requests_asks_for_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "files", export(1))
    (folder / "erasure_requests").mkdir()  # where nobody has asked so far
    assert read_requests([str(folder), database(tmp_path)], SourceMapping()) == Requests()
    (folder / "gdpr").mkdir()
    assert read_requests([str(folder)], mapped(table="gdpr")) == Requests()


@pytest.mark.parametrize("columns", ["usuario", "User_ID", "uid", "usuario,requested_at", "User_ID,conversation_id"])
def test_a_table_that_names_nobody_by_its_columns_stops_the_read(tmp_path: Path, columns: str) -> None:
    source = asked(tmp_path / "files", "erasure_requests.csv", f"{columns}\n{','.join(['ana'] * len(columns.split(',')))}\n")
    names = columns.split(",")
    for told, place in (
        (refusal(source), "erasure_requests.csv"),
        (refusal(sqlite(tmp_path, "erasure_requests", names)), "source.sqlite erasure_requests"),
    ):
        assert place in told
        assert all(name in told for name in names)
        assert "FINETUNE_SOURCE_MAPPING" in told


def test_a_semicolon_between_the_fields_is_named(tmp_path: Path) -> None:
    told = refusal(asked(tmp_path, "erasure_requests.csv", "user_id;requested_at\nana;2026-11-01\n"))
    assert "erasure_requests.csv separates its fields by ';'" in told


def sqlite(folder: Path, table: str, names: list[str]) -> str:
    columns, values = ", ".join(f'"{name}"' for name in names), ", ".join("'ana'" for _ in names)
    return database(folder, f"CREATE TABLE {table} ({columns})", f"INSERT INTO {table} VALUES ({values})")


def test_json_lines_and_parquet_of_other_columns_stop_the_read(tmp_path: Path) -> None:
    told = refusal(asked(tmp_path / "lines", "erasure_requests.jsonl", '{"usuario": "ana"}\n'))
    assert "erasure_requests.jsonl: row 1 names neither" in told
    assert "usuario" in told
    folder = write(tmp_path / "columns", export(1))
    pl.DataFrame({"usuario": ["ana"]}).write_parquet(folder / "erasure_requests.parquet")
    assert "its columns are usuario" in refusal(str(folder))


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_mapped_column_that_is_not_there_stops_the_read(tmp_path: Path, suffix: str) -> None:
    text = "usuario,conversation_id\nana,c1\n" if suffix == "csv" else '{"usuario": "ana", "conversation_id": "c1"}\n'
    source = asked(tmp_path, f"erasure_requests.{suffix}", text)
    told = refusal(source, mapped(columns={"user_id": "usario"}))
    assert f"erasure_requests.{suffix}" in told
    assert "lacks the column(s) usario" in told
    assert "its columns are conversation_id, usuario" in told
    assert read_requests([source], mapped(columns={"user_id": "usuario"})) == ANA


def test_a_mapped_table_that_is_not_there_stops_the_read(tmp_path: Path) -> None:
    mapping = mapped(table="bajass")
    for source in (asked(tmp_path / "files", "bajas.csv", "user_id\nana\n"), sqlite(tmp_path, "bajas", ["user_id"])):
        told = refusal(source, mapping)
        assert "lacks the table bajass" in told
        assert "bajas" in told.replace("bajass", "")
        assert read_requests([source], mapped(table="bajas")) == ANA
    (folder := tmp_path / "imported").mkdir()
    (folder / "source.yaml").write_text("{}")  # of no export: it has names of its own
    assert read_requests([str(folder)], mapping) == Requests()
    mapping = SourceMapping.model_validate({"sources": {"other": {"erasure_requests": {"table": "bajas"}}}})
    with pytest.raises(SettingsError, match="names other, which is in no source's address"):
        read_requests([str(tmp_path / "files")], mapping)


@pytest.mark.parametrize(
    "name", ["Erasure_Requests.csv", "erasure_requests.CSV", "erasure_requests.csv.gz", "erasure_requests/a.xlsx"]
)
def test_a_file_of_requests_that_is_not_read_is_told(tmp_path: Path, name: str) -> None:
    told = refusal(asked(tmp_path, name, "user_id\nana\n"))
    assert name.partition("/")[0] in told
    assert "erasure_requests{.parquet,.jsonl,.ndjson,.csv} or erasure_requests/" in told


def test_a_table_of_another_case_is_told(tmp_path: Path) -> None:
    source = sqlite(tmp_path, "ERASURE_REQUESTS", ["user_id"])
    assert "ERASURE_REQUESTS" in refusal(source)
    assert read_requests([source], mapped(table="ERASURE_REQUESTS")) == ANA


def test_a_source_that_is_missing_or_empty_is_told(tmp_path: Path) -> None:
    assert f"Source {tmp_path / 'nowhere'} does not exist" in refusal(str(tmp_path / "nowhere"))
    (tmp_path / "unmounted").mkdir()
    assert "is empty" in refusal(str(tmp_path / "unmounted"))
    sqlite3.connect(tmp_path / "new.db").close()
    assert "lacks the table conversations" in refusal(f"sqlite:///{tmp_path / 'new.db'}")
