"""The rollout of one assistant as a pure state machine: shadow, a growing share of users, champion; or back.

    idle ──start──► shadow ──advance──► 10 ──advance──► 50 ──advance──► idle (promoted: the candidate is champion)
                      └──────────────────┴───────────────┴──rollback──► idle (the champion stays)
    idle ──rollback──► idle (an earlier version, or the base model, is champion)

Within a step the status is `running`, `held` (a person is asked, the share stays) or `awaiting_approval` (all gates passed, a
person has to say yes). A function gives the next state, one generation later, or raises RolloutRefused; nothing here reads
or writes. Argo Rollouts and Flagger are the models: failed, inconclusive and not measurable are three things.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from finetune_assets.errors import RolloutRefused

IDLE = "idle"
SHADOW = "shadow"
BASE = "base"
"""Name of the live arm where no version is champion: the base model answers."""

Status = Literal["idle", "running", "held", "awaiting_approval"]
Outcome = Literal["gathering", "passed", "failed", "inconclusive", "not_measurable"]
"""What the guards say of a step; `gathering`: too few users, requests or hours to say anything yet."""


@dataclass(frozen=True)
class Rollout:
    """Which version an assistant's users get; `generation` counts every change.

    `share` (0..1) of the users get the candidate; `salt` names this rollout and decides which users are first.
    """

    assistant: str
    champion: str | None
    generation: int
    updated_at: datetime.datetime | None
    candidate: str | None = None
    step: str = IDLE
    status: Status = "idle"
    share: float = 0.0
    salt: str | None = None
    previous: str | None = None
    held_by: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether a candidate is being rolled out."""
        return self.candidate is not None

    @property
    def percent(self) -> int:
        """The step as a number; 0 in shadow and where there is no rollout."""
        return int(self.step) if self.step.isdigit() else 0


def start(state: Rollout, version: str, verdict: str | None) -> Rollout:
    """A candidate in shadow. A candidate that no user has seen yet is replaced; one that users see is not.

    Raises RolloutRefused for a verdict other than `serve`, for the champion itself, and where users see another candidate.
    """
    if verdict != "serve":
        said = verdict or "none"
        raise RolloutRefused(f"Version {version} of {state.assistant} has the verdict {said}; only `serve` is rolled out.")
    if version == state.champion:
        raise RolloutRefused(f"Version {version} is already champion of {state.assistant}.")
    if version == state.candidate:
        raise RolloutRefused(f"Version {version} of {state.assistant} is already being rolled out ({state.step}).")
    if state.is_open and state.share > 0:
        raise RolloutRefused(
            f"{state.candidate} of {state.assistant} is at {state.step} %: one rollout at a time. {version} waits for its end; "
            f"or end it with `finetune rollout rollback {state.assistant} --reason …`."
        )
    generation = state.generation + 1
    return replace(
        state,
        candidate=version,
        step=SHADOW,
        status="running",
        share=0.0,
        salt=f"{state.assistant}:{version}:{generation}",
        generation=generation,
        held_by=None,
    )


def next_step(state: Rollout, steps: Sequence[int]) -> int:
    """Percent of the next step; 100 where the settings name no step in between."""
    return min((step for step in steps if step > state.percent), default=100)


def advance(state: Rollout, outcome: Outcome, steps: Sequence[int], *, person: bool, approval: bool = False) -> Rollout:
    """One step on; at 100 % the candidate is champion.

    By itself only where every guard passed; where the step wants an approval it then waits for one. A person may go on
    where guards are inconclusive, could not measure, or have too little to say anything yet (a small tenant may never have
    more), never where one failed, and never over more than one step.
    """
    _need_open(state, "advanced")
    if outcome == "failed":
        raise RolloutRefused(f"A guard of {state.candidate} ({state.assistant}) failed: it is rolled back, not advanced.")
    if not person:
        if outcome != "passed":
            raise RolloutRefused(f"{state.candidate} of {state.assistant}: the guards are {outcome}; a person may decide.")
        if state.status != "running":
            raise RolloutRefused(f"The rollout of {state.assistant} is {state.status}: it waits for a person.")
        if approval:
            return replace(state, status="awaiting_approval", generation=state.generation + 1)
    target = next_step(state, steps)
    if target >= 100:
        return _idle(state, champion=state.candidate, previous=state.champion)
    return replace(state, step=str(target), share=target / 100, status="running", held_by=None, generation=state.generation + 1)


def hold(state: Rollout, by: Literal["guards", "person"]) -> Rollout:
    """The share stays where it is until a person decides, or, where the guards held it, until all of them pass."""
    _need_open(state, "held")
    if state.status == "held" and by in (state.held_by, "guards"):
        raise RolloutRefused(f"The rollout of {state.assistant} is already held by {state.held_by}.")
    return replace(state, status="held", held_by=by, generation=state.generation + 1)


def release(state: Rollout) -> Rollout:
    """A held rollout runs on at the same step."""
    if state.status != "held":
        raise RolloutRefused(f"The rollout of {state.assistant} is {state.status}, not held.")
    return replace(state, status="running", held_by=None, generation=state.generation + 1)


def rollback(state: Rollout, to: str | None = None, served: Collection[str] = ()) -> Rollout:
    """Back at once, from every state. An open rollout ends and its champion stays; else the previous champion is back.

    `to` names another version that becomes champion (`base`: the base model): one of `served`, those that have been champion,
    since any other would reach everybody without a step; from there, the way back is the base model. Raises RolloutRefused also
    where there is nothing to go back from.
    """
    if to is not None:
        champion = None if to == BASE else to
        if champion == state.champion and not state.is_open:
            raise RolloutRefused(f"{to} already serves {state.assistant}.")
        if champion not in (None, state.champion, *served):
            raise RolloutRefused(
                f"Version {to} has never served everybody of {state.assistant}: that is no way back. Roll it out: "
                f"finetune rollout start {state.assistant} {to} --reason …"
            )
        same = champion == state.champion
        return _idle(state, champion=champion, previous=state.previous if same else None)  # never forward to what was left
    if state.is_open:
        return _idle(state, champion=state.champion, previous=state.previous)
    if state.champion is None:
        raise RolloutRefused(f"{state.assistant} is served by its base model; there is nothing to roll back.")
    return _idle(state, champion=state.previous, previous=None)


def taken_back(before: Rollout, after: Rollout, experiment: Mapping[str, Any]) -> list[str]:
    """The sides of an experiment that a rollback takes from everybody: it ends with them."""
    gone = {before.candidate, None if after.champion == before.champion else before.champion}
    return [str(side) for side in (experiment["a"], experiment["b"]) if side is not None and side in gone]


def served_anew(before: Rollout, after: Rollout) -> str | None:
    """The version that a move gives to more people, whose verdict has to be `serve` at that moment; null where it gives none."""
    if after.champion != before.champion:
        return after.champion
    return after.candidate if (after.candidate, after.step) != (before.candidate, before.step) else None


def _idle(state: Rollout, champion: str | None, previous: str | None) -> Rollout:
    return replace(
        state,
        champion=champion,
        previous=previous,
        candidate=None,
        step=IDLE,
        status="idle",
        share=0.0,
        salt=None,
        held_by=None,
        generation=state.generation + 1,
    )


def _need_open(state: Rollout, what: str) -> None:
    if not state.is_open:
        raise RolloutRefused(f"{state.assistant} has no rollout that could be {what}; `finetune rollout status` shows them.")
