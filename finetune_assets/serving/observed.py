"""What a rollout step's requests and feedback say, read from the ledger. Analysis goes by the arm a user was assigned.

A shadow step has no users of its own: its requests are the candidate's answers to what the live arm was asked. Requests of
conversations that were open when the step began (in both arms, whether or not theirs is another since), those that a client gave
up, and those that no model takes count nowhere. A person is a tenant's user.

A request is known when it has ended, and an error may end long before the good replies to what was asked with it: at the
beginning of a step, or of a burst, a healthy model would seem to fail. So the errors are those of the requests that came before
all that may still be under way (`settled`): their order is that of coming in, and none is missing whose reply takes no longer
than those before it.

Time is measured so that a clock that is set forward or back neither opens nor blocks a gate. `hours` are the hours of the clock
in which the candidate was asked: a jump adds one at most, however far it goes. `waited`, after which a person is asked, is
counted from the event that began the step, or from a person's release, and is never less than the hours with requests since
then: behind a clock that was set back it grows all the same.
"""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from finetune_assets.registry import Ledger, Rollout
from finetune_assets.registry.rollouts import SHADOW
from finetune_assets.registry.tables import now, rollout_events
from finetune_assets.registry.traffic import feedback, requests
from finetune_assets.serving.guards import FIRST, Timed

BAD = ("error", "timeout", "policy")
NOBODYS = ("gone", "refused")
"""Outcomes that say nothing of a model: the client left, or asked what no model takes."""
PERSON = sa.func.coalesce(requests.c.tenant_id, sa.literal_column("''")) + sa.literal_column("'/'", sa.String) + requests.c.user
"""Two tenants' users of one name are two people."""
WAIT = 60.0
"""Seconds for which an arm is waited for that has given no good reply yet, and for the last requests of a burst."""


@dataclass(frozen=True)
class Arm:
    """One arm in one step: requests in all, users, the first and last settled requests (whether they failed), seconds and cost of
    the newest replies (`guards`), each user's feedback, in the order of their first.

    `negative`: share of negative feedback of each user who gave any, 0..1; `rating`: mean stars of each user who gave any, 1..5.
    """

    requests: int
    users: int
    first: list[bool]
    last: list[bool]
    seconds: Timed
    usd: Timed
    negative: list[float]
    rating: list[float]


@dataclass(frozen=True)
class Observed:
    """A rollout step: both arms, the hours of the clock in which the candidate was asked, hours since the step began, and how
    often a shadow's upstream said that it does not know the candidate, as long as that is all it said."""

    candidate: Arm
    champion: Arm
    hours: int
    waited: float
    unknown: int = 0


def observe(ledger: Ledger, state: Rollout) -> Observed:
    """The current step of an open rollout, or of an experiment."""
    step = (
        (requests.c.assistant == state.assistant)
        & (requests.c.rollout == state.salt)
        & (requests.c.step == state.step)
        & ~requests.c.kept
        & (requests.c.outcome.not_in(NOBODYS))
    )
    live = step & (requests.c.kind == "live")
    longest = sa.func.max(sa.func.coalesce(requests.c.seconds, 0.0))
    kinds = ("live", SHADOW) if state.step == SHADOW else ("live",)  # elsewhere no shadow reply is waited for
    rollout = (requests.c.assistant == state.assistant) & (requests.c.rollout == state.salt)
    whole = rollout & requests.c.kind.in_(kinds) & (requests.c.outcome == "ok")
    mine = step & (requests.c.kind == "shadow") if state.step == SHADOW else live & (requests.c.assigned_arm == "candidate")
    with ledger.engine.connect() as connection:
        arm = requests.c.assigned_arm
        good = {row[0]: float(row[1]) for row in connection.execute(sa.select(arm, longest).where(whole).group_by(arm))}
        newest = connection.execute(sa.select(sa.func.max(requests.c.created_at)).where(step)).scalar()
        until = settled(newest, max(good.get("candidate", WAIT), good.get("champion", 0.0)), now())
        candidate = _arm(connection, mine, until)
        return Observed(
            candidate,
            _arm(connection, live & (requests.c.assigned_arm == "champion"), until),
            _hours(connection, mine),
            _waited(connection, state, mine),
            0 if candidate.requests or state.step != SHADOW else _unknown(connection, rollout),
        )


