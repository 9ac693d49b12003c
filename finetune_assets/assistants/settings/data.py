"""Settings of the data: which conversations, filters, split, balance, minimum numbers, augmentation."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from finetune_assets.assistants.settings.group import Address, Count, Group, Share, check_pattern

Layout = Literal["per_reply", "per_conversation"]


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

    min_satisfaction: Annotated[int, Field(ge=1, le=5)] | None = Field(
        default=4, description="Least score of a reply without feedback; null: not asked, so a missing score is no reason either."
    )
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


class Split(Group):
    """How examples are divided."""

    mode: Literal["user", "time"] = Field(
        default="user", description="`user`: by a hash of the user; `time`: test is what came after `date`."
    )
    train: Share = Field(default=0.8, description="Share of the users (of the rows before `date`) to learn from.")
    validation: Share = Field(default=0.1, description="Share to choose the best checkpoint by.")
    test: Share = Field(default=0.1, description="Share to measure on.")
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

    base_url: Address = Field(description="Address of the API, e.g. https://api.openai.com/v1.")
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
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Another number makes other variations.")
    llm: VariationModel | None = Field(
        default=None, description="Who rewords; default: light variations (spelling, greetings, accents, tú and vos) made here."
    )


def check_regions(regions: list[str]) -> list[str]:
    """Country codes in capitals, each once. Raises ValueError for one that has no phone numbers."""
    if not regions:
        return regions
    from phonenumbers import SUPPORTED_REGIONS  # noqa: PLC0415

    codes = list(dict.fromkeys(region.strip().upper() for region in regions))
    unknown = [code for code in codes if code not in SUPPORTED_REGIONS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is no country's code; write two letters each, e.g. BO, PT, BR")
    return codes


def as_function(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as OpenAI writes it, with or without the envelope `type: function`. Raises ValueError."""
    function: Any = tool.get("function") if "function" in tool else tool
    if not isinstance(function, dict) or not isinstance(cast("dict[str, Any]", function).get("name"), str):
        raise ValueError("each tool is a function with a `name`, and mostly `description` and `parameters` (a JSON schema)")
    return {"type": "function", "function": function}
