"""From corpus to frozen data set: `choose` decides, `freeze` writes the files. Between them the choice is staged (`staging`).

    choice = choose(store, assistant)            raises NothingSelected, TooFewExamples
    manifest = freeze(store, assistant, choice)  <home>/datasets/<assistant>/<fingerprint>/, and `latest`; raises LeakError

Splits are assigned before twins are removed, so that a row's split never depends on other rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import polars as pl

from finetune_assets.assistants.settings import Assistant
from finetune_assets.assistants.settings.data import Filters
from finetune_assets.corpus.schema import EXAMPLES
from finetune_assets.corpus.spool import compact
from finetune_assets.dataset import manifest as manifests
from finetune_assets.dataset.augment import augment, parents_of, variations_of
from finetune_assets.dataset.balance import even_out, negatives_note
from finetune_assets.dataset.coverage import coverage, drift, sample, vocabulary_notes
from finetune_assets.dataset.duplicates import Contexts, Whole, blocking_negatives, remove_twins, replaced_by, with_text
from finetune_assets.dataset.formats import write_files
from finetune_assets.dataset.leaks import examine
from finetune_assets.dataset.lines import LayoutNote, Sorted, lines_made, lines_of
from finetune_assets.dataset.manifest import Manifest, counts, data_settings, tally
from finetune_assets.dataset.preferences import Pairs, label_counts, make_pairs
from finetune_assets.dataset.ratings import REJECTED, Ratings, mark_rejected
from finetune_assets.dataset.reading import Selected, read_more, select_examples
from finetune_assets.dataset.selection import (
    SOURCES,
    Judged,
    Left,
    judge,
    mark_personal,
    read_feedback,
    tenants_of,
    verdicts,
)
from finetune_assets.dataset.semantic import Embed, drop_same_meaning
from finetune_assets.dataset.splits import SPLITS, assign, testers
from finetune_assets.dataset.sufficiency import check_enough, check_objectives, warnings
from finetune_assets.dataset.views import dropped_rows, outcomes_by_week, some_dropped, twin_rows
from finetune_assets.dataset.wording import check_permission
from finetune_assets.environment import Environment
from finetune_assets.errors import DataError, LeakError
from finetune_assets.storage import Store, point, replacing_folder, write_json, write_parquet

REASONS: tuple[str, ...] = (
    *("tenant_excluded", "no_consent", "simulated", "negative_feedback", "not_satisfied", "reply_empty", "reply_too_long"),
    *("user_too_short", "user_too_long", "reply_too_short", "error_reply", "excluded_pattern", "required_pattern_missing"),
    *("rejected_in_review", "user_in_test"),
    *("personal_data_residual", "same_as_negative", "exact_duplicate", "near_duplicate", "semantic_duplicate"),
    *("intent_cap", "tenant_cap", "negative_share"),
)
"""Why an example is dropped, in the order in which it is decided."""
NOTED = (
    *("weeks", "read", "counts", "rejected", "feedback", "pairs", "negatives", "augmented", "vocabulary", "coverage", "warnings"),
)
"""Notes of a choice that its manifest keeps."""
_ROW = (
    "split",
    "source",
    "message_id",
    "conversation_id",
    "tenant_id",
    "vertical",
    "intent",
    "user",
    "satisfaction_score",
    "started_at",
    "created_at",
)


SPOOL_SHARE = 0.1  # of the memory setting, for lines held before they are written
_LABELS = {
    "source": pl.Enum(SOURCES),
    "split": pl.Enum(SPLITS),
    "verdict": pl.Enum(["positive", "negative"]),
    "reason": pl.Enum(REASONS),
    "intent": pl.Categorical(),
}
"""Columns of few values, of which numbers are held: a text takes 16 bytes a row."""
_OUT = ("place", "reason", "intent", "started_at")
_HELD = (*_OUT, "message_id", "created_at", "verdict", "expected", "source", "split", "text", "judged")
"""Columns that are held of all examples that may be kept; the others are read again for those that are."""
_KEPT = ("conversation_id", "tenant_id", "vertical", "user", "satisfaction_score", "text_key", "user_text", "reply")
_VARIED = ("user_chars", "error_reply")  # what the rules ask of a variation beside its texts


@dataclass(frozen=True)
class Choice:
    """What an assistant trains on, and what not and why; everything that `freeze` needs.

    `kept`, `preferences` and `kto` have one row a line to be, with the columns of the lineage, context and texts; the contexts
    of `kept`, longer than all else together, are not held but asked for (`contexts`, by `place`). `notes` is JSON: weeks, read,
    counts, rejected, funnel, feedback, pairs, warnings.
    """

    kept: pl.DataFrame
    dropped: pl.DataFrame
    preferences: pl.DataFrame
    kto: pl.DataFrame
    feedback_seen: pl.DataFrame
    notes: dict[str, Any]
    contexts: Contexts


def choose(
    store: Store,
    assistant: Assistant,
    embed: Embed | None = None,
    ratings: Ratings | None = None,
    forbidding: Collection[str] = (),
) -> Choice:
    """Decides for each example of the assistant's weeks; every one of them is in `kept` or `dropped`.

    `ratings`: what people said on the rating page (none: nothing). `embed` is used where the setting
    `filters.semantic_duplicate` asks for it. `forbidding`: tenants, this assistant's or not, that let nothing leave this machine.
    Raises NothingSelected where none is the assistant's, TooFewExamples where too few are left, SettingsError where `augment.llm`
    is forbidden.
    """
    filters = assistant.filters
    selected = select_examples(store, assistant)
    check_permission(assistant, (selected.tenants & set(forbidding)) - set(filters.exclude_tenants))
    contexts = partial(selected.contexts, turns=filters.context_turns, chars=filters.context_chars)
    tenants = sorted({*tenants_of(store, assistant), *selected.tenants} - set(filters.exclude_tenants))
    feedback = read_feedback(store)
    judged, rated = judge(selected.named(feedback["message_id"]), feedback, tenants), ratings or Ratings()
    left = Left.of(store)
    frame, seen = _decided(selected, assistant, judged, rated, contexts, left)
    frame = _without_twins(frame, seen.negatives, filters, embed, selected.whole, contexts)
    frame = even_out(frame, assistant.balance, selected.whole)
    outcomes, told = _accounted(frame, seen, selected.whole)
    gone = frame.filter(pl.col("reason").is_not_null()).select("place", "reason", "kept_message_id")
    some = selected.whole(_spelled(frame.filter("judged")))
    kept = _spelled(frame.filter(pl.col("reason").is_null()).drop("reason", "verdict", "judged", "kept_message_id"))
    del frame
    kept = selected.whole(kept, (*_KEPT, *_VARIED)).drop("expected")
    check_enough(assistant, outcomes.height, kept, told["rejected"])
    some, parents = _with_contexts([some, parents_of(kept, assistant)], contexts)
    pairs = make_pairs(some, kept, filters.near_duplicate, left, rated)
    made = _counted(pairs)
    check_objectives(assistant.name, assistant.objective, made, assistant.minimum)
    hidden = (pairs.hidden, seen.negatives["text"])
    synthetic, augmented = augment(kept, parents, hidden, assistant, variations_of(store, assistant), left)
    synthetic = synthetic.with_columns(place=(selected.starts[-1] + pl.int_range(pl.len())).cast(pl.UInt32))
    said, columns = synthetic.select("place", "context"), (*_ROW, "text_key", "replaced", "user_text", "reply", "place")
    kept = kept.select(columns)
    whole = pl.concat([kept, synthetic.select(columns)])
    notes: dict[str, Any] = {
        **told,
        "weeks": selected.weeks,
        "counts": counts(whole),
        "funnel": _funnel(outcomes.height, told["rejected"], synthetic.height),
        "feedback": {"read": judged.read, "ignored": judged.ignored, "conflicts": judged.conflicts},
        "pairs": made,
        "negatives": negatives_note(kept, assistant.balance),
        "augmented": augmented,
        "vocabulary": vocabulary_notes(whole),
        "coverage": coverage(outcomes["intent"], seen.live, whole),
    }
    notes["warnings"] = warnings(assistant, kept, notes, len(selected.outdated))
    return Choice(
        kept=whole,
        dropped=_dropped(seen.out, gone, selected),
        preferences=pairs.preferences.select(*_ROW, "replaced", "context", "chosen", "rejected"),
        kto=pairs.kto.select(*_ROW, "replaced", "context", "completion", "label"),
        feedback_seen=feedback.filter(pl.col("tenant_id").is_in(tenants)).select("feedback_id"),
        notes=notes,
        contexts=lambda rows: chain(contexts(rows), [rows.join(said, on="place", how="inner", maintain_order="left")]),
    )


@dataclass(frozen=True)
class _Seen:
    """What stays of examples that no later step needs: why they are `out`, a `few` of each reason, a sample of all (`live`); and
    the texts of `negatives`, which no reply may repeat."""

    out: pl.DataFrame
    few: pl.DataFrame
    live: pl.DataFrame
    negatives: pl.DataFrame


def _decided(
    selected: Selected, assistant: Assistant, judged: Judged, rated: Ratings, contexts: Contexts, left: Left
) -> tuple[pl.DataFrame, _Seen]:
    """The examples that are kept so far or that somebody judged (`_HELD`, in order of place); and all others."""
    parts, out, few, live, negatives = (list[pl.DataFrame]() for _ in range(5))

    def decided() -> Iterable[pl.DataFrame]:
        return (mark_rejected(verdicts(part, judged, assistant.filters), rated) for part in selected.parts())

    tested = pl.concat([testers(part, assistant.split) for part in decided()]) if assistant.split.mode == "time" else None
    for part in decided():
        frame = assign(part, assistant.split, tested).with_columns(judged=_is_judged(rated))
        used = frame.select(pl.col("reason").is_null() | pl.col("judged")).to_series()
        own, rest = frame.filter(used), frame.filter(~used)
        own = with_text(mark_personal(own, contexts(own.filter(pl.col("reason").is_null())), left), "reply")
        negatives.append(compact(blocking_negatives(own)))
        parts.append(_labelled(compact(own.select(_HELD))))
        out.append(_labelled(rest.select(_OUT)))
        few.append(compact(some_dropped(rest).select("reason", "user_text", "reply", "message_id")))
        live = [compact(sample(pl.concat([*live, frame.select("text_key", "user_text", "reply")])))]
    return pl.concat(parts), _Seen(pl.concat(out), pl.concat(few), live[0], pl.concat(negatives))


def _labelled(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.with_columns(pl.col(name).cast(dtype) for name, dtype in _LABELS.items() if name in rows.columns)


def _spelled(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.with_columns(pl.col(name).cast(pl.String) for name in _LABELS if name in rows.columns)


def _accounted(frame: pl.DataFrame, seen: _Seen, whole: Whole) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Every example's `_OUT`, null reasons for kept ones; and what the notes say of them."""
    few = whole(some_dropped(frame)).select(pl.col("reason").cast(pl.String), *seen.few.columns[1:])
    outcomes = pl.concat([seen.out, frame.select(_OUT)])
    return outcomes, {
        "read": outcomes.height,
        "rejected": tally(outcomes["reason"].drop_nulls()),
        "twins": twin_rows(frame, whole),
        "outcomes": outcomes_by_week(outcomes),
        "dropped_sample": dropped_rows(pl.concat([seen.few, few])),
    }