def settled(newest: datetime.datetime | None, longest: float, at: datetime.datetime) -> datetime.datetime:
    """When the last request came of which it is known that none before it is under way: as long before the newest one that has
    ended as the longest good reply of the rollout took (s); where nothing has come for a while, as long, or WAIT, before `at`."""
    ago = datetime.timedelta
    return at if newest is None else max(newest - ago(seconds=longest), at - ago(seconds=max(longest, WAIT)))


def _hours(connection: sa.Connection, where: sa.ColumnElement[bool]) -> int:
    """Hours of the clock that have a request."""
    year, day, hour = (sa.extract(part, requests.c.created_at) for part in ("year", "doy", "hour"))
    query = sa.select(sa.func.count(sa.distinct(year * 100_000 + day * 100 + hour))).where(where)
    return int(connection.execute(query).scalar_one())


def _unknown(connection: sa.Connection, rollout: sa.ColumnElement[bool]) -> int:
    where = rollout & (requests.c.kind == "shadow") & (requests.c.outcome == "refused")
    return int(connection.execute(sa.select(sa.func.count()).select_from(requests).where(where)).scalar_one())


def _waited(connection: sa.Connection, state: Rollout, where: sa.ColumnElement[bool]) -> float:
    """Hours since the step began or was released; 0 for an experiment, which has no steps."""
    began = (
        sa.select(rollout_events.c.created_at, rollout_events.c.generation)
        .where(
            (rollout_events.c.assistant == state.assistant)
            & (rollout_events.c.generation <= state.generation)
            & rollout_events.c.event.in_(("started", "advanced", "released"))
        )
        .order_by(rollout_events.c.id.desc())
        .limit(1)
    )
    event = connection.execute(began).first()
    if event is None:
        return 0.0
    elapsed = (now() - event.created_at).total_seconds() / 3600
    return max(elapsed, _hours(connection, where & (requests.c.generation >= event.generation)))


