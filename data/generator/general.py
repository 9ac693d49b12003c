"""Spanish dialogues of trades other than the sample's, to train the small base model on. Same skeletons, other content."""

from __future__ import annotations

import random
import string
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from . import people, private, skeletons
from .general_content import CITIES, COLORS, HOURS, NEARS, STREETS, TRADES, Trade
from .grammar import expand
from .phrases import load_words
from .skeletons import Domain
from .talk import Talk
from .tenant import money
from .when import MONTHS

SCHEMA = pa.schema(
    [
        ("dialogue_id", pa.string()),
        ("services", pa.list_(pa.string())),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ]
)
TABLES = load_words("general")
WORDS: dict[str, list[str]] = TABLES["words"]
ANSWERS: dict[str, list[str]] = TABLES["answers"]
ORDER = (
    ("thing", "day", "hour", "name"),
    ("thing", "day", "hour", "name"),
    ("thing", "day", "hour", "name"),
    ("thing", "party", "day", "hour", "name"),
)
TOPICS = (
    ("booking", 42),
    ("moving", 13),
    ("cancelling", 11),
    ("answers", 30),
    ("questions", 40),
    ("status", 12),
    ("complaint", 10),
    ("identity_check", 8),
    ("emergency", 9),
)


def write_general(out: Path, count: int, seed: int) -> int:
    """Write that many dialogues; returns their number."""
    rows = []
    for number in range(count):
        trade = sorted(TRADES)[number % len(TRADES)]
        talk = dialogue(random.Random(f"{seed}/general/{number}"), TRADES[trade])
        rows.append(
            {
                "dialogue_id": f"es_{number:05d}",
                "services": [trade],
                "messages": [{"role": turn.role, "content": turn.text} for turn in talk.turns],
            }
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), out, compression="zstd")
    return len(rows)


def dialogue(rng: random.Random, trade: Trade) -> Talk:
    """One dialogue with a place of this trade."""
    country = rng.choice(("BO", "ES", "AR", "MX"))
    talk = Talk(rng, country in ("BO", "AR"), rng.choices((0, 1, 2), (0.3, 0.5, 0.2))[0], {})
    masked = rng.random() < 0.18
    if masked:
        mark = rng.choice(("[NAME]", "[NAME]", "[NAME_2]", "[NAME_1]"))
        talk.slots.update(name=talk.introduce(mark), name_1=mark)
    booking = trade.booking
    talk.slots.update(
        booking=booking, booked=booking.split(" ", 1)[1], your=f"tu {booking.split(' ', 1)[1]}", place=rng.choice(trade.places)
    )
    domain = Domain(WORDS, rng.choice(ORDER), 8 * 60, 20 * 60 + 30, frozenset({rng.choice((6, 6, 0, 1))}), country, ANSWERS)
    facts(talk, trade, country)
    converse(talk, domain, trade, country, masked)
    return talk


def facts(talk: Talk, trade: Trade, country: str) -> None:
    """New values for everything the answers may name."""
    rng = talk.rng
    rate = {"ES": 1.0, "BO": 7.0, "MX": 18.0, "AR": 1500.0}[country]
    first, second = rng.randint(7, 12), rng.randint(13, 22)
    slots = {
        "h1": f"{first}:{rng.choice(('00', '30'))}",
        "h2": f"{second}:{rng.choice(('00', '30'))}",
        "n": str(rng.randint(2, 30)),
        "m": str(rng.randint(31, 60)),
        "person": people.full_name(rng),
        "city": rng.choice(CITIES),
        "color": rng.choice(COLORS),
        "month": rng.choice(MONTHS),
        "four": people.digits(rng, 4),
        "code": code(rng),
        "near": rng.choice(NEARS),
        "street": f"{rng.choice(STREETS)} {rng.randint(10, 2500)}",
        "price_2": money(rng.randint(20, 300) * rate, country),
        "staff": people.full_name(rng),
    }
    name, ways, euros = rng.choice(trade.things)
    price = euros * rate * rng.choice((0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35))
    filled = {key: expand(rng, text, dict(slots), talk.voseo) for key, text in (("thing", name), ("thing_s", rng.choice(ways)))}
    filled["pl"], filled["pls"] = plural(filled["thing"]), plural(filled["thing_s"])
    party = rng.randint(2, 12)
    talk.slots.update(
        slots,
        price=money(round(price), country),
        hours=expand(rng, rng.choice(HOURS), dict(slots), talk.voseo),
        party=f"{party} personas",
        party_s=rng.choice((f"{party} personas", str(party))),
        **filled,
    )


def plural(noun: str) -> str:
    """The letter a verb takes when this is its subject."""
    return "n" if noun.startswith(("los ", "las ", "unas ", "unos ", "clases ", "brackets")) else ""


def code(rng: random.Random) -> str:
    """A booking or parcel code."""
    letters = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(1, 3)))
    return letters + rng.choice(("", "-")) + people.digits(rng, rng.randint(2, 5))


def converse(talk: Talk, domain: Domain, trade: Trade, country: str, masked: bool) -> None:
    """One to three topics, framed by a hello and a goodbye at times."""
    rng = talk.rng
    today = date(2026, 1, 1) + timedelta(days=rng.randrange(365))
    if talk.chance(0.25):
        skeletons.hello(talk, domain)
    topics = list(
        dict.fromkeys(rng.choices([name for name, _ in TOPICS], [share for _, share in TOPICS], k=rng.choice((1, 1, 2, 2, 3))))
    )
    for topic in topics:
        if topic == "booking":
            skeletons.booking(talk, domain, today)
        elif topic == "moving":
            skeletons.moving(talk, domain, today)
        elif topic == "cancelling":
            skeletons.cancelling(talk, domain, today)
        elif topic == "answers":
            for key in rng.sample(sorted(ANSWERS), rng.randint(1, 2)):
                facts(talk, trade, country)
                skeletons.answer(talk, domain, key)
        elif topic == "questions":
            for ask, reply in rng.sample(trade.questions, rng.randint(1, 3)):
                facts(talk, trade, country)
                talk.user("question", [ask, ask + "<u_please>"])
                talk.bot([reply + "<a_more>"])
        else:
            problem = rng.choice(trade.problems)
            keys = sorted({key.rsplit(".", 1)[0] for key in domain.words if key.startswith(topic + ".")})
            skeletons.exchange(
                talk,
                replace(domain, words={**WORDS, "complaint.any.1": [problem, problem + "{|, ayuda|, ¿qué hago?|, muy mal}"]}),
                rng.choice(keys),
            )
    if talk.chance(0.25 if masked else 0.06):
        private.slip(talk, country, str(talk.slots["your"]), masked=masked)
    if talk.chance(0.7):
        skeletons.thanks(talk, domain)
