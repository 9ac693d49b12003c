"""The week's page for people: what serves, what it cost, how fast it was, who met a candidate, and the week before beside it.

People are told as head-counts: 10 % of 30 users is three.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from finetune_assets.registry import Ledger, Version, spending
from finetune_assets.registry.tables import now
from finetune_assets.serving.observed import slowest, totals

WEEK = datetime.timedelta(days=7)
NUMBERS = (
    "requests",
    "users",
    "exposed",
    "failed",
    "usd",
    "shadow_usd",
    "spent_usd",
    "seconds",
    "slowest_seconds",
    "feedback",
    "negatives",
)
COLUMNS = tuple(f"{name}{suffix}" for name in ("verdict", *NUMBERS) for suffix in ("", "_before"))
"""Of a row, beside its assistant, live version and candidate: this week's, and those of the week before."""


def digest(ledger: Ledger, assistants: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """Markdown of the last seven days of all assistants beside the seven before, and the numbers as rows."""
    until = now() + datetime.timedelta(minutes=1)
    lines, rows = [f"# Week to {until:%Y-%m-%d}", ""], list[dict[str, Any]]()
    for assistant in assistants:
        row = _row(ledger, assistant, until)
        rows.append(row)
        moves = [e for e in ledger.events(assistant) if e["created_at"] >= until - WEEK and e["event"] != "verdict"]
        said = (
            f"{e['event'].replace('_', ' ')} {e['version'] or ''}".rstrip() + f": {e['reason']} ({e['actor']})" for e in moves
        )
        lines += [f"## {assistant}", "", *(f"- {text}" for text in (*_texts(row), *said)), ""]
    return "\n".join(lines), rows


def _row(ledger: Ledger, assistant: str, until: datetime.datetime) -> dict[str, Any]:
    state, versions = ledger.rollout(assistant), ledger.versions(assistant)
    row: dict[str, Any] = {"assistant": assistant, "live": state.champion or "the base model"}
    row["candidate"] = f"{state.candidate} at {state.step}, {state.status.replace('_', ' ')}" if state.is_open else None
    for suffix, end in (("", until), ("_before", until - WEEK)):
        seen = totals(ledger, assistant, end - WEEK, end)
        seen["slowest_seconds"] = slowest(ledger, assistant, end - WEEK, end)
        seen["spent_usd"] = spending.between(ledger, assistant, end - WEEK, end)
        row |= {f"{name}{suffix}": seen[name] for name in NUMBERS}
        row[f"verdict{suffix}"] = _verdict(versions, end)
    return row


def _verdict(versions: Sequence[Version], end: datetime.datetime) -> str | None:
    """Of the newest version that was benchmarked until then."""
    at = end.replace(tzinfo=datetime.UTC)
    known = [one for one in versions if one.verdict and one.registered_at and one.registered_at < at]
    return f"{known[0].version}: {(known[0].verdict or '').replace('_', ' ')}" if known else None


def _texts(row: dict[str, Any]) -> list[str]:
    verdict, before = row["verdict"] or "no version yet", row["verdict_before"]
    texts = [
        f"Live: {row['live']}" + (f"; candidate: {row['candidate']}" if row["candidate"] else ""),
        f"Verdict: {verdict}" + ("" if row["verdict"] == before else f" (the week before {before or 'none'})"),
    ]
    if not row["requests"] and not row["requests_before"]:
        return [*texts, *_costs(row), "Nobody asked anything, in either week"]
    texts += [
        f"Met a candidate: {_people(row['exposed'])}{_change(row, 'exposed')}",
        f"Requests: {row['requests']}{_change(row, 'requests')} of {_people(row['users'])}{_change(row, 'users')}; "
        f"{row['failed']} failed{_change(row, 'failed')}",
    ]
    texts += _costs(row) or ["Cost: not known (set `budget.usd_per_hour`)"]
    if row["seconds"] is not None or row["seconds_before"] is not None:
        mean = _difference(row["seconds"], row["seconds_before"], "{:.2f} s", "{:+.2f} s")
        slow = _difference(row["slowest_seconds"], row["slowest_seconds_before"], "{:.2f} s", "{:+.2f} s")
        texts.append(f"Reply: {_s(row['seconds'])} on average ({mean}), 95 % within {_s(row['slowest_seconds'])} ({slow})")
    if row["feedback"] or row["feedback_before"]:
        was = f"{row['negatives_before']} of {row['feedback_before']}"
        texts.append(f"Negative feedback: {row['negatives']} of {row['feedback']} (the week before {was})")
    return texts


def _costs(row: dict[str, Any]) -> list[str]:
    named = (("usd", "Cost of replies"), ("shadow_usd", "Cost of unseen replies"), ("spent_usd", "Training and rented replies"))
    known = [(key, name) for key, name in named if row[key] is not None or row[f"{key}_before"] is not None]
    return [
        f"{name}: {_usd(row[key])} ({_difference(row[key], row[f'{key}_before'], '$ {:.2f}', '{:+.2f}')})" for key, name in known
    ]


def _people(count: int) -> str:
    return f"{count} person" if count == 1 else f"{count} people"


def _change(row: dict[str, Any], column: str) -> str:
    return f" ({row[column] - row[f'{column}_before']:+d})"


def _difference(value: float | None, before: float | None, shown: str, changed: str) -> str:
    """The week before and what changed since; a dash where there was nothing."""
    if before is None:
        return "the week before –"
    change = "" if value is None else f", {changed.format(value - before)}"
    return f"the week before {shown.format(before)}{change}"


def _usd(value: float | None) -> str:
    return "–" if value is None else f"$ {value:.2f}"


def _s(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s"
