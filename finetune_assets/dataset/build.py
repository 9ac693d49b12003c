"""From corpus to frozen data set: `choose` decides and writes nothing, `stage` keeps the choice, `freeze` writes the files.

    choice = choose(store, assistant)            raises NothingSelected, TooFewExamples
    stage(store, assistant, choice)              <home>/datasets/<assistant>/staged/*.parquet
    manifest = freeze(store, assistant, choice)  <home>/datasets/<assistant>/<fingerprint>/, and `latest`; raises LeakError

Splits are assigned before twins are removed, so that a row's split never depends on other rows.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from finetune_assets.assistants.settings import Assistant
from finetune_assets.dataset import manifest as manifests
from finetune_assets.dataset.duplicates import remove_twins, replaced_by, with_text
from finetune_assets.dataset.formats import lines_of, trim_context, write_files
from finetune_assets.dataset.leaks import examine
from finetune_assets.dataset.manifest import CODE_VERSION, Manifest, counts, data_settings, tally
from finetune_assets.dataset.preferences import UNUSABLE, make_pairs
from finetune_assets.dataset.selection import (
    CORRECTED,
    judge,
    mark_personal,
    read_feedback,
    select_examples,
    tenants_of,
    verdicts,
)
from finetune_assets.dataset.splits import SPLITS, TEST, TRAIN, VALIDATION, assign
from finetune_assets.errors import DataError, LeakError, TooFewExamples
from finetune_assets.storage import Store, point, read_json, replacing_folder, write_json, write_parquet

FEW = 1_000
"""Fewer examples than this are enough to start, and get a warning."""
REASONS: tuple[str, ...] = (
    *("tenant_excluded", "no_consent", "negative_feedback", "not_satisfied", "reply_empty", "reply_too_long", "user_too_short"),
    *("user_too_long", "reply_too_short", "error_reply", "excluded_pattern", "required_pattern_missing", "user_in_test"),
    *("personal_data_residual", "same_as_negative", "exact_duplicate", "near_duplicate"),
)
"""Why an example is dropped, in the order in which it is decided."""
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
    "created_at",
)


@dataclass(frozen=True)
class Choice:
    """What an assistant trains on, and what not and why; everything that `freeze` needs.

    `kept`, `preferences` and `kto` have one row a line to be, with the columns of the lineage, context and texts. `notes` is
    JSON: weeks, read, counts, rejected, funnel, feedback, pairs, warnings.
    """

    kept: pl.DataFrame
    dropped: pl.DataFrame
    preferences: pl.DataFrame
    kto: pl.DataFrame
    feedback_seen: pl.DataFrame
    notes: dict[str, Any]


def choose(store: Store, assistant: Assistant) -> Choice:
    """Decides for each example of the assistant's weeks; every one of them is in `kept` or `dropped`.

    Raises NothingSelected where none is the assistant's, TooFewExamples where too few are left.
    """
    filters = assistant.filters
    rows, weeks = select_examples(store, assistant)
    examples = rows.unique("message_id", keep="last", maintain_order=True)
    tenants = sorted({*tenants_of(store, assistant), *examples["tenant_id"].unique()} - set(filters.exclude_tenants))
    feedback = read_feedback(store)
    judged = judge(examples, feedback, tenants)
    frame = verdicts(trim_context(examples, filters.context_turns, filters.context_chars), judged, filters)
    frame = mark_personal(assign(frame, assistant.split))
    frame = _without_twins(frame, filters.near_duplicate)

    kept = frame.filter(pl.col("reason").is_null())
    rejected = tally(frame["reason"].drop_nulls())
    _check_enough(assistant, frame.height, kept, rejected)
    pairs = make_pairs(frame, filters.near_duplicate)
    notes = {
        "weeks": weeks,
        "read": frame.height,
        "counts": counts(kept),
        "rejected": rejected,
        "funnel": _funnel(frame.height, rejected),
        "feedback": {"read": judged.read, "ignored": judged.ignored},
        "pairs": {"preferences": tally(pairs.preferences["split"]), "kto": tally(pairs.kto["split"]), "left_out": pairs.left_out},
        "warnings": _warnings(kept, rows.height - examples.height),
    }
    return Choice(
        kept=kept.select(*_ROW, "replaced", "context", "user_text", "reply"),
        dropped=frame.filter(pl.col("reason").is_not_null()).select("message_id", "reason", "kept_message_id").sort("message_id"),
        preferences=pairs.preferences.select(*_ROW, "replaced", "context", "chosen", "rejected"),
        kto=pairs.kto.select(*_ROW, "replaced", "context", "completion", "label"),
        feedback_seen=feedback.filter(pl.col("tenant_id").is_in(tenants)).select("feedback_id"),
        notes=notes,
    )


def _without_twins(frame: pl.DataFrame, threshold: float) -> pl.DataFrame:
    """Adds `kept_message_id` and `replaced`, and the reasons of twins."""
    candidates = with_text(frame.filter(pl.col("reason").is_null()), "reply")
    rated = (pl.col("verdict") == "negative").fill_null(False) | (pl.col("source") == CORRECTED).fill_null(False)
    usable = ~pl.col("reason").is_in(UNUSABLE).fill_null(False)
    negatives = with_text(frame.filter(rated & usable), "original").select("message_id", "created_at", "text")
    decided = remove_twins(candidates, negatives, threshold).select("message_id", "kept_message_id", twin="reason")
    return (
        frame.join(decided, on="message_id", how="left", maintain_order="left")
        .join(replaced_by(decided.rename({"twin": "reason"})), on="message_id", how="left", maintain_order="left")
        .with_columns(reason=pl.coalesce("reason", "twin"), replaced=pl.col("replaced").fill_null(pl.lit([], pl.List(pl.String))))
        .drop("twin")
    )


def _check_enough(assistant: Assistant, read: int, kept: pl.DataFrame, rejected: dict[str, int]) -> None:
    dropped = ", ".join(f"{reason} {n}" for reason, n in rejected.items()) or "none"
    if kept.height < assistant.min_examples:
        raise TooFewExamples(
            f"Assistant {assistant.name!r} keeps {kept.height} of {read} examples; `min_examples` is {assistant.min_examples}. "
            f"Dropped: {dropped}. Add conversations or feedback, loosen the `filters` that drop most, or lower `min_examples`."
        )
    sizes = tally(kept["split"])
    empty = [name for name in (TRAIN, TEST) if not sizes.get(name)]
    if empty:
        users = kept.select(pl.coalesce("user", "conversation_id").n_unique()).item()
        setting = assistant.split.model_dump(mode="json", exclude_none=True)
        raise TooFewExamples(
            f"Assistant {assistant.name!r}: of {kept.height} examples by {users} users none falls into {' and '.join(empty)} "
            f"(`split`: {setting}). Add conversations of more users, or change `split`."
        )


def _warnings(kept: pl.DataFrame, repeated: int) -> list[str]:
    found: list[str] = []
    if repeated:
        found.append(f"{repeated} examples stand in two weeks, the later one counts: rebuild the weeks of clean_examples.")
    if kept.height < FEW:
        found.append(f"{kept.height} examples: under {FEW:,} a fine-tuned model may learn the style and little else.")
    if not tally(kept["split"]).get(VALIDATION):
        found.append("No example falls into validation: nothing watches the training for overfitting.")
    for intent, part in sorted(kept.group_by("intent"), key=lambda group: str(group[0])):
        sizes = tally(part["split"])
        missing = [name for name in SPLITS if not sizes.get(name)]
        if missing and part.height >= 20:
            found.append(f"Intent {intent[0]}: {part.height} examples, none in {' and '.join(missing)}.")
    return found


def _funnel(read: int, rejected: dict[str, int]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [{"step": "read", "dropped": 0, "left": read}]
    for reason in REASONS:
        if n := rejected.get(reason, 0):
            steps.append({"step": reason, "dropped": n, "left": steps[-1]["left"] - n})
    return steps


def sample_rows(choice: Choice, n: int = 5) -> list[dict[str, Any]]:
    """A few kept examples for a table (split, source, intent, texts, message_id); the same ones for the same content."""
    columns = ("split", "source", "intent", "user_text", "reply", "message_id")
    keyed = [(_hash(f"{row['user_text']}\n{row['reply']}"), row) for row in choice.kept.select(columns).iter_rows(named=True)]
    return [row for _, row in sorted(keyed, key=lambda pair: (pair[0], pair[1]["message_id"]))[:n]]


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# --- staged


_FRAMES = ("kept", "dropped", "preferences", "kto", "feedback_seen")


def _settings_key(assistant: Assistant) -> str:
    settings = {"code_version": CODE_VERSION, "min_examples": assistant.min_examples, **data_settings(assistant)}
    return _hash(json.dumps(settings, sort_keys=True))


def stage(store: Store, assistant: Assistant, choice: Choice) -> Path:
    """Keeps the choice until it is frozen; one that was staged before is replaced."""
    folder = store.datasets(assistant.name) / "staged"
    with replacing_folder(folder) as draft:
        for name in _FRAMES:
            write_parquet(draft / f"{name}.parquet", getattr(choice, name))
        write_json(draft / "notes.json", {"settings_key": _settings_key(assistant), "notes": choice.notes})
    return folder


def load_staged(store: Store, assistant: Assistant) -> Choice:
    """The staged choice. Raises DataError where there is none, or one of other settings."""
    folder = store.datasets(assistant.name) / "staged"
    if not (folder / "notes.json").exists():
        raise DataError(
            f"Assistant {assistant.name!r} has no staged examples in {folder}. Materialise the asset training_examples."
        )
    stored = read_json(folder / "notes.json")
    if stored["settings_key"] != _settings_key(assistant):
        raise DataError(
            f"The staged examples of assistant {assistant.name!r} in {folder} were chosen with other settings or by older code. "
            "Materialise the asset training_examples again."
        )
    return Choice(**{name: pl.read_parquet(folder / f"{name}.parquet") for name in _FRAMES}, notes=stored["notes"])


# --- frozen


def freeze(store: Store, assistant: Assistant, choice: Choice) -> Manifest:
    """Writes the frozen folder and moves `latest` to it; one of equal fingerprint stays as it is. Returns its manifest.

    Raises LeakError before anything is moved if the written files prove that two splits share something.
    """
    system = assistant.system_prompt.strip()
    frames = {
        "examples": lines_of("examples", choice.kept, system),
        "preferences": lines_of("preferences", choice.preferences, system),
        "kto": lines_of("kto", choice.kto, system),
    }
    mark = manifests.fingerprint(data_settings(assistant), frames)
    folder = store.dataset(assistant.name, mark)
    if not (folder / "manifest.json").exists():
        _write(store, assistant, choice, frames, mark)
    manifests.write_seen(store, assistant.name, mark, choice.feedback_seen["feedback_id"])
    point(store.datasets(assistant.name) / "latest", mark)
    return manifests.read_manifest(folder)


def _write(store: Store, assistant: Assistant, choice: Choice, frames: dict[str, pl.DataFrame], mark: str) -> None:
    before = manifests.latest(store, assistant.name)
    threshold = assistant.filters.near_duplicate
    folder = store.dataset(assistant.name, mark)
    with replacing_folder(folder) as draft:
        write_files(draft, frames)
        write_parquet(draft / "dropped.parquet", choice.dropped)
        problems, compared = examine(draft, threshold)
        if problems:
            raise LeakError(
                f"Data set of assistant {assistant.name!r}: its splits are not separate, so nothing was frozen. "
                f"{'; '.join(problems[:5])} ({len(problems)} in all). Materialise training_examples again."
            )
        made = {
            "fingerprint": mark,
            "leaks": {"found": problems, "compared": compared, "threshold": threshold},
            "parents": [before.name] if before else [],
            **{name: choice.notes[name] for name in ("weeks", "read", "counts", "rejected", "feedback", "pairs", "warnings")},
        }
        write_json(draft / "manifest.json", manifests.make_manifest(assistant, made))
