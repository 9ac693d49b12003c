"""Amazon Bedrock: fine-tuning of the models it hosts, by `create_model_customization_job`.

The tuned model is an ARN. It answers once it is deployed (`remote.deploy`: `create_custom_model_deployment`), by Converse; or
behind a gateway, `remote.base_url`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from finetune_assets.errors import TrainingError
from finetune_assets.storage import write_json, write_text
from finetune_assets.training import remote
from finetune_assets.training.aws import AwsTrainer
from finetune_assets.training.provider_formats import LEAST_ROWS, Prepared
from finetune_assets.training.remote import TRAIN_AGAIN, RemoteModel
from finetune_assets.training.trainer import JobHandle, TrainingRequest

CONVERSATIONS = ("nova", "llama3-2", "llama3-3")
"""Models whose rows are `bedrock-conversation-2024`; Claude has a shape of its own, the others (Titan, Cohere, Llama 3.1) take
prompt and completion: https://docs.aws.amazon.com/bedrock/latest/userguide/preparing-text-data.html."""
LEAST_OF_CLAUDE = 32


class BedrockTrainer(AwsTrainer):
    """The `RemoteTrainer` protocol over Bedrock's model customization."""

    service: ClassVar[str] = "bedrock"

    def parameters(self, request: TrainingRequest) -> dict[str, Any]:
        """epochCount, batchSize and learningRate, all strings; Nova takes 1 to 5 epochs and no batch size."""
        if request.objective != ("sft",):
            raise TrainingError(f"bedrock trains the objective [sft], not {list(request.objective)}; train a chain locally.")
        epochs, nova = request.hyperparameters.epochs, "nova" in request.base_model
        most = 5 if nova else 10
        if epochs != int(epochs) or not 1 <= epochs <= most:
            raise TrainingError(
                f"bedrock takes 1 to {most} whole epochs of {request.base_model}, hyperparameters.epochs is {epochs:g}."
            )
        rate = request.overrides.get("learning_rate", self.options.get("learning_rate", 1e-5))
        sent = {"epochCount": str(int(epochs)), "learningRate": f"{rate:g}"}
        return (
            sent if nova else {**sent, "batchSize": str(request.overrides.get("batch_size", self.options.get("batch_size", 8)))}
        )

    def files(self, request: TrainingRequest) -> dict[str, Prepared]:
        """Conversation schema or prompt and completion, by the model."""
        if "claude" in request.base_model:
            return self.prepare(request, "bedrock_claude", LEAST_OF_CLAUDE)
        talks = any(name in request.base_model for name in CONVERSATIONS)
        return self.prepare(request, "bedrock_conversation" if talks else "bedrock_prompt", LEAST_ROWS)

    def create(self, request: TrainingRequest, name: str, uris: Mapping[str, str]) -> None:
        """One customization job; the token makes a repeated request the same job."""
        asked: dict[str, Any] = {
            "jobName": name,
            "customModelName": remote.slug(str(self.options.get("suffix", "finetune")), request.assistant, name, most=63),
            "roleArn": self.options["role"],
            "clientRequestToken": hashlib.sha256(request.run_key.encode()).hexdigest()[:40],
            "baseModelIdentifier": request.base_model,
            "customizationType": "FINE_TUNING",
            "trainingDataConfig": {"s3Uri": uris["train"]},
            "outputDataConfig": {"s3Uri": f"{self.prefix(request.run_key)}/output/"},
            "hyperParameters": self.parameters(request),
            "jobTags": [{"key": "run_key", "value": request.run_key}, {"key": "fingerprint", "value": request.fingerprint}],
        }
        if "validation" in uris:
            asked["validationDataConfig"] = {"validators": [{"s3Uri": uris["validation"]}]}
        self.client("bedrock").create_model_customization_job(**asked)

    def told(self, name: str) -> dict[str, Any]:
        """By the job's name."""
        with self.errors(f"asking for job {name}"):
            return self.client("bedrock").get_model_customization_job(jobIdentifier=name)

    def word(self, told: Mapping[str, Any]) -> str:
        """`status`."""
        return str(told.get("status") or "missing")

    def progress(self, told: Mapping[str, Any]) -> Mapping[str, Any]:
        """The training loss, once Bedrock tells it."""
        loss = (told.get("trainingMetrics") or {}).get("trainingLoss")
        return {"train_loss": loss} if loss is not None else {}

    def stop(self, name: str) -> None:
        """Stops the job."""
        self.client("bedrock").stop_model_customization_job(jobIdentifier=name)

    def model_of(self, told: Mapping[str, Any]) -> str:
        """The custom model's ARN."""
        return str(told.get("outputModelArn") or told.get("outputModelName") or "")

    def deploy(self, name: str, model: str) -> None:
        """On-demand deployment of a custom model."""
        token = hashlib.sha256(f"deploy {name}".encode()).hexdigest()[:40]
        self.client("bedrock").create_custom_model_deployment(modelDeploymentName=name, modelArn=model, clientRequestToken=token)

    def undeploy(self, name: str) -> None:
        """The deployment; the model stays."""
        self.client("bedrock").delete_custom_model_deployment(customModelDeploymentIdentifier=name)

    def deployment(self, name: str) -> tuple[str, str | None, str]:
        """`status`, `failureMessage` and the deployment's ARN."""
        with self.errors(f"asking for the deployment {name}"):
            told = self.client("bedrock").get_custom_model_deployment(customModelDeploymentIdentifier=name)
        return str(told.get("status") or "missing"), told.get("failureMessage"), str(told.get("customModelDeploymentArn"))

    def keep(self, handle: JobHandle, folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
        """`model/remote.json` with the ARN, the base's beside it, and result.json. Raises TrainingError without one."""
        told = self.told(handle.id)
        model = self.result(handle).model
        if not model:
            raise TrainingError(
                f"Job {handle.id} is completed, but Bedrock names no model; look at it in the console. {TRAIN_AGAIN}"
            )
        where = self.address(handle.id, model)
        RemoteModel(self.provider, **where, **self._price(str(request["base_model"]))).write(folder / "model")
        base = re.sub(
            r":\d+k$", "", str(request["base_model"])
        )  # the context's length is part of what is tuned, not of what answers
        RemoteModel(self.provider, **{**where, "model": base}, **self._price(base)).write(folder / "model" / "base")
        losses = [entry.get("validationLoss") for entry in told.get("validationMetrics") or []]
        started, ended = told.get("creationTime"), told.get("endTime")
        result = {
            "model": "model",
            "trainer": self.provider,
            "provider_job_id": handle.id,
            "fine_tuned_model": model,
            "tokens": 0,
            "steps": 0,
            "seconds": (ended - started).total_seconds() if started and ended else 0.0,
            "train_loss": (told.get("trainingMetrics") or {}).get("trainingLoss"),
            "eval_loss": losses[-1] if losses else None,
            "host": self.provider,
            **{key: request.get(key) for key in ("objective", "hyperparameters", "base_model", "seed", "usd")},
        }
        write_text(folder / "training_log.jsonl", "")
        write_json(folder / "result.json", result)
        return result