def _dropped(out: pl.DataFrame, gone: pl.DataFrame, selected: Selected) -> pl.DataFrame:
    """message_id, reason and kept_message_id of both, in order of the ids, which are read again."""
    rows = pl.concat([out.select("place", "reason"), gone.select("place", "reason")]).sort("place")
    none = rows.clear().with_columns(message_id=pl.lit(None, pl.String))
    parts = (compact(part) for part in read_more(selected.files, selected.starts, rows, ("message_id",)))
    named = pl.concat([none, *parts]).join(gone.select("place", "kept_message_id"), on="place", how="left")
    return named.select("message_id", pl.col("reason").cast(pl.String), "kept_message_id").sort("message_id")


def _counted(pairs: Pairs) -> dict[str, Any]:
    """What the manifest says of the rows for `dpo` and `kto`."""
    return {
        "preferences": tally(pairs.preferences["split"]),
        "kto": tally(pairs.kto["split"]),
        "kto_labels": label_counts(pairs.kto),
        "left_out": pairs.left_out,
    }


def _is_judged(rated: Ratings) -> pl.Expr:
    """Rows of which somebody said something: preferences and KTO are made of them, kept or not."""
    judged = pl.col("verdict").is_not_null() | pl.col("expected").is_not_null() | (pl.col("reason") == REJECTED).fill_null(False)
    return judged | pl.col("message_id").is_in(rated.pairs["message_id"].unique().implode())


