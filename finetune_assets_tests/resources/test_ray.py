"""Workers as jobs of a real Ray cluster: the same model as in this process, kills survived, cancelled and gone on with."""

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from finetune_assets.assistants.settings import Assistant
from finetune_assets.resources import LauncherResource
from finetune_assets.storage import Store, read_json, write_json
from finetune_assets.training.local import LocalTrainer, cancel, is_running
from finetune_assets.training.spec import request_for, train_spec
from finetune_assets.training.trainer import TrainingRequest
from finetune_assets.worker.__main__ import run_task
from finetune_assets.workers import Workers
from finetune_assets_tests.corpus.exports import made
from finetune_assets_tests.resources.ray_cluster import free_ports, ray_cluster
from finetune_assets_tests.resources.weeks import build, source
from finetune_assets_tests.tiny_model import dialogues, make_tiny_model
from finetune_assets_tests.training_jobs import write_rows

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:AssetExecutionContext.:DeprecationWarning"),  # inside Dagster and dagster-ray
    pytest.mark.filterwarnings("ignore:ssl=None:DeprecationWarning"),  # inside Ray's client
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's client leaves its sessions open
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # a short name: Ray puts sockets there
    try:
        with ray_cluster(folder) as address:
            yield address
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> TrainingRequest:
    folder = tmp_path_factory.mktemp("request")
    base = make_tiny_model(folder / "base", hidden=96, layers=4)
    write_rows(folder / "train.jsonl", dialogues(600, turns=2))
    write_rows(folder / "validation.jsonl", dialogues(8, seed=9))
    values = {"epochs": 2, "precision": "float32"}
    assistant = Assistant.model_validate(
        {"name": "a", "select": {"vertical": "v"}, "base_model": str(base), "hyperparameters": values}
    )
    return request_for(assistant, folder, "f1", "key")[0]


