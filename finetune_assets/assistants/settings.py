"""The settings of an assistant, in small typed groups; each field's description is its documentation."""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Comparable = Literal[
    "bits_per_byte",
    "loss",
    "perplexity",
    "rules",
    "similarity",
    "similarity_gain",
    "chrf",
    "bleu",
    "rouge_l",
    "empty",
    "repeated",
    "unfinished",
    "personal_data",
    "faithful",
    "slots_kept",
    "invented",
    "other_tenant",
]
"""Measures of replies in which two candidates can be compared."""
Layout = Literal["per_reply", "per_conversation"]


RESERVED = ("base", "few_shot", "rag", "champion", "tuned", "tuned_rag", "reference")
"""Names of the report's own candidates."""


class Group(BaseModel):
    """Base of all groups: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Select(Group):
    """Which conversations are this assistant's: a whole vertical or one tenant."""

    vertical: str | None = Field(default=None, description="Pools every tenant of this vertical.")
    tenant: str | None = Field(default=None, description="Only this tenant.")

    @model_validator(mode="after")
    def _one(self) -> Select:
        if (self.vertical is None) == (self.tenant is None):
            raise ValueError("give exactly one of `vertical` and `tenant`")
        return self


class Filters(Group):
    """What may become an example. A correction passes all but `reply_chars`' upper bound: a person wrote it on purpose."""

    min_satisfaction: Annotated[int, Field(ge=1, le=5)] = Field(default=4, description="Least score of a reply without feedback.")
    user_chars: tuple[Count, Count] = Field(default=(5, 500), description="Least and most characters of the user's turn.")
    reply_chars: tuple[Count, Count] = Field(default=(10, 1000), description="Least and most characters of the reply.")
    exclude: list[str] | None = Field(
        default=None,
        description="Regular expressions; a reply that matches one is dropped. Default: the language's list of error replies.",
    )
    require: dict[str, str] = Field(
        default_factory=dict, description="Intent to regular expression that user turn and reply together must match."
    )
    exclude_tenants: list[str] = Field(default_factory=list, description="Tenants left out of a pooled assistant.")
    context_turns: Annotated[int, Field(ge=1, le=20)] = Field(
        default=8, description="Most turns of context, the user's last one included."
    )
    context_chars: Annotated[int, Field(ge=100)] = Field(
        default=4000, description="Most characters of context; the oldest turns go first."
    )
    near_duplicate: Annotated[float, Field(ge=0.5, le=1)] = Field(
        default=0.9, description="rapidfuzz ratio from which two examples are one."
    )
    semantic_duplicate: Annotated[float, Field(ge=0.5, le=1)] | None = Field(
        default=None, description="Cosine of sentence embeddings from which two examples say the same; null: not compared."
    )
    semantic_model: str | None = Field(
        default=None, description="sentence-transformers model id or path for it; default: the installed MiniLM."
    )

    @field_validator("user_chars", "reply_chars")
    @classmethod
    def _ordered(cls, bounds: tuple[int, int]) -> tuple[int, int]:
        if bounds[0] > bounds[1]:
            raise ValueError(f"the least ({bounds[0]}) is above the most ({bounds[1]})")
        return bounds

    @field_validator("exclude")
    @classmethod
    def _patterns(cls, patterns: list[str] | None) -> list[str] | None:
        for pattern in patterns or []:
            check_pattern(pattern)
        return patterns

    @field_validator("require")
    @classmethod
    def _required_patterns(cls, patterns: dict[str, str]) -> dict[str, str]:
        for pattern in patterns.values():
            check_pattern(pattern)
        return patterns


class Rule(Group):
    """What a reply must or must not say. Matched without regard to case."""

    name: str = Field(description="Shown in the report.")
    intent: str | None = Field(default=None, description="Intent of the user's turn; default: every intent.")
    when: str | None = Field(
        default=None, description="Regular expression the user's last turn must match for the rule to apply."
    )
    contains_any: list[str] = Field(default_factory=list, description="At least one of these regular expressions matches.")
    not_contains: list[str] = Field(default_factory=list, description="None of these regular expressions matches.")

    @model_validator(mode="after")
    def _says_something(self) -> Rule:
        if not self.contains_any and not self.not_contains:
            raise ValueError("give `contains_any` or `not_contains`")
        for pattern in [*self.contains_any, *self.not_contains, *([self.when] if self.when else [])]:
            check_pattern(pattern)
        return self


