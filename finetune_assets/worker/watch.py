"""While a stage trains: progress, loss curve, times to save and to validate, the best weights, an early end."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_assets.storage import read_json, replacing_folder, write_json
from finetune_assets.worker import card, checkpoints, curve, memory, ranks, shards
from finetune_assets.worker.loops import Totals, check_weights
from finetune_assets.worker.progress import Progress
from finetune_assets.worker.recovery import Diverged, Recovery, disk_full

CHECKPOINT_SECONDS = 5.0
CHECKPOINT_SHARE = 0.05
"""Most of the time that writing checkpoints may take: a large model is saved less often."""
PROGRESS_SECONDS = 1.0
STEPS_BETWEEN_VALIDATIONS = 500
"""A longer epoch is validated in between."""
LOGGED = {
    "loss": "loss",
    "eval_loss": "eval_loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "rewards/accuracies": "reward_accuracy",
    "rewards/margins": "reward_margin",
    "eval_rewards/accuracies": "eval_reward_accuracy",
    "eval_rewards/margins": "eval_reward_margin",
}
"""What a point of the curve holds, by TRL's names."""


@dataclass(frozen=True)
class Place:
    """A stage's folder and what it is called in progress lines."""

    folder: Path
    name: str
    patience: int
    checkpoint_seconds: float = CHECKPOINT_SECONDS

    @property
    def best(self) -> Path:
        """The best weights so far, and at last the stage's result."""
        return self.folder / "best"

    @property
    def log(self) -> Path:
        """Points of the curve."""
        return self.folder / "training_log.jsonl"


