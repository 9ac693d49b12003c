"""The noise of retraining: the same data set trained with other seeds, measured on the same test rows.

Another seed moves such measures by one or two per cent, which no interval over test rows holds (Bouthillier et al. 2021,
Accounting for variance in machine learning benchmarks, section 3; Dodge et al. 2020, arXiv:2002.06305). Gates judge this very
version, whose weights are what is served, so they leave it aside. Whether fine-tuning was worth it is a question about the next
training too: there the spread is added (`widened`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune_assets.assistants.settings.training import Budget
from finetune_assets.errors import FinetuneError
from finetune_assets.evaluation.candidates import TUNED, TUNED_RAG, Plain
from finetune_assets.evaluation.decision import Compare
from finetune_assets.evaluation.measures import COMPARABLE
from finetune_assets.evaluation.statistics import Estimate, Interval, with_spread
from finetune_assets.storage import Store, read_json, write_json
from finetune_assets.training.spec import spec_hash

PREFIX = "seed-"
"""Of a further training's name as a candidate; endpoints have no dash."""
BUDGET, RENTED = "budget", "rented"
"""Why a training was not begun."""
Launch = Callable[[Path, Path], None]
"""(spec file, output folder) -> runs the worker to its end. Raises LaunchError."""


@dataclass(frozen=True)
class Training:
    """One further training."""

    seed: int
    model: str | None
    """Its folder; null where it failed or was not begun."""
    problem: str | None = None

    @property
    def candidate(self) -> Plain:
        """To be measured."""
        return Plain(f"{PREFIX}{self.seed}", self.model or "")


def affordable(wanted: int, training: Mapping[str, Any], budget: Budget) -> int:
    """How many trainings, the version's own included, the budget of one training leaves room for; at most `wanted`."""
    most = float(wanted)
    seconds = float(training.get("seconds") or 0)
    if budget.hours is not None and seconds:
        most = min(most, budget.hours * 3600 / seconds)
    if budget.training_usd is not None and budget.usd_per_hour and seconds:
        most = min(most, budget.training_usd / (budget.usd_per_hour * seconds / 3600))
    return max(1, int(round(most, 6)))  # 2 × s ÷ s may be a hair below 2


def train(store: Store, version: Path, dataset: Path, wanted: int, budget: Budget, launch: Launch) -> list[Training]:
    """The trainings of a version beside its own, each in its job's folder; what has been trained is not trained again.

    Those of a rented trainer's version are not begun. One that fails is told with its cause, and stops nothing.
    """
    if wanted < 2:
        return []
    if not (version / "spec.json").exists():
        return [Training(0, None, RENTED)]
    spec, result = read_json(version / "spec.json"), read_json(version / "result.json")
    fits = affordable(wanted, result, budget)
    made: list[Training] = []
    for n in range(1, wanted):
        seed = int(spec["seed"]) + n
        if n >= fits:
            made.append(Training(seed, None, BUDGET))
            continue
        job = {**spec, "seed": seed, "dataset": str(dataset.resolve()), "cache": str(store.tokens.resolve())}
        job["spec_hash"] = spec_hash(job)
        folder = store.job(job["spec_hash"])
        try:
            if not (folder / "result.json").exists():
                write_json(folder / "spec.json", {**job, "output": str(folder.resolve())})
                launch(folder / "spec.json", folder)
            made.append(Training(seed, str(folder / read_json(folder / "result.json")["model"])))
        except FinetuneError as error:
            made.append(Training(seed, None, str(error)))
    return made


def is_seed(name: str) -> bool:
    """Whether a candidate is a further training."""
    return name.startswith(PREFIX)


def spread(estimates: Mapping[str, Mapping[str, Estimate]], trained: Sequence[Training]) -> dict[str, Any] | None:
    """The report's `seeds`: of each comparable measure the value of every training and their standard deviation.

    `estimates`: by candidate. Null where nothing but the version itself was asked for.
    """
    if not trained:
        return None
    names = [TUNED, *(name for name in estimates if is_seed(name))]
    values: dict[str, dict[str, Any]] = {}
    for measure in COMPARABLE:
        found = [_value(estimates[name][measure]) for name in names]
        known = [value for value in found if np.isfinite(value)]
        if len(known) == len(names) > 1:
            values[measure] = {"values": [round(value, 7) for value in known], "deviation": float(np.std(known, ddof=1))}
    told = [asdict(one) for one in trained if one.model is None]
    return {"trainings": len(names), "measures": values, "left_out": [{"seed": t["seed"], "why": t["problem"]} for t in told]}


def widened(compare: Compare, seeds: Mapping[str, Any] | None) -> Compare:
    """Comparisons of the tuned model with others, with the noise of its training in their intervals."""

    def compared(first: str, second: str, measure: str) -> Interval:
        found, known = compare(first, second, measure), (seeds or {}).get("measures", {}).get(measure)
        ours = [name in (TUNED, TUNED_RAG) for name in (first, second)]
        return with_spread(found, known["deviation"], seeds["trainings"]) if known and seeds and sum(ours) == 1 else found

    return compared


def _value(estimate: Estimate) -> float:
    return float(estimate.function(estimate.columns.sum(axis=0)))
