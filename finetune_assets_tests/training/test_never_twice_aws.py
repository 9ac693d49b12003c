"""As `test_never_twice`, at AWS: SIGKILL at every request between estimate and result, and lost answers; one job each time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("boto3", reason="the aws extra is not installed")
pytest.importorskip("moto.server", reason="moto[server] is not installed")

from finetune_assets.environment import ROOT
from finetune_assets.registry import Ledger
from finetune_assets.registry.spending import month
from finetune_assets_tests.tiny_model import make_tiny_model
from finetune_assets_tests.training import fake_aws
from finetune_assets_tests.training.fake_aws import FakeAws
from finetune_assets_tests.training.remote_request import dataset

SLOW = pytest.mark.slow
NOVA = "amazon.nova-lite-v1:0:300k"
POINTS = [
    # provider, operation, which one of its kind
    ("bedrock", "PUT train.jsonl", 0),
    ("bedrock", "PUT validation.jsonl", 0),
    ("bedrock", "CreateModelCustomizationJob", 0),
    ("bedrock", "GetModelCustomizationJob", 0),
    ("bedrock", "GetModelCustomizationJob", 2),
    ("bedrock", "CreateCustomModelDeployment", 0),
    ("bedrock", "GetCustomModelDeployment", 0),
    ("bedrock", "GetCustomModelDeployment", 1),
    ("bedrock", "DELETE train.jsonl", 0),
    ("bedrock", "DELETE validation.jsonl", 0),
    ("bedrock", "GetModelCustomizationJob", 5),
    ("sagemaker", "PUT train.jsonl", 0),
    ("sagemaker", "PUT validation.jsonl", 0),
    ("sagemaker", "PUT model.safetensors", 0),
    ("sagemaker", "PUT spec.json", 0),
    ("sagemaker", "CreateTrainingJob", 0),
    ("sagemaker", "DescribeTrainingJob", 0),
    ("sagemaker", "DescribeTrainingJob", 2),
    ("sagemaker", "DELETE train.jsonl", 0),
    ("sagemaker", "DELETE model.safetensors", 0),
    ("sagemaker", "GET list", 0),
    ("sagemaker", "GET list", 2),
    ("sagemaker", "GET result.json", 0),
    ("sagemaker", "GET model.safetensors", 0),
]
FAST = {("bedrock", "CreateModelCustomizationJob", 0, "hang_after")}
TABLE = [
    pytest.param(point, hang, id=f"{' '.join(map(str, point))} {hang}", marks=[] if (*point, hang) in FAST else [SLOW])
    for point in POINTS
    for hang in ("hang_before", "hang_after")
]


@pytest.fixture
def cloud() -> Iterator[FakeAws]:
    with fake_aws.start() as running:
        running.set(container="instant", asks=1)
        yield running
        assert running.state()["errors"] == []


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "small")


def start(cloud: FakeAws, folder: Path, provider: str, base: Path) -> subprocess.Popen[str]:
    module, model = "finetune_assets_tests.training.life_of_a_job", NOVA if provider == "bedrock" else str(base)
    command = [sys.executable, "-m", module, str(folder / "home"), str(folder / "frozen"), provider, cloud.url, model]
    environment = {**os.environ, **cloud.environment, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def see_through(cloud: FakeAws, folder: Path, provider: str, base: Path) -> None:
    process = start(cloud, folder, provider, base)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def assert_one(cloud: FakeAws, folder: Path, provider: str) -> None:
    state, home = cloud.state(), folder / "home"
    assert len(state["jobs"]) == 1
    ledger = Ledger(f"sqlite:///{home / 'ledger.db'}")
    try:
        [job] = ledger.jobs()
        rows = month(ledger)
    finally:
        ledger.close()
    assert (job.status, job.provider_job_id) == ("succeeded", next(iter(state["jobs"])))
    assert [(row["reference"], row["final"]) for row in rows] == [(job.id, True)]
    result = json.loads((home / "jobs" / job.spec_hash / "result.json").read_text())
    assert result["provider_job_id"] == job.provider_job_id
    if provider == "bedrock":
        assert list(state["deployments"]) == [job.provider_job_id]
    else:
        assert (home / "jobs" / job.spec_hash / "model" / "model.safetensors").read_bytes() == b"weights"
    assert not [key for key in state["objects"] if key.endswith((".jsonl", "spec.json")) or "/base/" in key]


@pytest.mark.parametrize(("point", "hang"), TABLE)
def test_killed_there_it_is_paid_once(cloud: FakeAws, base: Path, tmp_path: Path, point: tuple[str, str, int], hang: str) -> None:
    provider, operation, number = point
    dataset(tmp_path / "frozen")
    cloud.fault(operation, hang, skip=number)
    process = start(cloud, tmp_path, provider, base)
    try:
        cloud.wait_hanging()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    see_through(cloud, tmp_path, provider, base)
    assert_one(cloud, tmp_path, provider)
    see_through(cloud, tmp_path, provider, base)  # a third start finds everything done
    assert_one(cloud, tmp_path, provider)


@SLOW
@pytest.mark.parametrize(
    ("provider", "operation"),
    [
        ("bedrock", "CreateModelCustomizationJob"),
        ("bedrock", "CreateCustomModelDeployment"),
        ("sagemaker", "CreateTrainingJob"),
    ],
)
def test_an_answer_that_is_lost_is_one_job(cloud: FakeAws, base: Path, tmp_path: Path, provider: str, operation: str) -> None:
    dataset(tmp_path / "frozen")
    cloud.fault(operation, "drop_after")  # boto3 asks again by itself
    see_through(cloud, tmp_path, provider, base)
    assert cloud.state()["seen"].count(operation) >= 2
    assert_one(cloud, tmp_path, provider)


@pytest.mark.parametrize(
    ("provider", "operation", "fault"),
    [
        pytest.param("bedrock", "CreateModelCustomizationJob", "drop_after"),  # boto3 asks again by itself
        pytest.param("bedrock", "CreateModelCustomizationJob", "hang_after", marks=SLOW),
        pytest.param("sagemaker", "CreateTrainingJob", "hang_after", marks=SLOW),
    ],
)
def test_a_plain_no_after_a_creation_that_nobody_answered(
    cloud: FakeAws, base: Path, tmp_path: Path, provider: str, operation: str, fault: str
) -> None:
    """The job is there, and is what fills the account's quota: it is taken."""
    dataset(tmp_path / "frozen")
    cloud.fault(operation, fault)
    cloud.fault(operation, "refuse", status=400, code="ServiceQuotaExceededException", message="One job at a time.")
    if fault == "hang_after":
        process = start(cloud, tmp_path, provider, base)
        cloud.wait_hanging()
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    see_through(cloud, tmp_path, provider, base)
    assert_one(cloud, tmp_path, provider)


@SLOW
@pytest.mark.parametrize("provider", ["bedrock", "sagemaker"])
def test_three_processes_at_once_buy_one_job(cloud: FakeAws, base: Path, tmp_path: Path, provider: str) -> None:
    dataset(tmp_path / "frozen")
    processes = [start(cloud, tmp_path, provider, base) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert_one(cloud, tmp_path, provider)
