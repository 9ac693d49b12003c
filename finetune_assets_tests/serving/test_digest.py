"""The week's page: head-counts of who met a candidate, cost, seconds and verdict, beside the week before."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from finetune_assets.registry.tables import now, spending, versions
from finetune_assets.registry.traffic import feedback, requests
from finetune_assets.serving import control
from finetune_assets.serving.digest import COLUMNS, digest
from finetune_assets_tests.serving.shop import Shop


def asked(shop: Shop, days_ago: float, arms: list[tuple[str, str]], seconds: list[float], usd: float | None) -> None:
    """A request of each (user, arm), with its seconds; the first is judged bad."""
    at = now() - datetime.timedelta(days=days_ago)
    rows: list[dict[str, Any]] = []
    for n, ((user, arm), took) in enumerate(zip(arms, seconds, strict=True)):
        name = f"r-{days_ago}-{n}"
        base = {"assistant": "aurora", "generation": 1, "step": "10", "rollout": "salt", "kept": False, "version": "v"}
        base |= {"request_id": name, "message_id": f"m-{name}", "user": user, "kind": "live", "created_at": at, "status": 200}
        rows.append({**base, "assigned_arm": arm, "served_arm": arm, "outcome": "ok", "seconds": took, "usd": usd})
    with shop.ledger() as book, book.engine.begin() as connection:
        connection.execute(sa.insert(requests), rows)
        said = {"feedback_id": f"f-{days_ago}", "message_id": rows[0]["message_id"], "feedback_type": "negative"}
        connection.execute(sa.insert(feedback), [said])


def test_the_week_beside_the_week_before(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    old, new = shop.version("a"), shop.version("b", verdict="do_not_serve")
    shop.roll_out(old)
    week_before = [("ana", "candidate"), ("leo", "champion")]
    this_week = [("ana", "candidate"), ("ana", "candidate"), ("eva", "candidate"), ("bob", "candidate"), ("leo", "champion")]
    asked(shop, 10, week_before, [1.0, 3.0], 0.5)
    asked(shop, 3, this_week, [1.0, 1.0, 1.0, 1.0, 6.0], 0.3)
    with shop.ledger() as book:
        bought = {"reference": "job", "assistant": "aurora", "provider": "openai", "kind": "training", "usd": 4.0, "final": True}
        unseen = requests.c.request_id == "unseen"
        with book.engine.begin() as connection:
            connection.execute(sa.insert(spending).values(**bought, created_at=now()))
            row = dict(connection.execute(sa.select(requests).limit(1)).mappings().one())
            connection.execute(sa.insert(requests).values(row | {"request_id": "unseen", "kind": "shadow", "usd": 0.25}))
            connection.execute(sa.update(requests).where(unseen).values(created_at=now()))
        control.rollback(book, "aurora", "patients complain", "ana")  # it is over: whom it met is told all the same
        with book.engine.begin() as connection:
            before = now() - datetime.timedelta(days=9)
            connection.execute(sa.update(versions).where(versions.c.version == old).values(registered_at=before))
        text, [row, other] = digest(book, ["aurora", "sol"])
    lines = text.splitlines()
    assert "- Met a candidate: 3 people (+2)" in lines
    assert "- Requests: 5 (+3) of 4 people (+2); 0 failed (+0)" in lines
    assert "- Cost of replies: $ 1.50 (the week before $ 1.00, +0.50)" in lines
    seconds = "2.00 s on average (the week before 2.00 s, +0.00 s), 95 % within 6.00 s (the week before 3.00 s, +3.00 s)"
    assert f"- Reply: {seconds}" in lines
    assert "- Negative feedback: 1 of 1 (the week before 1 of 1)" in lines
    assert f"- Verdict: {new}: do not serve (the week before {old}: serve)" in lines
    assert f"- rolled back {old}: patients complain (ana)" in lines
    assert (row["exposed"], row["exposed_before"], row["usd"], row["usd_before"]) == (3, 1, 1.5, 1.0)
    assert set(row) == {"assistant", "live", "candidate", *COLUMNS}
    assert (other["requests"], other["verdict"], other["seconds"]) == (0, None, None)
    assert "- Cost of unseen replies: $ 0.25 (the week before –)" in lines
    assert "- Training and rented replies: $ 4.00 (the week before –)" in lines
    assert lines[-1] == "- Nobody asked anything, in either week"


def test_a_cost_that_nobody_knows_is_not_made_up(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    asked(shop, 1, [("ana", "champion")], [0.25], None)
    with shop.ledger() as book:
        assert "- Cost: not known (set `budget.usd_per_hour`)" in digest(book, ["aurora"])[0]


def test_without_a_week_before_nothing_is_compared(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    asked(shop, 1, [("ana", "champion")], [0.25], 0.01)
    with shop.ledger() as book:
        text, _ = digest(book, ["aurora"])
    assert "- Met a candidate: 0 people (+0)" in text
    assert "- Cost of replies: $ 0.01 (the week before –)" in text
    assert "- Reply: 0.25 s on average (the week before –), 95 % within 0.25 s (the week before –)" in text
