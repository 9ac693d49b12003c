"""Bedrock and SageMaker: call shapes against moto on a socket, sequences of statuses against botocore's Stubber."""

from __future__ import annotations

import datetime
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

boto3 = pytest.importorskip("boto3", reason="the aws extra is not installed")
moto_server = pytest.importorskip("moto.server", reason="moto[server] is not installed")

from botocore.stub import Stubber  # noqa: E402

from finetune_assets.environment import Environment  # noqa: E402
from finetune_assets.errors import DataError, ProviderError, ProviderUnsettled, SettingsError, TrainingError  # noqa: E402
from finetune_assets.registry import Ledger  # noqa: E402
from finetune_assets.registry.remote_jobs import open_journal  # noqa: E402
from finetune_assets.rented import rented  # noqa: E402
from finetune_assets.storage import Store, read_json, write_json  # noqa: E402
from finetune_assets.training import remote  # noqa: E402
from finetune_assets.training.aws import AwsTrainer  # noqa: E402
from finetune_assets.training.aws_files import Files  # noqa: E402
from finetune_assets.training.bedrock import BedrockTrainer  # noqa: E402
from finetune_assets.training.remote import CANCELLED, Connection, Notes, RemoteModel  # noqa: E402
from finetune_assets.training.submission import bill, bought_as  # noqa: E402
from finetune_assets.training.trainer import JobHandle, TrainingRequest  # noqa: E402
from finetune_assets.training.trainers import AWS, open_hours  # noqa: E402
from finetune_assets_tests.tiny_model import make_tiny_model  # noqa: E402
from finetune_assets_tests.training.remote_request import assistant, dataset, request  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
ROLE = "arn:aws:iam::123456789012:role/training"
NOVA = "amazon.nova-lite-v1:0:300k"
WHEN = datetime.datetime(2026, 11, 21, tzinfo=datetime.UTC)
ARN = "arn:aws:bedrock:us-east-1:123456789012"
MODEL = f"{ARN}:custom-model/amazon.nova-lite-v1:0:300k/abcdefghijkl"
PLACE = f"{ARN}:custom-model-deployment/abcdefghijkl"
JOB = {
    "jobArn": f"{ARN}:model-customization-job/amazon.nova-lite-v1:0:300k/abcdefghijkl",
    "jobName": "j",
    "outputModelName": "m",
    "roleArn": ROLE,
    "creationTime": WHEN,
    "baseModelArn": "arn:aws:bedrock:us-east-1::foundation-model/amazon.nova-lite-v1:0:300k",
    "trainingDataConfig": {"s3Uri": "s3://rows/a"},
    "validationDataConfig": {"validators": []},
    "outputDataConfig": {"s3Uri": "s3://rows/b"},
}
SAGEMAKER = "arn:aws:sagemaker:us-east-1:123456789012"
HUB = "arn:aws:sagemaker:us-east-1:aws:hub-content/SageMakerPublicHub/Model/qwen/1.0.0"
TRAINED = {
    "TrainingJobName": "j",
    "TrainingJobArn": f"{SAGEMAKER}:training-job/j",
    "ModelArtifacts": {"S3ModelArtifacts": "s3://rows/model"},
    "TrainingJobStatus": "Completed",
    "SecondaryStatus": "Completed",
    "StoppingCondition": {"MaxRuntimeInSeconds": 3600},
    "CreationTime": WHEN,
}
THROTTLED = ("ThrottlingException", "RequestThrottledException", "RequestLimitExceeded", "ProvisionedThroughputExceededException")


@pytest.fixture(scope="module")
def cloud() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def aws(cloud: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in (
        ("AWS_ENDPOINT_URL", cloud),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ):
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="rows")
    return boto3


def make(provider: str, home: Path, base: str, deploy: bool = True, **own: Any) -> tuple[AwsTrainer, Notes, TrainingRequest]:
    options = {"role": ROLE, "bucket": "rows", "image": "registry.example/finetune:1", "region": "us-east-1", **own}
    settings = assistant(provider, base_model=base, remote={"aws": options, "deploy": deploy})
    asked, journal = request(dataset(home / "frozen"), settings, f"job-{provider}-1"), Notes()
    return AWS[provider](Connection.of(settings), Store(home), journal), journal, asked


