"""Task `probe`: ten steps of a training's first stage, for a plan that is true. The spec is a training's; nothing is kept.

The batches are taken at even distances from the shortest to the longest rows, the longest among them, so that their rate is the
training's and their memory its peak, with the copy of a checkpoint held beside them. The first two steps warm up and do not
count. Where memory runs out the micro-batch is halved, as the training would do. Of a training in several processes one is
measured, with its part of the batch and of the threads. Result: tokens_per_second (of all), memory_bytes (of one; null where the
weights are divided, which one process cannot show), micro_batch.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import resource
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from finetune_assets.errors import TrainingError
from finetune_assets.training.tokens import Rows
from finetune_assets.worker import memory, models, preferences, snapshot
from finetune_assets.worker.loops import Resumable, Totals
from finetune_assets.worker.progress import Progress
from finetune_assets.worker.recovery import Recovery
from finetune_assets.worker.stage import Stage, check, make_loop, on_this_machine, read_rows, ready_model

STEPS = 10
WARM = 2


def run(spec: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Measures. Raises what the training would, but for memory: `ran_out` says that it does not suffice for any micro-batch."""
    check(spec, progress)
    spec = on_this_machine(spec)
    here = int(spec.get("processes") or 1)
    processes = here * int(spec.get("nodes") or 1)
    torch.set_num_threads(max(1, int(spec["threads"]) // here))
    first = dict(spec["stages"][0])
    share = int(first["hyperparameters"]["batch_size"]) // processes
    first["hyperparameters"] = {**first["hyperparameters"], "epochs": 1, "batch_size": share}
    stage = Stage({**spec, "stages": [first]}, 0, None)
    tokenizer = models.load_tokenizer(spec["base_model"], stage.revision)
    stage.place.folder.mkdir(parents=True, exist_ok=True)
    recovery = Recovery(stage.place.folder, progress, int(stage.values["batch_size"]), stage.smallest)
    try:
        while True:
            try:
                with memory.limited():
                    made = _measured(stage, tokenizer, recovery)
                    divided = processes > 1 and spec.get("parallel") == "fsdp"
                    rate = round(processes * made["tokens_per_second"], 2)
                    memory_bytes = None if divided else made["memory_bytes"]
                    return {
                        **made,
                        "tokens_per_second": rate,
                        "memory_bytes": memory_bytes,
                        "micro_batch": recovery.micro_batch,
                    }
            except Exception as error:
                if not memory.ran_out(error):
                    raise
                short = memory.in_short(error)
            memory.release()  # outside of the handler: a traceback would keep the model of the failed attempt in memory
            try:
                recovery.out_of_memory(0, short)
            except TrainingError as error:
                return {"probe": 0, "ran_out": str(error)}
    finally:
        shutil.rmtree(Path(spec["output"]) / "stages", ignore_errors=True)


def _measured(stage: Stage, tokenizer: PreTrainedTokenizerBase, recovery: Recovery) -> dict[str, Any]:
    """Ten steps with the recovery's micro-batch."""
    progress = recovery.progress
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # what an attempt that failed took is not what the training takes
    model, max_length = ready_model(stage, tokenizer, progress)
    rows, _ = read_rows(stage, tokenizer, max_length, progress)
    some = evenly(rows, int(stage.values["batch_size"]) * STEPS)
    if stage.objective in ("dpo", "kto"):
        file = stage.place.folder / "reference.json"
        before = preferences.reference(file, model, {"train": (stage.objective, some)}, stage.bf16, progress)
        some = preferences.with_reference(stage.objective, some, before["train"])
    totals = Totals()
    loop = make_loop(stage, model, tokenizer, (some, Rows()), totals, recovery)
    clock = _Clock(loop, totals)
    loop.add_callback(clock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop.train()
    peak = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {"probe": totals.steps, "tokens_per_second": round(clock.rate(), 2), "memory_bytes": int(peak)}


def evenly(rows: Rows, count: int) -> Rows:
    """`count` rows at even distances by length, the longest among them."""
    order = sorted(range(len(rows.examples)), key=rows.lengths.__getitem__)
    if len(order) > count:
        order = [order[round(at * (len(order) - 1) / (count - 1))] for at in range(count)]
    return Rows([rows.examples[index] for index in order])


class _Clock(TrainerCallback):
    """Tokens and time after the warm-up."""

    def __init__(self, loop: Resumable, totals: Totals):
        self._loop, self._totals = loop, totals
        self._copy: snapshot.Snapshot | None = None
        self._marks: list[tuple[float, int]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A mark for each step; a checkpoint's copy once, as while one is being written."""
        if len(self._marks) + 1 == WARM:
            self._copy = snapshot.Snapshot.of(self._loop, self._totals).copied()
        self._marks.append((time.monotonic(), self._totals.tokens))

    def rate(self) -> float:
        """Tokens a second between the end of the warm-up and the last step."""
        (start, before), (end, after) = self._marks[min(WARM, len(self._marks)) - 1], self._marks[-1]
        return (after - before) / max(end - start, 1e-9)
