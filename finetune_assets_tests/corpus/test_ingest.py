from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from finetune_assets.corpus import ingest
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.schema import CONVERSATIONS, EXAMPLES, FEEDBACK, REJECTED
from finetune_assets.corpus.sources import SourceTables, read_source
from finetune_assets.storage import Store, read_json
from finetune_assets_tests.corpus.exports import (
    KEY,
    SGD,
    Row,
    at,
    conversation,
    everything_under,
    export,
    judgement,
    made,
    message,
    write,
)

WEEK, NEXT = "2026-09-07", "2026-09-14"
Tables = dict[str, list[Row]]


def source(tables: Tables, folder: Path, suffix: str = ".parquet") -> SourceTables:
    return read_source([str(write(folder, tables, suffix))])


def ingest_all(store: Store, tables: SourceTables, weeks: list[str] | None = None) -> list[str]:
    weeks = weeks or stale_weeks(store, tables).all_weeks
    ingest_conversations(store, tables, weeks, KEY)
    ingest_feedback(store, tables, weeks, KEY)
    build_examples(store, weeks)
    return weeks


def part(store: Store, table: str, week: str = WEEK) -> pl.DataFrame:
    return pl.read_parquet(store.corpus(table, week) / "part.parquet")


def contents(store: Store, week: str = WEEK) -> dict[str, str]:
    rows = part(store, "conversations", week).explode("messages").unnest("messages")
    return dict(rows.select("message_id", "content").iter_rows())


def two_weeks() -> Tables:
    """Three conversations in WEEK, one in NEXT; feedback on a message of WEEK that comes in NEXT."""
    tables = export(3)
    tables["conversations"].append(conversation(3, started_at=at(weeks=1), ended_at=None))
    tables["messages"] += [message(n, 3, created_at=at(weeks=1, minutes=n)) for n in range(12, 16)]
    tables["feedback"].append(judgement(7, 3, 0, created_at=at(weeks=1)))
    return tables


def test_stored_schemas_counts_and_tenants(tmp_path: Path) -> None:
    store, tables = Store(tmp_path / "home"), two_weeks()
    tables["messages"].append(message(99, 0, role="bot"))
    tables["conversations"][3] |= {"tenant_id": "resto_b", "vertical": "restaurant"}
    found = source(tables, tmp_path / "source")
    assert ingest_all(store, found) == [WEEK, NEXT]
    for table, schema in (("conversations", CONVERSATIONS), ("feedback", FEEDBACK), ("examples", EXAMPLES)):
        assert part(store, table).schema == schema, table
    rejected = pl.read_parquet(store.corpus("rejected", WEEK) / "conversations.parquet")
    assert rejected.schema == REJECTED
    assert rejected.row(0)[:3] == ("messages", "msg_0099", "role_unknown")
    counts = read_json(store.corpus("conversations", WEEK) / "counts.json")
    assert counts["read"] == {"conversations": 3, "messages": 13}
    assert counts["kept"] == {"conversations": 3, "messages": 12}
    assert counts["dropped"] == {"conversations": 0, "messages": 1}
    assert counts["rejected_by_reason"] == {"conversations": {}, "messages": {"role_unknown": 1}}
    assert read_json(store.corpus("feedback", NEXT) / "counts.json")["kept"] == {"feedback": 1}
    assert read_json(store.tenants) == {"clinic_a": "dental", "resto_b": "restaurant"}
    assert part(store, "conversations")["training_consent"].to_list() == [True] * 3
    assert stale_weeks(store, found).stale == []


def test_a_week_without_rows_gets_an_empty_part(tmp_path: Path) -> None:
    store, tables = Store(tmp_path / "home"), source(export(1), tmp_path / "source")
    ingest_all(store, tables, [WEEK, "2026-08-31"])
    for table, schema in (("conversations", CONVERSATIONS), ("feedback", FEEDBACK), ("examples", EXAMPLES)):
        assert part(store, table, "2026-08-31").schema == schema
        assert part(store, table, "2026-08-31").is_empty()
    assert stale_weeks(store, tables).stale == []
    assert stale_weeks(store, tables).all_weeks == [WEEK]


# --- privacy


