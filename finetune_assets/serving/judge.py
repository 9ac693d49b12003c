"""Judges the current step of a rollout: what each guard says, and what that means. Reads; `control` acts on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune_assets.assistants.settings.serving import RolloutSettings
from finetune_assets.registry import Ledger, Rollout
from finetune_assets.registry.rollouts import SHADOW, Outcome
from finetune_assets.serving import guards
from finetune_assets.serving.guards import Guard
from finetune_assets.serving.observed import Observed, observe

VOID = ("assignment", "upstream")
"""Guards without which nothing can be measured: where one of them says so, a person is asked at once."""


@dataclass(frozen=True)
class Judgement:
    """The outcome of a step, its guards, and how much was seen."""

    outcome: Outcome
    guards: tuple[Guard, ...]
    requests: int
    users: int
    hours: int
    patience_over: bool

    @property
    def text(self) -> str:
        """What decided, in one line; where all guards passed, how much they saw."""
        if self.outcome == "passed":
            names = [guard.name for guard in self.guards]
            passed = f"all {len(names)} guards" if len(names) > 1 else f"guard {''.join(names)}"
            return f"{passed} passed: {self.requests} requests, {self.users} people, {self.hours} hours with traffic"
        telling = [guard for guard in self.guards if guard.outcome == self.outcome] or list(self.guards)
        return "; ".join(f"{guard.name.replace('_', ' ')}: {guard.text}" for guard in telling)

    def as_dict(self) -> dict[str, Any]:
        """For the ledger's events and `--json`."""
        return {
            "outcome": self.outcome,
            "requests": self.requests,
            "users": self.users,
            "hours": self.hours,
            "guards": [guard.as_dict() for guard in self.guards],
        }


def judge(ledger: Ledger, state: Rollout, settings: RolloutSettings) -> Judgement:
    """The current step of an open rollout."""
    return weigh(observe(ledger, state), state, settings)


def weigh(seen: Observed, state: Rollout, settings: RolloutSettings) -> Judgement:
    """What was observed, against the settings.

    A failed guard counts at once, everything else only when the step has its least requests, users and hours. If the champion
    fails too, and the candidate not certainly more often, the errors say nothing of the candidate: not measurable.
    """
    made = _guards(seen, state, settings)
    outcome = guards.together(made)
    missing = _missing(seen, state, settings)
    if outcome != "failed" and missing:
        short = Guard("minimum", "gathering", None, None, None, None, seen.candidate.requests, missing)
        made, outcome = (*made, short), "gathering"
    void = any(guard.name in VOID and guard.outcome == "not_measurable" for guard in made)
    if void and outcome != "failed":
        outcome = "not_measurable"
    candidate = seen.candidate
    over = void or seen.waited >= settings.ask_after_hours
    return Judgement(outcome, tuple(made), candidate.requests, candidate.users, seen.hours, over)


def _missing(seen: Observed, state: Rollout, settings: RolloutSettings) -> str:
    users = 0 if state.step == SHADOW else settings.min_users
    pairs: Sequence[tuple[str, float, float]] = (
        ("requests", seen.candidate.requests, settings.min_requests),
        ("users", seen.candidate.users, users),
        ("hours with traffic", seen.hours, settings.min_hours),
    )
    return ", ".join(f"{have:.4g} of {want:g} {name}" for name, have, want in pairs if have < want)


def _guards(seen: Observed, state: Rollout, settings: RolloutSettings) -> tuple[Guard, ...]:
    mine, theirs = seen.candidate, seen.champion
    usual, most = settings.usual_errors, settings.max_errors
    errors = guards.errors(mine.first, mine.last, usual, most)
    if errors.outcome == "failed" and guards.errors(theirs.first, theirs.last, usual, most).outcome == "failed":
        text = f"{errors.text}; the champion fails too, but certainly less often"
        outcome: Outcome = "failed"
        if not guards.worse(mine.last, theirs.last, state.share):
            text = f"{errors.text}; so does the champion, so that this says nothing of the candidate"
            outcome = "not_measurable"
        errors = Guard("errors", outcome, errors.value, None, None, most, errors.seen, text)
    if seen.unknown:
        text = f"the upstream does not know this version (HTTP 404, {seen.unknown} times): load it there, under its full name"
        errors = Guard("upstream", "not_measurable", None, None, None, None, seen.unknown, text)
    made: list[Guard | None] = [errors, guards.cost(mine.usd, theirs.usd, settings.max_cost_ratio)]
    if state.step != SHADOW:  # a shadow reply waits behind the live ones, and nobody rates it
        made.append(guards.latency(mine.seconds, theirs.seconds, settings.max_latency_ratio))
        made.append(guards.assignment(mine.users, theirs.users, state.share))
        what, margin = "negative feedback per user", settings.max_negative_increase
        made.append(guards.non_inferior("negative_feedback", (mine.negative, theirs.negative), state.share, margin, what))
        if mine.rating and theirs.rating:
            lost, their_lost = ([(5 - rating) / 4 for rating in arm.rating] for arm in (mine, theirs))
            what, margin = "lost stars (of 4) per user", settings.max_rating_drop / 4
            made.append(guards.non_inferior("rating", (lost, their_lost), state.share, margin, what))
    return tuple(guard for guard in made if guard is not None)
