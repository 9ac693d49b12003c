"""Phone numbers in texts and ids: valid ones of the regions or with a country code, and any of a phone's size after "llámame"."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import pairwise

import phonenumbers

from finetune_assets.corpus.recognisers import GAP, SEVEN_DIGITS, Span, accepted, groups_of, small

MAX_PHONE_LOOKS = 2_000  # phone shapes checked per text (about 0.1 ms each); beyond it every shape counts as a phone
_DASH = r"\u2010-\u2013-"
_PHONE = re.compile(
    rf"(?<![^\W_])(?<![$€£#])\(?\+?\(?\d(?:[ \t\u00a0().\/{_DASH}]{{0,3}}\d){{6,18}}(?![^\W_])(?![:,]\d|{GAP}?[%€£$])", re.ASCII
)
_NOT_PHONE = re.compile(
    rf"\d{{4}}[{_DASH}./ ]\d{{1,2}}[{_DASH}./ ]\d{{1,2}}(?:[ T]\d.*)?|"
    rf"\d{{1,2}}[{_DASH}./ ]\d{{1,2}}[{_DASH}./ ](?:19|20)\d\d(?:\D.*)?|"  # dates
    r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:\d{4}|\d{6})?|"  # 20261025, 202610251030
    rf"\d{{1,2}}\.\d\d{GAP}?[{_DASH}]{GAP}?\d{{1,2}}\.\d\d|(?:(?:19|20)\d\d\D{{1,3}})+(?:19|20)\d\d|"  # opening hours, years
    rf"\d+00{GAP}?[{_DASH}]{GAP}?\d+00|\d{{1,2}}(?:\.\d{{3}})+|"
    rf"\d{{3}}(?:\.\d{{3}}){{3,}}|\d{{1,3}}\.\d{{4,}}|\d{{5}}-\d{{4}}|000.*"  # prices, decimals, ZIP+4
)
_HOUR = r"(?:[01]?\d|2[0-4])[.:h][0-5]\d"
_DAY = r"(?:0?[1-9]|[12]\d|3[01])[./-](?:0?[1-9]|1[0-2])"
_TIMES = re.compile(  # hours and days in a row: "9.30-13.30 / 16.30-20.30", "10.30 11.15", "01.11.-30.11.2026"
    rf"(?<![\d.+(/{_DASH}]){_HOUR}(?:{GAP}?[/aày,;{_DASH}]?{GAP}?{_HOUR})*(?![\d.]\d|[/-]\d)|"
    rf"(?<![\d.+(/{_DASH}]){_DAY}\.?(?:[./-](?:20)?\d\d)?{GAP}?[a{_DASH}]{GAP}?{_DAY}(?:\.?(?:[./-]?(?:20)?\d\d)|\.)?(?![\d.]\d|[/-]\d)"
)
_TIME_SIGN = re.compile(rf"\d(?<!\d\d)\d?[.:h/{_DASH}]\d")  # every such row; a digit first, which is found fast
# Of `small` texts, as all patterns with words here.
_MONEY = re.compile(
    rf"{GAP}?(?:pesos|bs|bolivianos|euros?|eur|usd|d[oó]lares|dollars|clp|mxn|ars|mil|millones|km|kg|mg|ml|puntos|points)\b"
)
_MARK = r"(?:n[uú]mero|number|nro\.?|n[º°.]|no\.|num\.?|#|c[oó]digo|code|id)"
_BOOKING = r"(?:reserva(?:ci[oó]n)?|cita|turno|reservation|appointment|booking|client[e]?|paciente|mesa|solicitud|agendamento)"
_ORDER_WORD = re.compile(
    r"(?:\b(?:pedido|orden(?: de (?:trabajo|compra|servicio))?|order|"
    r"factura|invoice|boleta|ref(?:erencia|erence)?|booking|confirmation|confirmaci[oó]n|ticket|"
    r"tracking|seguimiento|c[oó]digo|code|folio|expediente|p[oó]liza|policy|lote|serie|serial|sku|isbn|"
    r"caso|case|cuenta|account|zip|cp|postal|ficha|historia(?: cl[ií]nica)?|hc|socio|afiliado|presupuesto|albar[aá]n|recibo|"
    r"comprobante|operaci[oó]n|transacci[oó]n|transferencia|localizador|protocolo)\b|"
    rf"{_MARK}\W{{0,2}}(?:d[aeo] |of )?(?:la |tu |mi |su |your |the |a |o )?{_BOOKING}\b|"
    rf"\b{_BOOKING}\W{{0,2}}{_MARK})\W{{0,3}}"
    r"(?:(?:n[uú]mero|number|nro|no|num|id|es|is|de|n[º°]|was|fue|[ée])\b\W{0,3}){0,3}$"
)
_PHONE_WORD = re.compile(
    r"\b(?:tel|tel[eé]fono|cel|celular|m[oó]vil|fono|fone|whats?app|wasap|wsp|contacto|"
    r"n[uú]mero|(?:ll[aá]m|m[aá]rc|escr[ií]b)\w{1,6}|phone|number|mobile|cell|call|text|reach|ring|dial|ligue|telefone)\b[^\d\n]{0,20}$"
)

_CARD_SHAPE = re.compile(r"\d{4}(?:[ -]\d{4}){3}")
_GLUED = re.compile(r"\d[.,:/-]$")
_DIGITS, _GROUP, _BRACKETED = re.compile(r"\d+"), re.compile(r"\+?\d+"), re.compile(r"(?:\(?\+)?\(?\d+\)?")


@cache
def _sizes(region: str) -> tuple[str, str | None, frozenset[int]]:
    """Country code, the pattern of what may stand before a national number, and how many digits one has."""
    code = phonenumbers.country_code_for_region(region)
    rules = [phonenumbers.PhoneMetadata.metadata_for_region(each) for each in phonenumbers.region_codes_for_country_code(code)]
    own = phonenumbers.PhoneMetadata.metadata_for_region(region)
    sizes = frozenset(size for each in rules if each and each.general_desc for size in each.general_desc.possible_length)
    return str(code), own.national_prefix_for_parsing if own else None, sizes


@lru_cache(maxsize=50_000)
def _valid_phone(digits: str, region: str | None) -> bool:
    if region is not None:
        code, prefix, sizes = _sizes(region)
        prefixed = not digits.isascii() or digits[0] in "01" or digits.startswith(code) or (prefix and re.match(prefix, digits))
        if not prefixed:  # neither of one's country nor of a call abroad: parsing would find nothing to take off
            return len(digits) in sizes and phonenumbers.is_valid_number(phonenumbers.PhoneNumber(int(code), int(digits)))
    try:
        number = phonenumbers.parse(digits, region)
    except phonenumbers.NumberParseException:
        return False
    if region is None and phonenumbers.is_possible_number_with_reason(number) == phonenumbers.ValidationResult.IS_POSSIBLE:
        return len(str(number.national_number)) >= 6
    return phonenumbers.is_valid_number(number)


def _counts(groups: list[str]) -> bool:
    """Numbers that go up or down by one three times in a row: teeth, tables, days."""
    steps = [int(b) - int(a) for a, b in pairwise(groups)]
    return any(abs(a) == 1 and a == b == c for a, b, c in zip(steps, steps[1:], steps[2:], strict=False))


def _is_phone(text: str, span: Span, worded: bool, regions: Sequence[str]) -> bool:
    shape = text[slice(*span)].strip()
    digits = "".join(filter(str.isdecimal, shape))
    if len(digits) < 7 or len(set(digits)) == 1 or ("+" not in shape and _NOT_PHONE.fullmatch(shape.lstrip("("))):
        return False
    if digits.startswith("521") and len(digits) == 13:  # Mexican mobiles lost their 1 in 2019, people still write it
        digits = "52" + digits[3:]
    if shape.startswith(("+", "(+")) or (digits.startswith("00") and not digits.startswith("000")):
        return _valid_phone("+" + digits.removeprefix("00"), None)
    groups = _DIGITS.findall(shape)
    sizes = [len(g) for g in groups]
    spelt = worded and set(sizes) == {1} and 8 <= len(sizes) <= 11
    counted = not worded and max(sizes) <= 2 and _counts(groups)
    if spelt or counted or sizes.count(1) > 1 or (len(sizes) > 1 and sizes[-1] == 1):
        return spelt
    if worded and len(digits) <= 15 and (len(sizes) == 1 or max(sizes[1:]) <= 8):
        return True
    return any(_valid_phone(digits, region) for region in regions)


def find_phones(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Valid numbers of the regions or with a country code; after a word such as "llámame" any number of a phone's size."""
    digits = SEVEN_DIGITS.search(text)
    if not digits:
        return
    if _TIME_SIGN.search(text):
        text = _TIMES.sub(lambda m: "\n" * len(m[0]), text)
    low = small(text)
    for seen, m in enumerate(_PHONE.finditer(text, max(0, digits.start() - 3))):  # up to three signs stand before
        before = low[max(0, m.start() - 40) : m.start()]
        international = "+" in m[0][:2]
        if _CARD_SHAPE.fullmatch(m[0]):  # a card's shape with a wrong check digit
            continue
        if not international and (_GLUED.search(before) or _MONEY.match(low, m.end()) or _ORDER_WORD.search(before)):
            continue
        groups = groups_of(_BRACKETED if "(" in m[0] else _GROUP, text, m.span())
        worded = _PHONE_WORD.search(before) is not None
        if seen >= MAX_PHONE_LOOKS:
            yield m.span()
            continue
        first = groups[0][0] if worded else -1
        yield from accepted(groups, lambda span, first=first: _is_phone(text, span, span[0] == first, regions))


def has_phone(identifier: str, regions: Sequence[str]) -> bool:
    """A valid phone glued to the letters of an id (conv_59170123456_x), but no part of a UUID or of a hexadecimal hash."""
    digits = [m[0] for m in re.finditer(r"(?<!\d)\d{8,15}(?!\d)", identifier) if not _NOT_PHONE.fullmatch(m[0])]
    hexadecimal = re.search(r"(?i)[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|(?=[0-9]*[a-f])[0-9a-f]{16,}", identifier)
    if not hexadecimal and any(_valid_phone(d, region) for d in digits for region in regions):
        return True
    return any(_valid_phone("+" + d, None) for d in digits if len(d) > 10)
