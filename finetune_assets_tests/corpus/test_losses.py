"""What is said of rows that were dropped."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_assets.assistants.settings import Assistant
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.losses import Loss, losses
from finetune_assets.corpus.sources import read_source
from finetune_assets.dataset.reading import select_examples
from finetune_assets.errors import NothingSelected
from finetune_assets.storage import Store
from finetune_assets_tests.corpus.exports import KEY, Row, at, conversation, export, message, write


def stored(folder: Path, tables: dict[str, list[Row]]) -> Store:
    store, source = Store(folder / "home"), read_source([str(write(folder / "source", tables, ".jsonl"))])
    weeks = stale_weeks(store, source).stale
    ingest_conversations(store, source, weeks, KEY)
    ingest_feedback(store, source, weeks, KEY)
    build_examples(store, weeks)
    return store


def numbers(found: list[Loss]) -> dict[str, tuple[int, int, dict[str, int]]]:
    return {loss.table: (loss.dropped, loss.read, loss.reasons) for loss in found}


def test_rows_count_in_their_weeks_and_those_without_a_time_where_all_weeks_are_asked_for(tmp_path: Path) -> None:
    tables = export(2)
    tables["conversations"] += [conversation(5, started_at=at(weeks=1), satisfaction_score=9), conversation(6, started_at=None)]
    said = [("bot", n) if n > 31 else ("user", n) for n in range(30, 36)]
    tables["messages"] += [message(n, 5, created_at=at(weeks=1, minutes=n), role=role) for role, n in said]
    tables["messages"] += [message(40, 6, created_at=None)]
    store = stored(tmp_path, tables)
    role, undated = {"role_unknown": 4}, {"started_at_null": 1}
    every = {"conversations": (1, 4, undated), "messages": (5, 15, {**role, "created_at_null": 1})}
    assert numbers(losses(store)) == every  # a repaired score is no loss
    assert numbers(losses(store, first="2026-09-07", last="2026-09-14")) == every
    assert numbers(losses(store, first="2026-09-14", last="2026-09-14")) == {"messages": (4, 6, role)}
    assert losses(store, last="2026-09-07") == losses(store, ["feedback"]) == []
    assert losses(store)[1].example == "msg_0032"


@pytest.mark.parametrize(("dropped", "read", "large"), [(19, 19, False), (20, 20, True), (20, 399, True), (20, 400, False)])
def test_a_loss_is_large_by_share_and_by_rows(tmp_path: Path, dropped: int, read: int, large: bool) -> None:
    assert Loss("messages", read, dropped, {"role_unknown": dropped}, None, tmp_path).large is large


def test_nothing_is_selected_because_it_was_dropped(tmp_path: Path) -> None:
    tables = export(2)
    for row in tables["messages"]:
        row["created_at"] = row["created_at"].replace(tzinfo=None)
    store = stored(tmp_path, tables)
    assistant = Assistant.model_validate({"name": "a", "select": {"tenant": "clinic_a"}})
    with pytest.raises(NothingSelected, match=r"(?s)no example.*was dropped.*8 of 8 messages.*time_naive 8") as caught:
        select_examples(store, assistant)
    assert "Correct `select`" not in str(caught.value)


def test_nothing_of_a_tenant_is_selected_and_much_was_dropped(tmp_path: Path) -> None:
    tables = export(40)
    for number, row in enumerate(tables["conversations"]):
        row["tenant_id"] = "clinic_b" if number % 2 else "clinic_a"
    for number, row in enumerate(tables["messages"]):
        row["role"] = "bot" if number // 4 % 2 and number % 2 else row["role"]
    store = stored(tmp_path, tables)
    assistant = Assistant.model_validate({"name": "b", "select": {"tenant": "clinic_b"}})
    with pytest.raises(NothingSelected, match=r"(?s)dental \(clinic_a\)\. Correct `select`.*40 of 160 messages.*role_unknown 40"):
        select_examples(store, assistant)
