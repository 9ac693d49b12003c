"""The child process: locks, death with its parent, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock

from finetune_assets.storage import read_json
from finetune_assets.training.local import cancel, is_running
from finetune_assets.worker.__main__ import run_task
from finetune_assets.worker.progress import Progress


def spec_file(folder: Path, **values: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "spec.json"
    file.write_text(json.dumps({"task": "train", "output": str(folder), **values}))
    return file


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.05)


def test_an_unknown_task_leaves_an_error_and_no_traceback(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "finetune_assets.worker", str(spec_file(tmp_path, task="nonsense"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert read_json(tmp_path / "error.json")["type"] == "SettingsError"
    assert "allowed: weeks, train" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_model_says_what_to_do(tmp_path: Path, capsys):
    spec = {"task": "train", "output": str(tmp_path), "stages": [], "adapter": "full", "threads": 1, "seed": 1}
    assert run_task({**spec, "base_model": "/no/such/model", "base_model_identity": {}}) == 1
    error = read_json(tmp_path / "error.json")
    assert error["type"] == "ModelUnavailable"
    assert "/no/such/model" in error["message"]
    assert "Traceback" not in capsys.readouterr().err


def test_a_second_process_waits_for_the_first(tmp_path: Path):
    lock = FileLock(tmp_path / "worker.lock")
    with lock:
        child = subprocess.Popen([sys.executable, "-m", "finetune_assets.worker", str(spec_file(tmp_path, task="nonsense"))])
        wait_for(
            lambda: "waiting" in ((tmp_path / "progress.jsonl").read_text() if (tmp_path / "progress.jsonl").exists() else "")
        )
        assert child.poll() is None
        assert is_running(tmp_path)
    assert child.wait(30) == 1
    assert not is_running(tmp_path)
    assert not cancel(tmp_path)


def test_cancelling_ends_the_process_that_holds_the_lock(tmp_path: Path):
    # A shell that starts the tests in the background may leave SIGTERM ignored or blocked, and children inherit that.
    code = (
        "import signal, time; signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM]);"
        "signal.signal(signal.SIGTERM, signal.SIG_DFL); print('ready', flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    worker.stdout.close()
    with FileLock(tmp_path / "worker.lock"):
        (tmp_path / "worker.json").write_text(json.dumps({"pid": worker.pid, "host": os.uname().nodename}))
        assert cancel(tmp_path)
    assert worker.wait(10) == -signal.SIGTERM


def test_the_child_dies_with_a_parent_that_is_killed(tmp_path: Path):
    file = spec_file(tmp_path, task="nonsense")
    parent_code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'finetune_assets.worker', sys.argv[1]],"
        " env={**os.environ, 'FINETUNE_DIE_WITH_PARENT': str(os.getpid())})\n"
        "print(child.pid, flush=True)\ntime.sleep(60)\n"
    )
    with FileLock(tmp_path / "worker.lock"):
        parent = subprocess.Popen([sys.executable, "-c", parent_code, str(file)], stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        wait_for((tmp_path / "progress.jsonl").exists)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
        wait_for(lambda: not alive(child), 5)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def test_progress_works_out_the_time_left_from_where_it_began(tmp_path: Path, capsys):
    progress = Progress.open(tmp_path)
    progress.update("train", 50, 100, loss=2.0)  # a resumed job begins at 50
    time.sleep(0.1)
    progress.update("train", 51, 100, loss=float("nan"), tokens_per_second=1234.5)
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert lines[0]["seconds_left"] is None
    assert 4 < lines[1]["seconds_left"] < 30
    assert lines[1]["loss"] is None
    assert "train 50/100 · loss 2" in capsys.readouterr().err
