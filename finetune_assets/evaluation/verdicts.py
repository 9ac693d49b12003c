"""What the gates say of the tuned model, and of the option that the decision comes to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_assets.assistants.settings import Assistant
from finetune_assets.evaluation import gates
from finetune_assets.evaluation.candidates import BASE, CHAMPION, TUNED, TUNED_RAG
from finetune_assets.evaluation.measured import Made, Measured
from finetune_assets.evaluation.statistics import Interval
from finetune_assets.evaluation.texts import Texts

OF_WEIGHTS = ("forgetting", "overfitting", "parity", "canaries")
"""Guards of a model's weights, however it is asked."""
Values = Mapping[str, Interval]


def of_tuned(assistant: Assistant, made: Made, found: Measured, differences: Mapping[str, Values]) -> dict[str, Any]:
    """The report's `verdict`, `reasons` and `gates`. `differences`: `tuned_vs_<other>` of each other candidate."""
    versus = {other: differences[pair] for other in (BASE, CHAMPION) if (pair := f"{TUNED}_vs_{other}") in differences}
    evidence = _evidence(assistant, found, TUNED, found.intervals[TUNED], versus, made.training.get("train_loss"))
    texts = Texts(assistant.language)
    decided = gates.decide(assistant.gates, evidence, texts)
    return {
        "verdict": gates.verdict(decided),
        "reasons": gates.reasons(decided, evidence, texts),
        "gates": [gate.as_dict() for gate in decided],
    }


def of_option(assistant: Assistant, made: Made, found: Measured, judged: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Verdict and reasons of an option: of the tuned model the report's own (`judged`); of another by those gates that can be
    measured on it, null where there is none. Tuned with retrieval has the tuned model's weights, so those guards are its own.
    """
    if name == TUNED:
        return {key: judged[key] for key in ("verdict", "reasons")}
    own, training = dict(found.intervals[name]), None
    if name == TUNED_RAG:
        own |= {guard: found.intervals[TUNED][guard] for guard in OF_WEIGHTS}
        training = made.training.get("train_loss")
    settings, texts = assistant.gates, Texts(assistant.language)
    relative = [m for m in (settings.better_than_base, settings.not_worse_than_champion, "slots_kept") if m is not None]
    versus = {
        other: {measure: found.compare(name, other, measure) for measure in relative}
        for other in (BASE, CHAMPION)
        if other != name and other in found.intervals
    }
    evidence = _evidence(assistant, found, name, own, versus, training)
    told = [gate for gate in gates.decide(settings, evidence, texts) if gate.interval.value is not None]
    return {"verdict": gates.verdict(told), "reasons": gates.reasons(told, evidence, texts)} if told else None


def _evidence(
    assistant: Assistant,
    found: Measured,
    name: str,
    values: Values,
    versus: Mapping[str, Values],
    training_loss: float | None,
) -> gates.Evidence:
    there = found.outputs[name].there
    return gates.Evidence(
        tuned=values,
        versus_base=versus.get(BASE, {}),
        versus_champion=versus.get(CHAMPION),
        training_loss=training_loss,
        rows=int(there.sum()),
        conversations=len(set(found.bootstrap.cluster[there].tolist())),
        asked=len(there),
        at_address="url" in found.outputs[name].facts,
        canaries=bool(assistant.benchmark.canaries),
        suite=assistant.benchmark.checks is not None,
        rules_set=len(assistant.rules),
        rules_fitting=sum(found.fitting),
    )
