from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from finetune_assets.corpus.index import look
from finetune_assets.corpus.schema import UNKNOWN_WEEK
from finetune_assets.corpus.sources import read_source
from finetune_assets.corpus.staleness import week_digests
from finetune_assets.corpus.undated import undated_rows
from finetune_assets.corpus.validation import Validated, validate
from finetune_assets.storage import Store
from finetune_assets_tests.corpus.exports import SGD, Row, at, conversation, export, judgement, message, write


def validated(tables: dict[str, list[Row]], folder: Path, suffix: str = ".jsonl") -> Validated:
    return validate(read_source([str(write(folder, tables, suffix))]))


def rejected(valid: Validated, table: str) -> list[tuple[Any, ...]]:
    return valid.rejected.filter(pl.col("table") == table).select("id", "reason", "action").rows()


def adds_up(valid: Validated) -> None:
    """read = kept + dropped, for every table and week."""
    frames = {"conversations": valid.conversations, "messages": valid.messages, "feedback": valid.feedback}
    found: Counter[tuple[str, str]] = Counter((table, week) for table, frame in frames.items() for week in frame["week"])
    found.update(valid.rejected.filter(pl.col("action") == "dropped").select("table", "week").iter_rows())
    assert found == {(table, week): rows for table, week, rows in valid.read.iter_rows()}


MESSAGES: list[tuple[Row, str]] = [
    ({"message_id": None}, "id_null"),
    ({"message_id": "  "}, "id_null"),
    ({"message_id": "m" * 300}, "id_too_long"),
    ({"message_id": "msg\x00"}, "text_broken"),
    ({"conversation_id": None}, "conversation_id_null"),
    ({"conversation_id": "conv_none"}, "conversation_missing"),
    ({"conversation_id": "conv_0001"}, "conversation_rejected"),
    ({"role": "bot"}, "role_unknown"),
    ({"role": None}, "role_unknown"),
    ({"content": None}, "content_null"),
    ({"content": ""}, "content_empty"),
    ({"content": " \t\n\u00a0\u200b"}, "content_empty"),
    ({"content": "hola\x00"}, "text_broken"),
    ({"content": "a\ufffdo"}, "text_broken"),
    ({"content": ["hola"]}, "text_broken"),
    ({"created_at": None}, "created_at_null"),
    ({"created_at": "soon"}, "created_at_invalid"),
    ({"created_at": "2026-09-07 09:00:00"}, "time_naive"),
    ({"created_at": "1970-01-01T00:00:00Z"}, "time_absurd"),
    ({"created_at": "2326-01-01T00:00:00Z"}, "time_absurd"),
]


@pytest.mark.parametrize(("wrong", "reason"), MESSAGES)
def test_a_bad_message_is_dropped_with_its_reason(tmp_path: Path, wrong: Row, reason: str) -> None:
    tables = export(1)
    tables["conversations"].append(conversation(1, tenant_id=None))
    tables["messages"].append(message(9, 0) | wrong)
    valid = validated(tables, tmp_path)
    stripped = (wrong.get("message_id", "msg_0009") or "").strip() or None
    assert rejected(valid, "messages") == [(stripped, reason, "dropped")]
    assert valid.messages.height == 4
    adds_up(valid)


CONVERSATIONS: list[tuple[Row, str]] = [
    ({"conversation_id": None}, "id_null"),
    ({"tenant_id": " "}, "tenant_null"),
    ({"vertical": None}, "vertical_null"),
    ({"vertical": "v" * 101}, "label_too_long"),
    ({"user_id": "\ufffd"}, "text_broken"),
    ({"started_at": None}, "started_at_null"),
    ({"started_at": "2026-09-07T09:00:00"}, "time_naive"),
    ({"started_at": "12/10/2026"}, "started_at_invalid"),
    ({"started_at": "0001-01-01T00:00:00Z"}, "time_absurd"),
]


@pytest.mark.parametrize(("wrong", "reason"), CONVERSATIONS)
def test_a_bad_conversation_takes_its_messages_along(tmp_path: Path, wrong: Row, reason: str) -> None:
    tables = export(2)
    tables["conversations"][1] |= wrong
    valid = validated(tables, tmp_path)
    assert [r[1:] for r in rejected(valid, "conversations")] == [(reason, "dropped")]
    gone = "conversation_missing" if "conversation_id" in wrong else "conversation_rejected"
    assert [r[1] for r in rejected(valid, "messages")] == [gone] * 4
    assert [r[1] for r in rejected(valid, "feedback")] == ["message_rejected"]
    adds_up(valid)


