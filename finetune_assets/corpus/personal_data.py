"""Personal data and secrets in texts: recognisers with check digits, typed placeholders, keyed hashes for ids.

`scrub_conversation(["Mi correo es ana@example.org"])` gives `["Mi correo es [EMAIL]"]` and the count per kind. `needs_look`
tells, for a whole column at once, which texts can hold anything: only their conversations have to pass through Python.
Not found: names that nobody introduces or asks for, street addresses, numbers in words. A report may never say "zero personal
data".
"""

from __future__ import annotations

import hmac
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import compress
from typing import NamedTuple

import polars as pl

from finetune_assets.corpus import presidio
from finetune_assets.corpus.names import (
    ASK_NAME,
    ASK_SIGN,
    LABEL,
    STRONG_INTRO,
    WEAK_INTRO,
    answered_name,
    asks_name,
    find_names,
    fold,
    name_patterns,
)
from finetune_assets.corpus.phones import find_phones, has_phone
from finetune_assets.corpus.recognisers import (
    END,
    FIVE_DIGITS,
    ID_WORD,
    KEY_PREFIX,
    SECRET_SIGNS,
    SECRET_WORD,
    START,
    Span,
    find_cards,
    find_emails,
    find_ibans,
    find_ips,
    find_national_ids,
    find_secrets,
    find_urls,
)

DEFAULT_REGIONS: tuple[str, ...] = ("ES", "MX", "AR", "BO", "CL", "US")
KINDS: tuple[str, ...] = ("url", "secret", "email", "iban", "credit_card", "national_id", "ip", "phone", "name")
MAX_SPREAD = 300  # patterns carried to the other texts of one conversation; later values are replaced where they are recognised
MAX_PASSES = 20  # a replaced value may bring a context word nearer to another number: scan again until nothing is found


class Find(NamedTuple):
    """One value that a recogniser knows, with its place in the text."""

    kind: str
    start: int
    end: int
    value: str


_NUMBERS = frozenset(("iban", "credit_card", "national_id", "phone"))
"""Kinds that need five digits in a row, or nearly."""
_KIND = "|".join(kind.upper() for kind in KINDS)
_PLACEHOLDER = re.compile(rf"\[({_KIND})(?:_(\d{{1,6}}))?\]")
_PLACEHOLDER_SPLIT = re.compile(rf"(\[(?:{_KIND})(?:_\d{{1,6}})?\])")

# Written for Python's re and for Polars (Rust) alike: no look-around, only what some recogniser needs.
_FIND_LOOK = (
    r"(?i)[@=]|arroba|://|bearer|-----begin|[0-9](?:[ \t\u00a0().,/\u2010-\u2013-]{0,4}[0-9]){6}|"
    r"[0-9]\.[0-9]{1,3}\.[0-9]|[0-9a-f]:[0-9a-f]{0,4}:|::[0-9a-f]|[a-zñ&]{4}[0-9]{6}[a-z0-9]{3}|[(\[]at[)\]]|"
    rf"(?:^|[^a-z0-9])(?-i:{KEY_PREFIX})|"
    rf"(?:^|[^a-z0-9])(?:{SECRET_WORD})(?:[ \t\u00a0]{{0,2}}(?:es|is|é|será|[:=])|[ \t\u00a0][^\s0-9]{{0,79}}[0-9])|"
    rf"{STRONG_INTRO}|"
    rf"(?:^|[^a-z0-9])(?:{ID_WORD})(?:[^0-9]{{0,3}}|[^0-9a-z][^0-9]{{0,40}})[0-9](?:[.-]?[0-9]){{4}}|"
    rf"(?:^|[^a-z0-9])(?:{WEAK_INTRO})[ \t\u00a0:]{{1,3}}(?:\w{{1,8}}\.?[ \t\u00a0]){{0,2}}(?-i:[^\W\d_a-zß-öø-ÿ])|"
    rf"(?:^|[^a-z0-9])(?:{LABEL})[ \t\u00a0]?:[ \t\u00a0:]{{0,3}}(?-i:[^\W\d_a-zß-öø-ÿ])|"
    r"(?:^|[^a-z0-9])(?:aqu[ií]|habla|this[ \t\u00a0]is)[ \t\u00a0]{1,3}(?-i:[^\W\d_a-zß-öø-ÿ])"
)
_ASK_LOOK = f"(?i){ASK_NAME}"  # the name that answers a question shows nothing by itself