class Watch(TrainerCallback):
    """Sees every step of a stage."""

    def __init__(self, place: Place, progress: Progress, totals: Totals, recovery: Recovery):
        """`totals`: of the checkpoint that is resumed; a kill loses at most `place.checkpoint_seconds`."""
        self._place, self._progress, self._totals, self._recovery = place, progress, totals, recovery
        self._before = totals.seconds
        self._began = self._saved = self._shown = time.monotonic()
        self._interval = place.checkpoint_seconds
        self._tokens_at_start = totals.tokens
        self._unwritten = ""
        self._hot = False
        self._gradient: float | None = None  # norm of the last point of the curve

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The clock starts, and the curve is cut where the checkpoint was taken."""
        self._began = self._saved = time.monotonic()
        if ranks.first():
            curve.truncate(self._place.log, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        """A checkpoint every few seconds, but not before the validation of an epoch that is just over: it would be lost."""
        now = time.monotonic()
        self._totals.seconds = self._before + now - self._began
        per_epoch = max(1, round(state.max_steps / max(state.num_train_epochs, 1)))
        epoch_over = state.global_step % per_epoch == 0 or state.global_step >= state.max_steps
        parts = round(per_epoch / STEPS_BETWEEN_VALIDATIONS)
        if parts > 1 and not epoch_over and state.global_step % per_epoch % -(-per_epoch // parts) == 0:
            control.should_evaluate = args.eval_strategy != "no"
        if not epoch_over and ranks.same(now - self._saved >= self._interval):
            control.should_save = True
        if state.global_step >= state.max_steps:
            control.should_log = True  # the curve has its end, and a short training has a curve
        if now - self._shown >= PROGRESS_SECONDS or state.global_step >= state.max_steps:
            self._shown = now
            self._tell(state, float(named["lr_scheduler"].get_last_lr()[0]))

    def _tell(self, state: TrainerState, rate: float) -> None:
        """One line of progress; once, that the GPU is too hot."""
        facts = card.facts()
        self._progress.update(
            self._place.name,
            state.global_step,
            state.max_steps,
            loss=round(self._totals.mean, 4),
            learning_rate=rate,
            grad_norm=self._gradient,
            tokens_per_second=round(self._rate(), 1),
            memory_gib=_gib(),
            **facts,
        )
        if facts.get("gpu_celsius", 0) > card.HOT and not self._hot:
            self._hot = True
            self._progress.note(
                f"The GPU is at {facts['gpu_celsius']:.0f} °C: above {card.HOT} °C it slows down, and wears. See to its cooling."
            )

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Each epoch ends with a checkpoint, after its validation; the last one where much would be lost without."""
        last = state.global_step >= state.max_steps
        control.should_save = not last or ranks.same(time.monotonic() - self._saved >= self._interval)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Counts from here to the next one."""
        self._saved = time.monotonic()
        if self._place.checkpoint_seconds:
            self._interval = max(self._place.checkpoint_seconds, self._totals.checkpoint_seconds / CHECKPOINT_SHARE)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """One point of the curve."""
        logs = logs or {}
        if ("loss" not in logs and "eval_loss" not in logs) or not ranks.first():
            return
        self._totals.seconds = self._before + time.monotonic() - self._began
        if "loss" in logs:
            logs = {**logs, "loss": self._totals.window_loss / max(self._totals.window_steps, 1)}
            self._totals.window_loss, self._totals.window_steps = 0.0, 0
        entry = {ours: logs[name] for name, ours in LOGGED.items() if name in logs}
        entry = {"step": state.global_step, "epoch": round(float(state.epoch or 0), 4), **entry}
        self._gradient = entry.get("grad_norm", self._gradient)
        entry |= {"tokens": self._totals.tokens, "tokens_per_second": round(self._rate(), 1), "memory_gib": _gib()}
        self._unwritten += json.dumps({**entry, "seconds": round(self._totals.seconds, 3)}) + "\n"
        try:
            curve.append(self._place.log, self._unwritten)
            self._unwritten = ""
        except OSError as error:
            if not disk_full(error):
                raise

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **named: Any,
    ) -> None:
        """Keeps the weights of the lowest validation loss; ends the training when it gets no better. Raises Diverged."""
        loss = (metrics or {})["eval_loss"]
        if not math.isfinite(loss):
            raise Diverged(state.global_step, f"the validation loss became {loss}")
        self._progress.update(f"{self._place.name}: validate", state.global_step, state.max_steps, eval_loss=loss)
        known = ranks.same(self._better(loss) if ranks.first() else None)
        if known is None:
            model = named["model"]
            keep_best(self._place, getattr(model, "module", model), {"eval_loss": loss, "step": state.global_step})
            self._totals.validations_since_best = 0
            return
        self._totals.validations_since_best += 1
        if self._totals.validations_since_best >= self._place.patience and state.global_step < state.max_steps:
            control.should_training_stop = self._totals.stopped = True
            self._recovery.record(
                "early_stop",
                state.global_step,
                f"ended early; the weights of step {known['step']} are kept",
                f"validation loss {loss:.4g}, {self._totals.validations_since_best} times above {known['eval_loss']:.4g}",
            )

    def _better(self, loss: float) -> dict[str, Any] | None:
        """What is known of kept weights that are at least as good as those of this loss; None: these are the best so far."""
        file = self._place.best / "best.json"
        known = read_json(file) if file.exists() else None
        return known if known is not None and loss >= known["eval_loss"] else None

    def _rate(self) -> float:
        """Real tokens a second since this start."""
        return (self._totals.tokens - self._tokens_at_start) / max(time.monotonic() - self._began, 1e-9)


def _gib() -> float:
    return round(memory.used() / 2**30, 3)


def keep_best(place: Place, model: PreTrainedModel, facts: dict[str, Any]) -> None:
    """Makes a model's weights (an adapter's alone) the stage's best. Every process calls it, the first one writes.

    Raises Diverged where they are no numbers.
    """
    check_weights(model, int(facts["step"]))
    gathered = shards.trained(model)
    if not ranks.first():
        return
    with replacing_folder(place.best) as draft:
        model.save_pretrained(draft, state_dict=gathered)
        write_json(draft / "best.json", facts)
        checkpoints.seal(draft)


def forget_best(place: Place, step: int) -> None:
    """Removes best weights that belong to a later step than the checkpoint that is resumed, or are not whole."""
    if place.best.exists() and (not checkpoints.is_whole(place.best) or read_json(place.best / "best.json")["step"] > step):
        shutil.rmtree(place.best)