FEEDBACK: list[tuple[Row, str]] = [
    ({"feedback_id": None}, "id_null"),
    ({"tenant_id": None}, "tenant_null"),
    ({"tenant_id": "clinic_b"}, "tenant_mismatch"),
    ({"conversation_id": "conv_0000"}, "conversation_mismatch"),
    ({"message_id": None}, "message_id_null"),
    ({"message_id": "msg_none"}, "message_missing"),
    ({"message_id": "msg_0004"}, "feedback_on_user_message"),
    ({"feedback_type": "meh"}, "feedback_type_unknown"),
    ({"feedback_type": None}, "feedback_type_unknown"),
    ({"expected_response": "a\x00b"}, "text_broken"),
    ({"created_at": "2026-09-07T09:00:00"}, "time_naive"),
    ({"created_at": None}, "created_at_null"),
]


@pytest.mark.parametrize(("wrong", "reason"), FEEDBACK)
def test_bad_feedback_is_dropped_with_its_reason(tmp_path: Path, wrong: Row, reason: str) -> None:
    tables = export(2)
    tables["feedback"].append(judgement(9, 5, 1) | wrong)
    valid = validated(tables, tmp_path)
    assert [r[1:] for r in rejected(valid, "feedback")] == [(reason, "dropped")]
    adds_up(valid)


REPAIRS: list[tuple[str, Row, str, str, Any]] = [
    ("conversations", {"satisfaction_score": 9}, "satisfaction_score_out_of_range", "satisfaction_score", None),
    ("conversations", {"satisfaction_score": -1}, "satisfaction_score_out_of_range", "satisfaction_score", None),
    ("conversations", {"satisfaction_score": 2.5}, "satisfaction_score_out_of_range", "satisfaction_score", None),
    ("conversations", {"satisfaction_score": "good"}, "satisfaction_score_invalid", "satisfaction_score", None),
    ("conversations", {"ended_at": "2026-09-07T08:00:00Z"}, "ended_before_started", "ended_at", None),
    ("conversations", {"ended_at": "later"}, "ended_at_invalid", "ended_at", None),
    ("conversations", {"training_consent": "ask"}, "training_consent_invalid", "training_consent", False),
    ("conversations", {"channel": "c" * 101}, "channel_too_long", "channel", None),
    ("messages", {"intent": "i" * 101}, "intent_too_long", "intent", None),
    ("messages", {"intent": "\x00"}, "text_broken", "intent", None),
    ("feedback", {"rating": 0}, "rating_out_of_range", "rating", None),
    ("feedback", {"comment": "\ufffd"}, "text_broken", "comment", None),
]


@pytest.mark.parametrize(("table", "wrong", "reason", "column", "value"), REPAIRS)
def test_what_is_repaired_is_kept_and_listed(
    tmp_path: Path, table: str, wrong: Row, reason: str, column: str, value: bool | None
) -> None:
    tables = export(1)
    tables[table][0] |= wrong
    valid = validated(tables, tmp_path)
    assert [r[1:] for r in rejected(valid, table)] == [(reason, "repaired")]
    assert getattr(valid, table)[column].to_list()[0] is value
    assert getattr(valid, table).height == len(tables[table])
    adds_up(valid)


def test_of_repeated_ids_the_earliest_valid_row_stays(tmp_path: Path) -> None:
    tables = export(1)
    tables["messages"] += [
        message(1, 0, content="later", created_at=at(minutes=50)),
        message(1, 0, content="first", created_at=at(minutes=-50)),
        message(1, 0, content="", created_at=at(minutes=-90)),
    ]
    tables["feedback"] += [judgement(0, 3, 0, created_at=at(minutes=1))]
    tables["conversations"] += [conversation(0, channel="late", started_at=at(minutes=9)), conversation(0, channel="web")]
    valid = validated(tables, tmp_path)
    assert valid.messages["content"].to_list() == ["first", "mensaje 0", "mensaje 2", "mensaje 3"]
    assert Counter(r[1] for r in rejected(valid, "messages")) == {"message_id_repeated": 2, "content_empty": 1}
    assert valid.feedback["message_id"].to_list() == ["msg_0003"]
    assert [r[1] for r in rejected(valid, "feedback")] == ["feedback_id_repeated"]
    assert valid.conversations["channel"].to_list() == ["web"]
    assert [r[1] for r in rejected(valid, "conversations")] == ["conversation_id_repeated"] * 2
    adds_up(valid)