def personal() -> Tables:
    tables = two_weeks()
    tables["conversations"][0] |= {"user_id": "+59170123456", "channel": "whatsapp"}
    tables["conversations"][1] |= {"conversation_id": "conv_+59170123456_x"}
    for row in tables["messages"][4:8]:
        row["conversation_id"] = "conv_+59170123456_x"
    tables["messages"][5]["message_id"] = "ana@example.org/1"
    tables["feedback"][1] |= {"message_id": "ana@example.org/1", "conversation_id": "conv_+59170123456_x"}
    tables["messages"][0]["content"] = "Hola, me llamo Ana Quispe y mi correo es ana@example.org"
    tables["messages"][1]["content"] = "Gracias, le escribo a ana@example.org"
    tables["messages"][2]["intent"] = "write to ana@example.org"
    later = {
        "expected_response": "Claro, Ana: escribo a ana@example.org o al otro, bea@example.org",
        "comment": "soporte@example.org",
    }
    tables["feedback"][3] |= later  # given in NEXT
    tables["messages"].append(message(98, 0, message_id="otro@example.org", role="ana@example.org"))
    tables["messages"].append(message(99, 77, content="mi correo es ana@example.org", created_at=None))
    return tables


VALUES = ("70123456", "example.org", "Quispe", "Ana")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_nothing_personal_is_written_and_placeholders_agree_across_weeks(tmp_path: Path, suffix: str) -> None:
    store = Store(tmp_path / "home")
    ingest_all(store, source(personal(), tmp_path / "source", suffix))
    for name, text in everything_under(store.home).items():
        assert not [value for value in VALUES if value in text], name
    said = contents(store)
    assert said["msg_0000"] == "Hola, me llamo [NAME] y mi correo es [EMAIL]"
    assert said["msg_0001"] == "Gracias, le escribo a [EMAIL]"
    row = part(store, "feedback", NEXT).row(0, named=True)
    assert row["expected_response"] == "Claro, [NAME]: escribo a [EMAIL] o al otro, [EMAIL_2]"
    assert row["comment"] == "[EMAIL_3]"
    assert read_json(store.corpus("conversations", WEEK) / "counts.json")["personal_data"] == {"email": 3, "name": 1}
    assert read_json(store.corpus("feedback", NEXT) / "counts.json")["personal_data"] == {"email": 3, "name": 1}


