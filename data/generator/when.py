"""Days and hours as people say them, with the one form the assistant echoes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import date, timedelta

WEEKDAYS = ("lunes", "martes", "miércoles", "jueves", "viernes", "sábado", "domingo")
MONTHS = (
    "enero",
    "febrero",
    "marzo",
    "abril",
    "mayo",
    "junio",
    "julio",
    "agosto",
    "septiembre",
    "octubre",
    "noviembre",
    "diciembre",
)
NUMBERS = ("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve", "diez", "once", "doce")


@dataclass(frozen=True)
class Day:
    """`echo` is what the assistant repeats, `said` the ways a person may put it."""

    echo: str
    said: tuple[str, ...]
    date: date


@dataclass(frozen=True)
class Hour:
    """An hour of the day; `echo` is 24-hour time, used after `a las`."""

    echo: str
    said: tuple[str, ...]
    minutes: int


def pick_day(rng: random.Random, today: date, closed: frozenset[int] = frozenset(), ahead: int = 13) -> Day:
    """A day from tomorrow to `ahead` days from now on which the place is open."""
    while True:
        gap = min(rng.randint(1, ahead), rng.randint(1, ahead))
        day = today + timedelta(days=gap)
        if day.weekday() not in closed:
            return name_day(rng, day, gap)


def name_day(rng: random.Random, day: date, gap: int) -> Day:
    """Choose how this day is called in the conversation."""
    week, number, month = WEEKDAYS[day.weekday()], day.day, MONTHS[day.month - 1]
    if gap == 1 and rng.random() < 0.7:
        return Day("mañana", ("mañana", "mañana", "mañana mismo", f"mañana {week}"), day)
    if gap == 2 and rng.random() < 0.4:
        return Day("pasado mañana", ("pasado mañana",), day)
    if gap <= 6 and rng.random() < 0.75:
        return Day(f"el {week}", (f"el {week}", f"el {week}", f"este {week}", f"el próximo {week}"), day)
    if rng.random() < 0.6:
        return Day(f"el {week} {number}", (f"el {week} {number}", f"el {week} {number}", f"el {week} {number} de {month}"), day)
    return Day(f"el {number} de {month}", (f"el {number} de {month}", f"el día {number} de {month}"), day)


def hour(minutes: int) -> Hour:
    """The hour that many minutes after midnight, between 8:00 and 23:30."""
    whole, rest = divmod(minutes, 60)
    short = whole - 12 if whole > 12 else whole
    part = "de la mañana" if whole < 12 else "del mediodía" if whole == 12 else "de la tarde" if whole < 20 else "de la noche"
    suffix = "am" if whole < 12 else "pm"
    to_long, to_short = f"a las {whole}", ("a la 1" if short == 1 else f"a las {short}")
    if rest:
        tail = {15: " y cuarto", 30: " y media", 45: " y 45"}[rest]
        said = (
            f"{to_long}:{rest}",
            f"{to_long}:{rest}",
            f"{to_long}.{rest}",
            f"{to_short}{tail} {part}",
            f"{to_short}:{rest} {suffix}",
            f"{to_long}:{rest} hs",
        )
    else:
        said = (
            f"{to_long}:00",
            f"{to_long}",
            f"{to_short} {part}",
            f"{to_short} {part}",
            f"{to_short} {suffix}",
            f"{to_long} hs",
        )
    return Hour(f"{whole}:{rest:02d}", said, minutes)


def pick_hour(rng: random.Random, opens: int, closes: int, step: int = 30) -> Hour:
    """An hour within a range of minutes after midnight; whole hours are likelier."""
    minutes = rng.randrange(opens, closes + 1, step)
    if rng.random() < 0.5 and minutes - minutes % 60 >= opens:
        minutes -= minutes % 60
    return hour(minutes)


def other_hours(rng: random.Random, taken: Hour, opens: int, closes: int, count: int = 2) -> list[Hour]:
    """Free hours near a taken one, in order."""
    near = [m for m in range(opens, closes + 1, 30) if m != taken.minutes and abs(m - taken.minutes) <= 180]
    return [hour(m) for m in sorted(rng.sample(near, count))]
