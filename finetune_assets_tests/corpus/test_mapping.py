from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import polars as pl
import pytest

from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.mapping import SourceMapping, read_mapping
from finetune_assets.corpus.parts import Part
from finetune_assets.corpus.schema import TABLES
from finetune_assets.corpus.sources import read_source
from finetune_assets.errors import SettingsError, SourceError
from finetune_assets.storage import Store, read_json, write_json
from finetune_assets_tests.corpus.exports import KEY, at, export, made, write
from finetune_assets_tests.corpus.test_index import week_of

MAPPING = """
tables:
  messages:
    table: chat_messages
    columns: {content: body, role: author}
    values: {role: {human: user, ai: assistant}}
sources:
  other:
    conversations:
      columns: {started_at: begun}
      constants: {tenant_id: clinic_a, vertical: dental}
"""


def other_names(folder: Path) -> Path:
    write(folder, export())
    messages = pl.read_parquet(folder / "messages.parquet").rename({"content": "body", "role": "author"})
    (folder / "messages.parquet").unlink()
    people = pl.col("author").replace({"user": "human", "assistant": "ai"})
    messages.with_columns(people).write_parquet(folder / "chat_messages.parquet")
    conversations = pl.read_parquet(folder / "conversations.parquet").rename({"started_at": "begun"})
    conversations.drop("tenant_id", "vertical").write_parquet(folder / "conversations.parquet")
    return folder


def mapping_file(folder: Path, text: str) -> Path:
    path = folder / "mapping.yaml"
    path.write_text(text)
    return path


def test_other_names_give_the_same_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = read_source([str(write(tmp_path / "usual", export()))])
    folder = other_names(tmp_path / "other")
    monkeypatch.setenv("FINETUNE_SOURCE_MAPPING", str(mapping_file(tmp_path, MAPPING)))
    found = read_source([str(folder)])
    for table in ("conversations", "messages", "feedback"):
        assert getattr(found, table).equals(getattr(wanted, table)), table
    assert found.unknown_columns == {"conversations": [], "messages": [], "feedback": []}


def test_a_missing_column_is_told_by_the_sources_name(tmp_path: Path) -> None:
    folder = other_names(tmp_path / "other")
    mapping = read_mapping(mapping_file(tmp_path, MAPPING.replace("begun", "started")))
    with pytest.raises(SourceError, match=r"conversations.parquet .* lacks the column\(s\) started; required"):
        read_source([str(folder)], mapping)
    path = write(tmp_path / "plain", export()) / "messages.parquet"
    pl.read_parquet(path).drop("role").write_parquet(path)
    with pytest.raises(SourceError, match="FINETUNE_SOURCE_MAPPING"):
        read_source([str(tmp_path / "plain")])


def test_what_a_platform_does_not_have_is_said_to_be_null(tmp_path: Path) -> None:
    """Thumbs only, and as numbers: values and constants are text as it stands in the file."""
    folder = write(tmp_path / "thumbs", export())
    path = folder / "feedback.parquet"
    frame = pl.read_parquet(path)
    thumbs = pl.col("feedback_type").replace({"positive": "1", "negative": "-1"})
    frame.drop("rating", "comment").with_columns(thumbs).write_parquet(path)
    text = "tables: {feedback: {values: {feedback_type: {1: positive, -1: negative}}, constants: {rating: null, comment: ~}}}"
    found = read_source([str(folder)], read_mapping(mapping_file(tmp_path, text))).feedback
    assert found["feedback_type"].to_list() == frame["feedback_type"].to_list()
    assert found["rating"].is_null().all()
    assert found["comment"].is_null().all()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tables: {chats: {}}", "tables.chats"),
        ("tables: {messages: {columns: {body: content}}}", "messages.columns names body; declared columns of messages are"),
        ("tables: {messages: {columns: {role: a}, constants: {role: user}}}", "stand in `columns` and in `constants`"),
        ("tables: {messages: {columns: {role: a, content: a}}}", "takes a for two declared columns"),
        ("tables: {messages: {colums: {}}}", "colums"),
        ("tables: [", "is no YAML at line"),
        ("- a", "file: Input should be"),
    ],
)
def test_a_mapping_that_makes_no_sense_names_the_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_mapping(mapping_file(tmp_path, text))
    assert said in str(caught.value)


