"""A stage trained to its end, whatever happens on the way: attempts, each from the newest whole checkpoint.

Master weights are float32; bfloat16 is used for the products only (autocast). With validation rows the result is the weights of
the lowest validation loss, else the last ones.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import math
import shutil
import time
import warnings
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from finetune_assets.storage import read_json, write_json
from finetune_assets.training.presets import PREFERENCES
from finetune_assets.training.tokens import Rows
from finetune_assets.worker import checkpoints, curve, memory, preferences, ranks
from finetune_assets.worker.loops import Totals
from finetune_assets.worker.progress import Progress
from finetune_assets.worker.recovery import Diverged, Recovery
from finetune_assets.worker.stage import Stage, make_loop, read_rows, ready_model
from finetune_assets.worker.watch import Place, forget_best, keep_best


def run_stage(stage: Stage, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> dict[str, Any]:
    """Trains, or goes on where an earlier start was killed; a finished stage's result is given back as it is.

    Raises DataError, ModelUnavailable, or TrainingError where no recovery helps.
    """
    place = stage.place
    result = place.folder / "result.json"
    if ranks.same(result.exists() and checkpoints.is_whole(place.best)):
        return read_json(result)
    (place.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    recovery = Recovery(place.folder, progress, int(stage.values["batch_size"]), stage.smallest)
    recovery.begin()
    try:
        made = _attempts(stage, tokenizer, recovery, progress)
    except Exception as error:
        if not ranks.lost(error):  # else the next start asks the kernel what became of the other process
            recovery.end()
        raise
    recovery.end()
    return made


def _attempts(stage: Stage, tokenizer: PreTrainedTokenizerBase, recovery: Recovery, progress: Progress) -> dict[str, Any]:
    """As many as the recoveries allow; the result of the one that came to the end."""
    place = stage.place
    result = place.folder / "result.json"
    first = True
    while True:
        trouble: Diverged | None = None
        short = ""
        try:
            with memory.limited():
                made = _attempt(stage, tokenizer, recovery, progress, first=first)
            if ranks.first():
                write_json(result, {**made, "recoveries": recovery.state.events})
                shutil.rmtree(place.folder / "checkpoints")  # best/ is what they were for
            ranks.wait()
            return read_json(result)
        except Diverged as error:
            trouble = error
        except Exception as error:
            if not memory.ran_out(error):
                raise
            short = memory.in_short(error)
        first = False
        # Outside of the handlers: a traceback would keep the model of the failed attempt in memory.
        memory.release()
        newest, _ = checkpoints.newest_whole(place.folder / "checkpoints")
        step = checkpoints.step_of(newest) or 0 if newest else 0
        if trouble is not None:
            recovery.diverged(trouble, float(stage.values["learning_rate"]), step)
        else:
            recovery.out_of_memory(step, short)
            if ranks.count() > 1:
                raise ranks.StartAgain(f"in one of {ranks.count()} processes {short}")


def _attempt(
    stage: Stage, tokenizer: PreTrainedTokenizerBase, recovery: Recovery, progress: Progress, *, first: bool
) -> dict[str, Any]:
    """From the newest whole checkpoint to the end. `first`: of this process."""
    began = time.monotonic()
    set_seed(int(stage.spec["seed"]))
    model, max_length = ready_model(stage, tokenizer, progress)
    train, heldout = read_rows(stage, tokenizer, max_length, progress)
    before: dict[str, dict[str, list[float]]] = {}
    if stage.objective in PREFERENCES:
        parts = {"train": (stage.objective, train), "heldout": (stage.objective, heldout)}
        before = preferences.reference(stage.place.folder / "reference.json", model, parts, stage.bf16, progress)
        train = preferences.with_reference(stage.objective, train, before["train"])
        heldout = preferences.with_reference(stage.objective, heldout, before["heldout"])
    found = resume_point(stage.place, recovery, first=first) if ranks.first() else None
    checkpoint, totals = ranks.same(found) or (None, Totals())
    loop = make_loop(stage, model, tokenizer, (train, heldout), totals, recovery)
    ready = time.monotonic() - began
    steps = math.ceil(float(stage.values["epochs"]) * math.ceil(len(train.examples) / int(stage.values["batch_size"])))
    if totals.steps < steps and not totals.stopped:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the libraries' own deprecations
                loop.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            loop.settle()
    elif checkpoint is not None:  # killed between the last step and the end: transformers would train one step more
        loop.load_weights(checkpoint)
    model = cast("PreTrainedModel", loop.accelerator.unwrap_model(loop.model))
    if not ranks.same((stage.place.best / "best.json").exists()):
        keep_best(stage.place, model, {"step": totals.steps, "eval_loss": None})
    if not ranks.first():
        return {}
    result = summary(stage, totals, (train, heldout), max_length, ready)
    if stage.objective in PREFERENCES and heldout.examples:
        loop.load_weights(stage.place.best)
        model = cast("PreTrainedModel", loop.accelerator.unwrap_model(loop.model))
        sides = preferences.sequences(stage.objective, heldout.examples)
        after = {name: preferences.log_probs(model, one, stage.bf16) for name, one in sides.items()}
        result["heldout"] = preferences.judged(stage.objective, heldout, before["heldout"], after, float(stage.values["beta"]))
        if result["heldout"]["likelihood_fell"]:
            progress.note(
                f"{stage.objective} made good replies less likely. "
                f"Lower hyperparameters.by_objective.{stage.objective}.learning_rate."
            )
    return result


def resume_point(place: Place, recovery: Recovery, *, first: bool) -> tuple[Path | None, Totals]:
    """The newest whole checkpoint and its totals; broken ones are removed. `first`: whether this process has just begun."""
    checkpoint, broken = checkpoints.newest_whole(place.folder / "checkpoints")
    for path in broken:
        shutil.rmtree(path)
        recovery.record(
            "broken_checkpoint", checkpoints.step_of(path) or 0, "the checkpoint before it is used", f"{path.name} is broken"
        )
    if checkpoint is None:
        forget_best(place, 0)
        return None, Totals()
    totals = Totals(**read_json(checkpoint / "totals.json"))
    forget_best(place, totals.steps)
    if first:
        recovery.resumed(totals.steps)
    return checkpoint, totals


def summary(stage: Stage, totals: Totals, rows: tuple[Rows, Rows], max_length: int, ready: float) -> dict[str, Any]:
    """What the stage's result.json says."""
    train, heldout = rows
    points = curve.read(stage.place.log)
    losses = [(point["step"], point["loss"]) for point in points if "loss" in point]
    late = [loss for step, loss in losses if step > 0.9 * totals.steps] or [loss for _, loss in losses[-1:]]
    chosen = read_json(stage.place.best / "best.json")
    return {
        "objective": stage.objective,
        "hyperparameters": stage.values,
        "train_loss": sum(late) / len(late) if late else None,  # mean of the last tenth of the steps
        "eval_loss": chosen["eval_loss"],
        "eval_losses": [point["eval_loss"] for point in points if "eval_loss" in point],
        "steps": totals.steps,
        "best_step": chosen["step"],
        "tokens": totals.tokens,
        "seconds": round(totals.seconds, 2),
        "seconds_before_first_step": round(ready, 2),
        "max_length": max_length,
        "rows": {
            "train": len(train.examples),
            "validation": len(heldout.examples),
            "shortened": train.shortened,
            "dropped": train.dropped + heldout.dropped,
        },
    }
