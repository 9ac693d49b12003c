"""Is there enough to train on: least numbers with a refusal that names them, and warnings for what is thin.

check_enough(assistant, frame, kept, pairs)           raises TooFewExamples
check_objectives(name, objectives, pairs, minimum)    the same for `dpo` and `kto` alone, from a manifest's `pairs`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from finetune_assets.assistants.settings import Assistant
from finetune_assets.assistants.settings.data import Minimum
from finetune_assets.dataset.manifest import tally
from finetune_assets.dataset.splits import SPLITS, TEST, TRAIN, VALIDATION
from finetune_assets.errors import TooFewExamples

FEW = 1_000
"""Fewer examples than this are enough to start, and get a warning."""

BLOCKED_SHARE = 0.25  # of what is kept: above it a few bad thumbs on replies out of templates may decide too much


def check_enough(assistant: Assistant, read: int, kept: pl.DataFrame, rejected: dict[str, int]) -> None:
    """Raises TooFewExamples with the numbers and what mends them. `kept` holds no synthetic row."""
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
    minimum = assistant.minimum
    short: list[str] = []
    if sizes[TRAIN] < minimum.train_rows:
        short.append(f"{sizes[TRAIN]} training rows, `minimum.train_rows` is {minimum.train_rows}")
    tested = kept.filter(pl.col("split") == TEST)["conversation_id"].n_unique()
    if tested < minimum.test_conversations:
        short.append(f"{tested} test conversations, `minimum.test_conversations` is {minimum.test_conversations}")
    by_intent = tally(kept.filter(pl.col("split") == TRAIN)["intent"])
    for intent, least in sorted(minimum.per_intent.items()):
        if by_intent.get(intent, 0) < least:
            short.append(f"{by_intent.get(intent, 0)} training rows of intent {intent}, `minimum.per_intent` asks for {least}")
    if short:
        raise TooFewExamples(
            f"Assistant {assistant.name!r} has too little: {'; '.join(short)}. Dropped: {dropped}. Add conversations or "
            "feedback, loosen the `filters` or the caps of `balance` that drop most, or lower these settings."
        )


def check_objectives(name: str, objectives: Sequence[str], pairs: dict[str, Any], minimum: Minimum) -> None:
    """Raises TooFewExamples where `dpo` or `kto` is asked for with fewer training rows than the minimum.

    `pairs` is the manifest's: `preferences` (rows by split) and `kto_labels` (training rows that are good and bad).
    """
    made = int(pairs["preferences"].get(TRAIN, 0))
    if "dpo" in objectives and made < minimum.preference_pairs:
        raise TooFewExamples(
            f"Assistant {name!r}: the objective dpo needs {minimum.preference_pairs} preference pairs for training "
            f"(`minimum.preference_pairs`), there are {made}. A pair is a reply and its correction (`expected_response`): "
            "collect more corrections, take `dpo` out of `objective`, or lower the minimum."
        )
    good, bad = (int(pairs["kto_labels"].get(label, 0)) for label in ("good", "bad"))
    if "kto" in objectives and min(good, bad) < minimum.thumbs:
        raise TooFewExamples(
            f"Assistant {name!r}: the objective kto needs {minimum.thumbs} good and as many bad replies for training "
            f"(`minimum.thumbs`), there are {good} and {bad}. Collect more positive and negative feedback, take `kto` out of "
            "`objective`, or lower the minimum."
        )


def warnings(assistant: Assistant, kept: pl.DataFrame, notes: dict[str, Any], repeated: int) -> list[str]:
    """What is allowed and thin, one sentence each. `repeated`: examples that stand in two weeks."""
    found: list[str] = []
    if repeated:
        found.append(f"{repeated} examples stand in two weeks, the later one counts: rebuild the weeks of clean_examples.")
    if kept.height < FEW:
        found.append(f"{kept.height} examples: under {FEW:,} a fine-tuned model may learn the style and little else.")
    if not tally(kept["split"]).get(VALIDATION):
        found.append("No example falls into validation: nothing watches the training for overfitting.")
    blocked = int(notes["rejected"].get("same_as_negative", 0))
    if blocked > kept.height * BLOCKED_SHARE:
        found.append(
            f"{blocked} replies nearly repeat one that was rated badly (`same_as_negative`), {kept.height} are kept: where such "
            "a reply was right and something else was not, withdraw its thumb or correct it; `finetune explain` names them."
        )
    for intent, part in sorted(kept.select("intent", "split").group_by("intent"), key=lambda group: str(group[0])):
        sizes = tally(part["split"])
        missing = [name for name in SPLITS if not sizes.get(name)]
        if missing and part.height >= 20:
            found.append(f"Intent {intent[0]}: {part.height} examples, none in {' and '.join(missing)}.")
    wanted, negatives = assistant.balance.negative_share, notes.get("negatives")
    if wanted and negatives and negatives["share"] < wanted / 2:
        found.append(
            f"Negative examples are {negatives['share']:.1%} of the training rows, `balance.negative_share` is {wanted:.0%}: "
            "correct replies that should have declined, or add such conversations."
        )
    asked = notes["augmented"]["intents"].values()
    missing = sum(intent["wanted"] - intent["made"] for intent in asked)
    if assistant.augment.llm and missing:
        found.append(
            f"{missing} of {sum(i['wanted'] for i in asked)} wordings are missing: see `augment.llm.max_requests`, `max_usd`."
        )
    objectives: Sequence[str] = assistant.objective
    for objective, kind in (("dpo", "preferences"), ("kto", "kto")):
        held = sum(n for split, n in notes["pairs"][kind].items() if split != TRAIN)
        if objective in objectives and not held:
            found.append(f"No {kind} row is held out: nothing measures what {objective} changes.")
    return found
