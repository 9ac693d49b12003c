"""SIGKILL after the job has ended: while its model is fetched, published, measured and registered, and while a teacher is asked.

Each point starts from the same store, whose job the provider has finished, and ends with one job, one version, one report, and
no reply paid twice but those that were under way.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from finetune_assets.environment import ROOT
from finetune_assets.registry import Ledger
from finetune_assets.registry.spending import month
from finetune_assets_tests.matrix.test_remote_run import Machine
from finetune_assets_tests.tiny_model import make_tiny_model
from finetune_assets_tests.training import fake_provider
from finetune_assets_tests.training.fake_provider import FakeProvider

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CHAT = "POST /chat/completions"
RUN = ("run", "--assistant", "aurora", "--wait")
ROWS = 6
BENCHMARK = 3 * ROWS
"""Requests of a whole benchmark: base, few-shot, tuned."""
STEPS = [
    *("finetune_assets.assets.training:keep_remote", "finetune_assets.assets.training:publish"),
    *("finetune_assets.registry.ledger:Ledger.mint_version", "finetune_assets.assets.evaluation:reserve_replies"),
    *("finetune_assets.assets.evaluation:settle_replies", "finetune_assets.evaluation.subject:write_report"),
    *("finetune_assets.assets.deployment:model_card",),
]


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeProvider]:
    with fake_provider.start() as running:
        yield running
        assert running.state()["violations"] == []


@pytest.fixture(scope="module")
def finished(fake: FakeProvider, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A store whose job has ended well, and nobody has taken it further."""
    machine = Machine(tmp_path_factory.mktemp("finished"), fake.url)
    yaml = machine.assistants / "aurora.yaml"
    yaml.write_text(yaml.read_text().replace("max_rows: 24", f"max_rows: {ROWS}, retrieval: false"))
    machine.environment["FINETUNE_FIRST_WEEK"] = "2026-09-14"
    code, submitted, errors = machine.finetune("run", "--assistant", "aurora")
    assert (code, submitted["state"]) == (0, "submitted"), errors
    return machine


