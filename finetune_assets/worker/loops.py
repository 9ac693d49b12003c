"""TRL's trainers with our order of the data, checkpoints that are whole or absent, and totals that survive a resume."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportMissingParameterType=false, reportUntypedBaseClass=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler
from transformers import Trainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.sft_trainer import SFTTrainer

from finetune_assets.storage import replacing_folder
from finetune_assets.training.tokens import IGNORED
from finetune_assets.worker import checkpoints, ranks, shards, snapshot, targets
from finetune_assets.worker.recovery import Diverged, Recovery, disk_full

WINDOW = 20
"""Steps over which the loss is averaged to see where it goes."""
LEAST = 5
"""At the beginning, after so many."""
RISES_BY, AND = 1.5, 0.5
"""A training has diverged when the mean of the last WINDOW losses is above 1.5 times the lowest such mean and 0.5 more."""
DOUBTFUL_BY, AND_DOUBTFUL = 1.2, 0.2
"""Above this no checkpoint is taken, so that there is a good one to go back to."""


@dataclass
class Totals:
    """Sums over all starts of a stage: TRL's `num_tokens` and the trainer's run time begin at 0 after a resume."""

    steps: int = 0
    tokens: int = 0
    """Real tokens, padding left out."""
    seconds: float = 0.0
    """In the training loop, validation and checkpoints included."""
    recent: list[float] = field(default_factory=list[float])
    """Losses of the last WINDOW steps."""
    lowest: float = math.inf
    """Lowest mean over WINDOW steps."""
    step_loss: float = 0.0
    """Of the micro-batches of the current step."""
    window_loss: float = 0.0
    """Sum of the losses since the last point of the curve; the trainer's own sum would lack the steps before a kill."""
    window_steps: int = 0
    checkpoint_seconds: float = 0.0
    """What the last checkpoint took to write."""
    validations_since_best: int = 0
    stopped: bool = False
    """Ended early."""
    shares: bool | None = None
    """Whether common beginnings are computed once; found out on the first batch that has one. Once: the trial changes how that
    batch's bfloat16 gradients are rounded, and a start that goes on would end with other weights."""

    @property
    def mean(self) -> float:
        """Mean loss of the last steps."""
        return sum(self.recent) / len(self.recent) if self.recent else math.nan

    @property
    def good(self) -> bool:
        """Whether the loss is where it was at its lowest, so that the weights are worth keeping."""
        return self.mean <= DOUBTFUL_BY * self.lowest + AND_DOUBTFUL or not math.isfinite(self.lowest)

    def end_step(self) -> None:
        """Adds the step's loss. Raises Diverged."""
        loss, self.step_loss = self.step_loss, 0.0
        self.steps += 1
        if not math.isfinite(loss):
            raise Diverged(self.steps, f"the loss became {loss}")
        self.window_loss += loss
        self.window_steps += 1
        self.recent = [*self.recent[-WINDOW + 1 :], loss]
        if self.steps == 1:
            self.lowest = 2 * loss  # a single batch may be an easy one
        if len(self.recent) >= LEAST and self.mean > RISES_BY * self.lowest + AND:
            raise Diverged(self.steps, f"the loss rose from {self.lowest:.3g} to {self.mean:.3g}")
        if len(self.recent) == WINDOW:
            self.lowest = min(self.lowest, self.mean)


def check_weights(model: Any, step: int) -> None:
    """Raises Diverged where trained weights are NaN or infinite. Every process calls it."""
    if not shards.is_finite(weight for weight in model.parameters() if weight.requires_grad):
        raise Diverged(step, "weights became NaN or infinite")


