"""Conversation skeletons with slots: booking, moving, cancelling, question and answer.

A domain gives the words, the skeleton the order.
The assistant always asks for the first slot that is missing, in the domain's order, and echoes what was said.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date

from . import people
from .grammar import Slots
from .phrases import COMMON
from .talk import Talk
from .when import Day, Hour, other_hours, pick_day, pick_hour


@dataclass(frozen=True)
class Domain:
    """What a place talks about. `words` holds the templates, `order` the slots of a booking in the order they are asked."""

    words: dict[str, list[str]]
    order: tuple[str, ...]
    opens: int
    closes: int
    closed: frozenset[int] = frozenset()
    country: str = "ES"
    answers: dict[str, list[str]] = field(default_factory=dict)

    def lines(self, key: str) -> list[str]:
        """The domain's templates of that key, or the shared ones."""
        found = self.words.get(key) or COMMON.get(key)
        if not isinstance(found, list):
            raise KeyError(f"no templates for {key!r}")
        return found


def fill_when(talk: Talk, domain: Domain, today: date) -> tuple[Day, Hour]:
    """Choose day and hour and put them into the talk's slots."""
    day = pick_day(talk.rng, today, domain.closed)
    hour = pick_hour(talk.rng, domain.opens, domain.closes)
    talk.slots.update(day=day.echo, day_s=talk.rng.choice(day.said))
    set_hour(talk, hour)
    return day, hour


def set_hour(talk: Talk, hour: Hour) -> None:
    """Make this the hour the talk is about."""
    talk.slots.update(hour=hour.echo, hour_s=talk.rng.choice(hour.said))


def fill_name(talk: Talk) -> None:
    """Choose the person's name; a person has one name in a conversation."""
    if "name" not in talk.slots:
        name = people.full_name(talk.rng)
        talk.slots.update(name=talk.introduce(name), name_1=name.split()[0])


def name_said(talk: Talk) -> bool:
    """Whether the person has given the name in this conversation."""
    name = str(talk.slots.get("name_1", ""))
    return bool(name) and any(name in turn.text for turn in talk.turns)


def booking(talk: Talk, domain: Domain, today: date, intent: str = "scheduling") -> bool:
    """Ask for what is missing, settle the hour, confirm. Returns whether the booking was made."""
    _, hour = fill_when(talk, domain, today)
    fill_name(talk)
    talk.slots["wanted"] = " para ".join(str(talk.slots[slot]) for slot in domain.order if slot in ("service", "thing", "party"))
    known_name = name_said(talk)
    missing = _open(talk, domain, intent, known_name)
    settled = False
    while True:
        if not settled and "hour" not in missing and "day" not in missing:
            settled = True
            if talk.chance(0.25):
                hour = _busy(talk, domain, hour, intent)
                continue
        if not missing:
            break
        slot = missing[0]
        if slot == "hour" and "day" not in missing and talk.chance(0.2):
            hour, settled = _free(talk, domain, hour, intent), True
            missing.remove("hour")
            continue
        both = missing[:2] == ["day", "hour"] and talk.chance(0.45)
        slot = "dayhour" if both else slot
        talk.bot([f"{talk.rng.choice(domain.lines('book.lead'))} {line}" for line in domain.lines(f"ask.{slot}")])
        if slot == "name" and talk.chance(0.12):
            talk.user(intent, domain.lines("book.wait"))
            talk.bot(domain.lines("book.wait_reply"))
            if talk.chance(0.5):
                return False
        if talk.chance(0.1) and domain.answers:
            aside(talk, domain, domain.lines(f"ask.{slot}"))
        talk.user(intent, domain.lines(f"tell.{slot}"))
        missing = missing[2:] if both else missing[1:]
    _confirm(talk, domain, intent)
    return True


def _open(talk: Talk, domain: Domain, intent: str, known_name: bool) -> list[str]:
    """The opening wish with some slots said; returns the slots that are missing."""
    share = talk.rng.choice((0.0, 0.3, 0.6, 0.9))
    said = [
        slot
        for slot in domain.order
        if talk.chance(share if slot != "name" else share / 3) and not (slot == "name" and known_name)
    ]
    if "hour" in said and "day" not in said:
        said.remove("hour")
    parts = [slot for slot in said if slot not in ("day", "hour", "name")]
    when: list[str] = [slot for slot in ("day", "hour") if slot in said]
    wish = " ".join(talk.say(domain.lines(f"clause.{slot}")) for slot in (parts + when if talk.chance(0.7) else when + parts))
    if "name" in said:
        wish += (", " if wish else " ") + talk.say(domain.lines("clause.name"))
    talk.user(intent, domain.lines("book.open"), wish=(" " + wish) if wish else "")
    return [slot for slot in domain.order if slot not in said and not (slot == "name" and known_name)]


def _busy(talk: Talk, domain: Domain, hour: Hour, intent: str) -> Hour:
    first, second = other_hours(talk.rng, hour, domain.opens, domain.closes)
    talk.bot(domain.lines("book.busy"), alt_1=first.echo, alt_2=second.echo)
    pick = talk.rng.choice((first, second))
    talk.user(intent, domain.lines("book.pick"), alt_s=talk.rng.choice(pick.said))
    set_hour(talk, pick)
    return pick


