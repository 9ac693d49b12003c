"""Amazon SageMaker: this project's own trainer in a container on rented capacity, or serverless customization of an open model.

The container runs `python -m finetune_assets.worker` with the same spec as a local training. Its output folder is the checkpoint
folder that SageMaker copies to S3, so a spot interruption goes on from the last whole checkpoint, and the finished model is a
folder like a local one's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from finetune_assets.errors import ProviderError, TrainingError
from finetune_assets.storage import read_json, replacing_folder, write_json, write_text
from finetune_assets.training import aws_calls, base_model, prices
from finetune_assets.training.aws import AwsTrainer
from finetune_assets.training.checks import check_request
from finetune_assets.training.provider_formats import LEAST_ROWS, Prepared
from finetune_assets.training.remote import TRAIN_AGAIN, RemoteModel
from finetune_assets.training.spec import train_spec
from finetune_assets.training.trainer import Estimate, JobHandle, JobState, TrainingRequest

INPUT = "/opt/ml/input/data"
OUTPUT = "/opt/ml/checkpoints"
STAGES = "stages/"
"""Checkpoints between the steps: of no use once the model is whole."""
CACHE = "/tmp/finetune/tokens"
"""Tokenised rows: in the container, never among the checkpoints."""
MOST_RUN, MOST_WAIT = 5 * 24 * 3600, 24 * 3600
LIMITS = ("MaxRuntimeExceeded", "MaxWaitTimeExceeded")
DATA: dict[str, tuple[str, ...]] = {
    "sft": ("train", "validation"),
    "tools": ("train", "validation"),
    "dpo": ("preferences", "preferences_heldout"),
    "kto": ("kto", "kto_heldout"),
}
"""Files of the frozen data set that each objective reads."""
TECHNIQUES: dict[tuple[str, ...], str] = {("sft",): "SFT", ("dpo",): "DPO"}


def limits(options: Mapping[str, Any]) -> tuple[int, int]:
    """Seconds after which SageMaker itself ends a job: of running (`remote.max_hours`), and with the waiting for spot capacity.

    `options`: those of `remote`, with those of `remote.aws` among them.
    """
    run = min(int(float(options.get("max_hours", 72)) * 3600), MOST_RUN)
    return run, run + (MOST_WAIT if options.get("spot", True) and not options.get("serverless") else 0)


class SageMakerTrainer(AwsTrainer):
    """The `RemoteTrainer` protocol over SageMaker training jobs."""

    service: ClassVar[str] = "sagemaker"

    @property
    def needs(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Settings without which nothing can be submitted."""
        if not self._serverless:
            return ("role", "bucket", "image")
        return ("role", "bucket", "base_endpoint") if self.deploys else ("role", "bucket")

    @property
    def _serverless(self) -> bool:
        return bool(self.options.get("serverless"))

    def parameters(self, request: TrainingRequest) -> dict[str, Any]:
        """The local recipe in a container; learning rate, epochs and batch where SageMaker has its own."""
        values = request.hyperparameters
        if not self._serverless:
            return {"recipe": train_spec(request, self._store)["spec_hash"]}
        if request.objective not in TECHNIQUES:
            raise TrainingError(f"sagemaker trains [sft] or [dpo] serverless, not {list(request.objective)}.")
        return {
            "max_epochs": str(int(values.epochs)),
            "learning_rate": f"{values.learning_rate:g}",
            "global_batch_size": str(values.batch_size),
        }

    @property
    def terms(self) -> dict[str, Any]:
        """Of a container what runs, and on what."""
        if self._serverless:
            return super().terms  # its hyper-parameters are not a container's
        return {**super().terms, "instance": self._instance, **{key: self.options.get(key) for key in ("image", "spot")}}

    def check(self, request: TrainingRequest) -> None:
        """A container trains whatever the local worker trains, but plain text, which stays here."""
        if not self._serverless:
            if request.text is not None or "continued_pretraining" in request.objective:
                raise TrainingError(
                    "sagemaker gets the frozen data set and nothing else, so it cannot train continued_pretraining on `text`. "
                    "Take it out of `objective`, or set `trainer: local`."
                )
            check_request(request, self._store, None)

    def sources(self, request: TrainingRequest) -> dict[str, Path]:
        """The files that the chain reads, by the names under which the worker looks for them."""
        if self._serverless:
            first, second = DATA[request.objective[0]]
            return {"train": request.dataset / f"{first}.jsonl", "validation": request.dataset / f"{second}.jsonl"}
        names = dict.fromkeys(name for objective in request.objective for name in DATA[objective])
        return {name: path for name in names if (path := request.dataset / f"{name}.jsonl").exists()}

    def files(self, request: TrainingRequest) -> dict[str, Prepared]:
        """The frozen rows themselves; serverless customization has no weights, so each target has a row of its own."""
        if not self._serverless:
            return self.prepare(request, "frozen", 1)
        return self.prepare(request, "preferences" if request.objective == ("dpo",) else "messages", LEAST_ROWS)

    def create(self, request: TrainingRequest, name: str, uris: Mapping[str, str]) -> None:
        """One training job."""
        prefix = self.prefix(request.run_key)
        asked: dict[str, Any] = {
            "TrainingJobName": name,
            "RoleArn": self.options["role"],
            "OutputDataConfig": {"S3OutputPath": f"{prefix}/output"},
            "InputDataConfig": [self._channel("training", f"{prefix}/input")],
            "StoppingCondition": {"MaxRuntimeInSeconds": self._run_seconds},
            "Tags": [{"Key": "run_key", "Value": request.run_key}, {"Key": "fingerprint", "Value": request.fingerprint}],
        }
        if self._serverless:
            serverless: dict[str, Any] = {
                "BaseModelArn": request.base_model,
                "JobType": "FineTuning",
                "CustomizationTechnique": TECHNIQUES[request.objective],
            }
            if self.options.get("accept_eula"):
                serverless["AcceptEula"] = True
            asked["ServerlessJobConfig"] = {**serverless, "Peft": "LORA"}
            asked["HyperParameters"] = self.parameters(request)
        else:
            self._container(request, asked, prefix)
        self.client("sagemaker").create_training_job(**asked)

    def _container(self, request: TrainingRequest, asked: dict[str, Any], prefix: str) -> None:
        """Our worker, its spec with the container's paths, the base model as a channel where it is a folder here."""
        spec = train_spec(request, self._store)
        spec |= {"dataset": f"{INPUT}/training", "output": OUTPUT, "cache": CACHE, "threads": 0}
        resolved = base_model.resolve(request.base_model)
        if Path(resolved).is_absolute():
            for file in sorted(path for path in Path(resolved).iterdir() if path.is_file()):
                self.s3.put(file, f"{prefix}/base/{file.name}")
            asked["InputDataConfig"].append(self._channel("base", f"{prefix}/base"))
            spec["base_model"] = f"{INPUT}/base"
        local = self._store.job(self.spec_hash(request)) / "upload" / "spec.json"
        write_json(local, spec)
        self.s3.put(local, f"{prefix}/input/spec.json")
        asked["AlgorithmSpecification"] = {
            "TrainingImage": self.options["image"],
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["python", "-m", "finetune_assets.worker", f"{INPUT}/training/spec.json"],
        }
        asked["ResourceConfig"] = {
            "InstanceType": self._instance,
            "InstanceCount": 1,
            "VolumeSizeInGB": int(self.options.get("volume_gb", 50)),
        }
        asked["CheckpointConfig"] = {"S3Uri": f"{prefix}/checkpoints", "LocalPath": OUTPUT}
        if self.options.get("spot", True):
            asked["EnableManagedSpotTraining"] = True
            asked["StoppingCondition"]["MaxWaitTimeInSeconds"] = limits(self.options)[1]

    def _channel(self, name: str, uri: str) -> dict[str, Any]:
        source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
        return {"ChannelName": name, "DataSource": {"S3DataSource": source}}

    def told(self, name: str) -> dict[str, Any]:
        """By the job's name."""
        with self.errors(f"asking for job {name}"):
            return self.client("sagemaker").describe_training_job(TrainingJobName=name)

    def word(self, told: Mapping[str, Any]) -> str:
        """`TrainingJobStatus`; where SageMaker has stopped the job at one of its limits, which."""
        limit = str(told.get("SecondaryStatus") or "")
        return limit if limit in LIMITS else str(told.get("TrainingJobStatus") or "missing")

    def progress(self, told: Mapping[str, Any]) -> Mapping[str, Any]:
        """Billed seconds, and the metrics that SageMaker has read from the log."""
        seconds = {key: told[key] for key in ("TrainingTimeInSeconds", "BillableTimeInSeconds") if key in told}
        if told.get("TrainingJobStatus") in ("Failed", "Stopped") and "TrainingStartTime" not in told:
            seconds.setdefault("BillableTimeInSeconds", 0)  # it is billed from that time on
        metrics = {str(metric["MetricName"]): metric["Value"] for metric in told.get("FinalMetricDataList") or []}
        tokens = {"trained_tokens": told["BillableTokenCount"]} if "BillableTokenCount" in told else {}
        return {"stage": told.get("SecondaryStatus"), **seconds, **tokens, **metrics}

    def estimate(self, request: TrainingRequest) -> Estimate:
        """Of a container the most that it can cost: `remote.max_hours` at the instance's price, at which SageMaker ends it."""
        estimate = super().estimate(request)
        if self._serverless:
            return estimate
        hour = self._hour(request.tables)
        return replace(estimate, usd=hour * self._run_seconds / 3600 if hour is not None else None)

    def cost(self, state: JobState, base_model: str, ran: bool, tables: Path | None) -> float | None:
        """Of a container the billed seconds, however it ended (spot bills fewer), at the instance's price."""
        seconds, hour = state.progress.get("BillableTimeInSeconds"), self._hour(tables)
        if self._serverless:
            return super().cost(state, base_model, ran, tables)
        return seconds / 3600 * hour if seconds is not None and hour is not None else None

    def hosting(self, base_model: str, tables: Path | None) -> str:
        """One instance."""
        instance = str(self.options.get("endpoint_instance", "ml.g4dn.xlarge"))
        price = prices.find(self.provider, instance, tables)
        if price is None or price.hour is None:
            return f"an endpoint of one {instance}, {prices.unknown(self.provider, instance, 'hour')}"
        usd = f"${price.hour:g} an hour, ${730 * price.hour:,.0f} a month"
        return f"an endpoint of one {instance}, {usd} ({price.source}, {price.date})"

    def _hour(self, tables: Path | None) -> float | None:
        price = prices.find(self.provider, self._instance, tables)
        return price.hour if price else None

    @property
    def _instance(self) -> str:
        return str(self.options.get("instance", "ml.p3.2xlarge"))

    @property
    def _run_seconds(self) -> int:
        return limits(self.options)[0]

    def stop(self, name: str) -> None:
        """Stops the job."""
        self.client("sagemaker").stop_training_job(TrainingJobName=name)

    def model_of(self, told: Mapping[str, Any]) -> str:
        """Checkpoint prefix of our container, artifacts of a serverless job."""
        if not self._serverless:
            return str((told.get("CheckpointConfig") or {}).get("S3Uri") or "")
        return str(told.get("OutputModelPackageArn") or (told.get("ModelArtifacts") or {}).get("S3ModelArtifacts") or "")

    @property
    def answers_elsewhere(self) -> bool:
        """A container's model comes home; a serverless job's stays."""
        return self._serverless

    @property
    def deploys(self) -> bool:
        """Only what stays at AWS."""
        return self._serverless and super().deploys

    def deploy(self, name: str, model: str) -> None:
        """A model of the job's package, and an endpoint of one instance. What an earlier try has made is taken."""
        client = self.client("sagemaker")
        package = [{"ModelPackageName": model}]
        variant = {"VariantName": "all", "ModelName": name, "InitialInstanceCount": 1}
        variant["InstanceType"] = self.options.get("endpoint_instance", "ml.g4dn.xlarge")
        for create, values in (
            (client.create_model, {"ModelName": name, "ExecutionRoleArn": self.options["role"], "Containers": package}),
            (client.create_endpoint_config, {"EndpointConfigName": name, "ProductionVariants": [variant]}),
            (client.create_endpoint, {"EndpointName": name, "EndpointConfigName": name}),
        ):
            try:
                with self.errors("creating the endpoint"):
                    create(**values)
            except ProviderError as error:
                if not aws_calls.is_there(error):
                    raise

    def undeploy(self, name: str) -> None:
        """Endpoint, its configuration and its model, each when what needs it is gone; the model package stays."""
        client = self.client("sagemaker")
        for what, delete, key in (
            ("endpoint", client.delete_endpoint, "EndpointName"),
            ("endpoint configuration", client.delete_endpoint_config, "EndpointConfigName"),
            ("model", client.delete_model, "ModelName"),
        ):
            try:
                with self.errors(f"deleting the {what} {name}"):
                    delete(**{key: name})
            except ProviderError as error:
                if error.status != 404:
                    raise

    def deployment(self, name: str) -> tuple[str, str | None, str]:
        """`EndpointStatus`, `FailureReason` and the endpoint's name."""
        with self.errors(f"asking for the endpoint {name}"):
            told = self.client("sagemaker").describe_endpoint(EndpointName=name)
        return str(told.get("EndpointStatus") or "missing"), told.get("FailureReason"), name

    def keep(self, handle: JobHandle, folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
        """Downloads the container's model and log, or writes where a serverless job's is. Raises TrainingError without one."""
        uri = self.result(handle).model
        if self._serverless:
            return self._keep_address(handle, folder, request, uri)
        with replacing_folder(folder / "download") as draft:
            self.s3.fetch(uri, draft, skip=STAGES)
            if not (draft / "result.json").exists():
                raise TrainingError(
                    f"Job {handle.id} is completed, but {uri} holds no result.json; look at the job's log. {TRAIN_AGAIN}"
                )
            result: dict[str, Any] = read_json(draft / "result.json")
            if not (draft / str(result["model"])).is_dir():
                raise TrainingError(f"Job {handle.id} is completed, but {uri} holds no model. {TRAIN_AGAIN}")
            with replacing_folder(folder / "model") as model:
                for file in sorted((draft / str(result["model"])).rglob("*")):
                    if file.is_file():
                        target = model / file.relative_to(draft / str(result["model"]))
                        target.parent.mkdir(parents=True, exist_ok=True)
                        file.rename(target)
            if (draft / "training_log.jsonl").exists():
                write_text(folder / "training_log.jsonl", (draft / "training_log.jsonl").read_text(encoding="utf-8"))
        shutil.rmtree(folder / "download")
        remote_result = {
            **result,
            "model": "model",
            "trainer": self.provider,
            "provider_job_id": handle.id,
            "usd": request.get("usd"),
        }
        write_json(folder / "result.json", remote_result)
        return remote_result

    def _keep_address(self, handle: JobHandle, folder: Path, request: Mapping[str, Any], uri: str) -> dict[str, Any]:
        where = self.address(handle.id, uri)
        base: dict[str, Any] = {**where, "model": self.options.get("base_endpoint") or str(request["base_model"])}
        for values, place in ((where, folder / "model"), (base, folder / "model" / "base")):
            RemoteModel(self.provider, **values).write(place)
        seconds = float(self.told(handle.id).get("TrainingTimeInSeconds") or 0)
        result = {"model": "model", "trainer": self.provider, "provider_job_id": handle.id, "fine_tuned_model": uri, "tokens": 0}
        result |= {"steps": 0, "seconds": seconds, "train_loss": None, "eval_loss": None, "host": self.provider}
        result |= {key: request.get(key) for key in ("objective", "hyperparameters", "base_model", "seed", "usd")}
        write_text(folder / "training_log.jsonl", "")
        write_json(folder / "result.json", result)
        return result