def _with_contexts(frames: list[pl.DataFrame], contexts: Contexts) -> list[pl.DataFrame]:
    """The rows of each frame, in their order, with their `context`, which is read once for all of them."""
    places = pl.concat([rows.select("place") for rows in frames]).unique()
    none = places.clear().with_columns(context=pl.lit(None, EXAMPLES["context"]))
    known = pl.concat([none, *(compact(part.select("place", "context")) for part in contexts(places))])
    return [rows.join(known, on="place", how="left", maintain_order="left") for rows in frames]


def _without_twins(
    frame: pl.DataFrame, negatives: pl.DataFrame, filters: Filters, embed: Embed | None, whole: Whole, contexts: Contexts
) -> pl.DataFrame:
    """Adds `kept_message_id` and `replaced`, and the reasons of twins."""
    columns = ("place", "message_id", "created_at", "expected", "source", "split", "text")
    candidates = frame.filter(pl.col("reason").is_null()).select(columns)
    decided = remove_twins(candidates, negatives, filters.near_duplicate, whole, contexts)
    if filters.semantic_duplicate is not None:
        if embed is None:
            raise DataError("`filters.semantic_duplicate` is set: `choose` needs `embed`, which makes vectors of texts.")
        said = whole(decided.select("place", "expected")).select("place", "user_text", "reply")
        decided = decided.join(said, on="place", how="left", maintain_order="left")
        decided = drop_same_meaning(decided, embed, filters.semantic_duplicate)
    replaced = replaced_by(decided)
    decided = decided.select("place", "kept_message_id", twin=pl.col("reason").cast(_LABELS["reason"]))
    none = pl.lit([], pl.List(pl.String))
    return (
        frame.join(decided, on="place", how="left", maintain_order="left")
        .join(replaced, on="message_id", how="left", maintain_order="left")
        .with_columns(reason=pl.coalesce("reason", "twin"), replaced=pl.col("replaced").fill_null(none))
        .drop("twin")
    )