def _arm(connection: sa.Connection, where: sa.ColumnElement[bool], until: datetime.datetime) -> Arm:
    users = sa.func.count(sa.distinct(PERSON))
    count, people = connection.execute(sa.select(sa.func.count(), users).select_from(requests).where(where)).one()
    order = (requests.c.created_at, requests.c.request_id)
    newest = [column.desc() for column in order]
    sequence = max(0, count // FIRST - 1)
    replies = sa.select(requests.c.outcome, requests.c.seconds, requests.c.usd).where(where)
    timed = connection.execute(replies.order_by(*newest).limit(count - sequence * FIRST)).all()[::-1]
    known = sa.select(requests.c.outcome).where(where & (requests.c.created_at <= until)).limit(FIRST)
    last = connection.execute(known.order_by(*newest)).scalars().all()[::-1]
    first = last if len(last) < FIRST else connection.execute(known.order_by(*order)).scalars().all()
    said = (
        sa.select(
            sa.func.avg(sa.case((feedback.c.feedback_type == "negative", 1.0), else_=0.0)),
            sa.func.avg(feedback.c.rating),
        )
        .select_from(feedback.join(requests, requests.c.message_id == feedback.c.message_id))
        .where(where & (requests.c.kind == "live"))
        .group_by(PERSON)
        .order_by(sa.func.min(feedback.c.created_at), PERSON)
    )
    people_said = connection.execute(said).all()
    return Arm(
        requests=count,
        users=people,
        first=[outcome in BAD for outcome in first],
        last=[outcome in BAD for outcome in last],
        seconds=Timed([row.seconds for row in timed if row.outcome == "ok" and row.seconds is not None], sequence),
        usd=Timed([row.usd for row in timed if row.usd is not None], sequence),
        negative=[float(negative) for negative, _ in people_said if negative is not None],
        rating=[float(rating) for _, rating in people_said if rating is not None],
    )


def exposed(ledger: Ledger, assistant: str, salt: str) -> int:
    """How many people the candidate of a rollout has answered."""
    query = sa.select(sa.func.count(sa.distinct(PERSON))).where(
        (requests.c.assistant == assistant)
        & (requests.c.rollout == salt)
        & (requests.c.kind == "live")
        & (requests.c.served_arm == "candidate")
    )
    with ledger.engine.connect() as connection:
        return int(connection.execute(query).scalar_one())


def slowest(
    ledger: Ledger, assistant: str, since: datetime.datetime, until: datetime.datetime, share: float = 0.95
) -> float | None:
    """Seconds within which `share` of the live replies came between two times (UTC, naive); null where there was none."""
    where = _of(assistant, "live", since, until) & (requests.c.outcome == "ok") & requests.c.seconds.is_not(None)
    with ledger.engine.connect() as connection:
        count = int(connection.execute(sa.select(sa.func.count()).select_from(requests).where(where)).scalar_one())
        place = max(math.ceil(count * share) - 1, 0)
        return connection.execute(
            sa.select(requests.c.seconds).where(where).order_by(requests.c.seconds).offset(place).limit(1)
        ).scalar()


def _of(assistant: str, kind: str, since: datetime.datetime, until: datetime.datetime) -> sa.ColumnElement[bool]:
    return (
        (requests.c.assistant == assistant)
        & (requests.c.kind == kind)
        & (requests.c.created_at >= since)
        & (requests.c.created_at < until)
    )


def totals(ledger: Ledger, assistant: str, since: datetime.datetime, until: datetime.datetime) -> dict[str, Any]:
    """Live traffic of an assistant between two times (UTC, naive): requests, users, outcomes, seconds, cost, feedback.

    `exposed`: people whom a candidate answered, of rollouts that are over too. `shadow_usd`: cost of what nobody saw.
    """
    where = _of(assistant, "live", since, until)
    unseen = _of(assistant, "shadow", since, until)
    taken_over = (requests.c.assigned_arm != requests.c.served_arm) & (requests.c.status == 200)
    with ledger.engine.connect() as connection:
        head = connection.execute(
            sa.select(
                sa.func.count(),
                sa.func.count(sa.distinct(PERSON)),
                sa.func.count(sa.distinct(sa.case((requests.c.served_arm == "candidate", PERSON)))),
                sa.func.sum(sa.case((requests.c.outcome.in_(BAD), 1), else_=0)),
                sa.func.sum(sa.case((taken_over, 1), else_=0)),
                sa.func.avg(requests.c.seconds),
                sa.func.sum(requests.c.usd),
                sa.func.avg(requests.c.user_chars),
                sa.func.avg(requests.c.reply_chars),
            ).where(where)
        ).one()
        shadow_usd = connection.execute(sa.select(sa.func.sum(requests.c.usd)).where(unseen)).scalar()
        said = connection.execute(
            sa.select(feedback.c.feedback_type, sa.func.count(), sa.func.avg(feedback.c.rating))
            .select_from(feedback.join(requests, requests.c.message_id == feedback.c.message_id))
            .where(where)
            .group_by(feedback.c.feedback_type)
        ).all()
        versions = connection.execute(
            sa.select(requests.c.version, sa.func.count()).where(where).group_by(requests.c.version)
        ).all()
    kinds = {kind: int(count) for kind, count, _ in said}
    given = sum(kinds.values())
    rated = [(float(rating), int(count)) for _, count, rating in said if rating is not None]
    return {
        "requests": int(head[0]),
        "users": int(head[1]),
        "exposed": int(head[2]),
        "failed": int(head[3] or 0),
        "fallbacks": int(head[4] or 0),
        "seconds": head[5],
        "usd": head[6],
        "shadow_usd": shadow_usd,
        "user_chars": head[7],
        "reply_chars": head[8],
        "feedback": given,
        "negatives": kinds.get("negative", 0),
        "negative": kinds.get("negative", 0) / given if given else None,
        "rating": sum(r * n for r, n in rated) / sum(n for _, n in rated) if rated else None,
        "versions": {version: int(count) for version, count in versions},
    }
