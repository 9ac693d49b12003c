"""Bedrock and SageMaker as a user meets them: submitted, waited for, reported; against moto with a front that lets time pass."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("boto3", reason="the aws extra is not installed")
pytest.importorskip("moto.server", reason="moto[server] is not installed")

from finetune_assets_tests.matrix.test_remote_run import Machine
from finetune_assets_tests.tiny_model import make_tiny_model
from finetune_assets_tests.training import fake_aws
from finetune_assets_tests.training.fake_aws import FakeAws

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SETTINGS = """
select: {{tenant: clinica_aurora}}
language: es
trainer: {trainer}
base_model: {base}
min_examples: 30
preset: tiny
hyperparameters: {{epochs: 1}}
benchmark: {{max_rows: 12}}
remote: {{deploy: {deploy}, aws: {aws}}}
"""
PLACE = "role: 'arn:aws:iam::123456789012:role/training', bucket: rows, region: us-east-1"
HUB = "arn:aws:sagemaker:us-east-1:aws:hub-content/SageMakerPublicHub/Model/qwen/1.0.0"


@pytest.fixture
def cloud() -> Iterator[FakeAws]:
    with fake_aws.start() as running:
        yield running
        assert running.state()["errors"] == []


@pytest.fixture
def machine(cloud: FakeAws, tmp_path: Path) -> Machine:
    made = Machine(tmp_path, "http://127.0.0.1:9/v1")
    kept = {name: value for name, value in made.environment.items() if not name.startswith("OPENAI_")}
    made.environment = {**kept, **cloud.environment, "FINETUNE_FIRST_WEEK": "2026-09-14"}
    return made


def run_to_report(machine: Machine, cloud: FakeAws, **settings: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Outcome and report of a run that submits, ends, and is gone on with."""
    (machine.assistants / "aurora.yaml").write_text(SETTINGS.format(**settings))
    code, submitted, errors = machine.finetune("run", "--assistant", "aurora")
    assert (code, submitted["state"]) == (0, "submitted"), errors
    assert list(cloud.state()["jobs"]) == [submitted["provider_job"]]
    code, reported, errors = machine.finetune("run", "--assistant", "aurora", "--wait")
    assert (code, reported["state"]) == (0, "reported"), errors
    assert len(cloud.state()["jobs"]) == 1
    assert not [key for key in cloud.state()["objects"] if "/input/" in key or "/base/" in key]
    return reported, json.loads(Path(reported["report"]).with_suffix(".json").read_text())


def test_bedrock(machine: Machine, cloud: FakeAws) -> None:
    reported, report = run_to_report(
        machine, cloud, trainer="bedrock", base="'amazon.nova-lite-v1:0:300k'", deploy="true", aws=f"{{{PLACE}}}"
    )
    tuned, base = report["candidates"]["tuned"], report["candidates"]["base"]
    assert tuned["bits_per_byte"]["value"] is None
    assert tuned["chrf"]["value"] > base["chrf"]["value"]  # the stand-in's tuned model answers from the training rows
    remote = json.loads((machine.home / "models" / "aurora" / reported["version"] / "remote.json").read_text())
    assert (remote["provider"], remote["base_url"]) == ("bedrock", "bedrock://us-east-1")
    assert "Converse" in cloud.state()["seen"]


def test_sagemaker_trains_in_our_container_through_an_interruption(machine: Machine, cloud: FakeAws, tmp_path: Path) -> None:
    small = make_tiny_model(tmp_path / "small")
    cloud.set(interrupt=1)
    aws = f"{{{PLACE}, image: 'registry.example/finetune:1'}}"
    reported, report = run_to_report(machine, cloud, trainer="sagemaker", base=str(small), deploy="false", aws=aws)
    assert cloud.state()["interrupted"] == 1
    tuned, base = report["candidates"]["tuned"], report["candidates"]["base"]
    assert tuned["bits_per_byte"]["value"] < base["bits_per_byte"]["value"]  # a model of its owner's, with likelihoods
    version = machine.home / "models" / "aurora" / reported["version"]
    assert not (version / "remote.json").exists()
    result = json.loads((version / "result.json").read_text())
    assert (result["trainer"], result["resumed"]) == ("sagemaker", 1)


def test_sagemaker_serverless_and_its_endpoint(machine: Machine, cloud: FakeAws) -> None:
    aws = f"{{{PLACE}, serverless: true, base_endpoint: the-base}}"
    reported, report = run_to_report(machine, cloud, trainer="sagemaker", base=f"'{HUB}'", deploy="true", aws=aws)
    tuned, base = report["candidates"]["tuned"], report["candidates"]["base"]
    assert tuned["chrf"]["value"] > base["chrf"]["value"]
    remote = json.loads((machine.home / "models" / "aurora" / reported["version"] / "remote.json").read_text())
    assert remote["base_url"] == "sagemaker://us-east-1"
    seen = cloud.state()["seen"]
    assert {"CreateModel", "CreateEndpointConfig", "CreateEndpoint", "InvokeEndpoint"} <= set(seen)