def objects() -> dict[str, bytes]:
    client = boto3.client("s3")
    listed = client.list_objects_v2(Bucket="rows").get("Contents", [])
    return {entry["Key"]: client.get_object(Bucket="rows", Key=entry["Key"])["Body"].read() for entry in listed}


def test_bedrock_is_created_once(aws: Any, tmp_path: Path) -> None:
    trainer, journal, asked = make("bedrock", tmp_path, NOVA)
    trainer.validate(asked)
    handle = trainer.submit(asked)
    told = aws.client("bedrock").get_model_customization_job(jobIdentifier=handle.id)
    assert told["hyperParameters"] == {"epochCount": "3", "learningRate": "1e-05"}
    assert told["trainingDataConfig"]["s3Uri"] == "s3://rows/finetune-assets/job-bedrock-1/input/train.jsonl"
    row = json.loads(objects()["finetune-assets/job-bedrock-1/input/train.jsonl"].splitlines()[0])
    assert row["schemaVersion"] == "bedrock-conversation-2024"
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant", "user", "assistant"]
    assert trainer.poll(handle).provider_status == "InProgress"  # moto leaves it there
    for lost in (("provider_job_id",), ("provider_job_id", "create_started")):  # killed before it was written down
        for key in lost:
            journal.state.pop(key)
        assert trainer.submit(asked) == handle
    journal.state.pop("provider_job_id")
    assert trainer.attach() == handle
    assert len(aws.client("bedrock").list_model_customization_jobs()["modelCustomizationJobSummaries"]) == 1
    assert trainer.clean_up(handle) == []
    assert objects() == {}
    with pytest.raises(TrainingError, match="cannot pause"):
        trainer.pause(handle)


def test_a_job_stays_in_the_region_where_it_was_bought(aws: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, journal, asked = make("bedrock", tmp_path, NOVA, region=None)
    asked = replace(asked, run_key="job-region-1")
    handle = trainer.submit(asked)
    before = trainer.spec_hash(asked)
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "eu-west-1")
    later = AWS["bedrock"](trainer.connection.kept(journal.state), Store(tmp_path), journal)
    assert (later.poll(handle).status, later.spec_hash(asked)) == ("running", before)
    again = AWS["bedrock"](trainer.connection, Store(tmp_path), journal)
    journal.state.pop("provider_job_id")  # a creation that was not answered
    assert again.submit(asked) == handle
    assert len(aws.client("bedrock").list_model_customization_jobs()["modelCustomizationJobSummaries"]) == 0
    assert again.clean_up(handle) == []


