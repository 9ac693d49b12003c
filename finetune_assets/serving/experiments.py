"""A/B in staging: two versions side by side for chosen tenants or users, at any split, with the guards' statistics.

Nobody else ever gets either version, and nothing is promoted: an experiment ends when a person ends it, and at once when one of
its versions is rolled back. Its result stays in the history, as the evidence of the event.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import sqlalchemy as sa

from finetune_assets.assistants.settings.serving import RolloutSettings
from finetune_assets.errors import RolloutRefused
from finetune_assets.registry import Ledger, Rollout
from finetune_assets.registry.rollouts import BASE, taken_back
from finetune_assets.registry.tables import now, rollout_events, rollouts
from finetune_assets.serving.guards import percentile
from finetune_assets.serving.judge import Judgement, weigh
from finetune_assets.serving.notify import notify
from finetune_assets.serving.observed import Arm, observe

log = logging.getLogger(__name__)
STEP = "a/b"


@dataclass(frozen=True)
class Side:
    """One version in an experiment. Feedback is per user: mean share of negative, mean stars; null where nobody gave any."""

    version: str
    requests: int
    users: int
    failed: int
    judged_by: int
    negative: float | None
    rating: float | None
    seconds: float | None
    slowest_seconds: float | None
    """95th percentile."""
    usd: float | None

    @classmethod
    def of(cls, version: str, arm: Arm) -> Side:
        """What was observed of an arm."""
        seconds = arm.seconds.values
        return cls(
            version=version,
            requests=arm.requests,
            users=arm.users,
            failed=sum(arm.last),
            judged_by=len(arm.negative),
            negative=_mean(arm.negative),
            rating=_mean(arm.rating),
            seconds=_mean(seconds),
            slowest_seconds=percentile(seconds)[0] if seconds else None,
            usd=_mean(arm.usd.values),
        )


@dataclass(frozen=True)
class Result:
    """Both sides, who takes part, and what the guards say of B against A."""

    a: Side
    b: Side
    share: float
    tenants: list[str]
    users: int
    judged: Judgement

    @property
    def text(self) -> str:
        """What can be said so far, in a sentence."""
        worse = [guard.name.replace("_", " ") for guard in self.judged.guards if guard.outcome == "failed"]
        if worse:
            return f"B is certainly worse than allowed: {', '.join(worse)}."
        if self.judged.outcome == "passed":
            return "B is certainly not worse than A by more than the limits."
        if any(guard.name == "assignment" and guard.outcome != "passed" for guard in self.judged.guards):
            return "People were not split as planned: the comparison is void."
        return "Not settled yet: more people have to take part, or say what they think."

    def as_dict(self) -> dict[str, Any]:
        """For the event that ends the experiment, and for `--json`."""
        people = {"share": self.share, "tenants": self.tenants, "users": self.users}
        return {"a": asdict(self.a), "b": asdict(self.b), **people, "said": self.text, **self.judged.as_dict()}


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def begin(  # noqa: PLR0913
    ledger: Ledger,
    assistant: str,
    versions: tuple[str, str],
    share: float,
    who: dict[str, list[str]],
    why: tuple[str, str],
    *,
    unproven: bool = False,
) -> None:
    """Starts version A against B (`base`: the base model); `who`: {"tenants": […], "users": ["TENANT/USER", …]}; `why`: reason
    and actor.

    `unproven`: also a version whose verdict is not `serve`; the event keeps its verdict. Raises RolloutRefused for such a version
    otherwise, where an experiment is running, or where nobody is named; LedgerError for an unknown version.
    """
    found = [ledger.version(assistant, version) for version in versions if version != BASE]
    doubtful = {version.version: version.verdict for version in found if version.verdict != "serve"}
    if doubtful and not unproven:
        said = ", ".join(f"{version}: {verdict or 'none'}" for version, verdict in doubtful.items())
        raise RolloutRefused(
            f"An experiment of {assistant} takes versions whose verdict is serve ({said}). For people who know that it "
            "may answer badly: --unproven."
        )
    if versions[0] == versions[1]:
        raise RolloutRefused(f"An experiment of {assistant} needs two versions, not {versions[0]} twice.")
    if versions[1] == BASE:
        raise RolloutRefused("The base model can be A, not B; name the version that is tried as B.")
    if not 0 < share < 1:
        raise RolloutRefused(f"The share of version B is {share:g}; it must lie between 0 and 1.")
    if not any(who.values()):
        raise RolloutRefused("Name the tenants or users that take part: an experiment is for people who know of it.")
    nobodys = [user for user in who.get("users", []) if not all(user.partition("/"))]
    if nobodys:
        raise RolloutRefused(
            f"Name a user with its tenant, TENANT/USER: {', '.join(nobodys)} may be somebody else at another one."
        )
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
    if state.generation and current(ledger, assistant):
        raise RolloutRefused(f"{assistant} has an experiment already; end it first with `finetune experiment end {assistant}`.")
    reason = f"{first} against {second} at {share:.0%}: {why[0]}"
    _write(ledger, state, value, ("experiment_began", reason, why[1]), {"unproven": doubtful} if doubtful else None)
    tell(assistant, "experiment_began", f"an experiment begins, {reason} ({why[1]})")


def end(ledger: Ledger, assistant: str, settings: RolloutSettings, why: tuple[str, str]) -> Result:
    """Ends the experiment; its result becomes the event's evidence. Raises RolloutRefused where there is none."""
    found = result(ledger, assistant, settings)
    if found is None:
        raise RolloutRefused(f"{assistant} has no experiment.")
    if not why[0].strip():
        raise RolloutRefused("Say why: the reason stays in the history (--reason).")
    _write(ledger, ledger.rollout(assistant), None, ("experiment_ended", why[0], why[1]), found.as_dict())
    tell(assistant, "experiment_ended", f"the experiment is over. {found.text} {why[0]} ({why[1]})")
    return found