def test_an_id_of_conversations_of_several_tenants_is_nobodys(tmp_path: Path) -> None:
    tables = export(3)
    twin = conversation(0, tenant_id=" clinic_b ", started_at=at(weeks=1))
    broken = conversation(1, tenant_id="clinic_b", started_at=None)  # no row by itself, so it says nothing of the id
    tables["conversations"] += [twin, conversation(0, channel="app"), broken]
    tables["messages"] += [message(90, 0, created_at=at(weeks=1)), message(91, 0, created_at=at(weeks=1))]
    valid = validated(tables, tmp_path)
    assert valid.conversations.select("conversation_id", "tenant_id").rows() == [
        ("conv_0001", "clinic_a"),
        ("conv_0002", "clinic_a"),
    ]
    ambiguous, started = ("conv_0000", "conversation_ambiguous", "dropped"), ("conv_0001", "started_at_null", "dropped")
    assert sorted(rejected(valid, "conversations")) == [*[ambiguous] * 3, started]
    assert [r[1] for r in rejected(valid, "messages")] == ["conversation_rejected"] * 6
    assert [r[1] for r in rejected(valid, "feedback")] == ["message_rejected"]
    details = valid.rejected.filter(pl.col("reason") == "conversation_ambiguous")["detail"].unique().to_list()
    assert details == ["its id stands for conversations of several tenants; give each source ids of its own"]
    adds_up(valid)


def test_a_conversation_without_a_valid_message_is_dropped_and_its_bad_score_still_listed(tmp_path: Path) -> None:
    tables = export(1)
    tables["conversations"].append(conversation(1, satisfaction_score=7))
    valid = validated(tables, tmp_path)
    wanted = [("conversation_empty", "dropped"), ("satisfaction_score_out_of_range", "repaired")]
    assert [r[1:] for r in rejected(valid, "conversations")] == wanted


def test_weeks(tmp_path: Path) -> None:
    tables = export(1)
    tables["messages"] += [message(5, 0, created_at=at(weeks=2)), message(7, 0, content="", created_at=at(weeks=1))]
    tables["messages"] += [message(9, 0, created_at=None), message(11, 99, created_at=None)]
    tables["feedback"] += [judgement(1, 1, 0, created_at=at(weeks=5))]
    valid = validated(tables, tmp_path)
    assert valid.messages["week"].unique().to_list() == ["2026-09-07"]  # a kept message stays with its conversation
    by_id = dict(valid.rejected.select("id", "week").iter_rows())
    assert by_id == {"msg_0007": "2026-09-14", "msg_0009": "2026-09-07", "msg_0011": "unknown"}
    assert valid.feedback["week"].to_list() == ["2026-09-07", "2026-10-12"]
    adds_up(valid)


@pytest.mark.parametrize(
    ("moment", "week"), [("2026-09-06T23:59:59Z", "2026-08-31"), ("2026-09-07T00:30:00+01:00", "2026-08-31")]
)
def test_weeks_start_on_monday_in_utc(tmp_path: Path, moment: str, week: str) -> None:
    tables = export(1)
    tables["conversations"][0]["started_at"] = moment
    assert validated(tables, tmp_path).conversations["week"].to_list() == [week]


def test_messages_of_one_instant_go_by_number_or_else_user_first(tmp_path: Path) -> None:
    same = at(minutes=1)
    ids = [f"m{n}" for n in (8, 9, 10, 11)]
    tables = export(2)
    tables["messages"] = [
        message(n, 0, message_id=i, role=role, created_at=same)
        for n, (i, role) in enumerate(zip(ids, ("user", "assistant", "user", "assistant"), strict=True))
    ]
    tables["messages"] += [
        message(0, 1, message_id="zz-aa", role="user", created_at=same),
        message(1, 1, message_id="aa-zz", role="assistant", created_at=same),
    ]
    tables["messages"].reverse()
    assert validated(tables, tmp_path).messages["message_id"].to_list() == [*ids, "zz-aa", "aa-zz"]


# --- any rows at all

IDS = st.sampled_from(["a", "b", "c", " a ", "", None, "\x00"])
TIMES = st.sampled_from(
    [
        "2026-09-07T09:00:00Z",
        "2026-09-08T09:00:00+02:00",
        "2026-09-21T00:00:00Z",
        "2026-09-07T09:00:00",
        "1999-01-01T00:00:00Z",
        "x",
        None,
    ]
)
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=8),
    st.lists(st.integers(), max_size=1),
)
LABELS = st.sampled_from(["dental", "restaurant", None])


def mostly(usual: SearchStrategy[Any]) -> SearchStrategy[Any]:
    return st.one_of(usual, usual, usual, usual, ANYTHING)


def rows(columns: dict[str, SearchStrategy[Any]], least: int) -> SearchStrategy[list[Row]]:
    return st.lists(st.fixed_dictionaries({name: mostly(values) for name, values in columns.items()}), min_size=least, max_size=6)


