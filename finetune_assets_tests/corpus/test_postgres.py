from __future__ import annotations

import random
import socket
import time
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from finetune_assets.assistants import load_assistant
from finetune_assets.corpus.databases import Database
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.mapping import SourceMapping
from finetune_assets.corpus.requests import Requests, read_requests
from finetune_assets.corpus.sources import SourceTables, read_source
from finetune_assets.dataset import choose, freeze
from finetune_assets.environment import ROOT
from finetune_assets.errors import SourceError
from finetune_assets.storage import Store, read_json
from finetune_assets_tests.corpus.exports import KEY, SGD, at, export, made, write
from finetune_assets_tests.corpus.postgres import PASSWORD, Server, server

pytest.importorskip("pgserver", reason="pgserver is not installed")
pytest.importorskip("adbc_driver_postgresql", reason="adbc-driver-postgresql is not installed")
SAMPLE = ROOT / "data" / "sample"


@pytest.fixture(scope="module")
def postgres() -> Generator[Server]:
    with server() as started:
        yield started


def build(home: Path, source: SourceTables) -> Store:
    store = Store(home)
    weeks = stale_weeks(store, source).stale
    ingest_conversations(store, source, weeks, KEY)
    ingest_feedback(store, source, weeks, KEY)
    build_examples(store, weeks)
    return store


def fingerprint(store: Store, name: str) -> str:
    settings = load_assistant(ROOT / "finetune_assets" / "assistants", name, read_json(store.tenants))
    return freeze(store, settings, choose(store, settings))["fingerprint"]


def relaid(folder: Path, target: Path, seed: int) -> Path:
    """The same rows shuffled, in several files of three formats."""
    for table in ("conversations", "messages", "feedback"):
        frame = pl.read_parquet(folder / f"{table}.parquet").sample(fraction=1, shuffle=True, seed=seed)
        (target / table).mkdir(parents=True)
        cuts = sorted(random.Random(seed).sample(range(1, frame.height), 2))
        first, second, third = (frame[a:b] for a, b in zip([0, *cuts], [*cuts, frame.height], strict=True))
        first.write_parquet(target / table / "z.parquet")
        times = [pl.col(name).dt.strftime("%Y-%m-%dT%H:%M:%S%.6f+00:00") for name in frame.columns if name.endswith("_at")]
        second.with_columns(times).write_csv(target / table / "a.csv")
        third.with_columns(times).write_ndjson(target / table / "m.jsonl")
    return target


