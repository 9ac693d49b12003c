"""A process killed with SIGKILL at every step between estimate and result: the next one ends with exactly one paid job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_assets.environment import ROOT
from finetune_assets.registry import Ledger
from finetune_assets.registry.spending import month
from finetune_assets_tests.training.fake_provider import FakeProvider
from finetune_assets_tests.training.remote_request import dataset

SLOW = pytest.mark.slow
HANGS = ("hang_before", "hang_after")
"""`hang_before`: killed when the step before it was written down. `hang_after`: done at the provider, and nobody knows."""
POINTS = [
    # request, which one of its kind
    ("GET /files", 0),
    ("POST /files", 0),
    ("GET /files", 1),
    ("POST /files", 1),
    ("GET /files/ID", 0),
    ("GET /files/ID", 1),
    ("POST /fine_tuning/jobs", 0),
    ("GET /fine_tuning/jobs/ID", 0),
    ("GET /fine_tuning/jobs/ID", 2),
    ("GET /fine_tuning/jobs/ID/events", 0),
    ("GET /fine_tuning/jobs/ID", 3),
    ("GET /files", 2),
    ("DELETE /files/ID", 0),
    ("DELETE /files/ID", 1),
    ("GET /fine_tuning/jobs/ID", 4),
    ("GET /models/ID", 0),
    ("GET /fine_tuning/jobs/ID/events", 2),
]
FAST = {("POST /fine_tuning/jobs", 0, "hang_after"), ("POST /files", 1, "hang_after")}
TABLE = [
    pytest.param(request, number, hang, id=f"{request} {number} {hang}", marks=[] if (request, number, hang) in FAST else [SLOW])
    for request, number in POINTS
    for hang in HANGS
]


def start(home: Path, frozen: Path, provider: str, url: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "finetune_assets_tests.training.life_of_a_job", str(home), str(frozen), provider, url]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)


def see_through(fake: FakeProvider, home: Path, frozen: Path, provider: str = "openai") -> None:
    process = start(home, frozen, provider, fake.url)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def assert_one(fake: FakeProvider, home: Path) -> None:
    assert [job["status"] for job in fake.jobs] == ["succeeded"]
    ledger = Ledger(f"sqlite:///{home / 'ledger.db'}")
    try:
        [job] = ledger.jobs()
        rows = month(ledger)
    finally:
        ledger.close()
    assert (job.status, job.provider_job_id) == ("succeeded", fake.jobs[0]["id"])
    assert [(row["reference"], row["final"]) for row in rows] == [(job.id, True)]
    assert rows[0]["usd"] == pytest.approx(fake.jobs[0]["trained_tokens"] * 3 / 1e6)
    result = json.loads((home / "jobs" / job.spec_hash / "result.json").read_text())
    assert result["fine_tuned_model"] == fake.jobs[0]["fine_tuned_model"]
    assert result["steps"] == 120
    assert fake.state()["files"] == []


@pytest.mark.parametrize(("request_", "number", "hang"), TABLE)
def test_killed_there_it_is_paid_once(fake: FakeProvider, tmp_path: Path, request_: str, number: int, hang: str) -> None:
    frozen, home = dataset(tmp_path / "frozen"), tmp_path / "home"
    fake.fault(request_, hang, skip=number)
    process = start(home, frozen, "openai", fake.url)
    fake.wait_hanging()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    see_through(fake, home, frozen)
    assert_one(fake, home)
    see_through(fake, home, frozen)  # a third start finds everything done
    assert_one(fake, home)


REFUSALS = [
    # what became of the first creation, and what the second one is told
    pytest.param("drop_after", 403, "permission_denied", id="not answered, then 403"),
    pytest.param("hang_after", 429, "insufficient_quota", id="killed, then no credit", marks=SLOW),
]


@pytest.mark.parametrize(("fault", "status", "code"), REFUSALS)
def test_a_plain_no_after_a_creation_that_nobody_answered(
    fake: FakeProvider, tmp_path: Path, fault: str, status: int, code: str
) -> None:
    """The first creation had made a job, which the list comes to show later: it is neither forgotten nor bought again."""
    frozen, home = dataset(tmp_path / "frozen"), tmp_path / "home"
    fake.set(list_lag=600.0)
    fake.fault("POST /fine_tuning/jobs", fault)
    if fault == "hang_after":
        process = start(home, frozen, "openai", fake.url)
        fake.wait_hanging()
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    fake.fault("POST /fine_tuning/jobs", "error", status=status, code=code)
    refused = start(home, frozen, "openai", fake.url)
    _, errors = refused.communicate(timeout=120)
    assert (refused.returncode, code in errors, "may have created it" in errors) == (1, True, True), errors
    assert ("No job was created" in errors, len(fake.jobs), len(fake.state()["files"])) == (False, 1, 2)
    fake.set(list_lag=0.0)
    see_through(fake, home, frozen)
    assert_one(fake, home)


@SLOW
def test_a_provider_without_metadata_is_paid_once_too(fake: FakeProvider, tmp_path: Path) -> None:
    frozen, home = dataset(tmp_path / "frozen"), tmp_path / "home"
    made = tmp_path / "made"
    made.mkdir()
    (made / "adapter_config.json").write_text("{}")
    (made / "adapter_model.safetensors").write_bytes(bytes(1024))
    fake.set(checkpoint=str(made))
    fake.fault("POST /fine_tuning/jobs", "hang_after")
    process = start(home, frozen, "nebius", fake.url)
    fake.wait_hanging()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    see_through(fake, home, frozen, "nebius")
    assert [job["status"] for job in fake.jobs] == ["succeeded"]


@SLOW
def test_two_processes_at_once_buy_one_job(fake: FakeProvider, tmp_path: Path) -> None:
    frozen, home = dataset(tmp_path / "frozen"), tmp_path / "home"
    processes = [start(home, frozen, "openai", fake.url) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert_one(fake, home)