TABLES: SearchStrategy[dict[str, list[Row]]] = st.fixed_dictionaries(
    {
        "conversations": rows(
            {
                "conversation_id": IDS,
                "tenant_id": st.sampled_from(["t", "t", "s"]),
                "user_id": st.sampled_from(["u", None]),
                "vertical": LABELS,
                "channel": LABELS,
                "satisfaction_score": st.sampled_from([1, 5, None, 9]),
                "started_at": TIMES,
                "ended_at": TIMES,
                "training_consent": st.sampled_from([True, False, None]),
            },
            1,
        ),
        "messages": rows(
            {
                "message_id": IDS,
                "conversation_id": IDS,
                "role": st.sampled_from(["user", "assistant", "bot"]),
                "content": st.text(st.characters(), max_size=12),
                "intent": LABELS,
                "created_at": TIMES,
            },
            1,
        ),
        "feedback": rows(
            {
                "feedback_id": IDS,
                "tenant_id": st.just("t"),
                "conversation_id": IDS,
                "message_id": IDS,
                "feedback_type": st.sampled_from(["positive", "negative", "meh"]),
                "rating": st.sampled_from([1, None, 7]),
                "expected_response": st.text(max_size=9),
                "comment": st.none(),
                "created_at": TIMES,
            },
            0,
        ),
    }
)


@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(TABLES, st.randoms(use_true_random=False))
def test_any_rows_add_up_and_their_order_never_matters(tables: dict[str, list[Row]], shuffle: random.Random) -> None:
    with TemporaryDirectory() as folder:
        source = read_source([str(write(Path(folder) / "one", tables, ".jsonl"))])
        valid = validate(source)
        adds_up(valid)
        shuffled = {table: shuffle.sample(listed, len(listed)) for table, listed in tables.items()}
        cut = shuffle.randint(1, len(shuffled["messages"]))
        first = {**shuffled, "messages": shuffled["messages"][:cut], "feedback": []}
        second = {"conversations": [], "messages": shuffled["messages"][cut:], "feedback": shuffled["feedback"]}
        other = read_source([str(write(Path(folder) / str(n), part, ".jsonl")) for n, part in enumerate((second, first))])
        again = validate(other)
        for name in ("conversations", "messages", "feedback", "rejected"):
            assert getattr(again, name).equals(getattr(valid, name)), name
        snapshot = look(Store(Path(folder) / "home"), other, 2**30)
        weeks = snapshot.weeks()
        assert {*weeks, UNKNOWN_WEEK} >= set(valid.read["week"])
        undated = valid.rejected.filter(pl.col("week") == UNKNOWN_WEEK)
        for name, rows in undated_rows(snapshot).items():
            assert rows.height == undated.filter(pl.col("table") == name).height
        for table in ("conversations", "feedback"):  # a week's own rows decide about it as all rows do
            for week in weeks:
                alone = validate(snapshot.load(snapshot.closure(table, [week])))
                assert week_digests(table, alone, [week]) == week_digests(table, valid, [week]), (table, week)
                read = [frame.read.filter(pl.col("week") == week).sort("table") for frame in (alone, valid)]
                own = ("conversations", "messages") if table == "conversations" else ("feedback",)
                assert read[0].filter(pl.col("table").is_in(own)).equals(read[1].filter(pl.col("table").is_in(own)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=8))
def test_any_unicode_is_the_same_from_every_format(contents: list[str]) -> None:
    tables = export(1, 2)
    tables["messages"] = [message(n, 0, content=content or None) for n, content in enumerate(contents)]
    with TemporaryDirectory() as folder:
        parquet, csv_, lines = (validated(tables, Path(folder) / s, s) for s in (".parquet", ".csv", ".jsonl"))
        for name in ("conversations", "messages", "feedback", "rejected"):
            assert getattr(csv_, name).equals(getattr(parquet, name)), name
            assert getattr(lines, name).equals(getattr(parquet, name)), name


FITTING = {
    "content is null": "content_null",
    "content is empty": "content_empty",
    "role is unknown": "role_unknown",
    "conversation does not exist": "conversation_missing",
    "message id is repeated": "message_id_repeated",
    "satisfaction_score is out of 1..5": "satisfaction_score_out_of_range",
    "message does not exist": "message_missing",
    "feedback_type is unknown": "feedback_type_unknown",
}


@pytest.mark.skipif(not SGD.is_dir(), reason="the shared export data/sgd is not here")
def test_every_planted_bad_row_of_the_real_export_is_rejected_for_its_reason() -> None:
    valid = validate(read_source([str(SGD)]))
    found = set(valid.rejected.select("table", "id", "reason").iter_rows())
    bad = json.loads((SGD / "truth.json").read_text())["bad_rows"]
    assert {(row["table"], row["id"], FITTING[row["reason"]]) for row in bad} <= found
    planted = {(row["table"], row["id"]) for row in bad}
    assert {(table, id_) for table, id_, _ in found} == planted
    adds_up(valid)
