"""What an assistant's newest data set made of one example: kept where, or dropped by which rule and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
from rapidfuzz import fuzz

from finetune_assets.corpus.examples import ERROR_REPLIES
from finetune_assets.corpus.near_duplicates import normalise
from finetune_assets.corpus.personal_data import find
from finetune_assets.dataset.formats import FILES
from finetune_assets.dataset.manifest import latest, read_manifest
from finetune_assets.dataset.reading import window
from finetune_assets.storage import Store

LONGEST = 240  # characters of a text that is shown
Facts = dict[str, Any]


def fate(store: Store, assistant: str, example: Facts, judged: list[Facts]) -> Facts:
    """What an assistant's newest data set made of an example: kept where, or dropped why.

    `state`: kept, dropped, not_selected, not_read (the data set is older than the week), no_data_set.
    """
    folder = latest(store, assistant)
    if folder is None:
        return {"assistant": assistant, "state": "no_data_set", "why": f"{assistant} has no data set; run its jsonl_splits."}
    manifest = read_manifest(folder)
    own = str(example["message_id"])
    base: Facts = {"assistant": assistant, "fingerprint": folder.name, **_pairs(folder, own)}
    lineage = pl.read_parquet(folder / "lineage.parquet").filter(pl.col("message_id") == own)
    varied = lineage.filter(pl.col("source") == "synthetic").height
    lineage = lineage.filter(pl.col("source") != "synthetic")  # those carry the id of the message that they vary
    if varied:
        base["varied"] = varied
    if lineage.height:
        row = lineage.row(0, named=True)
        place = f"{row['split']}.jsonl:{row['line'] + 1}"
        return {**base, "state": "kept", **_kept(row), "place": place, "why": f"{place}, as {_source(row, example, judged)}"}
    dropped = pl.read_parquet(folder / "dropped.parquet").filter(pl.col("message_id") == own)
    if dropped.height:
        row = dropped.row(0, named=True)
        return {
            **base,
            "state": "dropped",
            **row,
            **_why(store, row, example, judged, manifest["settings"]),
            **_better(folder, row),
        }
    select = {name: value for name, value in manifest["settings"]["select"].items() if value}
    if any(example["tenant_id" if name == "tenant" else name] != value for name, value in select.items()):
        wanted = ", ".join(f"{name}: {value}" for name, value in select.items())
        return {**base, "state": "not_selected", "why": f"{assistant} selects {{{wanted}}}, this is of {example['tenant_id']}."}
    if older := _before_window(manifest, example):
        return {**base, "state": "not_read", "why": older}
    made = str(manifest["created_at"])[:16]
    return {**base, "state": "not_read", "why": f"The data set of {made} did not read this message's week; make it again."}


def _before_window(manifest: Facts, example: Facts) -> str | None:
    number, weeks, said = manifest["settings"]["window_weeks"], list(manifest["weeks"]), example["started_at"].date()
    week = str(said - timedelta(days=said.weekday()))
    if week in window(sorted({*weeks, week}), number):
        return None
    return f"Its week, {week}, is older than window_weeks: {number}, whose first week is {weeks[0]}."


def _better(folder: Path, row: Facts) -> Facts:
    """Where the twin that was kept stands, and as what; nothing where no twin was."""
    if row["kept_message_id"] is None:
        return {}
    lineage = pl.read_parquet(folder / "lineage.parquet", columns=["split", "line", "source", "message_id"])
    twin = lineage.filter((pl.col("message_id") == row["kept_message_id"]) & (pl.col("source") != "synthetic"))
    places = [f"{split}.jsonl:{line + 1}, {source}" for split, line, source, _ in twin.rows()]
    return {"kept_place": places[0]} if places else {}


def _kept(row: Facts) -> Facts:
    return {name: row[name] for name in ("split", "line", "source", "replaced")}


def _source(row: Facts, example: Facts, judged: list[Facts]) -> str:
    score = example["satisfaction_score"]
    rated = "without a satisfaction_score" if score is None else f"with satisfaction_score {score}"
    told = {
        "corrected": "a correction: the target is the expected_response of the feedback",
        "positive": "a praised reply",
        "imported": "a row of a file (`finetune import`)",
        "satisfied": f"a reply of a conversation {rated}",
    }.get(row["source"], f"a row of source {row['source']}")
    ids = ", ".join(one["feedback_id"] for one in judged if row["source"] in ("corrected", "positive"))
    twins = f"; it stands for {len(row['replaced'])} twin(s)" if row["replaced"] else ""
    return f"{told}{f' ({ids})' if ids else ''}{twins}"


def _pairs(folder: Path, message_id: str) -> Facts:
    """Where preference pairs and labels of this message stand."""
    found: dict[str, list[str]] = {}
    for spec in FILES:
        if spec.kind == "examples":
            continue
        rows = pl.read_parquet(folder / spec.lineage).filter(
            (pl.col("message_id") == message_id) & pl.col("split").is_in(spec.splits)
        )
        found.setdefault(spec.kind, []).extend(f"{spec.name}:{line + 1}" for line in rows["line"])
    return {kind: places for kind, places in found.items() if places}


def _why(store: Store, row: Facts, example: Facts, judged: list[Facts], settings: Facts) -> Facts:
    """The rule in words, with the values that decided; for a twin the one that was kept."""
    filters: Facts = settings["filters"]
    expected = next((one["expected_response"] for one in reversed(judged) if one["expected_response"]), None)
    reply = str(expected or example["reply"])
    sizes = {"reply": (len(reply), filters["reply_chars"]), "user": (example["user_chars"], filters["user_chars"])}
    reason = str(row["reason"])
    target, _, side = reason.partition("_too_")
    if side and target in sizes:
        chars, bounds = sizes[target]
        return {"why": f"the {target}'s text has {chars} characters, filters.{target}_chars allows {bounds[0]} to {bounds[1]}"}
    if reason in ("same_as_negative", "exact_duplicate", "near_duplicate", "semantic_duplicate"):
        return _twin(store, reason, row, example, reply, filters)
    bad = ", ".join(f"{one['feedback_id']} on {one['at'][:10]}" for one in judged if one["feedback_type"] == "negative")
    score = example["satisfaction_score"]
    asked = filters["require"].get(example["intent"])
    told = {
        "tenant_excluded": f"tenant {example['tenant_id']} is in filters.exclude_tenants",
        "no_consent": "the conversation's training_consent is false",
        "simulated": "`finetune simulate` made the conversation up",
        "negative_feedback": f"rated negative ({bad}) and not corrected: never a target",
        "not_satisfied": f"satisfaction_score is {'missing' if score is None else score}, filters.min_satisfaction is "
        f"{filters['min_satisfaction']}, and nobody praised or corrected it",
        "rejected_in_review": "a reviewer of training examples refused this text (`finetune rating`)",
        "reply_empty": "the reply has no visible character",
        "error_reply": f"the reply says {_first_match(reply, [p for ps in ERROR_REPLIES.values() for p in ps])!r}, one of "
        "the error replies; filters.exclude replaces their list",
        "excluded_pattern": f"the reply says {_first_match(reply, filters['exclude'] or [])!r}, which filters.exclude forbids",
        "required_pattern_missing": f"intent {example['intent']} asks for {asked!r} (filters.require), neither turn has it",
        "user_in_test": "split.mode is time, and its user also stands in the test set",
        "personal_data_residual": f"a recogniser still finds {', '.join(sorted({f.kind for f in _left(example, reply)}))}",
        "intent_cap": f"intent {example['intent']} has more training rows than balance.max_per_intent",
        "tenant_cap": f"tenant {example['tenant_id']} has more training rows than balance.max_per_tenant",
        "negative_share": "more requests to decline or hand over than balance.negative_share",
    }
    return {"why": told.get(reason, f"rule {reason}; docs/data.md lists the rules")}


def _left(example: Facts, reply: str) -> list[Any]:
    return [f for text in (*(turn["content"] for turn in example["context"]), reply) for f in find(str(text))]


def _first_match(text: str, patterns: list[str]) -> str | None:
    matches = (re.search(pattern, text, re.IGNORECASE) for pattern in patterns)
    return next((m[0] for m in matches if m), None)


def _twin(store: Store, reason: str, row: Facts, example: Facts, reply: str, filters: Facts) -> Facts:
    other = next((one for _, one in rows_of(store, "examples", "message_id", [row["kept_message_id"]])), None)
    if other is None:
        return {"why": f"the same, or nearly, as {row['kept_message_id'] or 'a message that was erased since'}"}
    judged = judgements(store, str(other["message_id"]))
    expected = next((one["expected_response"] for one in reversed(judged) if one["expected_response"]), None)
    theirs = str(other["reply"] if reason == "same_as_negative" else expected or other["reply"])
    mine, twin = normalise(
        pl.Series([f"{example['user_text']}\n{reply}", f"{other['user_text']}\n{theirs}"], dtype=pl.String)
    ).to_list()
    alike = round(fuzz.ratio(mine, twin) / 100, 3)
    told = {"kept_text": clip(f"{other['user_text']} → {theirs}")}
    if reason == "semantic_duplicate":
        bound = filters["semantic_duplicate"]
        why = f"a better twin of the same meaning was kept: {row['kept_message_id']}, filters.semantic_duplicate is {bound:g}"
        return {"why": f"{why}; their letters alone are {alike:g} alike", **told}
    said = "the same as one that was rated badly" if reason == "same_as_negative" else "a better twin was kept"
    why = f"{said}: {row['kept_message_id']}, similarity {alike:g}, filters.near_duplicate is {filters['near_duplicate']:g}"
    return {"why": why, "similarity": alike, **told}


# --- rows of the corpus


def part_files(store: Store, table: str) -> list[Path]:
    """The files of a corpus table, by week."""
    return [path for week in store.weeks(table) for path in sorted(store.corpus(table, week).glob("*.parquet"))]


def rows_of(store: Store, table: str, column: str, ids: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Week and row of each row of a corpus table with one of the ids."""
    for path in part_files(store, table):
        if column not in pl.read_parquet_schema(path):
            continue
        hits = pl.read_parquet(path, columns=[column])[column].is_in(ids).fill_null(False)
        if hits.any():
            for row in pl.read_parquet(path).filter(hits).iter_rows(named=True):
                yield path.parent.name.removeprefix("week="), row


def judgements(store: Store, message_id: str) -> list[Facts]:
    """The feedback on a message, by week."""
    names = ("feedback_id", "feedback_type", "rating", "expected_response")
    rows = list(rows_of(store, "feedback", "message_id", [message_id]))
    return [{"week": week, "at": str(row["created_at"]), **{name: row[name] for name in names}} for week, row in rows]


def clip(text: str) -> str:
    """A text as it is shown."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
