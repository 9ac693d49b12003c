"""The settings of an assistant, in small typed groups; each field's description is its documentation."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from finetune_assets.assistants.settings.data import (
    Augment,
    Balance,
    Filters,
    Layout,
    Minimum,
    Select,
    Split,
    as_function,
    check_regions,
)
from finetune_assets.assistants.settings.evaluation import Benchmark, Gates, Rule
from finetune_assets.assistants.settings.group import Group
from finetune_assets.assistants.settings.serving import RolloutSettings, Serving
from finetune_assets.assistants.settings.training import (
    DEFAULT_REMOTE_MODEL,
    Budget,
    Hyperparameters,
    Objective,
    Remote,
    Retrain,
    TrainerName,
)


class Assistant(Group):
    """All settings of one assistant. `language` picks rules and texts, it never filters rows."""

    name: str = Field(description="The file's name without `.yaml`; the partition key.")
    extends: str | None = Field(
        default=None, description="Assistant whose settings this one inherits; a tenant inherits its vertical's."
    )
    select: Select
    language: Literal["es", "en", "pt"] = Field(
        default="es", description="Of error replies, rules and the report; it never filters rows."
    )
    system_prompt: str = Field(default="", description="First message of every example; empty: none.")
    base_model: str = Field(default="data/base_model", description="Path or Hugging Face id of a causal language model.")
    trainer: TrainerName = Field(
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
    min_examples: Annotated[int, Field(ge=1)] = Field(
        default=100, description="Fewer kept examples are refused; under 1,000 there is a warning."
    )
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
    regions: list[str] = Field(
        default_factory=list[str],
        description="Countries (BO, PT, …) whose national phone numbers are looked for in the conversations of `select`; a "
        "tenant's own list counts before its vertical's. Default: ES, MX, AR, BO, CL, US.",
    )
    tools: list[dict[str, Any]] = Field(
        default_factory=list[dict[str, Any]],
        description="Functions that it may call, as OpenAI's API takes them; they stand in every row of the data set.",
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

    @field_validator("tools")
    @classmethod
    def _functions(cls, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [as_function(tool) for tool in tools]

    @field_validator("regions")
    @classmethod
    def _countries(cls, regions: list[str]) -> list[str]:
        return check_regions(regions)

    @field_validator("name")
    @classmethod
    def _slug(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", name):
            raise ValueError("a name is letters, digits, `_` and `-` (it is a partition key and part of paths)")
        return name
