"""Settings of training: objectives, hyperparameters, budgets, rented trainers, when to retrain."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator

from finetune_assets.assistants.settings.group import Address, Group

TrainerName = Literal["local", "openai", "azure", "nebius", "openai_compatible", "bedrock", "sagemaker"]
TRAINERS: tuple[TrainerName, ...] = get_args(TrainerName)


DEFAULT_REMOTE_MODEL = "gpt-4o-mini-2024-07-18"


class Budget(Group):
    """What one training may cost; a plan above it is refused before anything is spent."""

    training_usd: float | None = Field(default=None, ge=0, description="Most US dollars of one training.")
    hours: float | None = Field(default=None, gt=0, description="Most hours of one training.")
    usd_per_hour: float | None = Field(
        default=None, ge=0, description="Hourly rate of the machine that trains and serves locally."
    )
    monthly_usd: float | None = Field(
        default=None, ge=0, description="Most US dollars that this assistant spends at providers in a calendar month (UTC)."
    )


class Aws(Group):
    """Where Bedrock and SageMaker work. Credentials come from the AWS chain (environment, profile, role), never from here."""

    region: str | None = Field(default=None, description="Region; default: AWS_REGION or the profile's.")
    role: str | None = Field(default=None, description="ARN of the role that the service takes on: reads and writes the bucket.")
    bucket: str | None = Field(default=None, description="S3 bucket of data, checkpoints and results.")
    prefix: str = Field(default="finetune-assets", description="First part of every key in the bucket.")
    image: str | None = Field(default=None, description="SageMaker: container image with this package installed.")
    instance: str = Field(default="ml.p3.2xlarge", description="SageMaker: instance that trains.")
    volume_gb: Annotated[int, Field(ge=1)] = Field(default=50, description="SageMaker: disk of the training instance.")
    spot: bool = Field(default=True, description="SageMaker: spot capacity; checkpoints on S3 make interruptions cheap.")
    serverless: bool = Field(default=False, description="SageMaker: serverless customization of an open-weight model.")
    batch_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Bedrock: batchSize; default: Claude 32, Llama and Titan Premier 1, others 8. Nova takes none.",
    )
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=1e-5, description="Bedrock: learningRate. Claude takes `remote.learning_rate_multiplier` instead."
    )
    accept_eula: bool = Field(default=False, description="SageMaker serverless: yes to the licence of a gated model.")
    endpoint_instance: str = Field(
        default="ml.g4dn.xlarge", description="SageMaker serverless with `remote.deploy`: instance of the tuned model's endpoint."
    )
    base_endpoint: str | None = Field(
        default=None, description="SageMaker serverless: endpoint on which the base model answers, for the benchmark."
    )


class Remote(Group):
    """A rented trainer. Keys stand in environment variables, never here."""

    allowed: bool = Field(
        default=True,
        description="False: no row of this assistant or tenant leaves the machine for a training, a benchmark, a distillation or "
        "`augment.llm`, pooled assistants included. Where the router sends requests, `serving.upstream` says.",
    )
    base_url: Address | None = Field(
        default=None,
        description="Address of the API; default: the provider's, or what OPENAI_BASE_URL, AZURE_OPENAI_BASE_URL or "
        "OPENAI_COMPATIBLE_BASE_URL holds, by `trainer`.",
    )
    key_env: str | None = Field(default=None, description="Environment variable that holds the key; default: the provider's.")
    suffix: str = Field(default="finetune", description="First part of the tuned model's name.")
    learning_rate_multiplier: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default=1.0, description="OpenAI, Azure and Bedrock's Claude: their scale of the learning rate."
    )
    training_type: Literal["Standard", "GlobalStandard", "Developer"] | None = Field(
        default=None, description="Azure: trainingType; default: the service's."
    )
    file_days: Annotated[int, Field(ge=1, le=30)] = Field(
        default=7, description="Days after which the provider deletes uploaded files by itself."
    )
    delete_files: bool = Field(default=True, description="Delete uploaded files as soon as the job has ended.")
    max_hours: Annotated[float, Field(gt=0)] = Field(
        default=72.0,
        description="A job that is open longer is cancelled as stuck. SageMaker: of running; it ends a job there by itself.",
    )
    min_model_life_days: Annotated[int, Field(ge=0)] = Field(
        default=90, description="A model that is switched off sooner is not trained any more."
    )
    successor: str | None = Field(
        default=None, description="TRAINER/MODEL that a dying model's data set is migrated to by itself; null: only a warning."
    )
    deploy: bool = Field(
        default=False,
        description="Bedrock, SageMaker serverless, Nebius: when the job has ended, make its model answer there. AWS "
        "may bill it by the hour, until a person deletes it.",
    )
    aws: Aws = Aws()

    @field_validator("successor")
    @classmethod
    def _trainer_and_model(cls, successor: str | None) -> str | None:
        if successor is not None:
            split_target(successor)
        return successor


def split_target(target: str) -> tuple[str, str]:
    """`TRAINER/MODEL` as its two parts; a model's own slashes stay. Raises ValueError."""
    trainer, slash, model = target.partition("/")
    if not slash or not model or trainer not in TRAINERS:
        raise ValueError(f"{target!r} is not TRAINER/MODEL with TRAINER one of {', '.join(TRAINERS)}")
    return trainer, model


class Retrain(Group):
    """When a training starts by itself; the schedule and the sensor are off until someone turns them on."""

    weekly: bool = Field(default=True, description="Take part in the weekly retrain.")
    feedback_threshold: Annotated[int, Field(ge=1)] = Field(
        default=50, description="New feedback since the last training that starts one."
    )


Objective = Literal["continued_pretraining", "sft", "tools", "dpo", "kto"]


class StageHyperparameters(Group):
    """Overrides of the preset; null keeps the preset's value."""

    epochs: float | None = Field(default=None, gt=0, le=50, description="Passes over the training rows.")
    learning_rate: float | None = Field(default=None, gt=0, lt=1, description="The highest one, after the warm-up.")
    batch_size: int | None = Field(default=None, ge=1, le=1024, description="Examples per optimiser step.")
    max_length: int | None = Field(default=None, ge=32, description="Tokens; longer examples lose their oldest turns.")
    warmup: float | None = Field(default=None, ge=0, le=1, description="Share of the steps.")
    weight_decay: float | None = Field(default=None, ge=0, le=1, description="AdamW's.")
    patience: int | None = Field(default=None, ge=1, description="Validations without a lower loss that end a training early.")
    beta: float | None = Field(default=None, gt=0, le=10, description="How closely dpo and kto stay with their start.")


class Hyperparameters(StageHyperparameters):
    """Overrides of the preset for every objective; `by_objective` has the last word for one of them."""

    seed: int | None = Field(default=None, ge=0, description="Of order, adapters and dropout.")
    lora_rank: int | None = Field(default=None, ge=1, le=1024, description="Rank of the adapter's matrices.")
    lora_alpha: int | None = Field(default=None, ge=1, description="Scale of the adapter: alpha / rank.")
    precision: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="Of the products; default: bfloat16 where the hardware multiplies it."
    )
    liger: bool | None = Field(
        default=None, description="GPU kernels of the package liger-kernel instead of the model's own; default: no."
    )
    checkpoints: int | None = Field(
        default=None, ge=1, le=100, description="Newest checkpoints that are kept while a local training runs; default: 2."
    )
    by_objective: dict[Objective, StageHyperparameters] = Field(
        default_factory=dict[Objective, StageHyperparameters], description="Overrides for one objective of a chain."
    )
