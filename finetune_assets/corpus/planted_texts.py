"""Made-up values and the sentences they stand in, for `planted`: every kind in Spanish, English and Portuguese."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

import phonenumbers
from stdnum import luhn
from stdnum.br import cpf
from stdnum.cl import rut
from stdnum.es import dni

Make = Callable[[random.Random, str, str], str]
"""A value from a source of chance, a language and a region of phone numbers."""

BLIND = ("name_not_introduced", "street_address", "number_in_words")
"""Personal data that no recogniser looks for."""

_FIRST = [
    "Lucía",
    "Mateo",
    "Valentina",
    "Joaquín",
    "Camila",
    "Nicolás",
    "Jimena",
    "Rodrigo",
    "Beatriz",
    "Álvaro",
    "Noelia",
    "Gonzalo",
    "Milagros",
    "Esteban",
]
_LAST = [
    "Quispe",
    "Gutiérrez",
    "Mamani",
    "Salazar",
    "Ibáñez",
    "Carvajal",
    "Zeballos",
    "Montaño",
    "Urquidi",
    "Peñaranda",
    "Rocabado",
    "Villarroel",
    "Arteaga",
]
_DOMAINS = ("correo.example", "mail.example", "gmail.com", "hotmail.com", "empresa.example")
_ALNUM = string.ascii_letters + string.digits


def _digits(draw: random.Random, count: int) -> str:
    return "".join(draw.choices(string.digits, k=count))


def _person(draw: random.Random) -> str:
    return f"{draw.choice(_FIRST)} {draw.choice(_LAST)}"


def _plain(text: str) -> str:
    return text.lower().translate(str.maketrans("áéíóúñ", "aeioun"))


def _email(draw: random.Random, _language: str, _region: str) -> str:
    sign = draw.choice(("", ".", "_"))
    return f"{_plain(draw.choice(_FIRST))}{sign}{_plain(draw.choice(_LAST))}{draw.randrange(100)}@{draw.choice(_DOMAINS)}"


def _card(draw: random.Random, _language: str, _region: str) -> str:
    digits = draw.choice(("4", "51", "52", "53")).ljust(1)
    digits += _digits(draw, 15 - len(digits))
    digits += luhn.calc_check_digit(digits)
    return draw.choice(("", " ", "-")).join(digits[at : at + 4] for at in range(0, 16, 4))


def _iban(draw: random.Random, _language: str, _region: str) -> str:
    account = _digits(draw, 20)
    check = 98 - int(f"{account}142800") % 97  # E is 14, S is 28
    value = f"ES{check:02d}{account}"
    return value if draw.random() < 0.5 else " ".join(value[at : at + 4] for at in range(0, 24, 4))


def _national_id(draw: random.Random, _language: str, _region: str) -> str:
    kind = draw.randrange(3)
    if kind == 0:
        digits = _digits(draw, 8)
        return f"{digits}{draw.choice(('', '-'))}{dni.calc_check_digit(digits)}"
    if kind == 1:
        digits = str(draw.randrange(5_000_000, 25_000_000))
        return f"{int(digits):,}".replace(",", ".") + f"-{rut.calc_check_digit(digits)}"
    return cpf.format(next(value for value in iter(lambda: _cpf(draw), "") if cpf.is_valid(value)))


def _cpf(draw: random.Random) -> str:
    digits = [draw.randrange(10) for _ in range(9)]
    for _ in range(2):
        weights = range(len(digits) + 1, 1, -1)
        rest = sum(digit * weight for digit, weight in zip(digits, weights, strict=True)) * 10 % 11
        digits.append(rest % 10)
    return "".join(map(str, digits))


def _phone(draw: random.Random, _language: str, region: str) -> str:
    """A valid mobile number, national or with its country's code; of no region always with a code."""
    own = region or "ES"
    example = phonenumbers.example_number_for_type(own, phonenumbers.PhoneNumberType.MOBILE)
    national, code = str(example.national_number), example.country_code  # pyright: ignore[reportOptionalMemberAccess]
    while True:
        # The last digits are free; the first ones say what kind of number it is.
        digits = national[:-6] + _digits(draw, 6)
        number = phonenumbers.PhoneNumber(code, int(digits))
        if phonenumbers.is_valid_number(number) and len(set(digits[-6:])) > 2:
            break
    styles = [phonenumbers.PhoneNumberFormat.INTERNATIONAL, phonenumbers.PhoneNumberFormat.E164]
    styles += [phonenumbers.PhoneNumberFormat.NATIONAL] * 2 if region else []
    return phonenumbers.format_number(number, draw.choice(styles))


