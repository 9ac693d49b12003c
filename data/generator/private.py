"""Personal data and secrets that people let slip in a chat; every value planted is recorded on its turn."""

from __future__ import annotations

import random
from dataclasses import replace

from . import people
from .grammar import shield
from .phrases import load_words
from .talk import Talk

KINDS = ("email", "phone", "credit_card", "iban", "national_id", "ip", "secret", "email", "phone", "national_id")

TABLES = load_words("private")
SAID: dict[str, list[str]] = TABLES["said"]
ANSWERED: dict[str, list[str]] = TABLES["answered"]
INTENTS = {"credit_card": "pricing", "iban": "pricing", "national_id": "identity_check", "ip": "complaint"}


def slip(talk: Talk, country: str, booking: str, masked: bool = False) -> None:
    """The person gives something personal; the assistant answers as it should. `masked` writes a placeholder instead."""
    kind = talk.rng.choice(KINDS)
    value = f"[{kind.upper()}]" if masked else make(talk.rng, kind, country)
    pii = () if masked else ((kind, value),)
    talk.user(INTENTS.get(kind, "scheduling"), SAID[kind], pii=pii, value=shield(value))
    talk.bot(ANSWERED[kind], value=value, booking=booking)
    if pii and value in talk.turns[-1].text:
        talk.turns[-1] = replace(talk.turns[-1], pii=pii)


def make(rng: random.Random, kind: str, country: str) -> str:
    """A made-up value of that kind."""
    if kind in ("phone", "national_id"):
        return (people.phone if kind == "phone" else people.national_id)(rng, country)
    makers = {
        "email": people.email,
        "credit_card": people.credit_card,
        "iban": people.iban,
        "ip": people.ip,
        "secret": people.secret,
    }
    return makers[kind](rng)
