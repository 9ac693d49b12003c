"""Moves rollouts: what the guards decide by themselves, and what a person decides. Every move is one event with who and why.

Whoever judges (the router, Dagster's sensor, a person) calls the same functions; compare-and-set lets one of them win.
"""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass
from pathlib import Path

from finetune_assets.assistants.settings.serving import RolloutSettings
from finetune_assets.errors import LedgerError, RolloutRefused
from finetune_assets.registry import Ledger, Rollout, rollouts
from finetune_assets.registry.tables import now
from finetune_assets.serving import experiments
from finetune_assets.serving.judge import Judgement, judge
from finetune_assets.serving.notify import notify

log = logging.getLogger(__name__)
ATTEMPTS = 5
LATELY = datetime.timedelta(minutes=1)
SAYS = {
    "started": "starts in shadow",
    "advanced": "goes on to {step} % of the users",
    "promoted": "serves everybody",
    "held": "is held at {step}",
    "released": "runs on at {step}",
    "asked": "waits for a person to say yes",
    "rolled_back": "is rolled back",
}


@dataclass(frozen=True)
class Move:
    """What happened to a rollout: the event, the states before and after, what was judged, and the sentence for people."""

    event: str
    before: Rollout
    after: Rollout
    judgement: Judgement | None
    reason: str
    text: str = ""


def start(ledger: Ledger, assistant: str, version: str, reason: str, actor: str) -> Move:
    """A version into shadow; its stored verdict is read again. Raises RolloutRefused."""
    before = ledger.rollout(assistant)
    after = rollouts.start(before, version, ledger.version(assistant, version).verdict)
    return _move(ledger, Move("started", before, after, None, reason), actor)


def offer(ledger: Ledger, assistant: str, version: str, reason: str, actor: str) -> str:
    """Brings a new version into shadow if nothing speaks against it; says what was done. Raises RolloutRefused."""
    state = ledger.rollout(assistant)
    if version in (state.champion, state.candidate):
        return "unchanged"
    if version in _ended(ledger, assistant):
        return "was rolled back or replaced before; `finetune rollout start` brings it back"
    if state.is_open and state.share > 0:
        return f"waits for the end of the rollout of {state.candidate}"
    if state.held_by == "person":
        return f"waits: {state.candidate} is held in shadow by a person; `finetune rollout start` takes {version} instead"
    start(ledger, assistant, version, reason, actor)
    return "in shadow"


def offer_waiting(ledger: Ledger, assistant: str, actor: str) -> str | None:
    """Where no rollout is open: the newest version that should be served and is newer than the champion; what was done."""
    state = ledger.rollout(assistant)
    if state.is_open or state.generation == 0:
        return None
    versions = ledger.versions(assistant)
    live = next((version.number for version in versions if version.version == state.champion), 0)
    ended = _ended(ledger, assistant)
    waiting = [v for v in versions if v.verdict == "serve" and v.number > live and v.version not in ended]
    if not waiting:
        return None
    return f"{waiting[0].version}: {offer(ledger, assistant, waiting[0].version, 'waited for the rollout before it', actor)}"


def _ended(ledger: Ledger, assistant: str) -> set[str]:
    """Versions that were taken back, or have been champion, and were not started again by a person since."""
    ended: set[str] = set()
    for event in ledger.events(assistant):
        if event["event"] in ("rolled_back", "promoted"):  # a rollback over an open rollout names the candidate alone
            ended.add(event["version"])
        elif event["event"] == "started":
            ended.discard(event["version"])
    return ended


def _served(ledger: Ledger, assistant: str) -> set[str]:
    """Versions that have gone through every step and been champion."""
    return {event["version"] for event in ledger.events(assistant) if event["event"] == "promoted"}