def _free(talk: Talk, domain: Domain, hour: Hour, intent: str) -> Hour:
    options = other_hours(talk.rng, hour, domain.opens, domain.closes, 3)
    if talk.chance(0.5):
        talk.bot([f"{talk.rng.choice(domain.lines('book.lead'))} {line}" for line in domain.lines("ask.hour")])
        talk.user(intent, domain.lines("book.ask_free"))
    talk.bot(domain.lines("book.free"), **{f"alt_{at + 1}": option.echo for at, option in enumerate(options)})
    pick = talk.rng.choice(options)
    talk.user(intent, domain.lines("book.pick"), alt_s=talk.rng.choice(pick.said))
    set_hour(talk, pick)
    return pick


def _confirm(talk: Talk, domain: Domain, intent: str) -> None:
    if talk.chance(0.4):
        talk.bot(domain.lines("recap"), recap=talk.say(domain.lines("book.recap")))
        if talk.chance(0.2):
            set_hour(talk, pick_hour(talk.rng, domain.opens, domain.closes))
            talk.user(intent, domain.lines("book.change_hour"))
        else:
            talk.user(intent, domain.lines("yes"))
    talk.bot(domain.lines("book.done"), recap=talk.say(domain.lines("book.recap")))


def aside(talk: Talk, domain: Domain, question: list[str]) -> None:
    """The person asks something else in the middle; the assistant answers and asks its own question again."""
    key = talk.rng.choice(sorted(key for key in domain.answers if key.startswith(("pricing", "hours"))))
    talk.user(key.split(".", maxsplit=1)[0], domain.words[f"{key}.ask"])
    talk.bot(
        [
            f"{line} {{Volviendo a lo tuyo,|Y para terminar,|Entonces,|Y}} {again}"
            for line in domain.answers[key]
            for again in question[:2]
        ]
    )


def answer(talk: Talk, domain: Domain, key: str) -> None:
    """A question of the person and its answer; `key` is the intent, a dot, the topic."""
    talk.user(key.split(".", maxsplit=1)[0], domain.words[f"{key}.ask"])
    talk.bot([line + "<a_more>" for line in domain.answers[key]])


def moving(talk: Talk, domain: Domain, today: date) -> None:
    """Move a booking to another day or hour."""
    old = pick_day(talk.rng, today, domain.closed, 6)
    new = old
    while new.echo == old.echo:
        new, _ = fill_when(talk, domain, today)
    was, was_said = old.echo, talk.rng.choice(old.said)
    fill_name(talk)
    if talk.chance(0.5):
        talk.user("rescheduling", domain.lines("move.open"), old=was, old_s=was_said)
        talk.bot(domain.lines("move.ask"), old=was)
        talk.user("rescheduling", domain.lines("tell.dayhour"))
    else:
        talk.user("rescheduling", domain.lines("move.open_full"), old=was, old_s=was_said)
    if talk.chance(0.3):
        talk.bot(domain.lines("move.ask_name"))
        talk.user("rescheduling", domain.lines("tell.name"))
    if talk.chance(0.25):
        first, second = other_hours(talk.rng, pick_hour(talk.rng, domain.opens, domain.closes), domain.opens, domain.closes)
        talk.bot(domain.lines("move.busy"), alt_1=first.echo, alt_2=second.echo)
        pick = talk.rng.choice((first, second))
        talk.user("rescheduling", domain.lines("book.pick"), alt_s=talk.rng.choice(pick.said))
        set_hour(talk, pick)
    talk.bot([line + "<a_more>" for line in domain.lines("move.done")], old=was)


def cancelling(talk: Talk, domain: Domain, today: date) -> None:
    """Cancel a booking; sometimes the person takes the offer to move it instead."""
    fill_when(talk, domain, today)
    fill_name(talk)
    named = talk.chance(0.5)
    talk.user("cancelling", domain.lines("cancel.open_name" if named else "cancel.open"))
    if not named and talk.chance(0.6):
        talk.bot(domain.lines("cancel.ask_name"))
        talk.user("cancelling", domain.lines("tell.name"))
    if talk.chance(0.4):
        talk.bot(domain.lines("cancel.offer"))
        if talk.chance(0.4):
            fill_when(talk, domain, today)
            talk.user("rescheduling", domain.lines("cancel.move"))
            talk.bot(domain.lines("move.done_short"))
            return
        talk.user("cancelling", domain.lines("cancel.firm"))
    talk.bot([line + "<a_more>" for line in domain.lines("cancel.done")])


def hello(talk: Talk, domain: Domain) -> None:
    """A greeting without a wish."""
    talk.greeted = True
    talk.user("smalltalk", domain.lines("smalltalk.hello"))
    talk.bot(domain.lines("smalltalk.hello_reply"))


def thanks(talk: Talk, domain: Domain) -> None:
    """Thanks and goodbye."""
    talk.user("smalltalk", domain.lines("smalltalk.thanks"))
    lines = domain.lines("smalltalk.thanks_reply")
    if not name_said(talk):
        lines = [line.replace("{|, <name_1>}", "") for line in lines]
    talk.bot(lines)


def exchange(talk: Talk, domain: Domain, key: str, slots: Slots | None = None) -> None:
    """A scripted exchange: `key.1` (person), `key.2` (assistant), `key.3` … as long as there are lines."""
    intent, step = key.split(".", maxsplit=1)[0], 1
    for name, value in (slots or {}).items():
        talk.slots[name] = value
    while f"{key}.{step}" in domain.words:
        lines = domain.words[f"{key}.{step}"]
        talk.user(intent, lines) if step % 2 else talk.bot(lines)
        step += 1
