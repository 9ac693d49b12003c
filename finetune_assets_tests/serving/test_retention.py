"""What is older than an assistant keeps it goes, as a whole, and nothing else does; without a stated limit nothing goes. So does
what the router stored of a person to be forgotten, whether the corpus has read it or not."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from rich.console import Console

from finetune_assets import erasure
from finetune_assets.cli.data import _erase  # pyright: ignore[reportPrivateUsage]
from finetune_assets.corpus.personal_data import pseudonym
from finetune_assets.environment import ROOT
from finetune_assets.registry.tables import now
from finetune_assets.registry.traffic import ROUTER_TABLES, requests
from finetune_assets.serving import control, retention
from finetune_assets.serving.retention import expire, stated
from finetune_assets.serving.writer import store
from finetune_assets.storage import Store
from finetune_assets_tests.serving.shop import TENANTS, Shop

NAMES = ("conversations", "messages", "ai_rlhf_feedback", "requests", "shadow_replies")


@pytest.fixture(params=["sqlite", "postgres"])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Shop:
    url = None if request.param == "sqlite" else str(request.getfixturevalue("postgres"))
    return Shop(tmp_path, database=url)


def request(name: str, days_ago: float, conversation: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """A row of `requests`."""
    then = (now() - datetime.timedelta(days=days_ago)).replace(tzinfo=datetime.UTC).isoformat()
    base = {"assistant": "aurora", "user": conversation, "generation": 1, "step": "idle", "status": 200, "kept": False}
    base |= {"outcome": "ok", "version": "v", "assigned_arm": "champion", "served_arm": "champion", "created_at": then}
    return "requests", {**base, "request_id": name, "kind": "live", "conversation_id": conversation, **more}


def chat(
    shop: Shop, name: str, days_ago: float, rollout: str | None = None, assistant: str = "aurora", judged: float = 0
) -> None:
    """A conversation of one turn with its request, the shadow's, and feedback given `judged` days after it."""
    at = now() - datetime.timedelta(days=days_ago)
    then, late = (one.replace(tzinfo=datetime.UTC).isoformat() for one in (at, at + datetime.timedelta(days=judged)))
    more = {"assistant": assistant, "rollout": rollout}
    said = {"conversation_id": name, "intent": None, "created_at": then}
    feedback = {"feedback_id": f"f-{name}", "conversation_id": name, "message_id": f"m-{name}", "feedback_type": "negative"}
    shadow = {"assistant": assistant, "live_message_id": f"m-{name}", "version": "w", "content": "Hola", "created_at": then}
    rows: list[tuple[str, dict[str, Any]]] = [
        ("conversations", {"conversation_id": name, "tenant_id": "t", "user_id": name, "started_at": then}),
        ("messages", {**said, "message_id": f"u-{name}", "role": "user", "content": "¿Hay hora?"}),
        ("messages", {**said, "message_id": f"m-{name}", "role": "assistant", "content": "Sí."}),
        ("ai_rlhf_feedback", {**feedback, "created_at": late}),
        request(f"r-{name}", days_ago, name, message_id=f"m-{name}", **more),
        request(f"s-{name}", days_ago, name, message_id=f"x-{name}", kind="shadow", **more),
        ("shadow_replies", {**shadow, "request_id": f"s-{name}"}),
    ]
    with shop.ledger() as book:
        store(book.engine, rows)


def left(shop: Shop, table: str = "conversations") -> set[str]:
    key = next(iter(ROUTER_TABLES[table].primary_key.columns))
    with shop.ledger() as book, book.engine.connect() as connection:
        return set(connection.execute(sa.select(key)).scalars())


def expired(shop: Shop, days: int = 30, *, apply: bool = True) -> dict[str, int]:
    with shop.ledger() as book:
        return expire(book, "aurora", days, apply=apply)