def step(ledger: Ledger, assistant: str, settings: RolloutSettings, actor: str) -> Move | None:
    """Judges the current step and does what follows; null where nothing changed, or somebody else was first.

    The stored verdict is read at each look: a benchmark that takes `serve` back during the rollout ends it.
    """
    before = ledger.rollout(assistant)
    if before.candidate is None:
        return None
    verdict = ledger.version(assistant, before.candidate).verdict
    if verdict != "serve":
        reason = f"its offline verdict is no longer serve but {verdict}"
        try:
            return _move(ledger, Move("rolled_back", before, rollouts.rollback(before), None, reason), actor, settings)
        except LedgerError:
            return None
    judged = judge(ledger, before, settings)
    decided = decide(before, judged, settings)
    if decided is None:
        return None
    try:
        return _move(ledger, Move(decided[0], before, decided[1], judged, judged.text), actor, settings)
    except LedgerError:
        return None


def decide(state: Rollout, judged: Judgement, settings: RolloutSettings) -> tuple[str, Rollout] | None:
    """Event and next state that follow from a judgement without a person; null: none."""
    if judged.outcome == "failed":
        return "rolled_back", rollouts.rollback(state)
    if state.status == "held" and state.held_by == "guards" and judged.outcome == "passed":
        return "released", rollouts.release(state)
    if state.status != "running":
        return None
    if judged.outcome == "passed":
        last = rollouts.next_step(state, settings.steps) >= 100
        approval = settings.approval == "every" or (settings.approval == "promotion" and last)
        after = rollouts.advance(state, "passed", settings.steps, person=False, approval=approval)
        return _event_of(after), after
    waits = judged.outcome in ("inconclusive", "not_measurable", "gathering")
    if waits and judged.patience_over:
        return "held", rollouts.hold(state, "guards")
    return None


def _event_of(after: Rollout) -> str:
    if after.status == "awaiting_approval":
        return "asked"
    return "advanced" if after.is_open else "promoted"


def advance(ledger: Ledger, assistant: str, settings: RolloutSettings, reason: str, actor: str, seen: int | None = None) -> Move:
    """A person's yes to the next step. `seen`: the generation that the person looked at, which must be the current one.

    Raises RolloutRefused where a guard failed, where the verdict is no longer `serve`, where there is no rollout, or where it
    has moved since.
    """
    _need_reason(reason)
    before = _as_seen(ledger, assistant, seen)
    if before.candidate is not None:
        _need_serve(ledger, assistant, before.candidate)
    judged = judge(ledger, before, settings) if before.is_open else None
    after = rollouts.advance(before, judged.outcome if judged else "gathering", settings.steps, person=True)
    return _move(ledger, Move(_event_of(after), before, after, judged, reason), actor)


def hold(ledger: Ledger, assistant: str, reason: str, actor: str, seen: int | None = None) -> Move:
    """A person's stop: the share stays. Raises RolloutRefused."""
    _need_reason(reason)
    before = _as_seen(ledger, assistant, seen)
    return _move(ledger, Move("held", before, rollouts.hold(before, "person"), None, reason), actor)


def release(ledger: Ledger, assistant: str, reason: str, actor: str, seen: int | None = None) -> Move:
    """The end of a hold. Raises RolloutRefused."""
    _need_reason(reason)
    before = _as_seen(ledger, assistant, seen)
    return _move(ledger, Move("released", before, rollouts.release(before), None, reason), actor)


def rollback(  # noqa: PLR0913
    ledger: Ledger,
    assistant: str,
    reason: str,
    actor: str,
    to: str | None = None,
    *,
    seen: int | None = None,
    settings: RolloutSettings | None = None,
) -> Move:
    """Back at once, whatever happens meanwhile: a lost race is tried again, unless the other one rolled back too.

    A second person who presses a moment later means what the first has done, not the champion before it: that takes another
    press by somebody who has `seen` the newest generation, a minute's time, or `to`. `settings` (else the defaults) judge an
    experiment that ends with a version that is taken back. Raises RolloutRefused, also where there is nothing to go back from;
    LedgerError for an unknown version.
    """
    _need_reason(reason)
    if to is not None and to != rollouts.BASE:
        ledger.version(assistant, to)
    first = ledger.rollout(assistant)
    for _ in range(ATTEMPTS):
        before = ledger.rollout(assistant)
        if to is None:
            _refuse_a_second(ledger, before, first.generation if seen is None else seen, lately=seen is None)
        after = rollouts.rollback(before, to, _served(ledger, assistant))
        if after.champion is not None and after.champion != before.champion:
            _need_serve(ledger, assistant, after.champion)
            _need_files(ledger, assistant, after.champion)
        move = Move("rolled_back", before, after, None, reason)
        try:
            return _move(ledger, move, actor, settings)
        except LedgerError:
            continue  # somebody else moved it: look again
    raise LedgerError(f"The rollout of {assistant} changes faster than it can be rolled back; who is changing it?")


