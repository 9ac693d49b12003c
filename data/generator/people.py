"""Made-up people and their data: names, phones, documents, cards. Check digits are right, the values belong to nobody."""

from __future__ import annotations

import random
import string
import unicodedata
from datetime import date, timedelta

from .phrases import load_words

NAMES = load_words("names")
WOMEN: list[str] = NAMES["women"]
MEN: list[str] = NAMES["men"]
SURNAMES: list[str] = NAMES["surnames"]
DNI_LETTERS = "TRWAGMYFPDXBNJZSQVHLCKE"
STATES = ("JC", "DF", "NL", "PL", "GT")


def first_name(rng: random.Random) -> str:
    """A first name."""
    return rng.choice(WOMEN if rng.random() < 0.5 else MEN)


def full_name(rng: random.Random) -> str:
    """A first name, mostly with a surname."""
    return first_name(rng) if rng.random() < 0.3 else f"{first_name(rng)} {rng.choice(SURNAMES)}"


def digits(rng: random.Random, count: int) -> str:
    """That many random digits."""
    return "".join(rng.choices(string.digits, k=count))


def phone(rng: random.Random, country: str, plain: bool = False) -> str:
    """A mobile number of BO, ES, AR or MX; `plain` gives the form without spaces that platforms use as an id."""
    if country == "BO":
        number = rng.choice("67") + digits(rng, 7)
        return (
            "+591" + number
            if plain
            else rng.choice((f"+591 {number}", f"+591{number}", number, f"{number[:3]} {number[3:5]} {number[5:]}"))
        )
    if country == "ES":
        number = rng.choice("6") + digits(rng, 8)
        spaced = f"{number[:3]} {number[3:6]} {number[6:]}"
        return "+34" + number if plain else rng.choice((f"+34 {spaced}", f"+34{number}", spaced, number))
    if country == "AR":
        number = digits(rng, 8).replace("0", "5")
        local = f"{number[:4]}-{number[4:]}"
        return "+54911" + number if plain else rng.choice((f"+54 9 11 {local}", f"+54911{number}", f"11 {local}"))
    number = "33" + rng.choice("12356") + digits(rng, 7)
    spaced = f"{number[:2]} {number[2:6]} {number[6:]}"
    return "+52" + number if plain else rng.choice((f"+52 {spaced}", spaced, number))


def plain_ascii(text: str) -> str:
    """Lower-case letters without accents."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()


def email(rng: random.Random) -> str:
    """An address under a domain reserved for examples."""
    user = (
        plain_ascii(first_name(rng))
        + rng.choice((".", "_", ""))
        + plain_ascii(rng.choice(SURNAMES))
        + rng.choice(("", digits(rng, 2)))
    )
    return f"{user}@{rng.choice(('correo.example.com', 'mail.example.net', 'example.org'))}"


def luhn_digit(number: str) -> str:
    """The digit that makes `number` pass the Luhn check."""
    total = 0
    for place, char in enumerate(reversed(number)):
        value = int(char) * (2 if place % 2 == 0 else 1)
        total += value - 9 if value > 9 else value
    return str(-total % 10)


def credit_card(rng: random.Random) -> str:
    """A 16-digit card number that passes Luhn."""
    number = rng.choice(("4", "51", "53", "55"))
    number += digits(rng, 15 - len(number))
    number += luhn_digit(number)
    groups = [number[at : at + 4] for at in range(0, 16, 4)]
    return rng.choice((number, " ".join(groups), "-".join(groups)))


def iban(rng: random.Random) -> str:
    """A Spanish account number whose check digits are right."""
    account = digits(rng, 20)
    check = 98 - int(account + "142800") % 97
    number = f"ES{check:02d}{account}"
    return number if rng.random() < 0.4 else " ".join(number[at : at + 4] for at in range(0, 24, 4))


def dni(rng: random.Random) -> str:
    """A Spanish DNI or NIE with its letter."""
    if rng.random() < 0.25:
        lead, number = rng.choice("XYZ"), digits(rng, 7)
        return f"{lead}{number}{DNI_LETTERS[int(str('XYZ'.index(lead)) + number) % 23]}"
    number = digits(rng, 8)
    return f"{number}{rng.choice(('', '', '-'))}{DNI_LETTERS[int(number) % 23]}"


def curp(rng: random.Random) -> str:
    """A Mexican CURP with its check digit."""
    born = date(1960, 1, 1) + timedelta(days=rng.randrange(14_000))
    letters = "BCDFGHJLMNPRSTVZ"
    body = rng.choice(letters) + rng.choice("AEIOU") + "".join(rng.choices(letters, k=2)) + born.strftime("%y%m%d")
    body += rng.choice("HM") + rng.choice(STATES) + "".join(rng.choices(letters, k=3)) + "0"
    alphabet = "0123456789ABCDEFGHIJKLMNÑOPQRSTUVWXYZ"
    return body + str(-sum(alphabet.index(char) * (18 - at) for at, char in enumerate(body)) % 10)


def rut(rng: random.Random) -> str:
    """A Chilean RUT with its check digit."""
    number = str(rng.randint(5, 25)) + digits(rng, 6)
    total = sum(int(char) * (2 + at % 6) for at, char in enumerate(reversed(number)))
    check = {11: "0", 10: "K"}.get(11 - total % 11, str(11 - total % 11))
    return f"{number[:-6]}.{number[-6:-3]}.{number[-3:]}-{check}" if rng.random() < 0.7 else f"{number}-{check}"


def national_id(rng: random.Random, country: str) -> str:
    """A document of the country; a RUT where a country has none here."""
    return {"ES": dni, "MX": curp}.get(country, rut)(rng)


def ip(rng: random.Random) -> str:
    """A public IPv4 address."""
    return f"{rng.choice((81, 88, 186, 190, 201))}.{rng.randint(1, 254)}.{rng.randint(0, 254)}.{rng.randint(1, 254)}"


def secret(rng: random.Random) -> str:
    """Something shaped like an API key."""
    return rng.choice(("sk-", "sk-proj-")) + "".join(rng.choices(string.ascii_letters + string.digits, k=40))