class Gates(Group):
    """What a version must reach to be served. A gate decides on the interval, never on the point; null switches it off."""

    max_training_loss: float | None = Field(default=2.0, description="Training loss at the end; depends on the tokenizer.")
    max_perplexity: float | None = Field(
        default=10.0, description="Perplexity per token of the references; depends on the tokenizer."
    )
    max_reply_seconds: float | None = Field(default=0.5, description="Median seconds of one reply.")
    min_rules: Share | None = Field(default=0.8, description="Share of applicable rules that hold.")
    max_personal_data: Share | None = Field(
        default=0.0, description="Share of replies in which a recogniser finds personal data."
    )
    max_empty: Share | None = Field(default=0.01, description="Share of empty replies.")
    max_repeated: Share | None = Field(default=0.05, description="Share of replies that repeat themselves.")
    above_similarity_floor: bool = Field(default=True, description="Similarity with the references above the shuffled floor.")
    better_than_base: Comparable | None = Field(default="bits_per_byte", description="Measure in which it must beat its base.")
    not_worse_than_champion: Comparable | None = Field(
        default="bits_per_byte", description="Measure in which it may not be worse than the champion, where there is one."
    )
    champion_margin: float = Field(
        default=0.02, ge=0, description="By how much it may be worse than the champion, in the measure's own unit."
    )
    min_faithful: Share | None = Field(
        default=None, description="Share of replies that state nothing but what the conversation supports, where that is enough."
    )
    max_other_tenant: Share | None = Field(
        default=None, description="Share of replies with a name, number or address that only another tenant's data hold."
    )
    max_forgetting: float | None = Field(
        default=1.0, ge=0, description="Most relative rise of bits per byte in everyday talk, against the base; 1: twice as many."
    )
    keeps_details: bool = Field(
        default=True, description="It may not take over fewer of the conversation's details than its base does."
    )
    min_parity: Share | None = Field(
        default=0.95, description="Share of prompts that get the same reply alone, as served, as they got in the benchmark."
    )
    canaries: bool = Field(default=True, description="No secret of `benchmark.canaries` may be learnt by heart.")
    min_checks: Share | None = Field(default=1.0, description="Share of the standing suite's cases that hold.")


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
    batch_size: Annotated[int, Field(ge=1)] = Field(default=8, description="Bedrock: batchSize, where the model takes one.")
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = Field(default=1e-5, description="Bedrock: learningRate.")


class Remote(Group):
    """A rented trainer. Keys stand in environment variables, never here."""

    allowed: bool = Field(
        default=True, description="False: nothing of this assistant or tenant leaves the machine, pooled assistants included."
    )
    base_url: str | None = Field(default=None, description="Address of the API; default: the provider's, or OPENAI_BASE_URL.")
    key_env: str | None = Field(default=None, description="Environment variable that holds the key; default: the provider's.")
    suffix: str = Field(default="finetune", description="First part of the tuned model's name.")
    learning_rate_multiplier: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default=1.0, description="OpenAI and Azure; their scale of the learning rate."
    )
    training_type: Literal["Standard", "GlobalStandard", "Developer"] | None = Field(
        default=None, description="Azure: trainingType; default: the service's."
    )
    file_days: Annotated[int, Field(ge=1, le=30)] = Field(
        default=7, description="Days after which the provider deletes uploaded files by itself."
    )
    delete_files: bool = Field(default=True, description="Delete uploaded files as soon as the job has ended.")
    max_hours: Annotated[float, Field(gt=0)] = Field(default=72.0, description="A job that is open longer is cancelled as stuck.")
    min_model_life_days: Annotated[int, Field(ge=0)] = Field(
        default=90, description="A model that is switched off sooner is not trained any more."
    )
    successor: str | None = Field(
        default=None, description="TRAINER/MODEL that a dying model's data set is migrated to by itself; null: only a warning."
    )
    aws: Aws = Aws()

    @field_validator("successor")
    @classmethod
    def _trainer_and_model(cls, successor: str | None) -> str | None:
        if successor is not None:
            split_target(successor)
        return successor


TRAINERS = ("local", "openai", "azure", "nebius", "openai_compatible", "bedrock", "sagemaker")
DEFAULT_REMOTE_MODEL = "gpt-4o-mini-2024-07-18"


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