@pytest.mark.parametrize(
    ("folder", "assistant"),
    [
        (SAMPLE, "dental"),
        pytest.param(SGD, "restaurant", marks=pytest.mark.skipif(not SGD.is_dir(), reason="../shared/data/sgd is absent")),
    ],
)
def test_files_in_any_layout_and_postgres_give_one_fingerprint(
    tmp_path: Path, postgres: Server, folder: Path, assistant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = build(tmp_path / "files", read_source([str(folder)]))
    url = postgres.fill("same", folder)
    monkeypatch.setenv("FINETUNE_MEMORY_GB", "0.5")  # several groups of weeks, and a spool on disk
    other = build(tmp_path / "layout", read_source([str(relaid(folder, tmp_path / "relaid", 3))]))
    database = build(tmp_path / "database", read_source([url]))
    assert made(other.home) == made(wanted.home)
    assert made(database.home) == made(wanted.home)
    assert fingerprint(wanted, assistant) == fingerprint(other, assistant) == fingerprint(database, assistant)
    assert PASSWORD not in "".join(path.read_text() for path in database.home.rglob("*.json"))
    assert stale_weeks(database, read_source([url])).stale == []


def error(url: str, use: str = "messages") -> str:
    with pytest.raises(SourceError) as caught:
        getattr(read_source([url]), use)
    assert PASSWORD not in str(caught.value)
    return str(caught.value)


def test_what_is_wrong_is_told_without_the_password(tmp_path: Path, postgres: Server) -> None:
    url = postgres.fill("wrong", write(tmp_path, export()))
    assert "nothing answers" in error(f"postgresql://root:{PASSWORD}@127.0.0.1:9/x")
    assert "its host is unknown" in error(f"postgresql://root:{PASSWORD}@nowhere.invalid/x")
    assert "does not exist" in error(url.replace("/wrong?", "/nothing?"))
    postgres.execute("wrong", "REVOKE SELECT ON messages FROM reader")
    assert "GRANT SELECT ON messages" in error(url)
    postgres.execute("wrong", "GRANT SELECT ON messages TO reader", "ALTER TABLE messages RENAME COLUMN content TO body")
    assert "messages (table messages) lacks the column(s) content" in error(url)
    postgres.execute("wrong", "DROP TABLE ai_rlhf_feedback")
    assert "lacks the table ai_rlhf_feedback; it has conversations, messages" in error(url)


def test_a_read_only_role_cannot_write_and_needs_not(tmp_path: Path, postgres: Server) -> None:
    url = postgres.fill("rights", write(tmp_path, export()))
    assert read_source([url]).messages.height == 12
    with pytest.raises(SourceError, match=r"25006|42501|may not"), Database(url)._cursor("") as cursor:
        cursor.execute("CREATE TABLE mine (a int)")


def test_a_connection_that_drops_in_the_middle_loses_nothing(tmp_path: Path, postgres: Server) -> None:
    write(tmp_path / "files", export(20))
    url = postgres.fill("drops", tmp_path / "files")
    postgres.execute("drops", "UPDATE messages SET content = repeat('x', 300000)")
    source, store = read_source([url]), Store(tmp_path / "home")
    part = next(part for part in source.parts if part.table == "messages")
    frames = part.read()
    next(frames), next(frames)
    postgres.execute("postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'drops'")
    with pytest.raises(SourceError, match=r"connection|ended") as caught:
        list(frames)
    assert PASSWORD not in str(caught.value)
    whole = build(tmp_path / "home", source)  # the same object connects again
    assert read_json(store.corpus("conversations", "2026-09-07") / "counts.json")["kept"] == {"conversations": 20, "messages": 80}
    assert stale_weeks(whole, read_source([url])).stale == []


def test_a_schema_that_changes_midway_is_told(tmp_path: Path, postgres: Server) -> None:
    url = postgres.fill("midway", write(tmp_path, export()))
    source = read_source([url])
    source.close()  # the snapshot of the list of columns ends
    postgres.execute("midway", "ALTER TABLE messages DROP COLUMN content")
    with pytest.raises(SourceError, match="schema changed"):
        stale_weeks(Store(tmp_path / "home"), source)
    assert not (tmp_path / "home" / "corpus" / "conversations").exists()


def test_weeks_in_the_look_back_are_read_and_older_ones_counted(tmp_path: Path, postgres: Server) -> None:
    tables = export(2)
    for n in range(1, 9):
        shift = {"started_at": at(weeks=n), "ended_at": None, "conversation_id": f"w{n}"}
        tables["conversations"].append(tables["conversations"][0] | shift)
        said = [row | {"conversation_id": f"w{n}", "created_at": at(weeks=n)} for row in tables["messages"][:4]]
        tables["messages"] += [row | {"message_id": f"{row['message_id']}w{n}"} for row in said]
    url = postgres.fill("weeks", write(tmp_path / "files", tables))
    store = build(tmp_path / "home", read_source([url]))

    def stale(*statements: str, full: bool = False) -> list[str]:
        postgres.execute("weeks", *statements)
        return stale_weeks(store, read_source([url]), full).conversations

    old, recent = "2026-09-14", "2026-10-26"  # the newest is 2026-11-02
    read = [part.key.rpartition("=")[2] for part in read_source([url]).of("messages") if part.always]
    assert read == ["2026-10-12", "2026-10-19", "2026-10-26", "2026-11-02"]
    assert stale() == []
    assert stale("UPDATE messages SET content = 'otra' WHERE message_id = 'msg_0000w7'") == [recent]
    assert stale("INSERT INTO messages SELECT 'late', conversation_id, role, 'tarde', intent, created_at FROM messages "
                 "WHERE message_id = 'msg_0000w1'") == [old, recent]  # fmt: skip
    build(tmp_path / "home", read_source([url]))
    assert stale() == []
    assert stale("UPDATE messages SET content = 'nueva' WHERE message_id = 'msg_0000w2'") == []  # the same count, long ago
    assert stale(full=True) == ["2026-09-21"]
    build(tmp_path / "home", read_source([url]))
    assert stale("DELETE FROM messages WHERE conversation_id = 'w1'") == [old]
    build(tmp_path / "home", read_source([url]))
    assert made(store.home) == made(build(tmp_path / "again", read_source([url])).home)


def test_times_without_a_zone_odd_types_and_infinity(tmp_path: Path, postgres: Server) -> None:
    url = postgres.fill("types", write(tmp_path, export(3)))
    postgres.execute(
        "types",
        "ALTER TABLE messages ALTER created_at TYPE timestamp USING created_at AT TIME ZONE 'UTC'",
        "ALTER TABLE ai_rlhf_feedback ALTER rating TYPE numeric USING 5.0, ALTER comment TYPE jsonb USING '{\"a\": 1}'",
        "UPDATE conversations SET started_at = 'infinity' WHERE conversation_id = 'conv_0001'",
        "UPDATE conversations SET started_at = '0044-03-15 BC' WHERE conversation_id = 'conv_0002'",
    )
    found = read_source([url])
    assert found.messages["created_at_problem"].unique().to_list() == ["naive"]
    assert found.feedback["rating"].to_list() == [5, 5, 5]
    assert found.feedback["comment"].unique().to_list() == ["\x00"]
    assert found.conversations["started_at_problem"].drop_nulls().to_list() == ["absurd", "absurd"]
    assert found.conversations.filter(pl.col("started_at_problem").is_null())["started_at"].to_list() == [
        datetime(2026, 9, 7, 9, tzinfo=UTC)
    ]


def test_a_database_and_a_folder_together(tmp_path: Path, postgres: Server) -> None:
    url = postgres.fill("two", write(tmp_path / "one", export(2)))
    tables: dict[str, list[Any]] = export(4)
    rest = {"conversations": tables["conversations"][2:], "messages": tables["messages"][8:], "feedback": tables["feedback"][2:]}
    together = build(tmp_path / "both", read_source([url, str(write(tmp_path / "rest", rest, ".csv"))]))
    alone = build(tmp_path / "alone", read_source([str(write(tmp_path / "whole", tables))]))
    assert made(together.home) == made(alone.home)


def test_erasure_requests_of_a_database_mapped_and_read_only(tmp_path: Path, postgres: Server) -> None:
    url = postgres.fill("asked", write(tmp_path, export()))
    assert read_requests([url]) == Requests()
    postgres.execute(
        "asked",
        "CREATE TABLE gdpr (customer bigint, conversation_id text, requested_at timestamptz)",
        "INSERT INTO gdpr VALUES (59170123456, NULL, now()), (NULL, ' conv_0001 ', now()), (59170123456, 'conv_0002', NULL)",
        "GRANT SELECT ON gdpr TO reader",
    )
    mapping = SourceMapping.model_validate(
        {"tables": {"erasure_requests": {"table": "gdpr", "columns": {"user_id": "customer"}}}}
    )
    assert read_requests([url], mapping) == Requests(frozenset({"59170123456"}), frozenset({"conv_0001"}))


def test_a_slow_source_is_told_with_its_setting(tmp_path: Path, postgres: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = postgres.fill("slow", write(tmp_path, export()))
    postgres.execute(
        "slow",
        "ALTER TABLE messages RENAME TO quick",
        "CREATE VIEW messages AS SELECT quick.* FROM quick WHERE pg_sleep(0.4) IS NOT NULL",
        "GRANT SELECT ON messages TO reader",
    )
    monkeypatch.setenv("FINETUNE_SOURCE_SECONDS", "1")
    told = error(url)
    assert "table messages, cannot be read: it took longer than FINETUNE_SOURCE_SECONDS=1" in told
    monkeypatch.setenv("FINETUNE_SOURCE_SECONDS", "60")
    assert read_source([url]).messages.height == 12


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_SOURCE_SECONDS", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        assert "did not answer in time" in error(f"postgresql://u:{PASSWORD}@127.0.0.1:{silent.getsockname()[1]}/x")
        assert time.monotonic() - start < 20


def test_a_table_that_is_dropped_while_it_is_read_changes_nothing(tmp_path: Path, postgres: Server) -> None:
    url = postgres.fill("gone", write(tmp_path / "files", export()))
    store = build(tmp_path / "home", read_source([url]))
    before = made(store.home)
    postgres.execute("gone", "UPDATE messages SET content = content || '!'")
    source = read_source([url])
    source.close()  # the snapshot ends
    postgres.execute("gone", "ALTER TABLE messages RENAME TO moved")
    with pytest.raises(SourceError, match="the table is gone"):
        build(tmp_path / "home", source)
    assert made(store.home) == before
    postgres.execute("gone", "ALTER TABLE moved RENAME TO messages")
    again = build(tmp_path / "home", read_source([url]))
    assert made(again.home) == made(build(tmp_path / "fresh", read_source([url])).home) != before


def test_tool_calls_of_a_jsonb_column(tmp_path: Path, postgres: Server) -> None:
    tables: dict[str, list[Any]] = export(1)
    tables["messages"][1]["content"] = "Un momento"
    url = postgres.fill("tools", write(tmp_path, tables))
    postgres.execute(
        "tools",
        "ALTER TABLE messages ADD tool_calls jsonb, ADD tool_name text",
        """UPDATE messages SET tool_calls = '[{"name": "hours", "arguments": "{}"}]' WHERE message_id = 'msg_0001'""",
        "UPDATE messages SET role = 'tool', tool_name = 'hours' WHERE message_id = 'msg_0002'",
    )
    found = read_source([url]).messages.sort("message_id")
    assert found["content"].to_list()[1:3] == [
        '{"tool_calls":[{"name":"hours","arguments":{}}],"content":"Un momento"}',
        '{"tool_result":{"name":"hours","content":"mensaje 2"}}',
    ]
    assert found["role"].to_list() == ["user", "assistant", "user", "assistant"]


def test_a_corrected_mapping_reaches_weeks_behind_the_look_back(
    tmp_path: Path, postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: dict[str, list[Any]] = export(2)
    tables["messages"][4:] = [row | {"created_at": at(weeks=9)} for row in tables["messages"][4:]]
    url = postgres.fill("mapped", write(tmp_path / "files", tables))
    postgres.execute("mapped", "UPDATE messages SET role = 'AI' WHERE role = 'assistant'")
    for role in ("ai", "AI"):
        mapping = SourceMapping.model_validate({"tables": {"messages": {"values": {"role": {role: "assistant"}}}}})
        store = build(tmp_path / "home", read_source([url], mapping))
    assert made(store.home) == made(build(tmp_path / "fresh", read_source([url], mapping)).home)
    assert "role_unknown" not in "".join(made(store.home).values())
