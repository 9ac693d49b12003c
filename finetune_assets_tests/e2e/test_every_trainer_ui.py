"""The whole graph in the UI with every rented trainer against its stand-in: one worker, seven assistants, no run that waits.

Marked `e2e`. Runs are launched as the Launchpad does; from there on the sensor takes each job to its end and into phase two.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("boto3", reason="the aws extra is not installed")
pytest.importorskip("moto.server", reason="moto[server] is not installed")

from finetune_assets.registry import Ledger
from finetune_assets_tests.e2e.running_ui import Ui, chromium_page, picture, running
from finetune_assets_tests.e2e.test_remote_ui import RUNS
from finetune_assets_tests.tiny_model import make_tiny_model
from finetune_assets_tests.training import fake_aws, fake_provider
from finetune_assets_tests.training.fake_aws import FakeAws
from finetune_assets_tests.training.fake_provider import FakeProvider
from finetune_assets_tests.training.fake_provider.process import KEY
from finetune_assets_tests.training.remote_request import own_days

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

SETTINGS = """
select: {{tenant: clinica_aurora}}
language: es
min_examples: 30
preset: tiny
hyperparameters: {{epochs: 1}}
benchmark: {{max_rows: 8, retrieval: false}}
trainer: {trainer}
base_model: {base}
remote: {remote}
"""
PLACE = {"role": "arn:aws:iam::123456789012:role/training", "bucket": "rows", "region": "us-east-1"}
HUB = "arn:aws:sagemaker:us-east-1:aws:hub-content/SageMakerPublicHub/Model/qwen/1.0.0"
WORK_SECONDS = 60.0
"""For which every job is at work at its stand-in, whatever it is asked."""


class Stands:
    """The stand-ins: one for each copy of OpenAI's wire, one for AWS."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.wires: dict[str, FakeProvider] = {
            name: stack.enter_context(fake_provider.start()) for name in ("openai", "azure", "nebius", "openai_compatible")
        }
        self.cloud: FakeAws = stack.enter_context(fake_aws.start())
        self.small = make_tiny_model(folder / "small")
        for fake in self.wires.values():
            fake.set(progress=["running"])
        self.wires["azure"].set(bom=True)
        self.wires["nebius"].set(checkpoint=str(make_tiny_model(folder / "checkpoint")))
        self.cloud.set(asks=10_000)

    def assistants(self) -> dict[str, dict[str, Any]]:
        """Trainer, base model and `remote` of each."""
        open_model = {"base": "open/small-7b"}
        at = {name: {"min_model_life_days": 0, "base_url": fake.url} for name, fake in self.wires.items()}
        return {
            "at_openai": {"trainer": "openai", "base": "gpt-4o-mini-2024-07-18", "remote": at["openai"]},
            "at_azure": {"trainer": "azure", "base": "gpt-4.1-mini-2025-04-14", "remote": at["azure"]},
            "at_nebius": {"trainer": "nebius", **open_model, "remote": {**at["nebius"], "deploy": True}},
            "at_a_copy": {"trainer": "openai_compatible", **open_model, "remote": at["openai_compatible"]},
            "at_bedrock": {
                "trainer": "bedrock",
                "base": "'amazon.nova-lite-v1:0:300k'",
                "remote": {"deploy": True, "aws": PLACE},
            },
            "in_a_container": {
                "trainer": "sagemaker",
                "base": str(self.small),
                "remote": {"aws": {**PLACE, "image": "registry.example/finetune:1"}},
            },
            "serverless": {
                "trainer": "sagemaker",
                "base": f"'{HUB}'",
                "remote": {"deploy": True, "aws": {**PLACE, "serverless": True, "base_endpoint": "the-base"}},
            },
        }

    def finish(self) -> None:
        """From here on every job ends well."""
        for fake in self.wires.values():
            fake.set(progress=["running", "succeeded"])
        self.cloud.set(asks=0)

    @property
    def jobs(self) -> int:
        """Jobs that anybody was ever paid for."""
        return sum(len(fake.jobs) for fake in self.wires.values()) + len(self.cloud.state()["jobs"])


@pytest.fixture(scope="module")
def stands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stands]:
    with ExitStack() as stack:
        made = Stands(stack, tmp_path_factory.mktemp("models"))
        yield made
        assert [fake.state()["violations"] for fake in made.wires.values()] == [[]] * 4
        assert made.cloud.state()["errors"] == []