@pytest.fixture(scope="module")
def expected(request_: TrainingRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights' hash after training without any launcher."""
    spec = train_spec(request_, Store(tmp_path_factory.mktemp("direct")), Workers(launcher="ray"))
    assert run_task(spec) == 0
    return str(read_json(Path(spec["output"]) / "result.json")["model_sha256"])


def train(address: str, store: Store, request: TrainingRequest) -> tuple[dg.ExecuteInProcessResult, list[str]]:
    """A Dagster run that trains on the cluster, and what its log says."""
    os.environ.update(FINETUNE_LAUNCHER="ray", RAY_ADDRESS=address, FINETUNE_WORKER_PYTHON=sys.executable)

    @dg.asset
    def job(context: dg.AssetExecutionContext, launcher: LauncherResource) -> dg.MaterializeResult[Any]:
        trainer = LocalTrainer(lambda spec, output: launcher.run(context, spec, output), store, launcher.workers)
        trainer.submit(request)
        return dg.MaterializeResult()  # as every asset that starts a child must

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([job], instance=instance, resources={"launcher": LauncherResource()}, raise_on_error=False)
        return result, [entry.user_message for entry in instance.all_logs(result.run_id)]


def when(ready: Callable[[], bool], act: Callable[[], Any]) -> threading.Thread:
    """Acts once something is so."""

    def wait() -> None:
        end = time.monotonic() + 240
        while not ready() and time.monotonic() < end:
            time.sleep(0.05)
        if ready():
            act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def checkpoints(folder: Path) -> bool:
    return any(folder.glob("stages/*/checkpoints/checkpoint-*/totals.json"))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FINETUNE_LAUNCHER", "RAY_ADDRESS", "FINETUNE_WORKER_PYTHON"):
        monkeypatch.setenv(name, "")  # put back afterwards


@pytest.mark.slow
def test_a_ray_job_trains_the_same_model_and_survives_a_kill(
    cluster: str, request_: TrainingRequest, expected: str, tmp_path: Path
):
    store = Store(tmp_path)
    spec = train_spec(request_, store, Workers(launcher="ray"))
    folder = Path(spec["output"])
    write_json(folder / "spec.json", {**spec, "checkpoint_seconds": 0.5})
    killer = when(lambda: checkpoints(folder), lambda: os.kill(read_json(folder / "worker.json")["pid"], signal.SIGKILL))
    result, log = train(cluster, store, request_)
    killer.join()
    assert result.success, log
    made = read_json(folder / "result.json")
    assert made["model_sha256"] == expected
    assert made["resumed"] == 1
    assert any("tokens/s" in line for line in log)  # its progress came through Pipes
    assert not list(folder.glob("launched-*"))
    assert sum(line.startswith("[pipes] Ray job") for line in log) >= 2


@pytest.mark.slow
def test_a_ray_job_is_cancelled_and_goes_on_later(cluster: str, request_: TrainingRequest, expected: str, tmp_path: Path):
    store = Store(tmp_path)
    folder = Path(train_spec(request_, store, Workers(launcher="ray"))["output"])
    ender = when(lambda: checkpoints(folder), lambda: cancel(folder))
    result, log = train(cluster, store, request_)
    ender.join()
    assert not result.success
    assert (folder / "cancelled.json").exists()
    assert not (folder / "result.json").exists()
    assert any("intentionally stopped" in str(event.step_failure_data.error) for event in result.get_step_failure_events()), log
    result, log = train(cluster, store, request_)
    assert result.success, log
    assert read_json(folder / "result.json")["model_sha256"] == expected


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_job_behind(cluster: str, request_: TrainingRequest, tmp_path: Path):
    from ray.job_submission import JobSubmissionClient

    store = Store(tmp_path)
    folder = Path(train_spec(request_, store, Workers(launcher="ray"))["output"])
    when(lambda: is_running(folder), lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        result, _ = train(cluster, store, request_)
        assert not result.success
    except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
        pass
    client, end = JobSubmissionClient(cluster), time.monotonic() + 30
    while not all(job.status.is_terminal() for job in client.list_jobs()) and time.monotonic() < end:
        time.sleep(0.2)
    assert all(job.status.is_terminal() for job in client.list_jobs())
    assert not is_running(folder)
    assert not (folder / "result.json").exists()


@pytest.mark.slow
def test_weeks_of_the_corpus_are_built_at_once_on_a_cluster(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = source(tmp_path / "source")
    monkeypatch.setenv("FINETUNE_USER_KEY", "one key")
    alone, _ = build(tmp_path / "alone", folder)
    for name, value in (("RAY_ADDRESS", cluster), ("FINETUNE_LAUNCHER", "ray"), ("FINETUNE_WORKER_PYTHON", sys.executable)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FINETUNE_WEEK_WORKERS", "2")
    monkeypatch.delenv("FINETUNE_USER_KEY")  # a secret: the cluster has its own, here the one of the home
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "key").write_text("one key")
    together, log = build(tmp_path / "cluster", folder)
    assert alone.success
    assert together.success, log
    files = {name: text for name, text in made(tmp_path / "alone").items() if name.startswith("corpus/")}
    assert {name: text for name, text in made(tmp_path / "cluster").items() if name.startswith("corpus/")} == files
    assert len({line.split()[3] for line in log if line.startswith("[pipes] Ray job")}) >= 2


def test_a_cluster_that_is_not_there_is_told(request_: TrainingRequest, tmp_path: Path):
    pytest.importorskip("dagster_ray", reason="needs Ray: pip install 'finetune-assets[ray]'")
    result, log = train(f"http://127.0.0.1:{free_ports(1)[0]}", Store(tmp_path), request_)
    assert not result.success
    errors = [event.step_failure_data.error for event in result.get_step_failure_events()]
    assert ["SettingsError" in str(error) and "No Ray cluster answers at RAY_ADDRESS" in str(error) for error in errors] == [
        True
    ], log