@pytest.fixture(scope="module")
def reported(fake: FakeProvider, finished: Machine, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """The same with a report: a rented version that can teach."""
    machine, before = again(finished, tmp_path_factory.mktemp("reported")), chats(fake)
    code, outcome, errors = machine.finetune(*RUN)
    assert (code, outcome["state"]) == (0, "reported"), errors
    assert chats(fake) - before == BENCHMARK
    return machine


def again(machine: Machine, folder: Path) -> Machine:
    """A copy of its store."""
    shutil.copytree(machine.home, folder / "home", symlinks=True)
    made = object.__new__(Machine)
    made.home, made.assistants = folder / "home", machine.assistants
    made.environment = {**machine.environment, "FINETUNE_HOME": str(made.home)}
    return made


def kill(machine: Machine, command: list[str], reached: Callable[[], bool]) -> None:
    """Starts it and kills it with its children as soon as it is where it should be."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=machine.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    end = time.monotonic() + 240
    try:
        while not reached():
            assert process.poll() is None, process.communicate()[1].decode()[-3000:]
            assert time.monotonic() < end, "it never came there"
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def kill_at(machine: Machine, folder: Path, where: str, when: str, arguments: tuple[str, ...]) -> None:
    """At a function."""
    mark = folder / "reached"
    kill(
        machine, [sys.executable, "-m", "finetune_assets_tests.matrix.stopping", where, when, str(mark), *arguments], mark.exists
    )


def kill_asking(machine: Machine, fake: FakeProvider, hang: str, number: int, arguments: tuple[str, ...]) -> None:
    """At a request to a model."""
    before = len(fake.state()["hanging"])
    fake.fault(CHAT, hang, skip=number)
    command = [sys.executable, "-m", "finetune_assets.cli", *arguments]
    kill(machine, command, lambda: len(fake.state()["hanging"]) > before)


def chats(fake: FakeProvider) -> int:
    return fake.state()["seen"].count(CHAT)


def spending(machine: Machine) -> list[dict[str, Any]]:
    ledger = Ledger(f"sqlite:///{machine.home / 'ledger.db'}")
    try:
        return month(ledger)
    finally:
        ledger.close()


def assert_reported_once(machine: Machine, fake: FakeProvider) -> dict[str, Any]:
    """Goes on where it was killed."""
    code, outcome, errors = machine.finetune(*RUN)
    assert (code, outcome["state"]) == (0, "reported"), errors
    ledger = Ledger(f"sqlite:///{machine.home / 'ledger.db'}")
    try:
        [version] = ledger.versions("aurora")
        [job] = ledger.jobs()
    finally:
        ledger.close()
    assert (version.number, job.status, job.fine_tuned_model) == (1, "succeeded", version.version)
    folder = machine.home / "models" / "aurora" / version.version
    assert json.loads((folder / "remote.json").read_text())["provider"] == "openai"
    assert [path.name for path in (machine.home / "models" / "aurora").iterdir() if path.name.startswith("v")] == [
        version.version
    ]
    report = json.loads(Path(outcome["report"]).with_suffix(".json").read_text())
    assert (report["model_version"], report["verdict"]) == (version.version, outcome["verdict"])
    rows = spending(machine)
    assert all(row["final"] for row in rows)
    assert [row["reference"] for row in rows if row["kind"] == "training"] == [job.id]
    assert len(fake.jobs) == 1
    return outcome


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", STEPS, ids=lambda where: where.rpartition(":")[2])
def test_killed_in_phase_two(fake: FakeProvider, finished: Machine, tmp_path: Path, where: str, when: str) -> None:
    machine = again(finished, tmp_path)
    kill_at(machine, tmp_path, where, when, RUN)
    assert_reported_once(machine, fake)


@pytest.mark.parametrize(("hang", "number"), [("hang_before", 0), ("hang_after", 8), ("hang_before", 15)])
def test_killed_while_a_benchmark_asks(fake: FakeProvider, finished: Machine, tmp_path: Path, hang: str, number: int) -> None:
    machine = again(finished, tmp_path)
    before = chats(fake)
    kill_asking(machine, fake, hang, number, RUN)
    assert_reported_once(machine, fake)
    again_asked = chats(fake) - before - BENCHMARK
    assert again_asked <= ROWS + 4  # those of the candidate that was being asked; the others' are kept


def distil(small: Path) -> tuple[str, ...]:
    return ("distil", "aurora", "--to", f"local/{small}", "--max-usd", "1", "--json")


@pytest.mark.parametrize(
    "point",
    [
        *(("hang_before", "0"), ("hang_after", "50")),
        *(("finetune_assets.distillation.build:freeze", "before"), ("finetune_assets.distillation.build:freeze", "after")),
        *(("finetune_assets.distillation.work:settle", "before"), ("finetune_assets.distillation.work:settle", "after")),
    ],
    ids=" ".join,
)
def test_killed_while_it_distils(fake: FakeProvider, reported: Machine, tmp_path: Path, point: tuple[str, str]) -> None:
    machine, small = again(reported, tmp_path), make_tiny_model(tmp_path / "small")
    paid = {row["reference"] for row in spending(machine)}
    before = chats(fake)
    if point[0].startswith("hang"):
        kill_asking(machine, fake, point[0], int(point[1]), distil(small))
    else:
        kill_at(machine, tmp_path, *point, distil(small))
    code, outcome, errors = machine.finetune(*distil(small)[:-1])
    assert (code, outcome["state"]) == (0, "reported"), errors
    replies = pl.read_parquet(machine.home / "datasets" / "aurora" / "teacher_replies.parquet")
    assert replies["key"].n_unique() == replies.height > 40
    teacher = [row for row in spending(machine) if row["reference"].startswith("distil:") and row["reference"] not in paid]
    assert all(row["final"] for row in teacher)
    assert sum(row["usd"] for row in teacher) == pytest.approx(replies["usd"].sum())
    assert chats(fake) - before <= replies.height + 20 + 2 * BENCHMARK  # at most the batch under way is asked again
    assert len(fake.jobs) == 1