def may_hold(series: pl.Series) -> pl.Series:
    """True where `find` may find something: a linear regular expression. Null texts give False."""
    if presidio.configured():  # a model may find a name anywhere
        return series.is_not_null()
    return series.str.contains(_FIND_LOOK).fill_null(False)


def may_ask(series: pl.Series) -> pl.Series:
    """True where a name is asked for, so that the next text may be one."""
    asks = series.str.contains(f"(?i){ASK_SIGN}").fill_null(False)
    signed = asks.arg_true()  # few, and the long pattern is slow
    return asks.scatter(signed, series.gather(signed).str.contains(_ASK_LOOK))


def needs_look(series: pl.Series) -> pl.Series:
    """True where either holds. Two expressions: one for both is too large for the engine's fast path, and 7 times slower."""
    return may_hold(series) | may_ask(series)


# --- the conversation


@lru_cache(maxsize=64)
def _recognisers(regions: tuple[str, ...]) -> tuple[tuple[str, Callable[[str], Iterator[Span]]], ...]:
    phones = partial(find_phones, regions=regions)
    numbers = (find_ibans, find_cards, find_national_ids, find_ips, phones)
    return tuple(zip(KINDS, (find_urls, find_secrets, find_emails, *numbers, find_names), strict=True))


def find(text: str, regions: Sequence[str] = DEFAULT_REGIONS) -> list[Find]:
    """What the recognisers know in a text, in text order and without overlap; the more certain kind (the order of KINDS) wins."""
    return list(found_in(text, tuple(regions)))


@lru_cache(maxsize=20_000)  # once its values are placeholders, one text is often equal to another
def found_in(text: str, regions: tuple[str, ...]) -> tuple[Find, ...]:
    """The same; the texts that were looked at last are remembered."""
    masked = _PLACEHOLDER.sub(lambda m: "\n" * len(m[0]), text) if "[" in text else text
    numbers = FIVE_DIGITS.search(masked) is not None
    found: list[Find] = []
    for kind, recogniser in _recognisers(regions):
        if kind in _NUMBERS and not numbers:
            continue
        spans = list(recogniser(masked))
        if not spans:
            continue
        if len(spans) > 1:
            spans.sort(key=lambda s: (s[0], -s[1]))
        starts, end = [f.start for f in found], 0
        for span in spans:
            at = bisect_left(starts, span[1])  # found before this kind: sorted, without overlap
            if span[0] >= end and (at == 0 or found[at - 1].end <= span[0]):
                found.append(Find(kind, span[0], span[1], text[slice(*span)]))
                end = span[1]
        found.sort(key=lambda f: f.start)
    if presidio.configured():
        others = [
            Find(kind, start, end, text[start:end]) for kind, start, end in presidio.find(masked) if "\n" not in masked[start:end]
        ]
        for other in sorted(others, key=lambda f: (KINDS.index(f.kind), f.start, -f.end)):
            if other.value.strip() and all(other.end <= one.start or one.end <= other.start for one in found):
                found.append(other)
        found.sort(key=lambda f: f.start)
    return tuple(found)


def residual(texts: Iterable[str], regions: Sequence[str] = DEFAULT_REGIONS, allow: frozenset[str] = frozenset()) -> Counter[str]:
    """How many values of which kind the recognisers still find in each text by itself, allow-listed ones aside."""
    return Counter(f.kind for text in texts for f in find(text, regions) if not _is_allowed(f, allow))


def _norm(kind: str, value: str) -> str:
    """The same for all writings of one value."""
    if kind in ("phone", "credit_card"):
        return "".join(filter(str.isdecimal, value))
    return re.sub(r"[\W_]", "", value).upper() if kind in ("iban", "national_id") else re.sub(r"\s+", " ", value).casefold()


def _same_number(a: str, b: str) -> bool:
    """With and without the country's prefix."""
    return min(len(a), len(b)) >= 7 and (a.endswith(b) or b.endswith(a))


