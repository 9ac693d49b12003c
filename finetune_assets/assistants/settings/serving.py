"""Settings of serving: the rollout and where replies come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from finetune_assets.assistants.settings.group import Count, Group, Share


class RolloutSettings(Group):
    """How a version that should be served gets to its users, and what takes it back."""

    steps: list[Annotated[int, Field(ge=1, le=100)]] = Field(
        default_factory=lambda: [10, 50, 100], min_length=1, description="Percent of the users at each step after shadow."
    )
    min_requests: Count = Field(default=200, description="Least requests that the candidate answered in a step.")
    min_users: Count = Field(default=20, description="Least users that the candidate answered in a step; not in shadow.")
    min_hours: Annotated[float, Field(ge=0)] = Field(
        default=24.0, description="Least hours of the clock in which the candidate was asked in a step; quiet hours do not count."
    )
    ask_after_hours: Annotated[float, Field(gt=0)] = Field(
        default=168.0, description="Hours since a step began after which a person is asked while the guards are inconclusive."
    )
    approval: Literal["never", "promotion", "every"] = Field(
        default="never", description="Before which steps a person has to say yes though every guard passed."
    )
    shadow_sample: Share = Field(default=1.0, description="Share of live requests that the candidate answers too in shadow.")
    shadow_seconds: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Longest time of a shadow reply, a timeout beyond it; default: `serving.timeout_seconds`."
    )
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
    keep_days: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Conversations, feedback and requests older than so many days are removed, daily or by `finetune retention`; "
        "default: kept for good.",
    )
    requests_per_minute: Annotated[int, Field(ge=1)] = Field(
        default=6000, description="Chats of one tenant, and as many judgements; each worker admits its part."
    )

    @property
    def longest_seconds(self) -> float:
        """Of a chat: where the candidate took its whole time, the champion has as much."""
        return 2 * self.timeout_seconds
