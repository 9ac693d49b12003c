"""The trainer on this machine: one child process a job, in a folder that is named after what decides its result.

`submit` returns when the job has ended. A job that was killed goes on from its last whole checkpoint when it is submitted
again; one that has finished is not trained again. Two processes that submit the same job take turns by the lock of its folder.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jinja2
from filelock import FileLock, Timeout

from finetune_assets import errors
from finetune_assets.errors import DataError, LaunchError, TrainingError
from finetune_assets.storage import Store, read_json, write_json
from finetune_assets.training import base_model, plan
from finetune_assets.training.checks import check_request
from finetune_assets.training.encoding import LightRenderer
from finetune_assets.training.machine import default_precision, free_threads
from finetune_assets.training.presets import Hyperparameters
from finetune_assets.training.spec import train_spec
from finetune_assets.training.tokens import Kind, token_rows
from finetune_assets.training.trainer import Estimate, JobHandle, JobState, TrainedResult, TrainingRequest
from finetune_assets.workers import THIS_MACHINE, Workers, launched, stop

CANCELLED = "cancelled.json"

KINDS: dict[str, tuple[Kind, str]] = {
    "continued_pretraining": ("text", ""),
    "sft": ("chat", "train.jsonl"),
    "tools": ("chat", "train.jsonl"),
    "dpo": ("preferences", "preferences.jsonl"),
    "kto": ("kto", "kto.jsonl"),
}
"""What each objective reads."""

MOST_RESTARTS = 2
"""A worker that was killed is started again this often."""
MOST_HALVINGS = 10
"""So often beside that several processes start again for want of memory, each time with half the micro-batch: `worker.recovery`
ends it before, unless a full disk keeps it from remembering."""


class LocalTrainer:
    """The `Trainer` protocol over `python -m finetune_assets.worker`."""

    provider = "local"

    def __init__(self, launch: Callable[[Path, Path], None], store: Store, workers: Workers = THIS_MACHINE):
        """`launch(spec file, output folder)` runs the worker to its end, and raises LaunchError where it fails."""
        self._launch = launch
        self._store = store
        self._workers = workers

    def spec_hash(self, request: TrainingRequest) -> str:
        """The hash that names the job's folder."""
        return str(train_spec(request, self._store, self._workers)["spec_hash"])

    def validate(self, request: TrainingRequest) -> None:
        """Refuses what this machine cannot train: see `finetune_assets.training.checks`."""
        check_request(request, self._store, self._workers)

    def estimate(self, request: TrainingRequest) -> Estimate:
        """Tokens counted; time and memory from earlier jobs, from ten steps of this one, or from the number of weights.

        A model that comes to this machine with the count is checked then. Raises DataError where no row of a stage fits, and
        what `validate` does.
        """
        workers = self._workers
        known = base_model.folder(request.base_model) is not None
        counts = [self._count(request, name, values) for name, values in request.chain]
        for (name, values), count in zip(request.chain, counts, strict=True):
            if not count.rows:
                raise DataError(
                    f"None of the {count.dropped:,} rows of `{name}` fits in {values.max_length} tokens, or in the model's "
                    "context. Raise hyperparameters.max_length, or take another base_model."
                )
        if not known:
            self.validate(request)
        shape = base_model.shape(request.base_model)
        peers = plan.finished_peers(self._store, base_model.identity(request.base_model), request, workers)
        machine = ((workers.threads or free_threads()) * workers.nodes, request.precision or default_precision())
        estimated = plan.estimate(request, counts, shape, peers, machine, workers)
        if not plan.worth_a_probe(estimated):
            return estimated
        try:
            probed = plan.estimate(request, counts, shape, [self._probe(request)], machine, workers)
        except LaunchError as failed:
            return replace(estimated, note=f"Ten steps could not be measured, the number of weights is what is left: {failed}")
        if workers.together == 1:
            return probed
        return replace(probed, note="Ten steps were measured in one of the processes: what they tell each other takes longer.")

    def submit(self, request: TrainingRequest) -> JobHandle:
        """Trains, or finds the finished job. Raises the worker's error, or LaunchError where it was killed."""
        spec = train_spec(request, self._store, self._workers)
        folder = Path(spec["output"])
        handle = JobHandle(self.provider, spec["spec_hash"], request.run_key, request.fingerprint)
        if _result(folder) is None:
            write_json(folder / "spec.json", spec)
            for stale in ("error.json", CANCELLED):
                (folder / stale).unlink(missing_ok=True)
            self._run(folder / "spec.json", folder, MOST_RESTARTS)
        return handle

    def poll(self, handle: JobHandle) -> JobState:
        """From the files of the job's folder."""
        folder = self._store.job(handle.id)
        progress = last_progress(folder / "progress.jsonl")
        if _result(folder) is not None:
            return JobState("succeeded", "finished", None, progress)
        if is_running(folder):
            return JobState("running", "training", None, progress)
        if (folder / CANCELLED).exists():
            return JobState("cancelled", "cancelled", None, progress)
        if (folder / "error.json").exists():
            return JobState("failed", "failed", str(read_json(folder / "error.json")["message"]), progress)
        if progress:
            error = "The process ended without a result: killed, or out of memory. Run the same again: it goes on."
            return JobState("failed", "interrupted", error, progress)
        return JobState("pending", "not started")

    def result(self, handle: JobHandle) -> TrainedResult:
        """The model's folder and result.json. Raises TrainingError where the job has not succeeded."""
        folder = self._store.job(handle.id)
        result = _result(folder)
        if result is None:
            state = self.poll(handle)
            raise TrainingError(f"Job {handle.id} has no model: {state.provider_status}. {state.error or ''}".rstrip())
        return TrainedResult(str(folder / result["model"]), result)

    def cancel(self, handle: JobHandle) -> None:
        """Ends the child process; its checkpoints stay."""
        cancel(self._store.job(handle.id))

    def _run(self, spec_file: Path, folder: Path, restarts: int = 0) -> None:
        """Launches the worker, again where it died without a word; the error that it left, in its own class."""
        halvings = MOST_HALVINGS if restarts else 0
        while True:
            try:
                self._launch(spec_file, folder)
                return
            except LaunchError as failed:
                left = read_json(folder / "error.json") if (folder / "error.json").exists() else {}
                goes_on = not (folder / CANCELLED).exists()
                if goes_on and left.get("type") == "StartAgain" and halvings > 0:
                    halvings -= 1
                elif goes_on and (not left or left.get("restart")) and restarts > 0:
                    restarts -= 1
                else:
                    known = getattr(errors, str(left.get("type")), None)
                    if isinstance(known, type) and issubclass(known, errors.FinetuneError):
                        raise known(str(left["message"])) from failed
                    raise

    def _probe(self, request: TrainingRequest) -> dict[str, Any]:
        """Rate and memory of ten steps, measured once for each spec. Raises LaunchError where the worker died, or its memory does
        not suffice.
        """
        spec = train_spec(request, self._store, self._workers)
        output = self._store.home / "plans" / f"probe-{spec['spec_hash']}"
        if not (output / "result.json").exists():
            write_json(output / "spec.json", {**spec, "task": "probe", "output": str(output)})
            self._run(output / "spec.json", output)
        result: dict[str, Any] = read_json(output / "result.json")
        if "ran_out" in result:
            (output / "result.json").unlink()  # another time there may be more memory
            raise LaunchError(str(result["ran_out"]))
        return result

    def _count(self, request: TrainingRequest, objective: str, values: Hyperparameters) -> plan.TokenCount:
        """One stage's rows, in this process where the tokenizer's files are here, else by the worker, which downloads them."""
        kind, name = KINDS[objective]
        file = request.text if kind == "text" else request.dataset / name
        if file is None:
            return plan.TokenCount(0, 0, 0, 0, 0)
        identity = base_model.identity(request.base_model)
        where = base_model.folder(request.base_model)
        shape = base_model.shape(request.base_model)
        if where is not None and shape is not None:
            length = min(values.max_length, shape.context or values.max_length)
            try:
                return plan.counted(token_rows(lambda: LightRenderer(where), (kind, file), identity, length, self._store.tokens))
            except (FileNotFoundError, jinja2.TemplateError, TypeError):
                pass  # no tokenizer.json, or a template that needs more than plain jinja2: the worker counts
        output = self._store.home / "plans" / f"{request.assistant}.count"
        spec = {"task": "count_tokens", "output": str(output), "base_model": request.base_model, "file": str(file), "kind": kind}
        spec |= {"base_model_identity": identity, "max_length": values.max_length, "cache": str(self._store.tokens)}
        write_json(output / "spec.json", spec)
        self._run(output / "spec.json", output)
        result = read_json(output / "result.json")
        return plan.TokenCount(**{field: result[field] for field in asdict(plan.TokenCount(0, 0, 0, 0, 0))})