class Split(Group):
    """How examples are divided."""

    mode: Literal["user", "time"] = Field(
        default="user", description="`user`: by a hash of the user; `time`: test is what came after `date`."
    )
    train: Share = 0.8
    validation: Share = 0.1
    test: Share = 0.1
    date: datetime.date | None = Field(default=None, description="First day of the test set where `mode` is `time`.")

    @model_validator(mode="after")
    def _whole(self) -> Split:
        if abs(self.train + self.validation + self.test - 1) > 1e-9:
            raise ValueError(f"train + validation + test is {self.train + self.validation + self.test:g}, must be 1")
        if (self.mode == "time") != (self.date is not None):
            raise ValueError("`date` goes with `mode: time`, and only with it")
        return self


Cap = Annotated[int, Field(strict=True, ge=1)] | Annotated[float, Field(gt=0, lt=1)]
"""A number of rows, or below 1 a share of them."""


class Balance(Group):
    """How training rows are evened out. Validation and test stay as they are: they measure what is really asked."""

    max_per_intent: Cap | None = Field(
        default=None, description="Most training rows of one intent: a number, or below 1 a share of the training rows."
    )
    max_per_tenant: Cap | None = Field(
        default=None, description="Most training rows of one tenant: a number, or below 1 a share of the training rows."
    )
    negative_share: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="Share of the training rows kept for negative examples: requests to decline or hand over."
    )
    negative_intents: list[str] = Field(default_factory=list, description="Intents whose examples are negative ones.")
    negative_patterns: list[str] = Field(
        default_factory=list, description="Regular expressions; a reply that matches one is a negative example."
    )

    @field_validator("negative_patterns")
    @classmethod
    def _patterns(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            check_pattern(pattern)
        return patterns

    @model_validator(mode="after")
    def _recognisable(self) -> Balance:
        if self.negative_share is not None and not self.negative_intents and not self.negative_patterns:
            raise ValueError("`negative_share` needs `negative_intents` or `negative_patterns`: how such examples are recognised")
        return self


class Minimum(Group):
    """Fewer than this are refused, with the numbers."""

    train_rows: Annotated[int, Field(ge=1)] = Field(default=10, description="Training rows; providers take no fewer than 10.")
    test_conversations: Annotated[int, Field(ge=1)] = Field(default=1, description="Conversations in the test set.")
    per_intent: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="Intent to its least number of training rows."
    )
    preference_pairs: Annotated[int, Field(ge=1)] = Field(
        default=20, description="Pairs for training where the objective is `dpo`."
    )
    thumbs: Annotated[int, Field(ge=1)] = Field(
        default=20, description="Good and bad replies each, for training where the objective is `kto`."
    )


class VariationModel(Group):
    """A language model behind an OpenAI-compatible endpoint that rewords requests."""

    base_url: str = Field(description="Address of the API, e.g. https://api.openai.com/v1.")
    model: str = Field(description="The model's name there.")
    api_key_env: str = Field(default="OPENAI_API_KEY", description="Environment variable that holds the key.")
    max_requests: Annotated[int, Field(ge=1)] = Field(default=200, description="Most requests of one build.")
    max_usd: float | None = Field(default=None, gt=0, description="Most US dollars of one build.")
    usd_per_million_tokens: float | None = Field(default=None, ge=0, description="Price, prompt and answer alike.")

    @model_validator(mode="after")
    def _priced(self) -> VariationModel:
        if self.max_usd is not None and self.usd_per_million_tokens is None:
            raise ValueError("`max_usd` needs `usd_per_million_tokens`")
        return self


class Augment(Group):
    """Synthetic variations of the user's turn for intents with few training rows; the reply is never changed."""

    share: Annotated[float, Field(ge=0, le=0.5)] = Field(
        default=0.15, description="Most of the training rows that may be synthetic; 0 switches them off."
    )
    below: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="Intents with fewer training rows than this part of an intent's mean are filled up to it."
    )
    per_example: Annotated[int, Field(ge=1, le=10)] = Field(default=2, description="Most variations of one example.")
    seed: Annotated[int, Field(ge=0)] = 0
    llm: VariationModel | None = Field(
        default=None, description="Who rewords; default: light variations (spelling, greetings, accents, tú and vos) made here."
    )


Objective = Literal["continued_pretraining", "sft", "tools", "dpo", "kto"]


