"""Pattern recognisers: keys, links, addresses of mail and machines, numbers with check digits. Others: `phones`, `names`.

Each takes a text and yields spans (start, end). `personal_data.find` runs them all and settles which kind wins.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from functools import partial

from stdnum import iban as iban_number
from stdnum import luhn
from stdnum.ar import cuit
from stdnum.br import cnpj, cpf
from stdnum.cl import rut
from stdnum.es import dni, nie
from stdnum.mx import curp, rfc

Span = tuple[int, int]
START, END = r"(?<![^\W_])", r"(?![^\W_])"  # no letter or digit before, after (an underscore may be there)
GAP = r"[ \t\u00a0]"  # placeholders are masked as newlines, so no pattern may bridge one
_I = re.IGNORECASE


def small(text: str) -> str:
    """The text in small letters, each in its place, so that a pattern in small letters matches as it would with IGNORECASE:
    two to four times faster, since Python's engine skips alternatives by their first character only where no case is folded."""
    low = text.lower()
    if len(low) != len(text):
        low = "".join("i" if letter == "İ" else letter.lower() for letter in text)
    return low.replace("ı", "i").replace("ſ", "s")


# Plain alternatives, for the pre-filter too: no look-around.
SECRET_WORD = (
    r"api[ _-]?key|access[ _-]?key|token|secret|clave(?: api)?|contraseña|contrasena|password|passwd|passcode|pwd|pass|senha|pin"
)
ID_WORD = (
    r"d\.?n\.?i|c\.?i|carn[eé]t?|c[eé]dula|cuit|cuil|documento|identificaci[oó]n|pasaporte|passaporte|passport|rut|run|nif|nie|ssn|cpf|"
    r"cnpj|rfc|ine|rg"
)
KEY_PREFIX = (
    r"sk[-_]|rk[-_]|gh[pousr]_|github_pat_|glpat-|hf_|AKIA|ASIA|xox[abeprs]-|xapp-|AIza|eyJ|npm_|pypi-|SG\.|shp(?:at|ss|ca|pa)_|"
    r"dop_v1_|ya29\."
)

# --- keys, links, addresses

