"""A/B in staging: two versions side by side for chosen tenants or users, at any split, with the guards' statistics.

Nobody else ever gets either version, and nothing is promoted: an experiment ends when a person ends it.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from finetune_assets.assistants.settings.serving import RolloutSettings
from finetune_assets.errors import RolloutRefused
from finetune_assets.registry import Ledger, Rollout
from finetune_assets.registry.rollouts import BASE
from finetune_assets.registry.tables import now, rollout_events, rollouts
from finetune_assets.serving.judge import Judgement, weigh
from finetune_assets.serving.observed import Observed, observe

STEP = "a/b"


def begin(
    ledger: Ledger, assistant: str, versions: tuple[str, str], share: float, who: dict[str, list[str]], why: tuple[str, str]
) -> None:
    """Starts version A against B (`base`: the base model); `who`: {"tenants": […], "users": […]}, `why`: reason and actor.

    Raises RolloutRefused where one is running or nobody is named, LedgerError for an unknown version.
    """
    for version in versions:
        if version != BASE:
            ledger.version(assistant, version)
    if versions[0] == versions[1]:
        raise RolloutRefused(f"An experiment of {assistant} needs two versions, not {versions[0]} twice.")
    if not 0 < share < 1:
        raise RolloutRefused(f"The share of version B is {share:g}; it must lie between 0 and 1.")
    if not any(who.values()):
        raise RolloutRefused("Name the tenants or users that take part: an experiment is for people who know of it.")
    _store(ledger, assistant, versions, share, who, why)


def _store(
    ledger: Ledger, assistant: str, versions: tuple[str, str], share: float, who: dict[str, list[str]], why: tuple[str, str]
) -> None:
    first, second = versions
    state = ledger.rollout(assistant)
    generation = state.generation + 1
    value = {
        "a": None if first == BASE else first,
        "b": None if second == BASE else second,
        "share": share,
        "salt": f"{assistant}:{first}:{second}:{generation}",
        **who,
    }
    if state.generation and _current(ledger, assistant):
        raise RolloutRefused(f"{assistant} has an experiment already; end it first with `finetune experiment end {assistant}`.")
    _write(ledger, state, value, ("experiment_began", f"{first} against {second} at {share:.0%}: {why[0]}", why[1]))


def end(ledger: Ledger, assistant: str, why: tuple[str, str]) -> None:
    """Ends the experiment. Raises RolloutRefused where there is none."""
    if not _current(ledger, assistant):
        raise RolloutRefused(f"{assistant} has no experiment.")
    _write(ledger, ledger.rollout(assistant), None, ("experiment_ended", why[0], why[1]))


def _current(ledger: Ledger, assistant: str) -> dict[str, Any] | None:
    with ledger.engine.connect() as connection:
        return connection.execute(sa.select(rollouts.c.experiment).where(rollouts.c.assistant == assistant)).scalar()


def _write(ledger: Ledger, state: Rollout, value: dict[str, Any] | None, event: tuple[str, str, str]) -> None:
    values = {"experiment": value if value is not None else sa.null(), "generation": state.generation + 1, "updated_at": now()}
    row = {
        "assistant": state.assistant,
        "generation": state.generation + 1,
        "event": event[0],
        "reason": event[1],
        "actor": event[2],
    }
    with ledger.engine.begin() as connection:
        if state.generation == 0:
            connection.execute(sa.insert(rollouts).values(assistant=state.assistant, **values))
        else:
            same = (rollouts.c.assistant == state.assistant) & (rollouts.c.generation == state.generation)
            if connection.execute(sa.update(rollouts).where(same).values(**values)).rowcount != 1:
                raise RolloutRefused(f"The rollout of {state.assistant} moved on meanwhile; try again.")
        connection.execute(sa.insert(rollout_events).values(**row, created_at=now()))


def result(
    ledger: Ledger, assistant: str, settings: RolloutSettings, experiment: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """The experiment, what was observed of A (champion) and B (candidate), and what the guards say of B against A."""
    value = experiment or _current(ledger, assistant)
    if not value:
        return None
    state = Rollout(
        assistant,
        value["a"],
        0,
        None,
        candidate=value["b"] or BASE,
        step=STEP,
        status="running",
        share=value["share"],
        salt=value["salt"],
    )
    seen: Observed = observe(ledger, state)
    judged: Judgement = weigh(seen, state, settings)
    return {**value, "a": value["a"] or BASE, "b": value["b"] or BASE, "seen": seen, "judged": judged}
