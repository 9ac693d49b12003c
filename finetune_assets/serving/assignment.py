"""Which arm a user gets: by hash, so that it is the same in every worker and after every restart.

The place of a user, 0..1, comes from the rollout's salt, the tenant and the user. A user below the candidate's share gets the
candidate: ramping up never takes anybody back, and another rollout starts with other people.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from finetune_assets.registry import Rollout
from finetune_assets.serving.talks import Talk

CHAMPION, CANDIDATE = "champion", "candidate"


@dataclass(frozen=True)
class Arm:
    """What answers a request: the arm and its version (null: the base model)."""

    name: str
    version: str | None


def place(salt: str, tenant: str, user: str) -> float:
    """A user's place in a rollout, evenly spread over 0..1."""
    digest = hashlib.blake2b(f"{salt}\0{tenant}\0{user}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def assign(state: Rollout, tenant: str, user: str) -> Arm:
    """The arm of a user at the rollout's current share."""
    if (
        state.candidate is not None
        and state.salt is not None
        and state.share > 0
        and place(state.salt, tenant, user) < state.share
    ):
        return Arm(CANDIDATE, state.candidate)
    return Arm(CHAMPION, state.champion)


def keep(state: Rollout, assigned: Arm, talk: Talk) -> tuple[Arm, bool]:
    """The arm of an open conversation, and whether it has it from an earlier step: it stays, unless that rollout is over.

    That is told of every such conversation, also of one whose arm would be the same today: those of users who change at the step
    count for neither arm, so those of users who do not may not count either, or the split of users would look wrong.
    """
    if talk.salt != state.salt or (talk.step == state.step and not talk.kept):
        return assigned, False
    if talk.arm == CANDIDATE and state.candidate is not None:
        return Arm(CANDIDATE, state.candidate), True
    return Arm(CHAMPION, state.champion), True


def takes_part(experiment: dict[str, Any], tenant: str, user: str) -> bool:
    """Whether a user is in an experiment: the tenant is named, or TENANT/USER; nobody else ever sees its versions.
    One named without a tenant is of an experiment that began when users were named so."""
    users = experiment.get("users", [])
    return tenant in experiment.get("tenants", []) or f"{tenant}/{user}" in users or ("/" not in user and user in users)


def as_rollout(state: Rollout, experiment: dict[str, Any]) -> Rollout:
    """An experiment seen as a rollout: version A is its champion, B its candidate."""
    first, second = experiment.get("a"), experiment.get("b")
    return Rollout(
        state.assistant,
        first,
        state.generation,
        state.updated_at,
        candidate=second,
        step="a/b",
        status="running",
        share=float(experiment["share"]),
        salt=str(experiment["salt"]),
    )
