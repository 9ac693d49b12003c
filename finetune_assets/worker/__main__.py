"""Runs one task: `python -m finetune_assets.worker SPEC.json`.

SPEC is a JSON object with `task` (a module of this folder with `run(spec, progress) -> dict`) and `output` (the task's folder).
Written there: `progress.jsonl`, then `result.json` (after it the module's `clean(spec)` runs, where it has one) or `error.json`
{type, message}; exit code 0 or 1. Two processes on one folder take turns: the second waits for the lock, and finds what the
first left. With `FINETUNE_DIE_WITH_PARENT` (the parent's pid, or 1) the process dies with the one that started it, also when
that is killed with SIGKILL.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, cast

from finetune_assets.training.machine import cores
from finetune_assets.worker import ranks

PARENT = os.getppid()  # read first: compared again once the death signal is set
BEGAN = time.monotonic()

TASKS = {
    "weeks": "finetune_assets.worker.weeks",
    "train": "finetune_assets.worker.train",
    "count_tokens": "finetune_assets.worker.count_tokens",
    "probe": "finetune_assets.worker.probe",
    "benchmark": "finetune_assets.worker.benchmark",
    "embed": "finetune_assets.worker.embed",
    "chat": "finetune_assets.worker.chat",
}


def main(arguments: list[str]) -> int:
    """Runs the spec file named by the only argument; the exit code."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m finetune_assets.worker SPEC.json\n")
        return 2
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # `jobs cancel` sends it, and a parent may have left it ignored
    spec = cast("dict[str, Any]", json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    spec["began"] = BEGAN
    trains = spec.get("task") == "train"
    processes, nodes = (int(spec.get(name) or 1) if trains else 1 for name in ("processes", "nodes"))
    set_environment(int(spec.get("threads") or 0) // processes)
    if processes * nodes > 1 and "RANK" not in os.environ:
        if ranks.node() > 0 and (Path(spec["output"]) / "result.json").exists():
            return 0  # the others have finished
        tell_others(spec, arguments[0], nodes)
        ranks.become(spec, Path(arguments[0]))
    if not ranks.first():
        return follow(spec)
    with ExitStack() as stack:
        if "DAGSTER_PIPES_CONTEXT" in os.environ:
            from dagster_pipes import open_dagster_pipes  # noqa: PLC0415  # pyright: ignore[reportUnknownVariableType]

            stack.enter_context(open_dagster_pipes())
        return run_task(spec)


def tell_others(spec: dict[str, Any], spec_file: str, nodes: int) -> None:
    """What the other machines of a training wait for: without them it never begins."""
    from finetune_assets.worker.progress import Progress  # noqa: PLC0415

    if nodes > 1 and ranks.node() == 0:
        Progress.open(Path(spec["output"])).note(
            f"Waits for the other {nodes - 1} of {nodes} machines, fifteen minutes at most: start there, with FINETUNE_NODE from "
            f"1 to {nodes - 1}, `FINETUNE_NODE=1 python -m finetune_assets.worker {spec_file}`."
        )


def run_task(spec: dict[str, Any]) -> int:
    """Runs one task under the lock of its folder; the exit code."""
    from filelock import FileLock, Timeout  # noqa: PLC0415

    from finetune_assets.errors import SettingsError  # noqa: PLC0415
    from finetune_assets.storage import sweep, write_json  # noqa: PLC0415
    from finetune_assets.worker.progress import Progress  # noqa: PLC0415

    output = Path(spec["output"])
    progress = Progress.open(output)
    lock = FileLock(output / "worker.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.note(f"Another process works in {output}; waiting until it is done.")
        lock.acquire()
    try:
        (output / "error.json").unlink(missing_ok=True)
        sweep(output)
        write_json(output / "worker.json", {"pid": os.getpid(), "host": os.uname().nodename})
        if spec.get("task") not in TASKS:
            raise SettingsError(f"task {spec.get('task')!r} is unknown; allowed: {', '.join(TASKS)}.")
        module = importlib.import_module(TASKS[spec["task"]])
        write_json(output / "result.json", module.run(spec, progress))
        if hasattr(module, "clean"):
            module.clean(spec)
        return 0
    except Exception as error:
        tell(error, output)
        return 1
    finally:
        (output / "worker.json").unlink(missing_ok=True)
        lock.release()


def follow(spec: dict[str, Any]) -> int:
    """One of several processes of a task, not the first; the exit code."""
    from finetune_assets.worker.progress import Progress  # noqa: PLC0415

    output = Path(spec["output"])
    try:
        importlib.import_module(TASKS[spec["task"]]).run(spec, Progress.open(output))
        return 0
    except Exception as error:
        tell(error, output)
        return 1


def tell(error: Exception, output: Path) -> None:
    """A failure, in the same places always: error.json, stderr, the run's log."""
    from finetune_assets.errors import FinetuneError  # noqa: PLC0415
    from finetune_assets.storage import write_json  # noqa: PLC0415
    from finetune_assets.worker.progress import log  # noqa: PLC0415

    if not isinstance(error, FinetuneError):
        traceback.print_exc()
    message = str(error) or type(error).__name__
    # A CUDA error leaves a process that can do nothing more: a new one goes on from the checkpoint.
    restart = type(error).__name__ in ("AcceleratorError", "StartAgain") or "CUDA error" in message or ranks.lost(error)
    with suppress(OSError):  # the disk may be full: then the log alone tells
        if ranks.count() == 1 or not (output / "error.json").exists():  # the first of several to fail knows why
            write_json(output / "error.json", {"type": type(error).__name__, "message": message, "restart": restart})
    sys.stderr.write(f"{type(error).__name__}: {message}\n")
    log(f"{type(error).__name__}: {message}")


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent ends (prctl(2), PR_SET_PDEATHSIG = 1), if the environment wants it.

    The signal comes when the parent's *thread* that started the child ends: start it from one that lives on.
    """
    wanted = os.environ.get("FINETUNE_DIE_WITH_PARENT", "0")
    if wanted == "0" or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    expected = int(wanted) if int(wanted) > 1 else PARENT
    if os.getppid() != expected:  # it died before the call above
        sys.exit("The process that started this one is gone.")


def set_environment(threads: int) -> None:
    """What torch, tokenizers and transformers read when they are imported. `threads`: 0 as many as there are cores, which torch
    does not know of a container whose time is limited; what the environment says goes before that."""
    defaults = {
        # Threads that wait sleep: with the default, which spins, two threads on a busy machine were ten times slower than one.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": str(threads or cores()),
        "MKL_NUM_THREADS": str(threads or cores()),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if threads:
        os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
