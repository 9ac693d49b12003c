"""Dental clinics: tenants with their own facts, and the words of the dental assistant."""

from __future__ import annotations

from .phrases import load_words
from .skeletons import Domain
from .tenant import Tenant, money

# service, how people say it, price in euros, minutes
SERVICES = (
    ("una limpieza", "limpieza", ("una limpieza", "una limpieza dental", "hacerme una limpieza", "limpieza de dientes"), 55, 40),
    ("una revisión", "revisión", ("una revisión", "un control", "un chequeo", "una revisión general"), 30, 20),
    ("un empaste", "empaste", ("un empaste", "tapar una caries", "una caries", "un empaste que se me cayó"), 60, 45),
    (
        "un blanqueamiento",
        "blanqueamiento",
        ("un blanqueamiento", "blanquearme los dientes", "un blanqueamiento dental"),
        220,
        60,
    ),
    ("una extracción", "extracción", ("una extracción", "sacarme una muela", "que me saquen la muela del juicio"), 80, 45),
    ("una ortodoncia", "ortodoncia", ("ortodoncia", "ponerme brackets", "una consulta de ortodoncia", "unos brackets"), 900, 30),
    ("una endodoncia", "endodoncia", ("una endodoncia", "un tratamiento de conducto", "matar el nervio de una muela"), 180, 90),
    ("un implante", "implante", ("un implante", "ponerme un implante", "una consulta por un implante"), 950, 90),
    ("una corona", "corona", ("una corona", "ponerme una corona", "una funda en una muela"), 320, 60),
    ("una radiografía", "radiografía", ("una radiografía", "una panorámica", "una placa"), 40, 15),
    ("una férula", "férula", ("una férula de descarga", "una férula, aprieto los dientes", "una placa para dormir"), 190, 30),
    (
        "una consulta infantil",
        "consulta infantil",
        ("el dentista de mi hijo", "una revisión para mi hija", "una cita para mi niño de 6 años"),
        35,
        30,
    ),
)

TENANTS = (
    Tenant(
        "clinica_aurora",
        "Clínica Aurora",
        "dental",
        "BO",
        True,
        "la avenida San Martín 450, Santa Cruz",
        "el tercer anillo y frente al parque",
        9 * 60,
        18 * 60,
        frozenset({6}),
        "de lunes a sábado de 9:00 a 18:30",
        "los domingos",
        6.96,
        ("la doctora Vargas", "el doctor Méndez"),
        "+591 3 342 0118",
        "citas@clinica-aurora.example",
    ),
    Tenant(
        "clinica_sonrisas",
        "Clínica Sonrisas",
        "dental",
        "ES",
        False,
        "la calle Alcalá 212, Madrid",
        "el metro Manuel Becerra",
        9 * 60 + 30,
        19 * 60 + 30,
        frozenset({5, 6}),
        "de lunes a viernes de 9:30 a 20:00",
        "los sábados y domingos",
        1.0,
        ("la doctora Ibáñez", "el doctor Prieto"),
        "+34 910 200 345",
        "hola@sonrisas.example",
    ),
    Tenant(
        "dental_plaza",
        "Dental Plaza",
        "dental",
        "MX",
        False,
        "la avenida Vallarta 1820, Guadalajara",
        "la plaza central, en el segundo piso",
        8 * 60,
        17 * 60,
        frozenset({6}),
        "de lunes a sábado de 8:00 a 17:30",
        "los domingos",
        18.0,
        ("la doctora Salazar", "el doctor Aguilar"),
        "+52 33 3615 0909",
        "recepcion@dentalplaza.example",
    ),
)

TABLES = load_words("dental")
WORDS: dict[str, list[str]] = TABLES["words"]
ANSWERS: dict[str, list[str]] = TABLES["answers"]


def domain(tenant: Tenant) -> Domain:
    """The dental domain with this tenant's hours."""
    return Domain(WORDS, ("service", "day", "hour", "name"), tenant.opens, tenant.closes, tenant.closed, tenant.country, ANSWERS)


def service_slots(index: int, tenant: Tenant, said: int) -> dict[str, str]:
    """The slots of one service at one clinic."""
    name, noun, ways, euros, minutes = SERVICES[index]
    return {
        "service": name,
        "noun": noun,
        "service_s": ways[said % len(ways)],
        "price": money(euros * tenant.rate, tenant.country),
        "minutes": str(minutes),
    }