def test_scrubbed_ids_still_join(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    ingest_all(store, source(personal(), tmp_path / "source"))
    joined = part(store, "feedback").join(part(store, "examples"), on=["message_id", "conversation_id"])
    assert joined.height == 3
    assert joined["message_id"].str.starts_with("p_").sum() == 1
    rejected = pl.read_parquet(store.corpus("rejected", WEEK) / "conversations.parquet")
    assert rejected["id"].to_list()[0].startswith("p_")


def test_an_id_that_holds_its_users_id_is_hashed(tmp_path: Path) -> None:
    tables = export(1)
    tables["conversations"][0] |= {"user_id": "anaquispe", "conversation_id": "web:anaquispe:1"}
    for row in (*tables["messages"], *tables["feedback"]):
        row["conversation_id"] = "web:anaquispe:1"
    tables["messages"][1]["message_id"] = tables["feedback"][0]["message_id"] = "anaquispe-2"
    store = Store(tmp_path / "home")
    ingest_all(store, source(tables, tmp_path / "source"))
    assert not [name for name, text in everything_under(store.home).items() if "anaquispe" in text]
    assert part(store, "feedback").join(part(store, "examples"), on=["message_id", "conversation_id"]).height == 1


def test_buckets_do_not_depend_on_the_key_and_pseudonyms_do(tmp_path: Path) -> None:
    tables = export(3)
    tables["conversations"][1]["user_id"] = tables["conversations"][0]["user_id"]
    tables["conversations"][2]["user_id"] = None
    found = source(tables, tmp_path / "source")
    stores = [Store(tmp_path / "one"), Store(tmp_path / "two")]
    for store, key in zip(stores, (b"one", b"two"), strict=True):
        ingest_conversations(store, found, [WEEK], key)
    one, two = (part(store, "conversations") for store in stores)
    pinned = [5120, 5120, 7942]  # another number would move people between train and test
    assert one["bucket"].to_list() == two["bucket"].to_list() == pinned
    assert one["user"].to_list() != two["user"].to_list()
    assert one["user"][0] == one["user"][1]
    assert one["user"][2] is None


# --- the same whatever the order, the format and the number of files


def test_order_format_files_and_choice_of_weeks_do_not_matter(tmp_path: Path) -> None:
    tables = personal()
    wanted = Store(tmp_path / "wanted")
    ingest_all(wanted, source(tables, tmp_path / "source"))
    shuffle = random.Random(7)
    shuffled = {table: shuffle.sample(rows, len(rows)) for table, rows in tables.items()}
    halves = [{table: rows[half::2] for table, rows in shuffled.items()} for half in (0, 1)]
    other = Store(tmp_path / "other")
    found = read_source(
        [str(write(tmp_path / f"half{n}", half, s)) for n, (half, s) in enumerate(zip(halves, (".csv", ".jsonl"), strict=True))]
    )
    for week in (NEXT, WEEK):
        ingest_all(other, found, [week])
    assert made(other.home) == made(wanted.home)
    assert stale_weeks(other, source(tables, tmp_path / "source")).stale == []


# --- staleness and crashes


def stale_after(change: Any, tmp_path: Path) -> dict[str, list[str]]:
    store, tables = Store(tmp_path / "home"), two_weeks()
    ingest_all(store, source(tables, tmp_path / "source"))
    change(tables)
    stale = stale_weeks(store, source(tables, tmp_path / "changed"))
    return {"conversations": stale.conversations, "feedback": stale.feedback, "examples": stale.examples}


def test_only_weeks_whose_rows_changed_are_stale(tmp_path: Path) -> None:
    none: dict[str, list[str]] = {"conversations": [], "feedback": [], "examples": []}
    late = judgement(8, 3, 0, created_at=at(weeks=2))
    assert stale_after(lambda t: t["messages"][0].update(content="otra cosa"), tmp_path / "1") == {
        **none,
        "conversations": [WEEK],
    }
    plain = {**none, "conversations": ["2026-09-21"], "feedback": ["2026-09-21"], "examples": ["2026-09-21"]}
    assert stale_after(lambda t: t["feedback"].append(late | {"expected_response": "claro"}), tmp_path / "2") == plain
    # a correction with a personal value takes part in the scrubbing of its conversation, weeks before
    mail = {**plain, "conversations": [WEEK, "2026-09-21"]}
    assert stale_after(lambda t: t["feedback"].append(late | {"comment": "ana@example.org"}), tmp_path / "3") == mail
    both = {**none, "conversations": [WEEK, NEXT]}  # a row of another week makes this one's a repeated one
    twin = message(12, 0, created_at=at(minutes=5))
    assert stale_after(lambda t: t["messages"].append(twin), tmp_path / "4") == both
    assert stale_after(lambda t: t["messages"].reverse(), tmp_path / "5") == none


def test_a_new_code_version_makes_every_week_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, tables = Store(tmp_path / "home"), source(two_weeks(), tmp_path / "source")
    ingest_all(store, tables)
    monkeypatch.setitem(ingest.CODE_VERSIONS, "clean_examples", "next")
    assert stale_weeks(store, tables).examples == [WEEK, NEXT]
    monkeypatch.setitem(ingest.CODE_VERSIONS, "rlhf_feedback", "next")
    assert stale_weeks(store, source(two_weeks(), tmp_path / "source")).feedback == [WEEK, NEXT]


def test_the_corpus_mirrors_the_source(tmp_path: Path) -> None:
    store, tables = Store(tmp_path / "home"), two_weeks()
    ingest_all(store, source(tables, tmp_path / "source"))
    less = {
        "conversations": tables["conversations"][:3],
        "messages": tables["messages"][:12],
        "feedback": [row for row in tables["feedback"] if row["created_at"] < at(weeks=1)],
    }
    found = source(less, tmp_path / "less")
    stale = stale_weeks(store, found)
    assert (stale.vanished, stale.stale, stale.all_weeks) == ([NEXT], [NEXT], [WEEK])
    ingest_all(store, found, stale.stale)
    assert part(store, "conversations", NEXT).is_empty()
    assert stale_weeks(store, found).stale == stale_weeks(store, found).vanished == []


@pytest.mark.parametrize("fatal", range(8))
def test_a_crash_between_two_writes_leaves_whole_files_and_the_next_run_heals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: int
) -> None:
    old, new = two_weeks(), two_weeks()
    for row in new["messages"]:
        row["content"] += ", y algo más"
    store, tables = Store(tmp_path / "home"), source(new, tmp_path / "new")
    ingest_all(store, source(old, tmp_path / "old"))
    writes = 0

    def dying(write_file: Any) -> Any:
        def write_or_die(path: Path, value: Any) -> None:
            nonlocal writes
            if writes == fatal:
                raise KeyboardInterrupt
            writes += 1
            write_file(path, value)

        return write_or_die

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "write_parquet", dying(ingest.write_parquet))
        patch.setattr(ingest, "write_json", dying(ingest.write_json))
        with pytest.raises(KeyboardInterrupt):
            ingest_conversations(store, tables, [WEEK, NEXT], KEY)
    everything_under(store.home)  # every file reads
    stale = stale_weeks(store, tables).stale
    if fatal < 6:  # 3 writes a week: rejected, part, counts
        assert stale
    ingest_all(store, tables, [WEEK, NEXT])
    clean = Store(tmp_path / "clean")
    ingest_all(clean, tables)
    assert made(store.home) == made(clean.home)
    assert stale_weeks(store, tables).stale == []


