"""The rollout's rules, whatever is done in whatever order: no path skips a gate, and there is always a way back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_assets.errors import RolloutRefused
from finetune_assets.registry import Rollout, rollouts

STEPS = st.sampled_from([[10, 50, 100], [100], [1, 5, 25, 100], [50, 100]])
MOVES = st.lists(
    st.tuples(
        st.sampled_from(["start", "advance", "hold", "release", "rollback", "rollback to"]),
        st.sampled_from(["gathering", "passed", "failed", "inconclusive", "not_measurable"]),
        st.booleans(),  # a person
        st.booleans(),  # an approval is wanted
        st.sampled_from(["v1", "v2", "v3"]),
        st.sampled_from(["serve", "serve", "do_not_serve", "cannot_tell", None]),
    ),
    max_size=40,
)


def apply(state: Rollout, move: tuple[Any, ...], steps: list[int], served: set[str]) -> Rollout:
    name, outcome, person, approval, version, verdict = move
    if name == "start":
        return rollouts.start(state, version, verdict)
    if name == "advance":
        return rollouts.advance(state, outcome, steps, person=person, approval=approval)
    if name == "hold":
        return rollouts.hold(state, "person" if person else "guards")
    if name == "rollback to":
        return rollouts.rollback(state, version, served)
    return rollouts.release(state) if name == "release" else rollouts.rollback(state)


@settings(max_examples=150, deadline=None)
@given(STEPS, MOVES)
def test_whatever_is_done(steps: list[int], moves: list[tuple[Any, ...]]) -> None:
    state = Rollout("dental", None, 0, None)
    path, served = [0], set[str]()
    for move in moves:
        before = state
        try:
            state = apply(state, move, steps, served)
        except RolloutRefused:
            continue
        name, outcome, person, _, version, verdict = move
        assert state.generation == before.generation + 1
        # never two rollouts, and a candidate comes only from a verdict
        if state.candidate != before.candidate and state.candidate is not None:
            assert (name, verdict, state.candidate, state.share) == ("start", "serve", version, 0.0)
            assert before.share == 0
            path = [0]
        # a step is taken only over guards that did not fail, one at a time, and by itself only over ones that passed
        if state.share != before.share and name == "advance" and state.is_open:
            assert outcome != "failed"
            assert outcome == "passed" or person
            path.append(round(state.share * 100))
            assert path == [0, *[step for step in steps if step < 100]][: len(path)]
        # a new champion has gone through every step
        if state.champion != before.champion and name == "advance":
            assert path == [0, *[step for step in steps if step < 100]]
            assert (state.champion, state.previous) == (before.candidate, before.champion)
            served.add(str(state.champion))
        # whoever goes back, and however: nobody serves everybody who has not been through every step
        assert state.champion is None or state.champion in served
        if before.status in ("held", "awaiting_approval") and name == "advance":
            assert person
        assert (state.candidate is None) == (state.step == "idle") == (state.status == "idle")
        # there is a way back from everywhere but the base model, and it takes the share to nothing
        if state.candidate is not None or state.champion is not None:
            back = rollouts.rollback(state)
            assert (back.candidate, back.share) == (None, 0.0)
            if state.candidate is not None:
                assert back.champion == state.champion


def test_back_to_any_earlier_version_and_to_the_base_model() -> None:
    state = Rollout("dental", "v3", 7, None, previous="v2")
    assert rollouts.rollback(state).champion == "v2"
    assert rollouts.rollback(state, "v1", {"v1", "v2", "v3"}).champion == "v1"
    there = rollouts.rollback(state, "v1", {"v1", "v2", "v3"})
    assert rollouts.rollback(there).champion is None  # not forward to v3, which was left
    opened = rollouts.start(state, "v4", "serve")
    assert rollouts.rollback(opened, "v3").previous == "v2"  # only the rollout ends
    with pytest.raises(RolloutRefused, match="never served everybody"):
        rollouts.rollback(state, "v1", {"v2", "v3"})
    assert rollouts.rollback(state, "base").champion is None
    with pytest.raises(RolloutRefused, match="already serves"):
        rollouts.rollback(state, "v3")
    with pytest.raises(RolloutRefused, match="nothing to roll back"):
        rollouts.rollback(Rollout("dental", None, 0, None))


def test_users_who_see_a_candidate_are_not_moved_to_another() -> None:
    state = rollouts.start(Rollout("dental", "v1", 3, None), "v2", "serve")
    assert rollouts.start(state, "v3", "serve").candidate == "v3"  # in shadow: nobody has seen it
    exposed = rollouts.advance(state, "passed", [10, 100], person=False)
    with pytest.raises(RolloutRefused, match="one rollout at a time"):
        rollouts.start(exposed, "v3", "serve")
    with pytest.raises(RolloutRefused, match="already champion"):
        rollouts.start(replace(state, candidate=None, step="idle", status="idle"), "v1", "serve")


def test_settings_that_change_in_the_middle_skip_nothing_ahead() -> None:
    state = rollouts.start(Rollout("dental", "v1", 3, None), "v2", "serve")
    state = rollouts.advance(state, "passed", [10, 50, 100], person=False)
    assert rollouts.advance(state, "passed", [5, 25, 100], person=False).step == "25"