def tell(assistant: str, event: str, text: str) -> None:
    """Notifies people of a begin or an end."""
    for problem in notify(f"{assistant}: {text}", {"assistant": assistant, "event": event}):
        log.warning(problem)


def ended(ledger: Ledger, assistant: str) -> list[dict[str, Any]]:
    """Events of the experiments that are over, newest first; `evidence` is the result."""
    return [event for event in reversed(ledger.events(assistant)) if event["event"] == "experiment_ended"]


def current(ledger: Ledger, assistant: str) -> dict[str, Any] | None:
    """The experiment that runs: a, b (null: the base model), share, salt, tenants, users; null where there is none."""
    with ledger.engine.connect() as connection:
        return connection.execute(sa.select(rollouts.c.experiment).where(rollouts.c.assistant == assistant)).scalar()


def _write(
    ledger: Ledger,
    state: Rollout,
    value: dict[str, Any] | None,
    event: tuple[str, str, str],
    evidence: dict[str, Any] | None = None,
) -> None:
    values = {"experiment": value if value is not None else sa.null(), "generation": state.generation + 1, "updated_at": now()}
    row = {
        "assistant": state.assistant,
        "generation": state.generation + 1,
        "event": event[0],
        "reason": event[1],
        "actor": event[2],
        "evidence": evidence,
    }
    with ledger.engine.begin() as connection:
        if state.generation == 0:
            connection.execute(sa.insert(rollouts).values(assistant=state.assistant, **values))
        else:
            same = (rollouts.c.assistant == state.assistant) & (rollouts.c.generation == state.generation)
            if connection.execute(sa.update(rollouts).where(same).values(**values)).rowcount != 1:
                raise RolloutRefused(f"The rollout of {state.assistant} moved on meanwhile; try again.")
        connection.execute(sa.insert(rollout_events).values(**row, created_at=now()))


def over(ledger: Ledger, before: Rollout, after: Rollout, settings: RolloutSettings) -> Result | None:
    """The result of the experiment that a rollback ends; null where it ends none."""
    value = current(ledger, before.assistant)
    return result(ledger, before.assistant, settings) if value and taken_back(before, after, value) else None


def result(ledger: Ledger, assistant: str, settings: RolloutSettings) -> Result | None:
    """What was observed of A (champion) and B (candidate) so far; null where there is no experiment."""
    value = current(ledger, assistant)
    if not value:
        return None
    a, b = value["a"] or BASE, value["b"] or BASE
    state = Rollout(assistant, a, 0, None, candidate=b, step=STEP, status="running", share=value["share"], salt=value["salt"])
    seen = observe(ledger, state)
    judged = weigh(seen, state, settings)
    return Result(
        Side.of(a, seen.champion), Side.of(b, seen.candidate), value["share"], value["tenants"], len(value["users"]), judged
    )