def _need_serve(ledger: Ledger, assistant: str, version: str) -> None:
    verdict = ledger.version(assistant, version).verdict
    if verdict != "serve":
        raise RolloutRefused(
            f"The verdict of {version} ({assistant}) is {verdict or 'none'}, not serve: it serves nobody. `finetune models list` "
            f"shows verdicts. Back to the base model: finetune rollout rollback {assistant} --to base --reason …"
        )


def _need_files(ledger: Ledger, assistant: str, version: str) -> None:
    """A version whose folder is gone cannot serve. Where this machine has no store, only the router can tell."""
    folder = Path(ledger.version(assistant, version).path)
    if folder.parent.is_dir() and not folder.is_dir():
        raise RolloutRefused(
            f"The files of {version} are gone from {folder.parent}: it cannot serve {assistant}. Restore them from a backup, or "
            f"name another version or the base model: finetune rollout rollback {assistant} --to base --reason …"
        )


def _refuse_a_second(ledger: Ledger, before: Rollout, seen: int, *, lately: bool) -> None:
    """Where somebody rolled back after generation `seen`; with `lately`, where nothing is rolled out, also within a minute."""
    back = next((event for event in reversed(ledger.events(before.assistant)) if event["event"] == "rolled_back"), None)
    if back is None:
        return
    fresh = lately and not before.is_open and abs(now() - back["created_at"]) < LATELY
    if fresh or back["generation"] > seen:
        raise RolloutRefused(
            f"{before.assistant} was rolled back a moment ago by {back['actor']}: {back['reason']}. Look at it again; to go "
            f"further back, name the version: finetune rollout rollback {before.assistant} --to …"
        )


def _as_seen(ledger: Ledger, assistant: str, seen: int | None) -> Rollout:
    """The rollout, if it is the one that a person looked at: a second press of a button takes no second step."""
    state = ledger.rollout(assistant)
    if seen is not None and state.generation != seen:
        last = ledger.events(assistant)[-1]
        what = last["event"].replace("_", " ")
        raise RolloutRefused(f"{assistant} has moved since you looked: {what} by {last['actor']}: {last['reason']}. Look again.")
    return state


def _need_reason(reason: str) -> None:
    if not reason.strip():
        raise RolloutRefused("Say why: the reason stays in the history (--reason).")


def _move(ledger: Ledger, move: Move, actor: str, settings: RolloutSettings | None = None) -> Move:
    back = move.event == "rolled_back"
    ended = experiments.over(ledger, move.before, move.after, settings or RolloutSettings()) if back else None
    evidence = move.judgement.as_dict() if move.judgement else None
    result = ended.as_dict() if ended else None
    after = ledger.move(move.before, move.after, move.event, (move.reason, actor), evidence, result)
    version = after.candidate or move.before.candidate or after.champion or rollouts.BASE
    if back and not move.before.is_open:
        version = move.before.champion or rollouts.BASE
    live = after.champion or "the base model"
    text = f"{after.assistant}: {version} {SAYS[move.event].format(step=after.step)}. {move.reason} ({actor}; live: {live})"
    facts = {"assistant": after.assistant, "event": move.event, "version": version, "step": after.step, "actor": actor}
    for problem in notify(text, {**facts, "generation": after.generation, "reason": move.reason}):
        log.warning(problem)
    if ended:
        over = f"the experiment is over: a version of it was rolled back ({actor}). {ended.text}"
        experiments.tell(after.assistant, "experiment_ended", over)
    return Move(move.event, move.before, after, move.judgement, move.reason, text)
