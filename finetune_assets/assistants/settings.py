"""The settings of an assistant, in small typed groups; each field's description is its documentation."""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Literal

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
]
"""Measures of replies in which two candidates can be compared."""


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


class Budget(Group):
    """What one training may cost; a plan above it is refused before anything is spent."""

    training_usd: float | None = Field(default=None, ge=0, description="Most US dollars of one training.")
    hours: float | None = Field(default=None, gt=0, description="Most hours of one training.")
    usd_per_hour: float | None = Field(
        default=None, ge=0, description="Hourly rate of the machine that trains and serves locally."
    )


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


class Hyperparameters(Group):
    """Overrides of the preset; null keeps the preset's value."""

    epochs: float | None = Field(default=None, gt=0, le=50)
    learning_rate: float | None = Field(default=None, gt=0, lt=1)
    batch_size: int | None = Field(default=None, ge=1, le=1024, description="Examples per optimiser step.")
    max_length: int | None = Field(default=None, ge=32, description="Tokens; longer examples lose their oldest turns.")
    warmup: float | None = Field(default=None, ge=0, le=1, description="Share of the steps.")
    weight_decay: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=0)


class Benchmark(Group):
    """The test set and its candidates."""

    max_rows: Annotated[int, Field(ge=1)] = Field(default=300, description="Most test rows, chosen by hash.")
    few_shot: Annotated[int, Field(ge=1, le=20)] = Field(default=3, description="Examples in the few-shot prompt.")
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = Field(default=96, description="Longest reply.")
    similarity_model: str | None = Field(
        default=None, description="sentence-transformers model id or path; default: the installed MiniLM."
    )


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
    trainer: Literal["local"] = "local"
    objective: list[Literal["sft"]] = Field(default_factory=lambda: ["sft"], min_length=1)
    adapter: Literal["full"] = "full"
    preset: Literal["default", "conservative", "aggressive", "tiny"] | None = Field(
        default=None, description="Default: what the base model's card names, else `default`."
    )
    rows: Literal["per_reply"] = Field(default="per_reply", description="One row for each reply that is kept.")
    min_examples: Annotated[int, Field(ge=1)] = 100
    window_weeks: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Only this many newest weeks; default: all."
    )
    filters: Filters = Filters()
    rules: list[Rule] = Field(default_factory=list[Rule])
    gates: Gates = Gates()
    benchmark: Benchmark = Benchmark()
    budget: Budget = Budget()
    require_approval: bool = Field(default=False, description="A training starts only in a run that a person approved.")
    retrain: Retrain = Retrain()
    split: Split = Split()
    hyperparameters: Hyperparameters = Hyperparameters()
    rollout: RolloutSettings = RolloutSettings()
    serving: Serving = Serving()

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