def test_a_source_that_no_address_holds_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        read_mapping(tmp_path / "nothing.yaml")
    mapping = read_mapping(mapping_file(tmp_path, MAPPING))
    with pytest.raises(SettingsError, match="names other, which is in no source's address"):
        read_source([str(write(tmp_path / "usual", export()))], mapping)


WRONG = "tables: {messages: {values: {role: {ai: assistant}}}, conversations: {constants: {tenant_id: aurora}}}"


def said_by_ai(folder: Path) -> Path:
    """Two weeks of an export whose assistant is called `AI`, and whose tenant is not in it."""
    tables = {name: [*week_of(0)[name], *week_of(1)[name]] for name in TABLES}
    write(folder, tables)
    messages = pl.read_parquet(folder / "messages.parquet")
    roles = pl.col("role").replace({"assistant": "AI"})
    messages.with_columns(roles).write_parquet(folder / "messages.parquet")
    conversations = pl.read_parquet(folder / "conversations.parquet")
    conversations.drop("tenant_id").write_parquet(folder / "conversations.parquet")
    return folder


def as_sqlite(folder: Path) -> str:
    path = folder.with_suffix(".sqlite")
    with closing(sqlite3.connect(path)) as connection:
        for table in TABLES:
            frame = pl.read_parquet(folder / f"{table}.parquet")
            times = [pl.col(name).dt.strftime("%Y-%m-%dT%H:%M:%S+00:00") for name in frame.columns if name.endswith("_at")]
            connection.execute(f"CREATE TABLE {table} ({', '.join(frame.columns)})")
            marks = ", ".join("?" * frame.width)
            connection.executemany(f"INSERT INTO {table} VALUES ({marks})", frame.with_columns(times).rows())
        connection.commit()
    return f"sqlite:///{path}"


def update(store: Store, source: str, mapping: SourceMapping) -> list[str]:
    opened = read_source([source], mapping)
    weeks = stale_weeks(store, opened).stale
    ingest_conversations(store, opened, weeks, KEY)
    ingest_feedback(store, opened, weeks, KEY)
    build_examples(store, weeks)
    return weeks


@pytest.mark.parametrize("kind", ["folder", "sqlite"])
def test_a_corrected_mapping_is_noticed(tmp_path: Path, kind: str) -> None:
    folder = said_by_ai(tmp_path / "source")
    source, store = str(folder) if kind == "folder" else as_sqlite(folder), Store(tmp_path / "home")
    wrong = read_mapping(mapping_file(tmp_path, WRONG))
    assert len(update(store, source, wrong)) == 2
    assert update(store, source, wrong) == []
    right = read_mapping(mapping_file(tmp_path, WRONG.replace("ai:", "AI:")))
    assert len(update(store, source, right)) == 2
    tenant = read_mapping(mapping_file(tmp_path, WRONG.replace("ai:", "AI:").replace("aurora", "boreal")))
    assert len(update(store, source, tenant)) == 2
    whole = Store(tmp_path / "whole")
    update(whole, source, tenant)
    assert made(store.home) == made(whole.home)


def test_only_the_weeks_of_rows_that_a_changed_mapping_changes_are_made_again(tmp_path: Path) -> None:
    store, folder = Store(tmp_path / "home"), said_by_ai(tmp_path / "source")
    path = folder / "messages.parquet"
    messages = pl.read_parquet(path)
    late = (pl.col("created_at") >= at(weeks=1)) & (pl.col("role") == "AI")
    messages.with_columns(pl.when(late).then(pl.lit("bot")).otherwise("role").alias("role")).write_parquet(path)
    text = WRONG.replace("ai:", "AI:")
    update(store, str(folder), read_mapping(mapping_file(tmp_path, text)))
    other = read_mapping(mapping_file(tmp_path, text.replace("{AI:", "{bot: assistant, AI:")))
    assert update(store, str(folder), other) == [at(weeks=1).strftime("%Y-%m-%d")]


def test_an_index_of_before_keeps_its_parts_where_nothing_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, folder = Store(tmp_path / "home"), write(tmp_path / "source", export())
    update(store, str(folder), SourceMapping())
    path = store.home / "corpus" / "index" / "parts.json"
    held = read_json(path)
    for entry in held["parts"].values():
        del entry["mapping"]
    write_json(path, held)

    def read(part: Part) -> None:
        pytest.fail(f"{part.place} was read")

    monkeypatch.setattr(Part, "read", read)
    assert update(store, str(folder), SourceMapping()) == []
