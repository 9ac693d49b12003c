"""Makes the conversations of the sample: who writes to which tenant, about what, when, and how satisfied."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta

from . import dental, people, private, restaurant, skeletons
from .skeletons import Domain
from .talk import Talk, Turn
from .tenant import Tenant
from .when import NUMBERS

FIRST_DAY = date(2026, 8, 3)
DAYS = 84
USERS_PER_TENANT = 150


@dataclass
class Conversation:
    """One conversation with its turns and their times."""

    tenant: Tenant
    user_id: str
    channel: str
    started_at: datetime
    turns: list[Turn]
    names: list[str]
    score: int | None
    times: list[datetime] = field(default_factory=list)
    conversation_id: str = ""
    bad: dict[int, str] = field(default_factory=dict)
    corrected: dict[int, str] = field(default_factory=dict)


def users(tenant: Tenant, rng: random.Random) -> list[tuple[str, str]]:
    """(user_id, channel) of a tenant's people; WhatsApp identifies them by phone number."""
    found = []
    for number in range(USERS_PER_TENANT):
        whatsapp = rng.random() < 0.65
        found.append(
            (people.phone(rng, tenant.country, plain=True), "whatsapp")
            if whatsapp
            else (f"web_{tenant.tenant_id}_{number:03d}", "web")
        )
    return found


def conversations(count: int, seed: int) -> list[Conversation]:
    """That many conversations, spread over the tenants and twelve weeks."""
    tenants = dental.TENANTS + restaurant.TENANTS
    base = random.Random(f"{seed}/users")
    crowd = {tenant.tenant_id: users(tenant, base) for tenant in tenants}
    return [_one(random.Random(f"{seed}/{index}"), tenants[index % len(tenants)], crowd) for index in range(count)]


def _one(rng: random.Random, tenant: Tenant, crowd: dict[str, list[tuple[str, str]]]) -> Conversation:
    user_id, channel = rng.choice(crowd[tenant.tenant_id])
    day = FIRST_DAY + timedelta(days=rng.randrange(DAYS))
    started = datetime(
        day.year,
        day.month,
        day.day,
        rng.choice((8, 9, 9, 10, 11, 12, 13, 15, 16, 17, 18, 19, 20, 21)),
        rng.randrange(60),
        rng.randrange(60),
        tzinfo=UTC,
    )
    talk = Talk(rng, tenant.voseo, rng.choices((0, 1, 2), (0.3, 0.5, 0.2))[0], _facts(rng, tenant))
    module = dental if tenant.vertical == "dental" else restaurant
    converse(talk, module.domain(tenant), tenant, day)
    score = None if rng.random() < 0.2 else rng.choices((1, 2, 3, 4, 5), (4, 8, 25, 34, 29))[0]
    said = [name for name in dict.fromkeys(talk.names) if any(name.split()[0] in turn.text for turn in talk.turns)]
    made = Conversation(tenant, user_id, channel, started, talk.turns, said, score)
    made.times = clock(rng, started, talk.turns)
    return made


def clock(rng: random.Random, started: datetime, turns: list[Turn]) -> list[datetime]:
    """The time of each message: people take a while, the assistant seconds."""
    times, now = [], started
    for turn in turns:
        times.append(now)
        now += timedelta(seconds=rng.randint(3, 12) if turn.role == "user" else rng.randint(15, 160))
    return times


def _facts(rng: random.Random, tenant: Tenant) -> dict[str, str | list[str]]:
    """The tenant's facts and the thing this person is interested in."""
    slots: dict[str, str | list[str]] = {
        "place": tenant.place,
        "street": tenant.street,
        "near": tenant.near,
        "hours": tenant.hours,
        "closed_days": tenant.closed_days,
        "own_phone": tenant.phone,
        "doctor": rng.choice(tenant.staff),
        "staff": rng.choice(tenant.staff),
    }
    _interest(rng, tenant, slots)
    party = rng.choice((2, 2, 2, 3, 3, 4, 4, 4, 5, 6, 6, 7, 8, 10, 12))
    spoken = (f"{party} personas", f"{NUMBERS[party]} personas", str(party), NUMBERS[party])
    slots.update(party=f"{party} personas", party_s=rng.choice(spoken), n=rng.choice((str(party), NUMBERS[party])))
    return slots


def _interest(rng: random.Random, tenant: Tenant, slots: dict[str, str | list[str]]) -> None:
    if tenant.vertical == "dental":
        slots.update(dental.service_slots(rng.randrange(len(dental.SERVICES)), tenant, rng.randrange(4)))
    else:
        first, second = rng.sample(range(8), 2)
        veg = rng.sample(range(2), 2) if tenant.tenant_id == "resto_la_parra" else rng.sample(range(3), 2)
        slots.update(restaurant.dish_slots(first, second, (veg[0], veg[1]), tenant))


TOPICS = (
    ("booking", 46),
    ("moving", 13),
    ("cancelling", 11),
    ("answers", 34),
    ("emergency", 7),
    ("identity", 8),
    ("complaint", 8),
)


def converse(talk: Talk, domain: Domain, tenant: Tenant, today: date) -> None:
    """One to three topics, with a hello and a goodbye at times, and personal data where it comes up."""
    rng = talk.rng
    if talk.chance(0.2):
        skeletons.hello(talk, domain)
    count = rng.choices((1, 2, 3), (35, 45, 20))[0]
    topics = rng.choices([name for name, _ in TOPICS], [share for _, share in TOPICS], k=count)
    topics = list(dict.fromkeys(topics))
    if "emergency" in topics:
        topics = ["emergency"]
    if "moving" in topics and "cancelling" in topics:
        topics.remove("cancelling")
    if "booking" in topics and ("moving" in topics or "cancelling" in topics):
        topics = [topic for topic in topics if topic != "booking"]
    for topic in topics:
        _topic(talk, domain, tenant, today, topic)
    if talk.chance(0.17):
        private.slip(talk, tenant.country, "tu cita" if tenant.vertical == "dental" else "tu reserva")
    if "emergency" not in topics and talk.chance(0.7):
        skeletons.thanks(talk, domain)


def _topic(talk: Talk, domain: Domain, tenant: Tenant, today: date, topic: str) -> None:
    if topic == "booking":
        skeletons.booking(talk, domain, today)
    elif topic == "moving":
        skeletons.moving(talk, domain, today)
    elif topic == "cancelling":
        skeletons.cancelling(talk, domain, today)
    elif topic == "answers":
        for key in talk.rng.sample(sorted(domain.answers), talk.rng.choices((1, 2, 3), (3, 4, 3))[0]):
            _interest(talk.rng, tenant, talk.slots)
            skeletons.answer(talk, domain, key)
    else:
        prefix = {"identity": "identity_check"}.get(topic, topic)
        keys = sorted({key.rsplit(".", 1)[0] for key in domain.words if key.startswith(prefix + ".")})
        skeletons.exchange(talk, domain, talk.rng.choice(keys))
