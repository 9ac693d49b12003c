"""TRL's SFTTrainer with our order of the data, checkpoints that are whole or absent, and totals that survive a resume."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportMissingParameterType=false, reportUntypedBaseClass=false

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.sft_trainer import SFTTrainer

from finetune_assets.errors import TrainingError
from finetune_assets.storage import read_json, replacing_folder, write_json, write_text
from finetune_assets.worker import checkpoints
from finetune_assets.worker.progress import Progress
from finetune_assets.worker.rows import LengthGrouped

CHECKPOINT_SECONDS = 20.0
SMALL_VOCABULARY = 16_384
"""Up to here the logits of a batch fit easily, and the model's own loss is a fifth faster than TRL's, which works in chunks,
computes entropy and accuracy besides, and repeats the product in the backward pass (measured: d 192, 2,048 tokens, CPU)."""
PROGRESS_SECONDS = 1.0


@dataclass
class Totals:
    """Sums over all starts of a job: TRL's `num_tokens` and the trainer's run time begin at 0 after a resume."""

    steps: int = 0
    tokens: int = 0
    """Real tokens, padding left out."""
    seconds: float = 0.0
    """In the training loop, validation and checkpoints included."""
    recent_loss: float = 0.0
    """Moving average of the loss."""
    window_loss: float = 0.0
    """Sum of the losses since the last point of the curve; the trainer's own sum would lack the steps before a kill."""
    window_steps: int = 0


class Loop(SFTTrainer):
    """The training loop of one job."""

    def __init__(self, *, lengths: list[int], totals: Totals, **options: Any):
        """`lengths`: tokens of each training row; `totals`: of the checkpoint that is resumed."""
        self.totals = totals
        self._row_tokens = lengths
        super().__init__(**options)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return LengthGrouped(self._row_tokens, self.args.train_batch_size, self.args.seed)

    def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> torch.Tensor:
        """One batch; raises TrainingError where the loss is no number."""
        tokens = int(inputs["attention_mask"].sum())
        loss: torch.Tensor = super().training_step(model, inputs, *rest, **named)
        value = float(loss)
        if not math.isfinite(value):
            raise TrainingError(
                f"The loss became {value} at step {self.state.global_step + 1} (learning rate "
                f"{self._get_learning_rate():.3g}). Lower hyperparameters.learning_rate, or take preset `conservative`."
            )
        totals = self.totals
        totals.steps += 1
        totals.tokens += tokens
        totals.window_loss += value
        totals.window_steps += 1
        totals.recent_loss = value if totals.steps == 1 else 0.95 * totals.recent_loss + 0.05 * value
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Mean over the target tokens of the batch."""
        if cast("Any", self.model).config.get_text_config().vocab_size > SMALL_VOCABULARY:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False
        return super(SFTTrainer, self).compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The base trainer writes into a temporary folder; the whole of it is renamed. No model card, no pruning by time."""
        folder = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        if checkpoints.is_whole(folder / name):
            return
        with replacing_folder(folder / name) as draft:
            self.args.output_dir = str(draft)
            try:
                super(SFTTrainer, self)._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(folder)
            for file in (draft / name).iterdir():
                file.rename(draft / file.name)
            (draft / name).rmdir()
            write_json(draft / "totals.json", asdict(self.totals))
            checkpoints.seal(draft)
        checkpoints.prune(folder)


class Watch(TrainerCallback):
    """Progress, loss curve, times to save, and the best weights."""

    def __init__(self, output: Path, progress: Progress, totals: Totals, checkpoint_seconds: float = CHECKPOINT_SECONDS):
        """`output`: the job's folder; `totals`: of the checkpoint that is resumed; a kill loses at most `checkpoint_seconds`."""
        self._log_file = output / "training_log.jsonl"
        self._best = output / "checkpoints" / "best"
        self._progress = progress
        self._totals = totals
        self._checkpoint_seconds = checkpoint_seconds
        self._before = totals.seconds
        self._began = self._saved = self._shown = time.monotonic()
        self._tokens_at_start = totals.tokens

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The clock starts, and the curve is cut where the checkpoint was taken."""
        self._began = self._saved = time.monotonic()
        _truncate_log(self._log_file, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A checkpoint every 20 s, but not before the validation of an epoch that is just over: it would be lost."""
        now = time.monotonic()
        self._totals.seconds = self._before + now - self._began
        per_epoch = max(1, round(state.max_steps / max(state.num_train_epochs, 1)))
        epoch_over = state.global_step % per_epoch == 0 or state.global_step >= state.max_steps
        if now - self._saved >= self._checkpoint_seconds and not epoch_over:
            control.should_save = True
        if now - self._shown >= PROGRESS_SECONDS or state.global_step >= state.max_steps:
            self._shown = now
            self._progress.update(
                "train",
                state.global_step,
                state.max_steps,
                loss=round(self._totals.recent_loss, 4),
                tokens_per_second=round(self._rate(), 1),
            )

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Each epoch ends with a checkpoint, after its validation."""
        control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Counts from here to the next one."""
        self._saved = time.monotonic()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """One point of the curve."""
        logs = logs or {}
        if "loss" not in logs and "eval_loss" not in logs:
            return
        self._totals.seconds = self._before + time.monotonic() - self._began
        if "loss" in logs:
            logs = {**logs, "loss": self._totals.window_loss / max(self._totals.window_steps, 1)}
            self._totals.window_loss, self._totals.window_steps = 0.0, 0
        entry = {name: logs[name] for name in ("loss", "eval_loss", "learning_rate", "grad_norm") if name in logs}
        entry = {"step": state.global_step, "epoch": round(float(state.epoch or 0), 4), **entry}
        entry |= {"tokens": self._totals.tokens, "tokens_per_second": round(self._rate(), 1)}
        with self._log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**entry, "seconds": round(self._totals.seconds, 3)}) + "\n")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **named: Any,
    ) -> None:
        """Keeps the weights of the lowest validation loss."""
        loss = (metrics or {})["eval_loss"]
        self._progress.update("validate", state.global_step, state.max_steps, eval_loss=loss)
        known = read_json(self._best / "best.json") if (self._best / "best.json").exists() else None
        if known is None or loss < known["eval_loss"]:
            model: PreTrainedModel = named["model"]
            with replacing_folder(self._best) as draft:
                model.save_pretrained(draft)
                write_json(draft / "best.json", {"eval_loss": loss, "step": state.global_step})

    def _rate(self) -> float:
        """Real tokens a second since this start."""
        return (self._totals.tokens - self._tokens_at_start) / max(time.monotonic() - self._began, 1e-9)


def _truncate_log(file: Path, step: int) -> None:
    """Drops points after `step`: they will be written again."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    kept: list[str] = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:  # the line that was being written when the process was killed
            continue
    write_text(file, "".join(line + "\n" for line in kept))


def forget(folder: Path, step: int) -> None:
    """Removes best weights that belong to a later step than the checkpoint that is resumed."""
    best = folder / "best"
    if best.exists() and (not (best / "best.json").exists() or read_json(best / "best.json")["step"] > step):
        shutil.rmtree(best)