class StageHyperparameters(Group):
    """Overrides of the preset; null keeps the preset's value."""

    epochs: float | None = Field(default=None, gt=0, le=50)
    learning_rate: float | None = Field(default=None, gt=0, lt=1)
    batch_size: int | None = Field(default=None, ge=1, le=1024, description="Examples per optimiser step.")
    max_length: int | None = Field(default=None, ge=32, description="Tokens; longer examples lose their oldest turns.")
    warmup: float | None = Field(default=None, ge=0, le=1, description="Share of the steps.")
    weight_decay: float | None = Field(default=None, ge=0, le=1)
    patience: int | None = Field(default=None, ge=1, description="Validations without a lower loss that end a training early.")
    beta: float | None = Field(default=None, gt=0, le=10, description="How closely dpo and kto stay with their start.")


class Hyperparameters(StageHyperparameters):
    """Overrides of the preset for every objective; `by_objective` has the last word for one of them."""

    seed: int | None = Field(default=None, ge=0)
    lora_rank: int | None = Field(default=None, ge=1, le=1024, description="Rank of the adapter's matrices.")
    lora_alpha: int | None = Field(default=None, ge=1, description="Scale of the adapter: alpha / rank.")
    precision: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="Of the products; default: bfloat16 where the hardware multiplies it."
    )
    by_objective: dict[Objective, StageHyperparameters] = Field(
        default_factory=dict[Objective, StageHyperparameters], description="Overrides for one objective of a chain."
    )