class Resumable(Trainer):
    """What the loops share; stands before a TRL trainer."""

    totals: Totals
    recovery: Recovery
    _writer: ThreadPoolExecutor
    sampler: Sampler[int]
    kept: int = 2
    """Checkpoints."""
    _writing: Future[tuple[float, list[tuple[int, str, str]]]] | None = None
    """The checkpoint that is being written."""

    @classmethod
    def made(cls, totals: Totals, recovery: Recovery, sampler: Sampler[int], **options: Any) -> Resumable:
        """The trainer. `totals`: of the checkpoint that is resumed; `sampler`: the order of the rows."""
        made = cls(**options)
        made.totals, made.recovery, made.sampler = totals, recovery, sampler
        made._writer = ThreadPoolExecutor(1, "checkpoint")
        return made

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.sampler

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # tokenised by finetune_assets.training.tokens, as benchmark and serving tokenise

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset  # computed by finetune_assets.worker.preferences, and kept beside the stage

    def load_weights(self, folder: Path) -> None:
        """The weights (an adapter's alone) of a checkpoint or of the best ones."""
        self._load_from_checkpoint(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if (Path(resume_from_checkpoint) / snapshot.WEIGHTS).exists():
            snapshot.load_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> torch.Tensor:
        """One micro-batch; the last one of a step may raise Diverged."""
        tokens = int(inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel())
        loss: torch.Tensor = super().training_step(model, inputs, *rest, **named)
        tokens, whole = ranks.summed([tokens, float(loss)])
        self.totals.tokens += round(tokens)
        self.totals.step_loss += whole / ranks.count()
        if self.accelerator.sync_gradients:
            self.totals.end_step()
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called before the optimiser's step. Raises Diverged, so that the step is not made with a gradient that is no number."""
        norm: Any = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not math.isfinite(float(norm)):
            raise Diverged(self.totals.steps, f"the norm of the gradient became {float(norm)}")
        return norm

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The checkpoint's state with this attempt's learning rate, which may be lower than the one it was saved with."""
        if checkpoint is not None and self.is_fsdp_enabled:
            shards.load_optimizer(self, Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        scheduler = cast("Any", self.lr_scheduler)
        if checkpoint is None or not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            return
        scheduler.base_lrs = [self.args.learning_rate] * len(scheduler.base_lrs)
        rates = [base * shape(scheduler.last_epoch) for base, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler._last_lr = rates
        for group, rate in zip(cast("Any", self.optimizer).param_groups, rates, strict=True):
            group["initial_lr"], group["lr"] = self.args.learning_rate, rate

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Begins a whole checkpoint: not of weights that are about to diverge, and not while the one before is being written.

        Raises Diverged where the weights are no numbers any more.
        """
        folder = Path(str(self.args.output_dir))
        if not ranks.same(ranks.first() and self._may_save(folder)):
            return
        check_weights(self.model, self.state.global_step)
        self.settle()
        now = snapshot.Snapshot.of(self, self.totals)
        if not ranks.first():
            return
        copy = now if self.is_fsdp_enabled else now.copied()
        self._writing = self._writer.submit(_write, copy or now, folder, self.state.global_step, self.kept)
        if copy is None:  # no room for a copy: the training waits
            self.settle()

    def _may_save(self, folder: Path) -> bool:
        done = checkpoints.is_whole(folder / f"checkpoint-{self.state.global_step}")
        busy = self._writing is not None and not self._writing.done()
        return self.totals.good and not done and not busy

    def settle(self) -> None:
        """Waits for the checkpoint that is being written, and tells what came of it. Raises what the writing raised."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        self.totals.checkpoint_seconds, events = writing.result()
        for step, did, cause in events:
            self.recovery.record("disk_full", step, did, cause)


def _write(taken: snapshot.Snapshot, folder: Path, step: int, kept: int) -> tuple[float, list[tuple[int, str, str]]]:
    """A checkpoint, or none where the disk is full, and all but the newest `kept` away; its seconds, and what was done about the
    disk (step, did, cause).
    """
    began = time.monotonic()
    events: list[tuple[int, str, str]] = []
    for last in (False, True):
        try:
            with replacing_folder(folder / f"checkpoint-{step}") as draft:
                taken.write(draft)
                checkpoints.seal(draft)
            break
        except Exception as error:
            if not disk_full(error):
                raise
            if last:
                events.append((step, "goes on without this checkpoint", "still no room for it"))
            else:
                events.append((step, "older checkpoints deleted", "no room for a checkpoint"))
                checkpoints.prune(folder, kept=1)
    checkpoints.prune(folder, kept)
    return time.monotonic() - began, events


class SftLoop(Resumable, SFTTrainer):
    """`sft`, `tools` and `continued_pretraining`: mean loss over the target tokens of a step."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Mean over the target tokens.

        One process computes it by `worker.targets`: TRL's way works in chunks, computes entropy and accuracy besides, and repeats
        the product in the backward pass. With several, whose wrappers want one forward pass a step, it is TRL's.
        """
        whole = cast("Any", self.model)
        vocabulary = int(whole.config.get_text_config().vocab_size)
        elsewhere = self.accelerator.num_processes > 1 or self.aux_loss_enabled or self.args.use_liger_kernel
        if elsewhere or not targets.fits(inputs, vocabulary):
            return SFTTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        head = whole.get_output_embeddings()
        # One context around both passes: inside it weights are cast once.
        with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16, enabled=bool(self.args.bf16)):
            loss = targets.nats(model, head, inputs, self._may_share(model, head, inputs))
        count = (inputs["labels"][:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / torch.as_tensor(count, device=loss.device).clamp(min=1)
        return (loss, None) if return_outputs else loss

    def _may_share(self, model: Any, head: torch.nn.Module, inputs: Any) -> bool:
        """Not while activations are recomputed: that leaves no keys and values."""
        if self.recovery.state.recompute:
            return False
        if self.totals.shares is None and targets.common_beginning(inputs["input_ids"], inputs["labels"]):
            self.totals.shares = targets.can_share(model, head, inputs)
            if not self.totals.shares:
                self.recovery.progress.note("This architecture computes the rows' common beginning (system prompt) for each row.")
        return bool(self.totals.shares)


class DpoLoop(Resumable, DPOTrainer):
    """`dpo`."""


class KtoLoop(Resumable, KTOTrainer):
    """`kto`."""