def is_running(folder: Path) -> bool:
    """Whether a worker holds the lock of a job's folder."""
    if not (folder / "worker.lock").exists():
        return False
    lock = FileLock(folder / "worker.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def cancel(folder: Path) -> bool:
    """Ends the worker of a job's folder, here or where its launcher put it; whether there was one."""
    elsewhere = launched(folder)
    if elsewhere:
        write_json(folder / CANCELLED, {"tasks": elsewhere})
        return sum(stop(task) for task in elsewhere) > 0  # each of them
    if not is_running(folder):
        return False
    try:
        holder = read_json(folder / "worker.json")
    except (OSError, ValueError):
        return False
    if holder["host"] != os.uname().nodename:
        raise TrainingError(f"The job runs on {holder['host']}; cancel it there.")
    write_json(folder / CANCELLED, holder)
    os.kill(int(holder["pid"]), signal.SIGTERM)
    return True


def _result(folder: Path) -> dict[str, Any] | None:
    """result.json of a job whose model has the files it was sealed with, else None."""
    try:
        result: dict[str, Any] = read_json(folder / "result.json")
        model = folder / str(result["model"])
        sizes: dict[str, list[Any]] = read_json(model / "whole.json")
    except (OSError, ValueError, KeyError):
        return None
    whole = all((model / name).exists() and (model / name).stat().st_size == entry[0] for name, entry in sizes.items())
    return result if whole else None


def last_progress(file: Path) -> dict[str, Any]:
    """The last whole report."""
    if not file.exists():
        return {}
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 4096))
        lines = stream.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            report = json.loads(line)
        except ValueError:
            continue
        if isinstance(report, dict) and "step" in report:
            return report
    return {}