def _ip(draw: random.Random, _language: str, _region: str) -> str:
    return ".".join(str(draw.randrange(11, 250)) for _ in range(4))


def _secret(draw: random.Random, _language: str, _region: str) -> str:
    prefix, length = draw.choice((("sk-", 32), ("ghp_", 36), ("AKIA", 16), ("hf_", 34)))
    letters = string.ascii_uppercase + string.digits if prefix == "AKIA" else _ALNUM
    return prefix + "".join(draw.choices(letters, k=length))


def _url(draw: random.Random, _language: str, _region: str) -> str:
    token = "".join(draw.choices(_ALNUM, k=24))
    return f"https://portal.example/citas?{draw.choice(('token', 'access_token', 'key'))}={token}"


def _name(draw: random.Random, _language: str, _region: str) -> str:
    return _person(draw)


def _address(draw: random.Random, _language: str, _region: str) -> str:
    street = draw.choice(("Calle Murillo", "Avenida Arce", "Calle de la Palma", "Rua das Flores", "Pasaje Los Sauces"))
    return f"{street} {draw.randrange(2, 900)}"


_WORDS = {
    "es": ["cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve"],
    "en": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "pt": ["zero", "um", "dois", "três", "quatro", "cinco", "seis", "sete", "oito", "nove"],
}


def _in_words(draw: random.Random, language: str, _region: str) -> str:
    return " ".join(draw.choices(_WORDS.get(language, _WORDS["es"]), k=9))


VALUES: dict[str, Make] = {
    "url": _url,
    "secret": _secret,
    "email": _email,
    "iban": _iban,
    "credit_card": _card,
    "national_id": _national_id,
    "ip": _ip,
    "phone": _phone,
    "name": _name,
    "name_not_introduced": _name,
    "street_address": _address,
    "number_in_words": _in_words,
}