def test_old_conversations_go_whole_and_young_ones_stay(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "BATCH", 2)
    for n in range(5):
        chat(shop, f"old{n}", 31)
    chat(shop, "young", 29)
    chat(shop, "judged-lately", 60, judged=59)
    chat(shop, "of-another", 90, assistant="sol")
    with shop.ledger() as book:  # the platform's own, which no request names
        at = (now() - datetime.timedelta(days=400)).replace(tzinfo=datetime.UTC).isoformat()
        message = {"message_id": "m-p", "conversation_id": "platform", "role": "user", "content": "Hola", "created_at": at}
        store(book.engine, [("conversations", {"conversation_id": "platform", "started_at": at}), ("messages", message)])
    asked = expired(shop, apply=False)
    assert len(left(shop)) == 9  # nothing was removed
    gone = expired(shop)
    assert gone == dict(zip(NAMES, (5, 10, 5, 10, 5), strict=True))
    assert asked == gone
    assert left(shop) == {"young", "judged-lately", "of-another", "platform"}
    assert left(shop, "messages") == {"m-p"} | {f"{a}-{b}" for a in "um" for b in ("young", "judged-lately", "of-another")}
    assert left(shop, "requests") == {f"{a}-{b}" for a in "rs" for b in ("young", "judged-lately", "of-another")}
    assert left(shop, "shadow_replies") == {"s-young", "s-judged-lately", "s-of-another"}
    assert set(expired(shop).values()) == {0}


def test_what_no_model_took_goes_by_its_own_age_and_within_a_conversation_with_it(shop: Shop) -> None:
    chat(shop, "talked", 31)
    chat(shop, "quiet", 31)
    refused = {"outcome": "refused", "status": 400}
    rows = [request("alone", 31, "c1", **refused), request("late", 29, "c2", **refused), request("failed", 31, "c3", status=502)]
    rows += [request("within", 31, "quiet", **refused), request("again", 29, "talked", **refused)]
    with shop.ledger() as book:
        store(book.engine, rows)
    assert expired(shop)["requests"] == 5
    assert left(shop) == {"talked"}  # somebody was in it lately, though nobody could answer
    assert left(shop, "requests") == {"late", "again", "r-talked", "s-talked"}


def test_what_an_open_rollout_is_judged_by_stays_until_its_end(shop: Shop) -> None:
    shop.roll_out(shop.version("a"), "10")
    with shop.ledger() as book:
        salt = book.rollout("aurora").salt
    chat(shop, "evidence", 90, rollout=salt)
    chat(shop, "before", 90, rollout="aurora:earlier:1")
    assert expired(shop)["conversations"] == 1
    assert left(shop) == {"evidence"}
    assert left(shop, "requests") == {"r-evidence", "s-evidence"}
    with shop.ledger() as book:
        control.rollback(book, "aurora", "enough", "ana")
    assert expired(shop)["requests"] == 2
    assert left(shop) == left(shop, "requests") == set()