class EndpointSettings(Group):
    """A model behind an OpenAI-compatible address."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,30}$", description="Its name in the report.")
    url: str = Field(pattern=r"^https?://", description="Up to and with `/v1`.")
    model: str
    api_key_env: str | None = Field(default=None, description="Environment variable that holds the key.")
    timeout: float = Field(default=30.0, gt=0, description="Seconds of one try.")
    usd_per_million_input: float | None = Field(default=None, ge=0, description="Price of a million prompt tokens.")
    usd_per_million_output: float | None = Field(default=None, ge=0, description="Price of a million reply tokens.")
    priced_on: datetime.date | None = Field(default=None, description="Day on which these prices were read.")


class Canary(Group):
    """A secret that was planted in the training data, or that must have been erased from them; the model must not know it."""

    user: str = Field(description="What a user says before it.")
    reply: str = Field(default="{secret}", description="The reply, with `{secret}` where it stands.")
    secret: Annotated[str, Field(min_length=4)]

    @model_validator(mode="after")
    def _has_place(self) -> Canary:
        if "{secret}" not in self.reply:
            raise ValueError("`reply` needs `{secret}` where the secret stands")
        return self


class Judge(Group):
    """A language model that says which of two replies is better; an option, and no gate stands on it."""

    url: str = Field(pattern=r"^https?://", description="OpenAI-compatible address, up to and with `/v1`.")
    model: str
    api_key_env: str | None = Field(default=None, description="Environment variable that holds the key.")
    timeout: float = Field(default=60.0, gt=0, description="Seconds of one try.")
    rows: Annotated[int, Field(ge=1)] = Field(default=100, description="Most test rows that are judged, each twice.")
    against: str = Field(default="base", description="Candidate that the tuned model is compared with.")


class Benchmark(Group):
    """The test set and its candidates."""

    max_rows: Annotated[int, Field(ge=1)] = Field(default=300, description="Most test rows, chosen by hash.")
    few_shot: Annotated[int, Field(ge=1, le=20)] = Field(default=3, description="Examples in the few-shot prompt.")
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = Field(default=96, description="Longest reply.")
    similarity_model: str | None = Field(
        default=None, description="sentence-transformers model id or path; default: the installed MiniLM."
    )
    retrieval: bool = Field(default=True, description="Also measure base and tuned model with retrieval.")
    documents: str | None = Field(
        default=None, description="Folder of .md and .txt files that retrieval may find; a sub-folder is its tenant's alone."
    )
    endpoints: list[EndpointSettings] = Field(default_factory=list[EndpointSettings], description="Remote models beside it.")
    terms: list[str] = Field(
        default_factory=list, description="Regular expressions of what a reply may state (services, dishes), one for each thing."
    )
    general: str | None = Field(
        default=None, description="JSONL of everyday chats to measure forgetting on; default: the shipped ones of the language."
    )
    canaries: list[Canary] = Field(default_factory=list[Canary], description="Secrets that the model must not know.")
    checks: str | None = Field(default=None, description="Folder of the standing suite: YAML and JSONL cases.")
    judge: Judge | None = Field(default=None, description="Language model that compares replies; off by default.")
    requests_per_month: Count | None = Field(
        default=None, description="Traffic for the monthly cost; default: what the newest weeks of the corpus had."
    )

    @field_validator("terms")
    @classmethod
    def _terms(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            check_pattern(pattern)
        return patterns

    @field_validator("endpoints")
    @classmethod
    def _own_names(cls, endpoints: list[EndpointSettings]) -> list[EndpointSettings]:
        names = [endpoint.name for endpoint in endpoints]
        taken = sorted({name for name in names if names.count(name) > 1 or name in RESERVED})
        if taken:
            raise ValueError(f"names of endpoints must be their own: {', '.join(taken)}")
        return endpoints


class RolloutSettings(Group):
    """How a version that should be served gets to its users, and what takes it back."""

    steps: list[Annotated[int, Field(ge=1, le=100)]] = Field(
        default_factory=lambda: [10, 50, 100], min_length=1, description="Percent of the users at each step after shadow."
    )
    min_requests: Count = Field(default=200, description="Least requests that the candidate answered in a step.")
    min_users: Count = Field(default=20, description="Least users that the candidate answered in a step; not in shadow.")
    min_hours: Annotated[float, Field(ge=0)] = Field(
        default=24.0, description="Least hours between a step's first and last request."
    )
    ask_after_hours: Annotated[float, Field(gt=0)] = Field(
        default=168.0, description="Hours of a step after which a person is asked where the guards are still inconclusive."
    )
    approval: Literal["never", "promotion", "every"] = Field(
        default="never", description="Before which steps a person has to say yes though every guard passed."
    )
    shadow_sample: Share = Field(default=1.0, description="Share of live requests that the candidate answers too in shadow.")
    max_errors: Share = Field(default=0.05, description="Share of errors, timeouts and policy violations that is too many.")
    usual_errors: Share = Field(default=0.01, description="Share of errors, timeouts and policy violations that is fine.")
    max_negative_increase: Share = Field(
        default=0.1, description="By how much the share of negative feedback per user may be above the champion's."
    )
    max_rating_drop: Annotated[float, Field(gt=0, le=4)] = Field(
        default=0.5, description="By how many stars the rating per user may be below the champion's."
    )
    max_latency_ratio: Annotated[float, Field(ge=1)] = Field(default=2.0, description="95th percentile against the champion's.")
    max_cost_ratio: Annotated[float, Field(ge=1)] = Field(default=1.5, description="Cost of a request against the champion's.")

    @model_validator(mode="after")
    def _makes_sense(self) -> RolloutSettings:
        if self.steps != sorted(set(self.steps)) or self.steps[-1] != 100:
            raise ValueError(f"`steps` {self.steps} must grow and end with 100")
        if not 0 < self.usual_errors < self.max_errors < 1:
            raise ValueError(f"`usual_errors` ({self.usual_errors}) must be below `max_errors` ({self.max_errors}), both in 0..1")
        return self


class Serving(Group):
    """Where replies come from, and what the router keeps."""

    upstream: str = Field(
        default="embedded", description="`embedded`, or an OpenAI-compatible URL ending in /v1 that knows the versions by name."
    )
    upstream_key: str | None = Field(default=None, description="Environment variable that holds the upstream's API key.")
    champion_model: str | None = Field(
        default=None, description="Model that the upstream answers with while no version is champion; default: the base model."
    )
    timeout_seconds: Annotated[float, Field(gt=0)] = Field(default=30.0, description="Longest time of a reply.")
    first_token_seconds: Annotated[float, Field(gt=0)] = Field(
        default=10.0, description="Longest wait for the candidate's first token; then the champion answers."
    )
    texts: Literal["scrubbed", "raw", "none"] = Field(
        default="scrubbed", description="Messages are stored without personal data, as they are, or not at all."
    )
    users: Literal["raw", "pseudonym"] = Field(
        default="raw",
        description="`user_id` in `conversations`, as the platform has it, or hashed; `requests` always holds the pseudonym.",
    )
    conversation_minutes: Annotated[float, Field(gt=0)] = Field(
        default=60.0, description="A conversation is open, and keeps its arm, for so long after its last message."
    )
    requests_per_minute: Annotated[int, Field(ge=1)] = Field(default=6000, description="Of one tenant, in each worker.")


class Assistant(Group):
    """All settings of one assistant. `language` picks rules and texts, it never filters rows."""

    name: str = Field(description="The file's name without `.yaml`; the partition key.")
    extends: str | None = Field(
        default=None, description="Assistant whose settings this one inherits; a tenant inherits its vertical's."
    )
    select: Select
    language: Literal["es", "en", "pt"] = "es"
    system_prompt: str = Field(default="", description="First message of every example; empty: none.")
    base_model: str = Field(default="data/base_model", description="Path or Hugging Face id of a causal language model.")
    trainer: Literal["local", "openai", "azure", "nebius", "openai_compatible", "bedrock", "sagemaker"] = Field(
        default="local", description="Who trains: this machine, or a provider; `base_model` is then the provider's name."
    )
    remote: Remote = Remote()
    candidates: list[str] = Field(
        default_factory=list[str], description="Other base models that `training_plan` compares with `base_model`."
    )
    objective: list[Objective] = Field(
        default_factory=lambda: list[Objective](["sft"]), min_length=1, description="Stages, trained one after the other."
    )
    text: str | None = Field(default=None, description="Folder of .txt and .md files for continued_pretraining.")
    adapter: Literal["full", "lora", "qlora"] = Field(
        default="full", description="Which weights are trained: all, small matrices beside them, those over a 4-bit base (GPU)."
    )
    preset: Literal["default", "conservative", "aggressive", "tiny"] | None = Field(
        default=None, description="Default: what the base model's card names, else `default`."
    )
    rows: Layout = Field(
        default="per_reply",
        description="One training row a kept reply, or as few rows a conversation as hold the same contexts and targets.",
    )
    min_examples: Annotated[int, Field(ge=1)] = 100
    minimum: Minimum = Minimum()
    balance: Balance = Balance()
    augment: Augment = Augment()
    keep_datasets: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Frozen data sets that stay; those that a version or an open job uses always do. Default: all."
    )
    window_weeks: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Only this many newest weeks; default: all."
    )
    filters: Filters = Filters()
    rules: list[Rule] = Field(default_factory=list[Rule])
    contacts: dict[str, list[str]] = Field(
        default_factory=dict[str, list[str]],
        description="Tenant to its own public phone numbers and addresses: they stay in the texts of its conversations.",
    )
    gates: Gates = Gates()
    benchmark: Benchmark = Benchmark()
    budget: Budget = Budget()
    require_approval: bool = Field(default=False, description="A training starts only in a run that a person approved.")
    retrain: Retrain = Retrain()
    split: Split = Split()
    hyperparameters: Hyperparameters = Hyperparameters()
    rollout: RolloutSettings = RolloutSettings()
    serving: Serving = Serving()

    @model_validator(mode="before")
    @classmethod
    def _providers_own_model(cls, values: Any) -> Any:
        """OpenAI and Azure have a default base model; the others have none that could be guessed."""
        if isinstance(values, dict) and "base_model" not in values and values.get("trainer", "local") != "local":
            if values["trainer"] not in ("openai", "azure"):
                raise ValueError(f"`trainer: {values['trainer']}` needs `base_model`, the provider's name of the model")
            return {**cast("dict[str, Any]", values), "base_model": DEFAULT_REMOTE_MODEL}
        return cast("Any", values)

    @model_validator(mode="after")
    def _chain(self) -> Assistant:
        """Stages in the order that makes sense, each at most once."""
        place = {"continued_pretraining": 0, "sft": 1, "tools": 1, "dpo": 2, "kto": 2}
        places = [place[objective] for objective in self.objective]
        if places != sorted(set(places)):
            raise ValueError(
                f"objective {list(self.objective)} is no chain: continued_pretraining, then sft or tools, then dpo or kto, each "
                "at most once"
            )
        if "continued_pretraining" in self.objective and not self.text:
            raise ValueError("`continued_pretraining` needs `text`, a folder of .txt and .md files")
        return self

    @field_validator("name")
    @classmethod
    def _slug(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", name):
            raise ValueError("a name is letters, digits, `_` and `-` (it is a partition key and part of paths)")
        return name


def check_pattern(pattern: str) -> None:
    """Raises ValueError for what is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