def test_a_part_that_is_damaged_or_gone_is_stale(tmp_path: Path) -> None:
    store, tables = Store(tmp_path / "home"), source(two_weeks(), tmp_path / "source")
    ingest_all(store, tables)
    path = store.corpus("conversations", WEEK) / "part.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    (store.corpus("feedback", NEXT) / "part.parquet").unlink()
    (store.corpus("examples", NEXT) / "counts.json").write_text("{")
    stale = stale_weeks(store, tables)
    assert (stale.conversations, stale.feedback, stale.examples) == ([WEEK], [NEXT], [NEXT])


def test_rows_without_a_time_are_in_the_unknown_week_once(tmp_path: Path) -> None:
    tables = export(1)
    tables["messages"].append(message(9, 99, created_at=None))
    tables["feedback"].append(judgement(9, 99, 99, created_at=None))
    store, found = Store(tmp_path / "home"), source(tables, tmp_path / "source")
    for _ in range(2):
        assert ingest_all(store, found) == [WEEK]
    folder = store.corpus("rejected", "unknown")
    assert pl.read_parquet(folder / "conversations.parquet")["id"].to_list() == ["msg_0009"]
    assert pl.read_parquet(folder / "feedback.parquet")["id"].to_list() == ["fb_0009"]
    assert read_json(folder / "conversations_counts.json")["dropped"] == {"conversations": 0, "messages": 1}


# --- the real export

needs_sgd = pytest.mark.skipif(not SGD.is_dir(), reason="the shared export data/sgd is not here")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("home"))
    ingest_all(store, read_source([str(SGD)]))
    return store


@needs_sgd
def test_no_planted_personal_value_is_in_any_made_file(real: Store) -> None:
    values = {row["value"] for row in json.loads((SGD / "truth.json").read_text())["pii"]}
    assert len(values) > 70
    users = set(pl.read_parquet(SGD / "conversations.parquet")["user_id"])
    for name, text in everything_under(real.home).items():
        assert not [value for value in values if value in text], name
        assert users.isdisjoint(re.findall(r'"([^"\\]{1,60})"', text)), name


@needs_sgd
def test_the_real_export_adds_up_and_every_bad_row_is_rejected(real: Store) -> None:
    read: dict[str, int] = {}
    for table in ("conversations", "feedback", "examples"):
        for week in real.weeks(table):
            counts = read_json(real.corpus(table, week) / "counts.json")
            for name in counts["read"]:
                assert counts["read"][name] == counts["kept"][name] + counts["dropped"][name]
                read[name] = read.get(name, 0) + counts["read"][name]
    assert read == {"conversations": 2_114, "messages": 41_446, "feedback": 699, "examples": 20_693}
    rejected = pl.concat(pl.read_parquet(file) for file in real.home.glob("corpus/rejected/week=*/*.parquet"))
    planted = json.loads((SGD / "truth.json").read_text())["bad_rows"]
    assert {(row["table"], row["id"]) for row in planted} == set(rejected.select("table", "id").iter_rows())


@needs_sgd
def test_every_corrected_message_has_an_example(real: Store) -> None:
    examples = pl.concat(part(real, "examples", week) for week in real.weeks("examples"))
    truth = json.loads((SGD / "truth.json").read_text())
    assert {*truth["corrected"], *truth["positive"], *truth["negative"], *truth["bad_replies"]} <= set(examples["message_id"])