SENTENCES: dict[str, dict[str, tuple[str, ...]]] = {
    "url": {
        "es": ("Entré por {} y no abre.", "Este es el enlace: {}"),
        "en": ("I used {} and it does not open.", "This is the link: {}"),
        "pt": ("Entrei por {} e não abre.", "O link é {}"),
    },
    "secret": {
        "es": ("Pegué {} en la web.", "Me salió esto: {}", "¿Qué es {}?"),
        "en": ("I pasted {} there.", "It showed {}"),
        "pt": ("Colei {} no site.", "Apareceu {}"),
    },
    "email": {
        "es": ("Mi correo es {}.", "Escríbeme a {} por favor.", "{}", "anota {}, es el de mi trabajo"),
        "en": ("My email is {}.", "Write to {} please.", "{}"),
        "pt": ("Meu e-mail é {}.", "Pode escrever para {}.", "{}"),
    },
    "iban": {
        "es": ("Devuélvanlo a la cuenta {}.", "mi IBAN: {}", "{}"),
        "en": ("Refund it to {}.", "IBAN {}"),
        "pt": ("Devolvam para a conta {}.", "IBAN {}"),
    },
    "credit_card": {
        "es": ("Cóbralo a la tarjeta {}.", "Mi tarjeta es {}", "{}"),
        "en": ("Charge my card {}.", "{}"),
        "pt": ("Cobre no cartão {}.", "{}"),
    },
    "national_id": {
        "es": ("Mi documento es {}.", "{}", "Soy paciente, {}"),
        "en": ("My ID is {}.", "{}"),
        "pt": ("Meu documento é {}.", "{}"),
    },
    "ip": {
        "es": ("Me conecto desde {} y falla.", "mi ip es {}"),
        "en": ("I connect from {} and it fails.", "my ip is {}"),
        "pt": ("Conecto de {} e falha.", "meu ip é {}"),
    },
    "phone": {
        "es": ("Llámame al {}.", "{}", "Mi número es {}, gracias.", "Avísame por WhatsApp: {}", "te paso otro {} por las dudas"),
        "en": ("Call me at {}.", "{}", "My number is {}, thanks.", "here is another one {} just in case"),
        "pt": ("Ligue para {}.", "{}", "Meu telefone é {}, obrigado."),
    },
    "name": {
        "es": ("Me llamo {}.", "Hola, soy {}.", "La reserva va a nombre de {}.", "Es una cita para mi hija {}."),
        "en": ("My name is {}.", "Hi, I am {}.", "It is under the name {}."),
        "pt": ("Meu nome é {}.", "Olá, sou {}.", "Em nome de {}."),
    },
    "name_not_introduced": {
        "es": ("Dile a {} que llego tarde.", "Ayer me atendió {} y muy bien."),
        "en": ("Tell {} that I will be late.", "{} helped me yesterday."),
        "pt": ("Diga a {} que vou atrasar.", "Ontem {} me atendeu."),
    },
    "street_address": {
        "es": ("Vivo en {}.", "Envíenlo a {}, por favor."),
        "en": ("I live at {}.", "Send it to {}, please."),
        "pt": ("Moro na {}.", "Enviem para {}, por favor."),
    },
    "number_in_words": {
        "es": ("Mi número es el {}.",),
        "en": ("My number is {}.",),
        "pt": ("Meu número é {}.",),
    },
}
"""Kind to language to patterns."""


def _time(draw: random.Random) -> str:
    hour, minute = draw.randrange(8, 21), draw.choice((0, 15, 30, 45))
    return draw.choice((f"{hour}:{minute:02d}", f"{hour:02d}:{minute:02d} a {hour + 2}:{minute:02d}", f"{hour}.{minute:02d}"))


def _date(draw: random.Random) -> str:
    day, month, year = draw.randrange(1, 29), draw.randrange(1, 13), draw.choice((2025, 2026, 2027))
    return draw.choice((f"{day:02d}/{month:02d}/{year}", f"{year}-{month:02d}-{day:02d}", f"{day:02d}.{month:02d}.{year}"))


def _price(draw: random.Random) -> str:
    amount = draw.randrange(10, 9_000) * draw.choice((1, 10, 100, 1000))
    grouped = f"{amount:,}".replace(",", ".")
    euros = f"{amount / 100:.2f} €".replace(".", ",")
    return draw.choice((f"${grouped}", f"{grouped} pesos", f"Bs {grouped}", euros, f"{amount} bs"))


def _count(draw: random.Random) -> str:
    return str(draw.randrange(2, 120))


def _order(draw: random.Random) -> str:
    return str(draw.randrange(10_000_000, 99_999_999))


DECOYS: dict[str, tuple[tuple[Callable[[random.Random], str], str], ...]] = {
    "es": (
        (_time, "¿Tienen a las {}?"),
        (_date, "Sería el {}."),
        (_price, "¿Cuesta {}?"),
        (_count, "Somos {} personas."),
        (_order, "Es el pedido {}."),
        (_count, "Me duele la pieza {}."),
    ),
    "en": (
        (_time, "Is {} free?"),
        (_date, "On {}."),
        (_price, "Is it {}?"),
        (_count, "We are {} people."),
        (_order, "It is order {}."),
    ),
    "pt": (
        (_time, "Tem às {}?"),
        (_date, "Seria {}."),
        (_price, "Custa {}?"),
        (_count, "Somos {} pessoas."),
        (_order, "É o pedido {}."),
    ),
}
"""Language to what a clean text may hold, and its sentence."""


def decoy(draw: random.Random, language: str) -> str:
    """A sentence with a number that is nobody's."""
    make, pattern = draw.choice(DECOYS.get(language, DECOYS["es"]))
    return pattern.format(make(draw))
