"""Amazon Bedrock: fine-tuning of the models it hosts, by `create_model_customization_job`.

The tuned model is an ARN. It answers once it is deployed (`remote.deploy`: `create_custom_model_deployment`), by Converse; or
behind a gateway, `remote.base_url`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Takes:
    """What a family of models takes: least and most, both included."""

    epochs: tuple[int, int] = (1, 10)
    rate: tuple[float, float] = (0.0, 1.0)
    """Of learningRate; Claude's learningRateMultiplier."""
    batch: tuple[int, int] | None = (1, 1024)
    """Null: no batchSize at all."""
    usual_batch: int = 8


FAMILIES = {
    "nova": Takes((1, 5), (1e-6, 1e-4), None),
    "claude": Takes((1, 10), (0.1, 2.0), (4, 256), 32),
    "llama": Takes((1, 10), (5e-6, 0.1), (1, 1), 1),
    "titan-text-premier": Takes((1, 5), (1e-7, 1e-5), (1, 1), 1),
    "titan-text": Takes((1, 10), (0.0, 1.0), (1, 64)),
    "cohere.command-light": Takes((1, 100), (5e-6, 0.1), (8, 32)),
    "cohere.command": Takes((1, 100), (5e-6, 0.1), (8, 8)),
}
"""By a part of the model's id, the first that fits. Amazon Bedrock's user guide, "Custom model hyperparameters": cm-hp-nova-mm,
cm-hp-anth-claude-3, cm-hp-meta-llama2, -llama31 and -llama32, cm-hp-titan-text, cm-hp-cohere-command; noted 2026-11-22."""


class BedrockTrainer(AwsTrainer):
    """The `RemoteTrainer` protocol over Bedrock's model customization."""

    service: ClassVar[str] = "bedrock"

    def parameters(self, request: TrainingRequest) -> dict[str, Any]:
        """epochCount, batchSize and learningRate (Claude: learningRateMultiplier), all strings, within what the model takes.

        Raises TrainingError for what it does not take.
        """
        if request.objective != ("sft",):
            raise TrainingError(f"bedrock trains the objective [sft], not {list(request.objective)}; train a chain locally.")
        takes = next((takes for part, takes in FAMILIES.items() if part in request.base_model), Takes())
        epochs = request.hyperparameters.epochs
        if epochs != int(epochs) or not takes.epochs[0] <= epochs <= takes.epochs[1]:
            raise TrainingError(
                f"bedrock takes {takes.epochs[0]} to {takes.epochs[1]} whole epochs of {request.base_model}, "
                f"hyperparameters.epochs is {epochs:g}."
            )
        sent = {"epochCount": str(int(epochs)), **self._rate(request, takes)}
        if takes.batch is not None:
            batch = self._set("batch_size", request) or takes.usual_batch
            sent["batchSize"] = _within(takes.batch, batch, request.base_model, "batchSize", "batch_size")
        return sent

    def _rate(self, request: TrainingRequest, takes: Takes) -> dict[str, str]:
        name, setting = "learningRate", "learning_rate"
        rate = self._set(setting, request)
        if "claude" in request.base_model:
            name, setting = "learningRateMultiplier", "learning_rate_multiplier"
            rate = self.options.get(setting, 1.0)
        return {} if rate == "auto" else {name: _within(takes.rate, rate, request.base_model, name, setting)}

    def _set(self, name: str, request: TrainingRequest) -> Any:
        """Of `hyperparameters`, else of `remote.aws`."""
        return request.overrides.get(name, self.options.get(name))

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


def _within(takes: tuple[float, float], value: float, model: str, name: str, setting: str) -> str:
    if not takes[0] <= value <= takes[1]:
        what = f"{takes[0]:g} to {takes[1]:g}" if takes[0] < takes[1] else f"{takes[0]:g} and nothing else"
        raise TrainingError(f"bedrock takes as {name} of {model} {what}, {setting} is {value:g}.")
    return f"{value:g}"