def test_a_job_that_is_cancelled_during_its_upload_is_not_created(
    aws: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, journal, asked = make("bedrock", tmp_path, NOVA)
    before = aws.client("bedrock").list_model_customization_jobs()["modelCustomizationJobSummaries"]
    real = Files.put

    def then_cancelled(self: Files, path: Path, uri: str) -> None:
        real(self, path, uri)
        journal.save(**{CANCELLED: True})

    monkeypatch.setattr(Files, "put", then_cancelled)
    with pytest.raises(TrainingError, match="cancelled before it was submitted; nothing was created"):
        trainer.submit(asked)
    assert aws.client("bedrock").list_model_customization_jobs()["modelCustomizationJobSummaries"] == before
    assert (journal.load()["create_started"], trainer.attach()) == (None, None)
    assert (trainer.clean_up(JobHandle("bedrock", "", asked.run_key, "f")), objects()) == ([], {})


def test_a_bucket_that_keeps_versions_is_emptied_of_them(aws: Any, tmp_path: Path) -> None:
    trainer, journal, asked = make("bedrock", tmp_path, NOVA)
    s3 = aws.client("s3")
    s3.put_bucket_versioning(Bucket="rows", VersioningConfiguration={"Status": "Enabled"})
    for lost in (False, True):  # uploaded twice: killed before the upload was written down
        handle = trainer.submit(asked)
        journal.state.pop("provider_job_id" if not lost else "uris")
    assert len(s3.list_object_versions(Bucket="rows")["Versions"]) > len(objects())
    assert trainer.clean_up(handle) == []
    left = s3.list_object_versions(Bucket="rows")
    assert (left.get("Versions"), left.get("DeleteMarkers")) == (None, None)


def test_bedrock_statuses_and_result(aws: Any, tmp_path: Path) -> None:
    trainer, journal, _ = make("bedrock", tmp_path, NOVA)
    client = trainer.client("bedrock")
    arn, job = MODEL, JOB
    done = {"outputModelArn": arn, "endTime": WHEN + datetime.timedelta(hours=1), "trainingMetrics": {"trainingLoss": 0.5}}
    journal.save(provider_job_id="j")
    handle = JobHandle("bedrock", "j", "k", "f")
    with Stubber(client) as stub:
        for word in ("InProgress", "Stopping"):
            stub.add_response("get_model_customization_job", {**job, "status": word}, {"jobIdentifier": "j"})
            assert trainer.poll(handle).status == "running"
        stub.add_response("get_model_customization_job", {**job, "status": "Failed", "failureMessage": "Line 3 is bad"})
        state = trainer.poll(handle)
        assert (state.status, "Line 3 is bad" in (state.error or "")) == ("failed", True)
        # trained: a deployment is made, once, and the job is open until it answers
        place = PLACE
        deployed = {"customModelDeploymentArn": place, "modelDeploymentName": "j", "modelArn": arn, "createdAt": WHEN}
        stub.add_response("get_model_customization_job", {**job, **done, "status": "Completed"})
        stub.add_response("create_custom_model_deployment", {"customModelDeploymentArn": place})
        stub.add_response("get_custom_model_deployment", {**deployed, "status": "Creating"})
        state = trainer.poll(handle)
        assert (state.status, state.provider_status) == ("running", "Deploying (Creating)")
        stub.add_response("get_model_customization_job", {**job, **done, "status": "Completed"})
        stub.add_response("get_custom_model_deployment", {**deployed, "status": "Failed", "failureMessage": "quota of one"})
        state = trainer.poll(handle)  # what was paid for is not lost
        assert (state.status, "quota of one" in state.progress["warning"]) == ("succeeded", True)
        stub.add_response("get_model_customization_job", {**job, **done, "status": "Completed"})
        stub.add_response("get_custom_model_deployment", {**deployed, "status": "Active"})
        assert trainer.poll(handle).status == "succeeded"
        for _ in range(2):
            stub.add_response("get_model_customization_job", {**job, **done, "status": "Completed"})
        stub.add_response("get_custom_model_deployment", {**deployed, "status": "Active"})
        result = trainer.keep(handle, tmp_path / "job", {"base_model": NOVA})
        assert (result["seconds"], result["train_loss"]) == (3600.0, 0.5)
        for code in THROTTLED:
            stub.add_client_error("get_model_customization_job", code, "slow down", 400)
            with pytest.raises(ProviderUnsettled, match=f"{code}: slow down"):
                trainer.poll(handle)
        stub.add_client_error("get_model_customization_job", "AccessDeniedException", "no", 403)
        with pytest.raises(ProviderError, match="403 AccessDeniedException"):
            trainer.poll(handle)
    model = RemoteModel.read(tmp_path / "job" / "model")
    assert model is not None
    assert (model.model, model.region, model.base_url) == (place, "us-east-1", "bedrock://us-east-1")
    base = RemoteModel.read(tmp_path / "job" / "model" / "base")
    assert (base.model if base else None) == "amazon.nova-lite-v1:0"


def test_a_deployment_that_is_given_up_leaves_the_trained_model(aws: Any, tmp_path: Path) -> None:
    trainer, journal, _ = make("bedrock", tmp_path, NOVA)
    client = trainer.client("bedrock")
    journal.save(provider_job_id="j", run_key="k", deployment="j")
    handle, done = JobHandle("bedrock", "j", "k", "f"), {**JOB, "status": "Completed", "outputModelArn": MODEL}
    creating = {"customModelDeploymentArn": PLACE, "modelDeploymentName": "j", "modelArn": MODEL, "createdAt": WHEN}
    with Stubber(client) as stub:
        stub.add_response("get_model_customization_job", done)
        stub.add_response("get_custom_model_deployment", {**creating, "status": "Creating"})
        state = trainer.poll(handle)
        assert (state.status, state.trained) == ("running", True)
        stub.add_response("get_model_customization_job", done)  # a cancel, or the deadline: nothing is left to stop but this
        stub.add_response("get_custom_model_deployment", {**creating, "status": "Creating"})
        stub.add_response("delete_custom_model_deployment", {}, {"customModelDeploymentIdentifier": "j"})
        trainer.cancel(handle)
        stub.add_response("get_model_customization_job", done)
        state = trainer.poll(handle)
        assert (state.status, "given up while it was being made" in state.progress["warning"]) == ("succeeded", True)
        assert MODEL in state.progress["warning"]
        for _ in range(2):
            stub.add_response("get_model_customization_job", done)
        stub.add_client_error("get_custom_model_deployment", "ResourceNotFoundException", "Requested resource not found", 404)
        with pytest.raises(TrainingError, match="answers nowhere"):
            trainer.keep(handle, tmp_path / "job", {"base_model": NOVA})
        stub.assert_no_pending_responses()


@pytest.mark.parametrize(
    ("provider", "operation", "code", "text"),
    [
        ("bedrock", "get_model_customization_job", "ResourceNotFoundException", "The provided job identifier is invalid"),
        ("bedrock", "get_model_customization_job", "ValidationException", "Requested resource not found"),
        ("sagemaker", "describe_training_job", "ValidationException", "Requested resource not found."),
        ("sagemaker", "describe_training_job", "ValidationException", "Could not find training job with name j"),
    ],
)
def test_a_job_that_is_gone_is_told_from_one_that_may_not_be_seen(
    aws: Any, tmp_path: Path, provider: str, operation: str, code: str, text: str
) -> None:
    trainer, journal, _ = make(provider, tmp_path, NOVA)
    journal.save(create_started=True, run_key="j")
    with Stubber(trainer.client(provider)) as stub:
        stub.add_client_error(operation, code, text, 400)
        assert trainer.attach() is None
        stub.add_client_error(operation, code, text, 400)
        with pytest.raises(ProviderError) as gone:
            trainer.poll(JobHandle(provider, "j", "j", "f"))
        assert gone.value.status == 404
        stub.add_client_error(operation, "AccessDeniedException", "no", 403)
        with pytest.raises(ProviderError, match="AccessDenied"):  # it may be there: nobody says that it is not
            trainer.attach()


@pytest.mark.parametrize("provider", ["bedrock", "sagemaker"])
def test_a_tick_waits_for_no_service_that_hangs(aws: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        trainer = make(provider, tmp_path, NOVA)[0].hurried(0.5)
        client = trainer.client(provider)
        with pytest.raises(ProviderUnsettled):
            trainer.poll(JobHandle(provider, "j", "j", "f"))
        assert client.meta.config.connect_timeout == client.meta.config.read_timeout == 0.5
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):  # tried once
            silent.accept()


def test_a_container_costs_its_billed_seconds_and_at_most_its_longest_run(aws: Any, tmp_path: Path) -> None:
    base = str(make_tiny_model(tmp_path / "base"))
    (tmp_path / "prices.yaml").write_text("- {provider: sagemaker, model: ml.p3, hour: 3.6, source: a bill, date: 2026-11-01}\n")
    trainer, _, asked = make("sagemaker", tmp_path, base)
    assert trainer.estimate(asked).usd is None
    settings = assistant("sagemaker", base_model=base, budget={"training_usd": 1.0})
    with pytest.raises(SettingsError, match=r"No price is known for sagemaker ml\.p3\.2xlarge.*model, hour, source"):
        bill(settings, asked, trainer.estimate(asked), None, "")
    assert trainer.estimate(replace(asked, tables=tmp_path)).usd == pytest.approx(72 * 3.6)  # remote.max_hours
    told = {"TrainingJobStatus": "Failed", "TrainingTimeInSeconds": 3000, "BillableTimeInSeconds": 1000}
    state = trainer.state_of(told)
    assert trainer.cost(state, base, True, tmp_path) == pytest.approx(1.0)
    assert trainer.cost(state, base, True, None) is None
    for told, usd in (({}, 0.0), ({"TrainingStartTime": WHEN}, None)):  # no instance was had; or nobody says for how long
        state = trainer.state_of({"TrainingJobStatus": "Failed", **told})
        assert trainer.cost(state, base, True, tmp_path) == usd
    serverless, _, _ = make("sagemaker", tmp_path, "arn:x", serverless=True, image=None, base_endpoint="b")
    (tmp_path / "prices.yaml").write_text("- {provider: sagemaker, model: 'arn:', training: 2, source: x, date: 2026-11-01}\n")
    os.utime(tmp_path / "prices.yaml", ns=(1, 1))
    done = serverless.state_of({"TrainingJobStatus": "Completed", "BillableTokenCount": 3_000_000})
    assert serverless.cost(done, "arn:x", True, tmp_path) == pytest.approx(6.0)
    bedrock, _, _ = make("bedrock", tmp_path, NOVA)
    assert bedrock.cost(bedrock.state_of({"status": "Completed"}), "meta.llama3-70b", True, None) is None  # the estimate stays


@pytest.mark.parametrize(("base", "epochs", "says"), [(NOVA, 6, "1 to 5 whole"), ("cohere.command", 101, "1 to 100 whole")])
def test_what_bedrock_does_not_take(aws: Any, tmp_path: Path, base: str, epochs: int, says: str) -> None:
    trainer, _, asked = make("bedrock", tmp_path, base)
    with pytest.raises(TrainingError, match=says):
        trainer.validate(replace(asked, hyperparameters=replace(asked.hyperparameters, epochs=epochs)))


CLAUDE, PREMIER = "anthropic.claude-3-haiku-20240307-v1:0:200k", "amazon.titan-text-premier-v1:0:32k"


@pytest.mark.parametrize(
    ("base", "sent"),
    [
        (NOVA, {"learningRate": "1e-05"}),
        ("meta.llama3-2-1b-instruct-v1:0:128k", {"learningRate": "1e-05", "batchSize": "1"}),
        (CLAUDE, {"learningRateMultiplier": "1", "batchSize": "32"}),
        (PREMIER, {"learningRate": "1e-05", "batchSize": "1"}),
        ("amazon.titan-text-lite-v1:0:4k", {"learningRate": "1e-05", "batchSize": "8"}),
        ("cohere.command-light-text-v14:7:4k", {"learningRate": "1e-05", "batchSize": "8"}),
        ("somebody.model-v1", {"learningRate": "1e-05", "batchSize": "8"}),
    ],
)
def test_what_each_family_is_sent_by_default_is_what_it_takes(tmp_path: Path, base: str, sent: dict[str, str]) -> None:
    trainer, _, asked = make("bedrock", tmp_path, base)
    assert isinstance(trainer, BedrockTrainer)
    assert trainer.parameters(asked) == {"epochCount": "3", **sent}


@pytest.mark.parametrize(
    ("base", "own", "says"),
    [
        (NOVA, {"learning_rate": 0.5}, "learningRate of .* 1e-06 to 0.0001, learning_rate is 0.5"),
        ("meta.llama3-1-8b-instruct-v1:0:128k", {"batch_size": 8}, "batchSize of .* 1 and nothing else, batch_size is 8"),
        (CLAUDE, {"batch_size": 2}, "batchSize of .* 4 to 256, batch_size is 2"),
        (PREMIER, {"learning_rate": 1e-4}, "learningRate of .* 1e-07 to 1e-05"),
    ],
)
def test_what_a_family_does_not_take_is_refused_here(tmp_path: Path, base: str, own: dict[str, Any], says: str) -> None:
    trainer, _, asked = make("bedrock", tmp_path, base, **own)
    assert isinstance(trainer, BedrockTrainer)
    with pytest.raises(TrainingError, match=says):
        trainer.parameters(asked)


def test_claudes_learning_rate_is_a_multiplier(tmp_path: Path) -> None:
    _, _, asked = make("bedrock", tmp_path, CLAUDE)
    for rate, sent in ((2.0, {"learningRateMultiplier": "2"}), ("auto", {})):
        settings = assistant("bedrock", base_model=CLAUDE, remote={"learning_rate_multiplier": rate})
        trainer = BedrockTrainer(Connection.of(settings), Store(tmp_path), Notes())
        assert trainer.parameters(asked) == {"epochCount": "3", "batchSize": "32", **sent}
    settings = assistant("bedrock", base_model=CLAUDE, remote={"learning_rate_multiplier": 3})
    with pytest.raises(TrainingError, match=r"0\.1 to 2, learning_rate_multiplier is 3"):
        BedrockTrainer(Connection.of(settings), Store(tmp_path), Notes()).parameters(asked)


def test_missing_settings_are_named(aws: Any, tmp_path: Path) -> None:
    for provider, missing in (("bedrock", "role"), ("sagemaker", "bucket"), ("sagemaker", "image")):
        trainer, _, asked = make(provider, tmp_path, NOVA, **{missing: None})
        with pytest.raises(SettingsError, match=rf"remote\.aws\.{missing}"):
            trainer.validate(asked)


def test_a_model_that_would_answer_nowhere_is_not_bought(aws: Any, tmp_path: Path) -> None:
    trainer, _, asked = make("bedrock", tmp_path, NOVA, deploy=False)
    with pytest.raises(SettingsError, match=r"remote\.deploy: true"):
        trainer.validate(asked)


def test_no_credentials(cloud: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    trainer, _, asked = make("bedrock", tmp_path, NOVA)
    with pytest.raises(SettingsError, match="no AWS credentials"):
        trainer.submit(asked)


def test_sagemaker_runs_our_worker_and_brings_the_model_home(aws: Any, tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    trainer, journal, asked = make("sagemaker", tmp_path, str(base))
    trainer.validate(asked)
    handle = trainer.submit(asked)
    told = aws.client("sagemaker").describe_training_job(TrainingJobName=handle.id)
    assert told["EnableManagedSpotTraining"] is True
    most = told["StoppingCondition"]
    assert open_hours(trainer.connection) * 3600 > most["MaxWaitTimeInSeconds"] > most["MaxRuntimeInSeconds"] == 72 * 3600
    state = trainer.state_of({"TrainingJobStatus": "Stopped", "SecondaryStatus": "MaxWaitTimeExceeded"})
    assert (state.status, state.error) == ("failed", "sagemaker ended the job: MaxWaitTimeExceeded")
    assert told["CheckpointConfig"]["LocalPath"] == "/opt/ml/checkpoints"
    assert [channel["ChannelName"] for channel in told["InputDataConfig"]] == ["training", "base"]
    sent = objects()
    spec = json.loads(sent["finetune-assets/job-sagemaker-1/input/spec.json"])
    assert (spec["task"], spec["output"], spec["base_model"]) == ("train", "/opt/ml/checkpoints", "/opt/ml/input/data/base")
    rows = [json.loads(line) for line in sent["finetune-assets/job-sagemaker-1/input/train.jsonl"].splitlines()]
    assert rows == [json.loads(line) for line in (asked.dataset / "train.jsonl").read_text().splitlines()]
    journal.state.pop("provider_job_id")
    assert trainer.submit(asked) == handle  # ResourceInUse: the job that is there
    assert trainer.poll(handle).status == "succeeded"  # moto completes at once
    with pytest.raises(TrainingError, match=r"holds no result\.json"):
        trainer.keep(handle, tmp_path / "job", {"base_model": str(base)})

    made = tmp_path / "container"  # what the worker leaves in its output folder
    write_json(made / "result.json", {"model": "model", "steps": 3, "tokens": 9, "seconds": 1.0, "train_loss": 0.1})
    (made / "model").mkdir()
    (made / "model" / "model.safetensors").write_bytes(b"weights")
    (made / "training_log.jsonl").write_text('{"step": 1, "loss": 0.1}\n')
    for file in (path for path in made.rglob("*") if path.is_file()):
        aws.client("s3").upload_file(str(file), "rows", f"finetune-assets/job-sagemaker-1/checkpoints/{file.relative_to(made)}")
    trainer.keep(handle, tmp_path / "job", {"base_model": str(base)})
    assert (tmp_path / "job" / "model" / "model.safetensors").read_bytes() == b"weights"
    assert read_json(tmp_path / "job" / "result.json")["trainer"] == "sagemaker"
    assert RemoteModel.read(tmp_path / "job" / "model") is None  # a folder like a local training's


def test_sagemaker_serverless(aws: Any, tmp_path: Path) -> None:
    trainer, _, asked = make("sagemaker", tmp_path, HUB, serverless=True, image=None, base_endpoint="base")
    trainer.validate(asked)
    client = trainer.client("sagemaker")
    seen: dict[str, Any] = {}
    client.meta.events.register("provide-client-params.sagemaker.CreateTrainingJob", lambda params, **_: seen.update(params))
    with Stubber(client) as stub:
        stub.add_response("create_training_job", {"TrainingJobArn": "arn:aws:sagemaker:us-east-1:123456789012:training-job/j"})
        trainer.submit(asked)
    assert seen["ServerlessJobConfig"] == {
        "BaseModelArn": HUB,
        "JobType": "FineTuning",
        "CustomizationTechnique": "SFT",
        "Peft": "LORA",
    }
    assert "ResourceConfig" not in seen
    assert 74 > open_hours(trainer.connection) > seen["StoppingCondition"]["MaxRuntimeInSeconds"] / 3600


def test_what_is_rented_makes_another_job_and_names_do_not(aws: Any, tmp_path: Path) -> None:
    base = str(make_tiny_model(tmp_path / "base"))

    def key(provider: str = "sagemaker", base: str = base, **own: Any) -> str:
        trainer, _, asked = make(provider, tmp_path, base, **own)
        return trainer.spec_hash(asked)

    same = key()
    assert [key(**{name: "other"}) for name in ("role", "bucket", "prefix")] == [same] * 3
    others: list[dict[str, Any]] = [{"spot": False}, {"instance": "ml.g5.xlarge"}, {"image": "other:2"}, {"region": "eu-west-1"}]
    assert len({same, *(key(**other) for other in others)}) == 5
    assert key("bedrock", NOVA) != key("bedrock", NOVA, region="eu-west-1")
    serverless = [key(base=HUB, serverless=True, spot=spot) for spot in (True, False)]
    assert serverless[0] == serverless[1] != key("bedrock", HUB)  # it has no capacity to wait for


def test_what_was_bought_before_the_terms_counted_is_not_bought_again(aws: Any, tmp_path: Path) -> None:
    book = Ledger(f"sqlite:///{tmp_path / 'l.db'}")
    for provider, base in (("bedrock", NOVA), ("sagemaker", HUB)):
        own: dict[str, Any] = {"serverless": provider == "sagemaker"}
        trainer, _, asked = make(provider, tmp_path, base, **own)
        sent = trainer.parameters(asked)
        columns: dict[str, Any] = {"assistant": "dental", "tenant_id": None, "dataset_id": "d", "dataset_fingerprint": "f1"}
        columns |= {"provider": provider, "base_model": base, "hyperparameters": {}, "plan": {}}
        job = book.open_job({**columns, "spec_hash": remote.spec_hash(asked, trainer.connection, sent)})
        open_journal(book, job.id, trainer.connection.to_dict(), 72)
        assert bought_as(book, "dental", trainer, asked) == job.spec_hash != trainer.spec_hash(asked)
        elsewhere = make(provider, tmp_path, base, region="eu-west-1", **own)[0]
        assert bought_as(book, "dental", elsewhere, asked) == elsewhere.spec_hash(asked)
        book.set_job(job.id, "failed")
        assert bought_as(book, "dental", trainer, asked) == trainer.spec_hash(asked)
        nowhere = make(provider, tmp_path, base, region=None, **own)[0]
        assert nowhere.spec_hash(asked) == job.spec_hash  # what is not set does not count
    book.close()


def test_the_doctor_lists_what_stands_and_is_billed(aws: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, asked = make("sagemaker", tmp_path, HUB, serverless=True, image=None, base_endpoint="base")
    assert "ml.g4dn.xlarge, price unknown" in trainer.estimate(asked).note
    tables = tmp_path / "tables"
    tables.mkdir()
    (tables / "prices.yaml").write_text("- {provider: sagemaker, model: ml.g4dn, hour: 0.5, source: a bill, date: 2026-11-01}\n")
    assert "$0.5 an hour, $365 a month (a bill, 2026-11-01)" in trainer.estimate(replace(asked, tables=tables)).note
    (tmp_path / "assistants").mkdir()
    for name in ("HOME", "ASSISTANTS", "TABLES"):
        monkeypatch.setenv(f"FINETUNE_{name}", str(tmp_path / name.lower()))
    monkeypatch.setenv("FINETUNE_DATABASE_URL", f"sqlite:///{tmp_path / 'l.db'}")
    book = Ledger(f"sqlite:///{tmp_path / 'l.db'}")
    columns: dict[str, Any] = {"assistant": "dental", "tenant_id": None, "dataset_id": "d", "dataset_fingerprint": "f1"}
    columns |= {"provider": "sagemaker", "base_model": HUB, "hyperparameters": {}, "plan": {}, "spec_hash": "s"}
    job = book.open_job(columns)
    open_journal(book, job.id, trainer.connection.to_dict(), 72).save(deployment="ours")
    book.close()

    def told() -> list[str]:
        return [one.text for one in rented(Environment.read()) if one.what == "deployment"]

    assert told() == []  # somebody has deleted it, or it was never made
    sagemaker = aws.client("sagemaker")
    variant = {"VariantName": "all", "ModelName": "ours", "InitialInstanceCount": 1, "InstanceType": "ml.g4dn.xlarge"}
    sagemaker.create_model(ModelName="ours", ExecutionRoleArn=ROLE, PrimaryContainer={"Image": "i"})
    sagemaker.create_endpoint_config(EndpointConfigName="ours", ProductionVariants=[variant])
    sagemaker.create_endpoint(EndpointName="ours", EndpointConfigName="ours")
    [text] = told()
    assert text.startswith("ours of dental at sagemaker (InService): an endpoint of one ml.g4dn.xlarge, $0.5 an hour")
    assert "until a person deletes it in the AWS console, and no budget counts it" in text


def test_what_is_left_of_an_endpoint_is_deleted_later(aws: Any, tmp_path: Path) -> None:
    """The endpoint first: one that stands needs its configuration."""
    trainer, journal, _ = make("sagemaker", tmp_path, HUB, serverless=True, image=None, base_endpoint="base")
    journal.save(provider_job_id="j", run_key="k", deployment="j")
    handle, deletes = JobHandle("sagemaker", "j", "k", "f"), ("delete_endpoint", "delete_endpoint_config", "delete_model")
    gone, busy = ("ValidationException", 'Could not find model "j".', 400), ("ThrottlingException", "Rate exceeded", 400)
    with Stubber(trainer.client("sagemaker")) as stub:

        def expect(*answers: tuple[str, str, int] | None) -> None:
            stub.add_response("describe_training_job", TRAINED)
            for operation, answer in zip(deletes, answers, strict=False):
                stub.add_client_error(operation, *answer) if answer else stub.add_response(operation, {})

        stub.add_response("describe_training_job", TRAINED)
        about = {"EndpointName": "j", "EndpointArn": f"{SAGEMAKER}:endpoint/j", "CreationTime": WHEN, "LastModifiedTime": WHEN}
        stub.add_response("describe_endpoint", {**about, "EndpointStatus": "Creating"})
        stub.add_client_error("delete_endpoint", *busy)
        trainer.cancel(handle)
        expect(None, busy)
        state = trainer.poll(handle)
        assert (state.status, state.provider_status, state.trained) == ("running", "Deleting its deployment", True)
        assert "deleting the endpoint configuration j failed with 400 ThrottlingException" in state.progress["warning"]
        expect(gone, None, gone)
        state = trainer.poll(handle)
        assert (state.status, "could not be deleted" in state.progress["warning"]) == ("succeeded", False)
        stub.add_response("describe_training_job", TRAINED)
        assert trainer.poll(handle).status == "succeeded"  # nothing is left to delete
        journal.state |= {"undeployed": None, "given_up": "2026-11-01T00:00:00+00:00"}
        expect(busy)
        state = trainer.poll(handle)  # not for ever
        assert (state.status, "Delete j in the AWS console" in state.progress["warning"]) == ("succeeded", True)
        stub.assert_no_pending_responses()


def test_sagemaker_gets_what_its_chain_reads(aws: Any, tmp_path: Path) -> None:
    base = str(make_tiny_model(tmp_path / "base"))
    trainer, _, asked = make("sagemaker", tmp_path, base)
    chain = replace(asked, objective=("sft", "dpo"), stages=())
    trainer.validate(chain)
    assert sorted(trainer.files(chain)) == ["preferences", "preferences_heldout", "train", "validation"]
    assert trainer.estimate(chain).tokens > trainer.estimate(asked).tokens
    with pytest.raises(TrainingError, match="cannot train continued_pretraining"):
        trainer.validate(replace(asked, objective=("continued_pretraining", "sft"), text=tmp_path))
    (chain.dataset / "preferences.jsonl").write_text("")
    with pytest.raises(DataError, match="objective `dpo` needs it"):
        trainer.validate(chain)


def test_sagemaker_serverless_preferences(aws: Any, tmp_path: Path) -> None:
    trainer, _, asked = make("sagemaker", tmp_path, "arn:x", serverless=True, image=None, base_endpoint="base")
    made = trainer.files(replace(asked, objective=("dpo",)))
    row = json.loads(made["train"].path.read_text().splitlines()[0])
    assert set(row) == {"prompt", "chosen", "rejected"}
    with pytest.raises(TrainingError, match=r"\[sft\] or \[dpo\] serverless"):
        trainer.validate(replace(asked, objective=("sft", "dpo")))