def test_a_killed_removal_is_gone_on_with(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        chat(shop, f"old{n}", 31)
    take, calls = retention._take, 0

    def killed(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return take(*arguments)

    monkeypatch.setattr(retention, "_take", killed)
    with pytest.raises(KeyboardInterrupt):
        expired(shop)
    monkeypatch.setattr(retention, "_take", take)
    expired(shop)
    assert [left(shop, name) for name in NAMES] == [set()] * 5


def finetune(shop: Shop, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finetune_assets.cli", "retention", *arguments]
    return subprocess.run(command, cwd=ROOT, env=shop.environment, capture_output=True, text=True, check=False)


def test_the_command_needs_a_limit_that_somebody_stated(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    chat(shop, "old", 40)
    for arguments, why in (
        (("--yes",), "No assistant states a limit"),
        (("--assistant", "aurora", "--yes"), "aurora states no limit"),
    ):
        refused = finetune(shop, *arguments)
        assert (refused.returncode, why in refused.stderr) == (2, True)
    assert finetune(shop, "--days", "3", "--yes").returncode == 2
    assert left(shop) == {"old"}
    shop.settings("")
    file = shop.assistants / "aurora.yaml"
    file.write_text(file.read_text().replace("serving: {", "serving: {keep_days: 30, "))
    with shop.ledger() as book:
        assert stated(book, shop.assistants, TENANTS) == {"aurora": 30}
    shown = finetune(shop, "--dry-run")
    assert "aurora, older than 30 days: 1 conversations, 2 messages" in shown.stderr
    assert left(shop) == {"old"}
    done = finetune(shop, "--yes", "--json")
    assert json.loads(done.stdout)["assistants"][0]["rows"]["messages"] == 2
    assert left(shop) == set()
    with shop.ledger() as book, book.engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(requests)).scalar() == 0


def test_an_erasure_takes_chats_that_only_the_router_knows(shop: Shop) -> None:
    """Under a raw id and a pseudonym, with texts, judgements and what a shadow said; also what it set aside, and what erasures
    left that did not know these chats."""
    key = b"k" * 32
    for name in ("eva", "luis"):
        chat(shop, name, days_ago=1)
    values: dict[str, Any] = {"conversation_id": "eva-2", "role": "user", "content": "¿Hay hora?", "intent": None}
    values |= {"message_id": "u-eva-2", "created_at": now().replace(tzinfo=datetime.UTC).isoformat()}
    with shop.ledger() as book:  # `serving.users: pseudonym`, and a conversation that an earlier erasure took alone
        store(book.engine, [request("r-eva-2", 1, "eva-2", user=pseudonym("eva", key)), ("messages", values)])
        left_before = {"message_id": "m-chatcmpl-1", "conversation_id": "gone", "created_at": values["created_at"]}
        shadow = {"live_message_id": "m-chatcmpl-1", "assistant": "aurora", "version": "v", "created_at": values["created_at"]}
        store(book.engine, [("messages", left_before), ("shadow_replies", {**shadow, "request_id": "s-gone"})])
        store(book.engine, [("messages", {**left_before, "message_id": "platform's"})])
    aside, segment = shop.home / "serving/journal/refused/1.jsonl", shop.home / "serving/journal/2.jsonl"
    aside.parent.mkdir(parents=True)
    others = ({**values, "conversation_id": name, "message_id": f"u-{name}"} for name in ("eva-2", "eva-21", "luis"))
    lines = [json.dumps(["messages", one]) for one in others]
    for file in (aside, segment):  # the second may be one that a router writes to
        file.write_text("\n".join(lines) + "\n")
    with shop.ledger() as book:
        where = Store(shop.home), book
        plan = erasure.look(*where, erasure.subject_of("eva", None, key), key)
        assert plan.ledger_rows == {"ai_rlhf_feedback": 1, "conversations": 1, "messages": 3, "requests": 3, "shadow_replies": 1}
        assert len(plan.traces.conversations) == 2
        assert erasure.erase(*where, plan, key, lambda _: 0)["state"] == "erased"
    assert {table: left(shop, table) for table in NAMES} == {
        "conversations": {"luis"},
        "messages": {"u-luis", "m-luis", "platform's"},
        "ai_rlhf_feedback": {"f-luis"},
        "requests": {"r-luis", "s-luis"},
        "shadow_replies": {"s-luis"},
    }
    assert aside.read_text().splitlines() == lines[1:]
    assert segment.read_text().splitlines() == lines


def test_the_erase_command_reads_what_a_stopped_router_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Shop(tmp_path)
    for name in ("FINETUNE_HOME", "FINETUNE_DATABASE_URL"):
        monkeypatch.setenv(name, shop.environment[name])
    monkeypatch.setenv("DAGSTER_HOME", str(shop.home))
    journal = shop.home / "serving/journal"
    journal.mkdir(parents=True)
    said = {"message_id": "u1", "conversation_id": "t/c1", "role": "user", "content": "¿Hay hora?", "intent": None}
    (journal / "1.jsonl").write_text(json.dumps(["messages", {**said, "created_at": now().isoformat() + "+00:00"}]) + "\n")
    outcome = _erase(Console(quiet=True), (None, "c1"), dry_run=False, limit=50, yes=True)
    assert outcome["ledger_rows"] == {"messages": 1}
    assert list(journal.glob("*.jsonl")) == []
    assert left(shop, "messages") == set()
