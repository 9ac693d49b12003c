"""What a training does about its own trouble: each recovery bounded, remembered across processes, and told.

<stage>/recovery.json    micro-batch, activation checkpointing, factor of the learning rate, and the events so far
<stage>/alive.json       while a process works on the stage: what the kernel's counters were when it began

out_of_memory      (also when the kernel killed the process for it) the micro-batch is halved, accumulation doubled; at last
                   activations are recomputed; after that the training fails
diverged           loss, gradient or weights are no numbers, or the loss rises far above its lowest: back to the last good
                   checkpoint with half the learning rate, at most 3 times
disk_full          older checkpoints go and the checkpoint is written again, or left out; the model itself needs room
broken_checkpoint  the one before it is used
early_stop         validation gets no better: the best weights are the result
resumed            a process went on where another one ended; what it does after its own recoveries is told by those
"""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune_assets.errors import TrainingError
from finetune_assets.storage import read_json, write_json
from finetune_assets.training.machine import boot_id, killed_for_memory
from finetune_assets.worker import curve, ranks
from finetune_assets.worker.progress import Progress

MOST_DIVERGENCES = 3
SLOWER = 0.5


class Diverged(Exception):
    """Loss, gradient or weights are no numbers any more, or the loss is far above its lowest."""

    def __init__(self, step: int, what: str):
        """`step`: of the optimiser, counted from 1; `what`: a sentence."""
        super().__init__(what)
        self.step, self.what = step, what


@dataclass
class State:
    """What recovery.json holds."""

    micro_batch: int | None = None
    recompute: bool = False
    """Activations are computed again in the backward pass instead of kept."""
    rate: float = 1.0
    events: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """what, step, did."""


class Recovery:
    """The recoveries of one stage."""

    def __init__(self, folder: Path, progress: Progress, batch_size: int, smallest: int = 1):
        """`folder`: of the stage; `batch_size`: examples of a step; `smallest`: least micro-batch of the objective."""
        self._folder, self.progress = folder, progress
        self._batch_size, self._smallest = batch_size, smallest
        self._before = "ended early"  # what became of the process before this one
        file = folder / "recovery.json"
        self.state = State(**read_json(file)) if file.exists() else State()

    @property
    def micro_batch(self) -> int:
        """Examples that are in memory at a time, in each process."""
        return self.state.micro_batch or self._batch_size // ranks.count()

    @property
    def accumulation(self) -> int:
        """Micro-batches of an optimiser step."""
        return self._batch_size // (self.micro_batch * ranks.count())

    def begin(self) -> None:
        """Notes that a process begins; halves the micro-batch where the one before was killed for its memory.

        Of several processes the first decides for all. The kernel's counter is compared with that of the same start of the same
        machine only.
        """
        if ranks.first():
            alive = self._folder / "alive.json"
            now = {"boot": boot_id(), "killed_for_memory": killed_for_memory()}
            before = read_json(alive) if alive.exists() else {}
            self._before = "was killed" if before else self._before
            if before.get("boot") == now["boot"] and now["killed_for_memory"] > before["killed_for_memory"]:
                self.out_of_memory(0, "the kernel ended the process before this one for want of memory")
            write_json(alive, now)
        self.state = ranks.same(self.state)

    def resumed(self, step: int) -> None:
        """Tells that this process goes on from a checkpoint of the one before it."""
        self.record("resumed", step, "goes on from its checkpoint", f"the process before this one {self._before}")

    def end(self) -> None:
        """Notes that the process ends by itself."""
        (self._folder / "alive.json").unlink(missing_ok=True)

    def out_of_memory(self, step: int, cause: str) -> None:
        """Halves the micro-batch, or recomputes activations. Raises TrainingError where both have been done."""
        smaller = _divisor_below(self._batch_size // ranks.count(), self.micro_batch)
        if smaller is not None and smaller >= self._smallest:
            before, self.state.micro_batch = self.micro_batch, smaller
            did = f"micro-batch {before} → {smaller}, {self.accumulation} of them accumulated for a step of {self._batch_size}"
        elif not self.state.recompute:
            self.state.recompute = True
            did = "activations are computed again in the backward pass"
        else:
            raise TrainingError(
                f"Memory ran out at step {step} with a micro-batch of {self.micro_batch} and activations recomputed ({cause}). "
                "Lower hyperparameters.max_length, set `adapter: lora`, or take a smaller base_model or a larger machine."
            )
        self.record("out_of_memory", step, did, cause)

    def diverged(self, error: Diverged, learning_rate: float, resumed_from: int) -> None:
        """Halves the learning rate. Raises TrainingError where that has been done too often, or cannot help."""
        done = sum(event["what"] == "diverged" for event in self.state.events)
        rate = self.state.rate * learning_rate
        if error.step <= 1 or done >= MOST_DIVERGENCES:
            start = "the weights that it starts from give no loss or gradient"
            tried = start if error.step <= 1 else f"{done} times a lower rate did not help"
            raise TrainingError(
                f"{error.what} at step {error.step} (learning rate {rate:.3g}), and {tried}. Lower "
                "hyperparameters.learning_rate, take preset `conservative`, or check the base model and the data."
            )
        self.state.rate *= SLOWER
        self.record(
            "diverged", error.step, f"back to step {resumed_from}, learning rate {rate:.3g} → {rate * SLOWER:.3g}", error.what
        )

    def record(self, what: str, step: int, did: str, cause: str = "") -> None:
        """Remembers an event and tells it: in recovery.json, in the training log and to whoever watches.

        A disk that stays full is one event of each kind, told once and counted: `times`, and `last_step`.
        """
        event = {"what": what, "step": step, "did": did, **({"cause": cause} if cause else {})}
        alike = (one for one in self.state.events if what == "disk_full" and (one["what"], one["did"]) == (what, did))
        known = next(alike, None)
        if known is None:
            self.state.events.append(event)
        else:
            known |= {"times": known.get("times", 1) + 1, "last_step": step}
        if not ranks.first() and what != "out_of_memory":  # memory may run out in one process alone
            return
        try:
            write_json(self._folder / "recovery.json", asdict(self.state))
            if known is None:
                curve.append(self._folder / "training_log.jsonl", json.dumps({"step": step, "recovery": event}) + "\n")
        except OSError as error:
            if not disk_full(error):
                raise
        if known is None:
            self.progress.note(f"Step {step:,}: {cause + ': ' if cause else ''}{did}.")


def _divisor_below(batch_size: int, micro_batch: int) -> int | None:
    """The largest divisor of the batch that is at most half of the micro-batch."""
    return next((size for size in range(micro_batch // 2, 0, -1) if batch_size % size == 0), None)


def disk_full(error: BaseException) -> bool:
    """Whether an error means that a file could not grow: no space, a quota, a limit. torch and safetensors say it in words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    texts = ("no space left", "os error 28", "os error 27", "disk quota", "file write failed", "unexpected pos", "file too large")
    return any(text in str(error).lower() for text in texts)
