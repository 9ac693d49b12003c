"""What a reply states, and whether the conversation supports it: hours, days, numbers of people, amounts, codes, names, terms.

A model can be fluent and confirm another hour than the one asked for, which no likeness to a reference shows. So the facts of a
reply are looked up in what was said before it, the system message, the retrieved passages. One writing of a fact is as good as
another: "a las 5 de la tarde" is 17:00, "viernes 13" is a Friday and a 13th. Spanish, English and Portuguese.

The idea is slot accuracy of task-oriented dialogue (Budzianowski et al. 2018, MultiWOZ, "inform") and entity-level grounding
(Nan et al. 2021, arXiv:2102.09130), by rules instead of annotations. Not found: relative days, quantities in other units, facts
told in other words ("the same time as last week").
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Fact = tuple[str, str]
"""(kind, value): hour "17:00" or "5:00?" (half of the day unknown), weekday "4", day "13", month "8", people, amount, code,
name, placeholder, term."""

_DAYS = ["lunes", "martes", "miercoles", "jueves", "viernes", "sabado", "domingo"]
_DAYS_EN = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
_DAYS_PT = ["segunda-feira", "terca-feira", "quarta-feira", "quinta-feira", "sexta-feira"]
_WEEKDAY = {name: n for names in (_DAYS, _DAYS_EN, _DAYS_PT) for n, name in enumerate(names)}
_MONTHS = (
    "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
    "january february march april may june july august september october november december",
    "janeiro fevereiro marco abril maio junho julho agosto setembro outubro novembro dezembro",
)
_MONTH = {name: n + 1 for names in _MONTHS for n, name in enumerate(names.split())} | {"setiembre": 9}
_NUMBERS = (
    "cero un dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciseis",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen",
    "zero um dois tres quatro cinco seis sete oito nove dez onze doze treze catorze quinze dezesseis",
)
_ALSO = {"una": 1, "uno": 1, "uma": 1, "duas": 2, "couple": 2}
_NUMBER = {name: n for names in _NUMBERS for n, name in enumerate(names.split())} | _ALSO
_WORD = "|".join(sorted(_NUMBER, key=len, reverse=True))
_N = rf"(?:\d{{1,2}}|{_WORD})"

_PLACEHOLDER = re.compile(r"\[[A-Z_]{2,}(?:_\d+)?\]")
_AMOUNT = re.compile(
    r"(?:[$€£]|us\$|\bbs\.?)\s*(\d[\d.,]*\d|\d)|(\d[\d.,]*\d|\d)\s*(?:[$€£]|bs\b|euros?\b|pesos?\b|bolivianos?\b|dol+ar(?:es|s)?\b|reais\b)"
)
_TIME_OF_DAY = r"(?:manana|tarde|noche|manha|noite|morning|afternoon|evening|night)"
_HALF = rf"(?P<half>\s*(?:[ap]\.?\s?m\b\.?|(?:de|por|da|in|at)\s+(?:la\s+|the\s+)?{_TIME_OF_DAY}))?"
_CLOCK = re.compile(rf"(?<![\d.,/-])(?P<h>[01]?\d|2[0-4])\s?[:.h]\s?(?P<m>[0-5]\d)(?![\d.,:/-]\d|\d)\s*(?:hs?\b|horas\b)?{_HALF}")
_SPOKEN = re.compile(
    rf"(?:\ba\s+las?\b|\blas?\b(?=\s+{_N}\s+(?:y\b|menos\b|de\s+la\b|en\s+punto))|\bas\b|\bat\b|\baround\b|\bsobre\s+las?\b|"
    rf"\bdesde\s+las?\b|\bhasta\s+las?\b)\s+(?P<h>{_N})\b(?!\s*(?:personas|pessoas|people|[:.,/]\d))"
    rf"(?P<q>\s+(?:y|e|menos)\s+(?:media|meia|cuarto|quarto|cuarenta y cinco|{_N})\b)?"
    rf"\s*(?:hs?\b|horas?\b|o'clock\b|en punto\b)?{_HALF}"
)
_HOURS = re.compile(
    rf"(?<![\d.,:/-])(?<!\ben )(?<!\bin )(?<!\bde )(?P<h>{_N})\s*(?:hs\b|h\b|horas\b(?!\s+antes)|o'clock\b){_HALF}"
)
_PAST = re.compile(rf"\b(?P<part>half|quarter) (?P<way>past|to) (?P<h>{_N})\b{_HALF}")
_MERIDIAN = re.compile(
    r"(?<![\d.,:/-])(?P<h>\d{1,2})(?P<half>\s*(?:[ap]\.?\s?m\b\.?|de la (?:tarde|noche|manana)|da (?:tarde|noite|manha)))"
)
_QUARTER = {"media": 30, "meia": 30, "cuarto": 15, "quarto": 15, "cuarenta y cinco": 45}
_SLASHED = re.compile(r"(?<![\d/])(\d{1,2})/(\d{1,2})(?:/\d{2,4})?(?![\d/])")
_MONTH_WORD = "|".join(_MONTH)
_DATE = re.compile(rf"\b(?P<d>\d{{1,2}}|primero)(?:st|nd|rd|th)?\s+(?:de\s+|of\s+)?(?P<m>{_MONTH_WORD})\b")
_DATE_EN = re.compile(rf"\b(?P<m>{'|'.join(_MONTHS[1].split())})\s+(?P<d>\d{{1,2}})(?:st|nd|rd|th)?\b")
_WEEKDAY_WORD = re.compile(
    rf"\b(?P<w>{'|'.join(sorted(_WEEKDAY, key=len, reverse=True))})\b"
    rf"(?:,?\s+(?:dia\s+|the\s+|el\s+)?(?P<d>\d{{1,2}})\b(?!\s*[:.h]\d|\s*personas))?"
)
_DAY = re.compile(r"\b(?:dia|el|del|al|the)\s+(\d{1,2})(?:st|nd|rd|th)?\b(?!\s*(?:%|[:.,/]\d|personas|de la\b))")
_PEOPLE = re.compile(rf"\b({_N})\s+(?:personas?|pessoas?|people|persons?|guests?|comensales|adultos|lugares|cubiertos)\b")
_CODE = re.compile(r"\b(?=[\w-]*\d)(?=[\w-]*[a-z])[a-z]{1,4}-?\d{2,6}\b|(?<![\d.,])\d{3,}(?:[ .-]?\d{2,})*(?![\d%])")
_CAPITAL = "[A-ZÁÉÍÓÚÑ][a-záéíóúñüçãõâêô]{2,}"
_NAME = re.compile(rf"(?<=[a-záéíóúñüçãõâêô,;)] )(?:{_CAPITAL})(?:\s+(?:de\s+|del\s+|la\s+)?{_CAPITAL})*")
_BARE = re.compile(rf"\b({_N})\b")
_MARKS = re.compile("[\u0300-\u036f]+")
LONGEST = 4_000  # characters of a text that are read


@dataclass(frozen=True)
class Judged:
    """How a reply stands to what was said before it."""

    stated: int
    """Facts in the reply."""
    unsupported: tuple[Fact, ...]
    """Those that are found nowhere."""
    answerable: bool
    """Whether there is a reference that states nothing but what was said: then the right reply needs no other knowledge."""
    expected: int
    """Facts that the reference takes from the conversation."""
    repeated: int
    """How many of them the reply states too."""

    @property
    def faithful(self) -> bool | None:
        """Null where there is no reference, or it goes beyond the conversation, or neither it nor the reply states anything."""
        return not self.unsupported if self.answerable and (self.stated or self.expected) else None


def judge(reply: str, reference: str, said: Sequence[str], terms: Sequence[str] = ()) -> Judged:
    """`said`: system message, turns and retrieved passages before the reply; `terms`: see `facts`."""
    context = support(said, terms)
    expected = facts(reference, terms)
    from_context = [fact for fact in expected if context.has(fact)]
    answerable = bool(reference.strip()) and len(from_context) == len(expected)
    stated = facts(reply, terms)
    wider = support([*said, reference], terms)
    mine = support([reply], terms)
    missing = tuple(sorted(fact for fact in stated if not wider.has(fact)))
    return Judged(len(stated), missing, answerable, len(from_context), sum(mine.has(fact) for fact in from_context))


def facts(text: str, terms: Sequence[str] = ()) -> frozenset[Fact]:
    """Everything a text states. `terms`: regular expressions, each naming one thing (a service, a dish) in all its writings."""
    return _facts(text[:LONGEST], tuple(terms))


@dataclass(frozen=True)
class Support:
    """What may be stated."""

    known: frozenset[Fact]
    numbers: frozenset[str]
    words: frozenset[str]

    def has(self, fact: Fact) -> bool:
        """An hour of unknown half of the day fits both; a number of people may have been said alone; a name in any case."""
        kind, value = fact
        if kind == "hour":
            other = value[:-1] if value.endswith("?") else f"{_mod(value)}?"
            return (
                fact in self.known or (kind, other) in self.known or (value.endswith("?") and (kind, _later(other)) in self.known)
            )
        if kind in ("people", "amount", "code", "day"):
            return fact in self.known or value in self.numbers
        if kind == "name":
            return all(word in self.words for word in value.split())
        return fact in self.known


def shown(fact: Fact) -> str:
    """A fact as a reader may be told it: `17:00`, `friday`, `[NAME]`."""
    kind, value = fact
    if kind == "hour":
        hour, minute = value.rstrip("?").split(":")
        return f"{12 if value.endswith('?') and hour == '0' else hour}:{minute}"
    return _DAYS[int(value)] if kind == "weekday" else value


def support(said: Sequence[str], terms: Sequence[str] = ()) -> Support:
    """What a conversation supports."""
    each = [_support(text[:LONGEST], tuple(terms)) for text in said]
    nothing = frozenset[Any]()
    return Support(
        nothing.union(*(one.known for one in each)),
        nothing.union(*(one.numbers for one in each)),
        nothing.union(*(one.words for one in each)),
    )


@lru_cache(maxsize=65_536)
def _support(text: str, terms: tuple[str, ...]) -> Support:
    known, plain = _facts(text, terms), _plain(text)
    numbers = {str(_NUMBER.get(found, found)) for found in _BARE.findall(plain)}
    digits = {re.sub(r"\D", "", found) for found in re.findall(r"\d[\d.,-]*", plain)}
    names = {word for kind, value in known if kind == "name" for word in value.split()}
    return Support(known, frozenset(numbers | digits), frozenset(names | set(re.findall(r"\w+", plain))))


@lru_cache(maxsize=65_536)
def _facts(text: str, terms: tuple[str, ...]) -> frozenset[Fact]:
    found: set[Fact] = {("placeholder", placeholder) for placeholder in _PLACEHOLDER.findall(text)}
    text = _PLACEHOLDER.sub(" ", text)
    found |= {("name", _plain(name)) for name in _NAME.findall(text) if not _is_calendar(_plain(name))}
    rest = _plain(text)
    for number, pattern in enumerate(terms):
        if re.search(pattern, text, re.IGNORECASE):
            found.add(("term", f"{number}"))
    rest = _take(_AMOUNT, rest, lambda m: found.add(("amount", re.sub(r"\D", "", m[1] or m[2]))))
    for pattern in (_DATE, _DATE_EN):
        rest = _take(pattern, rest, lambda m: found.update({("day", _count(m["d"])), ("month", str(_MONTH[m["m"]]))}))
    rest = _take(_SLASHED, rest, lambda m: found.update({("day", str(int(m[1]))), ("month", str(int(m[2])))}))
    rest = _take(_PAST, rest, lambda m: found.update(_hour({**m.groupdict(), "q": _past(m["part"], m["way"])})))
    for pattern in (_CLOCK, _SPOKEN, _HOURS, _MERIDIAN):
        rest = _take(pattern, rest, lambda m: found.update(_hour(m.groupdict())))
    rest = _take(_PEOPLE, rest, lambda m: found.add(("people", _count(m[1]))))

    def weekday(match: re.Match[str]) -> None:
        found.add(("weekday", str(_WEEKDAY[match["w"]])))
        if match["d"]:
            found.add(("day", str(int(match["d"]))))

    rest = _take(_WEEKDAY_WORD, rest, weekday)
    rest = _take(_DAY, rest, lambda m: found.add(("day", str(int(m[1])))) if 1 <= int(m[1]) <= 31 else None)
    _take(_CODE, rest, lambda m: found.add(("code", re.sub(r"[^a-z\d]", "", m[0]))))
    return frozenset(found)


def _take(pattern: re.Pattern[str], text: str, keep: Callable[[re.Match[str]], object]) -> str:
    """Gives each match to `keep`, and blanks it, so that no later pattern reads it again."""

    def one(match: re.Match[str]) -> str:
        keep(match)
        return " " * len(match[0])

    return pattern.sub(one, text)


def _hour(groups: dict[str, str | None]) -> set[Fact]:
    hour, minute = int(_count(groups["h"] or "")), 0
    if groups.get("m"):
        minute = int(groups["m"] or 0)
    if groups.get("q"):
        sign, _, rest = (groups["q"] or "").strip().partition(" ")
        part = _QUARTER.get(rest.strip()) or int(_count(rest.strip()))
        hour, minute = (hour, part) if sign != "menos" else ((hour - 1) % 24, 60 - part)
    if hour > 24:
        return set()
    half = re.sub(r"[\s.]", "", groups.get("half") or "")
    if hour > 12 or hour == 0:
        return {("hour", f"{hour % 24}:{minute:02d}")}
    if half:
        late = half.startswith("p") or any(word in half for word in ("tarde", "noche", "noite", "afternoon", "evening", "night"))
        if half.startswith("por") and "manana" in half:
            late = False
        return {("hour", f"{(hour % 12) + 12 * late}:{minute:02d}")}
    return {("hour", f"{hour % 12}:{minute:02d}?")}


def _past(part: str, way: str) -> str:
    return f"{'menos' if way == 'to' else 'y'} {'media' if part == 'half' else 'cuarto'}"


def _mod(value: str) -> str:
    hour, minute = value.split(":")
    return f"{int(hour) % 12}:{minute}"


def _later(value: str) -> str:
    hour, minute = value.split(":")
    return f"{int(hour) + 12}:{minute}"


def _count(text: str) -> str:
    return str(_NUMBER.get(text, 1 if text == "primero" else int(text) if text.isdigit() else 0))


def _is_calendar(name: str) -> bool:
    return any(word in _WEEKDAY or word in _MONTH for word in name.split())


def _plain(text: str) -> str:
    """Lower case without accents."""
    text = text.lower()
    return text if text.isascii() else _MARKS.sub("", unicodedata.normalize("NFD", text))