_KEYS = re.compile(
    rf"{START}(?:(?:sk|rk)[-_][A-Za-z0-9_-]{{16,400}}|gh[pousr]_[A-Za-z0-9]{{16,255}}|"
    r"github_pat_\w{20,255}|glpat-[\w-]{16,64}|hf_[A-Za-z0-9]{20,64}|"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}|xox[abeprs]-[A-Za-z0-9-]{10,255}|xapp-[A-Za-z0-9-]{10,255}|AIza[\w-]{30,45}|"
    r"npm_[A-Za-z0-9]{30,64}|pypi-[\w-]{16,255}|SG\.[\w-]{16,64}\.[\w-]{16,64}|shp(?:at|ss|ca|pa)_[A-Fa-f0-9]{24,64}|"
    r"dop_v1_[a-f0-9]{32,128}|ya29\.[\w-]{20,400}|"
    r"eyJ[\w-]{8,4000}\.[\w-]{8,8000}(?:\.[\w-]{0,2000})?)"
)
_PEM = re.compile(r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[^-]{0,20000}(?:-----END [A-Z ]{0,30}PRIVATE KEY-----)?")
_BEARER = re.compile(rf"{START}bearer{GAP}{{1,3}}([A-Za-z0-9._~+/-]{{12,8000}}=*)", _I)
_WORDED = re.compile(
    rf"{START}({SECRET_WORD}){GAP}{{0,2}}(?:(?:es|is|é|será)\b|[:=])(?:{GAP}{{0,2}}[:=])?{GAP}{{0,2}}"
    r"(?:([\"'“`])([^\"'”`\n]{4,80})[\"'”`]|[\"'“`]?([^\s\"'”`<>,;]{4,400}))",
    _I,
)
_BESIDE = re.compile(rf"{START}(?:clave|contraseña|contrasena|password|passwd|pwd|senha){GAP}([^\s<>,;]{{6,80}})", _I)
_LINK = re.compile(r"(?<![^\s<>\"'(\[])[^\s<>\"'(\[\]]+")
_LINK_SECRET = re.compile(
    r"[?&#;][\w.-]{0,40}(?:token|key|sig|signature|auth|secret|passw|pwd|session|sid|jwt|otp|credential)"
    r"[\w-]{0,40}=[^&\s]{4}|://[^/\s:@]{1,200}:[^/\s@]{1,200}@|"
    r"//hooks\.slack\.com/services/\w|//(?:\w+\.)?discord(?:app)?\.com/api/webhooks/\d|//api\.telegram\.org/bot\d",
    _I,
)
_AT = rf"(?:{GAP}?@{GAP}?|{GAP}arroba{GAP}|{GAP}?[(\[]{GAP}?(?:arroba|at){GAP}?[)\]]{GAP}?)"
_DOT = (
    rf"(?:\.|{GAP}punto{GAP}|{GAP}?[(\[]{GAP}?(?:punto|dot){GAP}?[)\]]{GAP}?|{GAP}\.(?=(?:com|es|org|net|mx|cl|ar|bo|br|pt)\b))"
)
_EMAIL = re.compile(
    rf"{START}(?:\w[\w.+%'-]{{0,63}}{GAP}(?:punto|gui[oó]n(?:{GAP}bajo)?|underscore){GAP}){{0,3}}\w[\w.+%'-]{{0,63}}{_AT}"
    rf"(?:(?:(?!\d+\.\d)[^\W_][\w-]{{0,62}}{_DOT}){{1,5}}[^\W\d_]{{2,24}}|"
    rf"(?:gmail|hotmail|outlook|yahoo|icloud|protonmail)){END}",
    _I,
)
_IPV4 = re.compile(r"(?<![\w.,])(?:\d{1,3}\.){3}\d{1,3}(?!\w|[.,]\d)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")


def _looks_secret(word: str, quoted: bool, value: str) -> bool:
    """A value after a key word: never an ordinary word ("la clave es reservar", "el token es necesario")."""
    digits = sum(c.isdigit() for c in value)
    if re.fullmatch(r"(?i)api.?key|access.?key|token|secret|clave api", word):
        return len(value) >= 8 and digits > 0
    odd = any(c in "!#$%&*_+=^~|\\@" for c in value) and any(c.isalpha() for c in value)
    return digits > 0 or odd or quoted


# Cheap signs without which a recogniser finds nothing: most texts show none.
SECRET_SIGNS = ("key", "token", "secret", "clave", "contrase", "pass", "pwd", "senha", "pin", "bearer", "-----begin")
_KEY_SIGN = re.compile(KEY_PREFIX)
FIVE_DIGITS = re.compile(r"\d(?:[()./ \t\u00a0\u2010-\u2013-]{0,3}\d){4}", re.ASCII)
SEVEN_DIGITS = re.compile(r"\d(?:[ \t\u00a0().\/\u2010-\u2013-]{0,3}\d){6}", re.ASCII)
_THIRTEEN_DIGITS = re.compile(r"\d(?<!\d\d)(?:[ .-]?\d){12}", re.ASCII)  # every card
_TWO_LETTERS_TWO_DIGITS = re.compile(r"\d(?<=[A-Za-z]{2}\d)\d", re.ASCII)  # every IBAN; a digit first, which is found fast
_CHECKED = re.compile(r"\d(?:\d{5}|\.\d{3}\.\d{3})")  # every id with check digits: six digits together, or groups with points


def find_secrets(text: str) -> Iterator[Span]:
    """Private keys, access keys by their issuers' prefixes, bearer tokens, and values after a word such as "contraseña"."""
    key = _KEY_SIGN.search(text)
    if key:
        yield from (m.span() for m in _KEYS.finditer(text, key.start()))
    low = text.casefold()
    if not any(map(low.__contains__, SECRET_SIGNS)):
        return
    yield from (m.span() for m in _PEM.finditer(text))
    yield from (m.span(1) for m in _BEARER.finditer(text) if any(c.isdigit() for c in m[1]))
    for m in _WORDED.finditer(text):
        group = 3 if m[2] else 4
        value = m[group].rstrip(".!?:)]}")
        if len(value) >= 4 and _looks_secret(m[1], bool(m[2]), value):
            yield m.start(group), m.start(group) + len(value) + int(m[group].startswith("!", len(value)))
    for m in _BESIDE.finditer(text):
        value = m[1].rstrip(".!?:)]}")
        if any(c.isdigit() for c in value) and any(c.isalpha() for c in value):
            yield m.start(1), m.start(1) + len(value) + int(m[1].startswith("!", len(value)))


def find_urls(text: str) -> Iterator[Span]:
    """Links that carry a secret (`?token=`, `user:password@`); others stay."""
    for m in _LINK.finditer(text) if "=" in text or "://" in text else ():
        value = m[0].rstrip(".,;:!?)}")
        if "." in value and _LINK_SECRET.search(value):
            yield m.start(), m.start() + len(value)


def find_emails(text: str) -> Iterator[Span]:
    """Also "ana arroba correo punto org"."""
    low = text.casefold()
    if "@" in text or "arroba" in low or "(at)" in low or "[at]" in low:
        yield from (m.span() for m in _EMAIL.finditer(text))


def find_ips(text: str) -> Iterator[Span]:
    """Addresses, but neither versions (v1.2.3.4) nor times."""
    for m in _IPV4.finditer(text) if text.count(".") > 2 else ():
        octets = m[0].split(".")
        before = text[max(0, m.start() - 12) : m.start()].casefold()
        version = re.search(r"\bv(?:er(?:si[oó]n)?)?\.? ?$", before) or (all(len(o) == 1 for o in octets) and "ip" not in before)
        padded = any(len(o) > 1 and o[0] == "0" for o in octets)  # 1.000.000.000
        if not version and not padded and all(int(o) < 256 for o in octets):
            yield m.span()
    for m in _IPV6.finditer(text) if text.count(":") > 1 else ():
        groups = [g for g in m[0].split(":") if g]
        if len(groups) == 8 or ("::" in m[0] and len(groups) >= 2 and (len(groups) > 3 or re.search("[a-fA-F]", m[0]))):
            try:
                ipaddress.IPv6Address(m[0])
            except ValueError:
                continue
            yield m.span()


# --- numbers with check digits

_WORD, _DIGITS = re.compile(r"[A-Za-z0-9]+"), re.compile(r"\d+")
_IBAN = re.compile(rf"{START}[A-Z]{{2}}\d{{2}}(?:[ -]?[A-Z0-9]){{11,30}}", _I | re.ASCII)
_CARD = re.compile(rf"{START}(?<!\+)(?:\d{{4}}(?:\.\d{{4}}){{3}}|\d(?:[ -]?\d){{12,30}}){END}", re.ASCII)
_ES_ID = re.compile(rf"{START}(?:\d{{8}}|\d{{2}}\.\d{{3}}\.\d{{3}}|[XYZxyz][ -]?\d{{7}})(?:-?[A-Za-z]| [A-Z]){END}", re.ASCII)
_CURP = re.compile(rf"{START}[A-Z]{{4}}\d{{6}}[HMX][A-Z]{{5}}[A-Z0-9]\d{END}", _I | re.ASCII)
_RUT = re.compile(rf"{START}(?:\d{{1,2}}\.\d{{3}}\.\d{{3}}|\d{{7,8}})-[\dK]{END}", _I | re.ASCII)
_CPF = re.compile(rf"{START}\d{{3}}\.\d{{3}}\.\d{{3}}-\d\d{END}", re.ASCII)
_CNPJ = re.compile(rf"{START}\d\d\.\d{{3}}\.\d{{3}}/\d{{4}}-\d\d{END}", re.ASCII)
_RFC = re.compile(rf"{START}[A-ZÑ&]{{4}}\d{{6}}[A-Z0-9]{{3}}{END}", _I)
_WORDED_ID = re.compile(
    rf"{START}({ID_WORD})\.?(?:{GAP}(?:nacional|de{GAP}(?:identidad|identificaci[oó]n|ciudadan[ií]a)))?{GAP}{{0,2}}"
    rf"(?:(?:es|is|é|el|n[uú]mero|number|nro\.?|no\.?|n[º°])?{GAP}{{0,2}}[:#=]?{GAP}{{0,2}}){{1,3}}"
    rf"(\d{{1,3}}(?:{GAP}\d{{3}}){{2}}(?!\d|{GAP}\d)|"
    rf"[a-z]{{0,3}}\d(?:[./-]?\d){{4,13}}(?:[ -]?[a-z](?![a-z0-9]))?(?:[ -](?:lp|sc|cb|or|pt|tj|ch|be|pd|bn)\b)?){END}",
    re.ASCII,
)


def groups_of(pattern: re.Pattern[str], text: str, span: Span) -> list[Span]:
    """The places of a pattern inside a span."""
    return [m.span() for m in pattern.finditer(text, *span)]


def _runs(groups: list[Span]) -> Iterator[Span]:
    """Neighbouring groups: all, then without the last or first ones ("call 1760 415-771-2216")."""
    yield groups[0][0], groups[-1][1]
    for cut in range(1, len(groups)):
        yield groups[0][0], groups[-1 - cut][1]
        yield groups[cut][0], groups[-1][1]


def accepted(groups: list[Span], accept: Callable[[Span], bool]) -> Iterator[Span]:
    """The longest accepted run, and then what the groups after it hold ("612345678 622345678")."""
    while groups:
        run = next(filter(accept, _runs(groups)), None)
        if run is None:
            return
        yield run
        groups = [g for g in groups if g[0] >= run[1]]


def find_ibans(text: str) -> Iterator[Span]:
    """The longest run of groups with valid check digits."""
    for m in _IBAN.finditer(text) if _TWO_LETTERS_TWO_DIGITS.search(text) else ():
        groups = groups_of(_WORD, text, m.span())
        for last in range(len(groups), 0, -1):
            start, end = groups[0][0], groups[last - 1][1]
            whole = end == len(text) or not text[end].isalnum()
            if whole and iban_number.is_valid(text[start:end], check_country=False):
                yield start, end
                break


def _is_card(text: str, span: Span) -> bool:
    digits = "".join(filter(str.isdecimal, text[slice(*span)]))
    return 13 <= len(digits) <= 19 and digits[0] in "23456" and len(set(digits)) > 1 and luhn.is_valid(digits)


def find_cards(text: str) -> Iterator[Span]:
    """Card numbers that pass the Luhn check."""
    for m in _CARD.finditer(text) if _THIRTEEN_DIGITS.search(text) else ():
        yield from accepted(groups_of(_DIGITS, text, m.span()), partial(_is_card, text))


def find_national_ids(text: str) -> Iterator[Span]:
    """DNI, NIE, CURP, RFC, RUT, CPF and CNPJ by their check digits; other numbers only after a word such as "cédula"."""
    if _CHECKED.search(text):
        yield from _checked_ids(text)
    for m in _WORDED_ID.finditer(small(text)):
        if not re.match(r"cui[tl]", m[1]) or cuit.is_valid(m[2]):
            yield m.span(2)


def _checked_ids(text: str) -> Iterator[Span]:
    for m in _ES_ID.finditer(text):
        value = re.sub(r"\W", "", m[0]).upper()
        if nie.is_valid(value) if value[0] in "XYZ" else dni.is_valid(value):
            yield m.span()
    yield from (m.span() for m in _CURP.finditer(text) if curp.is_valid(m[0].upper()))
    yield from (m.span() for m in _RUT.finditer(text) if rut.is_valid(m[0]))
    yield from (m.span() for m in _CPF.finditer(text) if cpf.is_valid(m[0]))
    yield from (m.span() for m in _CNPJ.finditer(text) if cnpj.is_valid(m[0]))
    yield from (m.span() for m in _RFC.finditer(text) if rfc.is_valid(m[0].upper(), validate_check_digits=True))