def _funnel(read: int, rejected: dict[str, int], synthetic: int) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [{"step": "read", "dropped": 0, "left": read}]
    for reason in REASONS:
        if n := rejected.get(reason, 0):
            steps.append({"step": reason, "dropped": n, "left": steps[-1]["left"] - n})
    if synthetic:
        steps.append({"step": "synthetic added", "dropped": -synthetic, "left": steps[-1]["left"] + synthetic})
    return steps


# --- frozen


def freeze(store: Store, assistant: Assistant, choice: Choice) -> Manifest:
    """Writes the frozen folder and moves `latest` to it; one of equal fingerprint stays as it is. Returns its manifest.

    Raises LeakError before anything is moved if the written files prove that two splits share something.
    """
    system = assistant.system_prompt.strip()
    lines, note = Sorted(int(Environment.read().memory * SPOOL_SHARE)), LayoutNote(system)
    for rows in choice.contexts(choice.kept):
        lines.add(lines_made("examples", rows, system, assistant.rows, assistant.tools))
        note.add(rows)
    others = {
        "preferences": lines_of("preferences", choice.preferences, system, tools=assistant.tools),
        "kto": lines_of("kto", choice.kto, system, tools=assistant.tools),
    }
    mark = manifests.fingerprint(data_settings(assistant), {"examples": lines.marks, **others})
    folder = store.dataset(assistant.name, mark)
    if not (folder / "manifest.json").exists():
        frames = {"examples": lines, **{kind: [rows] for kind, rows in others.items()}}
        _write(store, assistant, choice, frames, {"fingerprint": mark, "layout": note.told()})
    manifests.write_seen(store, assistant.name, mark, choice.feedback_seen["feedback_id"])
    point(store.datasets(assistant.name) / "latest", mark)
    return manifests.read_manifest(folder)


def _write(
    store: Store, assistant: Assistant, choice: Choice, frames: Mapping[str, Iterable[pl.DataFrame]], known: dict[str, Any]
) -> None:
    before = manifests.latest(store, assistant.name)
    threshold = assistant.filters.near_duplicate
    with replacing_folder(store.dataset(assistant.name, known["fingerprint"])) as draft:
        write_files(draft, frames)
        write_parquet(draft / "dropped.parquet", choice.dropped)
        problems, compared = examine(draft, data_settings(assistant))
        if problems:
            raise LeakError(
                f"Data set of assistant {assistant.name!r}: its splits are not separate, so nothing was frozen. "
                f"{'; '.join(problems[:5])} ({len(problems)} in all). Materialise training_examples again."
            )
        made = {
            **known,
            "leaks": {"found": problems, "compared": compared, "threshold": threshold},
            "parents": [before.name] if before else [],
            **{name: choice.notes[name] for name in NOTED},
        }
        write_json(draft / "manifest.json", manifests.make_manifest(assistant, made))
        if before is not None and (before / "train.jsonl").exists():
            made["drift"] = drift(before, draft)
            write_json(draft / "manifest.json", manifests.make_manifest(assistant, made))