@pytest.fixture(scope="module")
def ui(stands: Stands, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    home, settings = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("assistants")
    for name, values in stands.assistants().items():
        (settings / f"{name}.yaml").write_text(SETTINGS.format(**{**values, "remote": json.dumps(values["remote"])}))
    keys = {f"{name}_API_KEY": KEY for name in ("OPENAI", "AZURE_OPENAI", "NEBIUS", "OPENAI_COMPATIBLE")}
    own = {"FINETUNE_HOME": str(home), "FINETUNE_SOURCE": "data/sample", "FINETUNE_ASSISTANTS": str(settings)}
    first = {"FINETUNE_FIRST_WEEK": "2026-09-14", "HF_HUB_OFFLINE": "1", "FINETUNE_TABLES": str(own_days(home / "tables"))}
    with running(home, {**own, **first, **keys, **stands.cloud.environment}) as found:
        yield found


def test_the_worker_is_free_while_seven_jobs_are_at_work(ui: Ui, stands: Stands) -> None:
    weeks = {"dagster/asset_partition_range_start": "2026-09-14", "dagster/asset_partition_range_end": "2026-11-16"}
    assert ui.wait(ui.launch("prepare_corpus", weeks)) == "SUCCESS"
    names = list(stands.assistants())
    launched = {name: ui.launch("train", {"dagster/partition": name}) for name in names}
    assert {name: ui.wait(run, 600) for name, run in launched.items()} == dict.fromkeys(names, "SUCCESS")
    train = {run["runId"]: run for run in ui.ask(RUNS, {"job": "train"})["runsOrError"]["results"]}
    all_submitted = time.time()
    assert stands.jobs == len(names)
    ledger = Ledger(f"sqlite:///{ui.home / 'ledger.db'}")
    try:
        assert {job.status for job in ledger.jobs()} <= {"pending", "running"}  # no run has waited for one of them
        time.sleep(max(0.0, WORK_SECONDS - (time.time() - all_submitted)))
        assert {job.status for job in ledger.jobs()} == {"running"}  # the sensor has asked for all of them
        assert not ui.ask(RUNS, {"job": "release"})["runsOrError"]["results"]
        stands.finish()
        end = time.monotonic() + 1200
        while time.monotonic() < end and not all(job.released_at for job in ledger.jobs()):
            time.sleep(2)
        jobs = {job.assistant: job for job in ledger.jobs()}
        assert {name: (job.status, job.released_at is not None) for name, job in jobs.items()} == dict.fromkeys(
            names, ("succeeded", True)
        )
        versions = {name: [one.verdict for one in ledger.versions(name)] for name in names}
    finally:
        ledger.close()
    for run in ui.ask(RUNS, {"job": "release"})["runsOrError"]["results"]:
        ui.wait(run["runId"])
    releases = ui.ask(RUNS, {"job": "release"})["runsOrError"]["results"]
    assert len(releases) == len(names) == stands.jobs  # phase two once, one paid job each
    assert all(len(found) == 1 and found[0] is not None for found in versions.values()), versions
    lines: list[str] = []
    for name, run in launched.items():
        end, done = train[run]["endTime"], jobs[name].completed_at
        assert done is not None
        assert done.timestamp() - end >= WORK_SECONDS  # for so long its job went on, and no run was there for it
        took, job = end - train[run]["startTime"], (done - jobs[name].created_at).total_seconds()
        lines.append(f"{name:<16} run {took:6.1f} s   job {job:6.1f} s, {done.timestamp() - end:6.1f} s of them after the run")
    (ui.home / "durations.txt").write_text("\n".join(lines) + "\n")


def test_the_pages_of_all_of_them(ui: Ui, stands: Stands) -> None:
    with chromium_page() as page:
        for name in stands.assistants():
            page.goto(f"{ui.url}/assets/training_job?view=events&partition={name}", wait_until="domcontentloaded")
            page.get_by_text("provider_job", exact=True).first.wait_for(timeout=60_000)
        page.goto(f"{ui.url}/assets/benchmark_report?view=partitions", wait_until="domcontentloaded")
        page.get_by_text("in_a_container").first.wait_for(timeout=60_000)
        picture(page, "every_trainer_report")
        page.goto(f"{ui.url}/runs", wait_until="domcontentloaded")
        page.get_by_text("release").first.wait_for(timeout=60_000)
        page.wait_for_timeout(2000)
        picture(page, "every_trainer_runs")
