from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from finetune_assets.corpus.mapping import read_mapping
from finetune_assets.corpus.sources import read_source
from finetune_assets.errors import SettingsError, SourceError
from finetune_assets_tests.corpus.exports import export, write

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