def _is_allowed(found: Find, allow: frozenset[str]) -> bool:
    value = _norm(found.kind, found.value)
    if found.kind == "phone":
        return any(_same_number(value, _norm("phone", entry)) for entry in allow)
    return any(value == _norm(found.kind, entry) for entry in allow)


def _patterns(kind: str, value: str, norm: str) -> list[tuple[str, str]]:
    """What stands for a found value in the conversation's other texts, each with a sign: what such a text holds when folded."""
    if kind == "name":
        return name_patterns(value)
    if kind in _NUMBERS:
        sign = norm if norm.isdecimal() else fold(norm)
        return [(START + r"\+?\(?(?i:" + r"[ \t\u00a0()./-]{0,3}".join(norm) + ")" + END, sign)]
    return [(rf"{START}(?i:{re.escape(value)}){END}" if kind == "email" else rf"(?<!\w){re.escape(value)}(?!\w)", fold(value))]


class _Book:
    """Which value has which placeholder in one conversation."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.last: dict[str, int] = {}  # kind: number of its last placeholder
        self.known: dict[tuple[str, str], str] = {}
        self.patterns: dict[str, tuple[str, str]] = {}  # pattern: placeholder, sign
        for m in (m for text in texts if "[" in text for m in _PLACEHOLDER.finditer(text)):
            self.last[m[1].lower()] = max(self.last.get(m[1].lower(), 0), int(m[2] or 1))

    def placeholder(self, kind: str, value: str) -> str:
        norm = _norm(kind, value)
        known = self.known.get((kind, norm))
        if known is None:
            known = self.known[kind, norm] = self._kin(kind, norm) or self._next(kind)
            if len(self.patterns) < MAX_SPREAD:
                for pattern, sign in _patterns(kind, value, norm):
                    self.patterns.setdefault(pattern, (known, sign))
        return known

    def replaced(self, text: str, found: Iterable[Find], counts: Counter[str]) -> str:
        """The text with placeholders for what was found."""
        pieces: list[str] = []
        end = 0
        for f in found:
            pieces += (text[end : f.start], self.placeholder(f.kind, f.value))
            counts[f.kind] += 1
            end = f.end
        return "".join(pieces) + text[end:]

    def _next(self, kind: str) -> str:
        number = self.last[kind] = self.last.get(kind, 0) + 1
        return f"[{kind.upper()}]" if number == 1 else f"[{kind.upper()}_{number}]"

    def _kin(self, kind: str, value: str) -> str | None:
        """The same phone with a prefix; the same person by a part of the name."""
        for (other_kind, other), placeholder in self.known.items() if kind in ("phone", "name") else ():
            if other_kind != kind:
                continue
            a, b = set(value.split()), set(other.split())
            if _same_number(value, other) if kind == "phone" else (a <= b or b <= a):
                return placeholder
        return None

    def anywhere(self, texts: Iterable[str]) -> bool:
        """Whether any text may hold a known value."""
        said = "\0".join(texts)
        signs = [sign for _, sign in self.patterns.values() if all(c in said for c in sign if c.isdecimal())]
        folded = fold(said) if signs else ""  # which changes no digit
        return any(sign in folded for sign in signs)

    def spread(self, text: str, counts: Counter[str]) -> str:
        """Replace the known values where no recogniser sees them."""
        folded = fold(text)
        near = [(pattern, placeholder) for pattern, (placeholder, sign) in self.patterns.items() if sign in folded]
        for pattern, placeholder in sorted(near, key=lambda item: -len(item[0])):
            pieces = _PLACEHOLDER_SPLIT.split(text)
            for i in range(0, len(pieces), 2):  # odd pieces are placeholders
                pieces[i], n = re.subn(pattern, placeholder, pieces[i])
                if n:
                    counts[placeholder.strip("[]").rstrip("_0123456789").lower()] += n
            text = "".join(pieces)
        return text


def _answer(text: str) -> list[Find]:
    """A bare name, which only the question before it makes one."""
    span = answered_name(text)
    return [Find("name", *span, text[slice(*span)])] if span else []


def scrub_conversation(
    texts: Sequence[str],
    *,
    regions: Sequence[str] = DEFAULT_REGIONS,
    allow: frozenset[str] = frozenset(),
    looked: tuple[Sequence[bool], Sequence[bool]] | None = None,
) -> tuple[list[str], Counter[str]]:
    """One conversation's texts, in their order, with typed placeholders (one value, one placeholder); replacements per kind.

    `looked` is what `may_hold` and `may_ask` say of the texts, where somebody asked them for a whole column.
    """
    scrubbed, regions, book = list(texts), tuple(regions), _Book(texts)
    counts: Counter[str] = Counter()
    holds, asks = looked or ([True] * len(texts), [asks_name(text) for text in texts])
    asked = set(compress(range(1, len(texts)), asks))
    todo = sorted(asked.union(compress(range(len(texts)), holds)))
    for _ in range(MAX_PASSES):
        replaced: list[int] = []
        for i in todo:
            found = found_in(scrubbed[i], regions) or (_answer(scrubbed[i]) if i in asked else ())
            if allow:
                found = [f for f in found if not _is_allowed(f, allow)]
            if found:
                scrubbed[i] = book.replaced(scrubbed[i], found, counts)
                replaced.append(i)
        if not replaced:
            break
        todo = replaced
        if book.anywhere(scrubbed):
            before, scrubbed = scrubbed, [book.spread(text, counts) for text in scrubbed]
            todo = sorted({*replaced, *(i for i, text in enumerate(scrubbed) if text != before[i])})
    return scrubbed, counts


# --- ids

_PLAIN = (
    r"[pu]_[0-9a-f]{16}|[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|"
    r"(?:19|20)\d\d-?\d\d-?\d\d(?:[T _-].{0,24})?|\d{1,6}|\d{16,}"
)
_PLAIN_ID = re.compile(rf"{_PLAIN}|(?=.*[a-f])[0-9a-f]{{16,128}}", re.IGNORECASE)
_COUNTED_ID = re.compile(
    rf"(?!(?i:{ID_WORD}|[a-z]*(?:{'|'.join(SECRET_SIGNS)}))|(?:{KEY_PREFIX}))[A-Za-z]{{1,12}}(?:[_-]\d{{1,20}})+", re.ASCII
)
"""A word that says nothing, and counters: msg_007375_12345. It can hold a phone, a card or a RUT, and nothing else."""
_RUT_END = re.compile(r"\d{7}-\d(?!\d)")


def plain_ids(ids: pl.Series) -> pl.Series:
    """True for ids in which `scrub_id` looks for nothing or finds nothing, by their form alone; the others it has to see."""
    plain = ids.str.contains(rf"^(?i:{_PLAIN})$")
    rest = (~plain).arg_true()  # few, where a platform has UUIDs
    if rest.is_empty():
        return plain
    ids = ids.gather(rest)
    hexadecimal = ids.str.contains(r"^[0-9A-Fa-f]{0,128}$") & ids.str.contains(r"^.{16}") & ids.str.contains("[A-Fa-f]")
    looked = needs_look(ids) | needs_look(ids.str.replace_all("_", " ", literal=True)) | ids.str.contains(r"\d{8}")
    return plain.scatter(rest, hexadecimal | ~looked)


def keyed(prefix: str, value: str, key: bytes) -> str:
    """`prefix` and 16 hex digits of an HMAC."""
    return f"{prefix}_{hmac.digest(key, value.encode('utf-8', 'surrogatepass'), 'sha256').hex()[:16]}"


def scrub_id(value: str, key: bytes, regions: Sequence[str] = DEFAULT_REGIONS) -> str:
    """The id itself, or a keyed hash where it holds something personal (conv_+59170123456_x)."""
    return value if _PLAIN_ID.fullmatch(value) or not _holds(value, regions) else keyed("p", value, key)


def _holds(value: str, regions: Sequence[str]) -> bool:
    if has_phone(value, regions):
        return True
    spaced = value.replace("_", " ")
    if _COUNTED_ID.fullmatch(value) and not _RUT_END.search(value):
        each = (found for text in {value, spaced} for found in (find_phones(text, regions), find_cards(text)))
        return any(True for found in each for _ in found)
    return bool(find(value, regions) or find(spaced, regions))


def pseudonym(user_id: str, key: bytes) -> str:
    """The keyed hash that stands for a user."""
    return keyed("u", user_id, key)
