"""Content of the general dialogues: fourteen everyday trades (`words/trades.yaml`), and streets, cities and hours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .phrases import load_words


@dataclass(frozen=True)
class Trade:
    """One trade's tables."""

    places: tuple[str, ...]
    booking: str
    things: tuple[tuple[str, tuple[str, ...], float], ...]
    questions: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]


def _trade(table: dict[str, Any]) -> Trade:
    things = tuple((thing["name"], tuple(thing["said"]), float(thing["price"])) for thing in table["things"])
    questions = tuple((question["ask"], question["reply"]) for question in table["questions"])
    return Trade(tuple(table["places"]), table["booking"], things, questions, tuple(table["problems"]))


TRADES: dict[str, Trade] = {name: _trade(table) for name, table in load_words("trades").items()}
CITIES = (
    "Lima",
    "Bogotá",
    "Sevilla",
    "Quito",
    "Montevideo",
    "Cusco",
    "Rosario",
    "Bilbao",
    "Puebla",
    "Sucre",
    "Cancún",
    "Asunción",
    "Mendoza",
    "Granada",
    "La Paz",
    "Tarija",
)
COLORS = ("azul", "rojo", "verde", "gris", "beige", "amarillo", "celeste", "marrón")
STREETS = (
    "la calle Mayor",
    "la avenida Libertad",
    "la calle Bolívar",
    "la avenida del Puerto",
    "la calle Real",
    "el paseo Colón",
    "la calle Sucre",
    "la avenida Juárez",
    "la calle Belgrano",
)
NEARS = (
    "la plaza principal",
    "el mercado",
    "la estación",
    "el hospital",
    "la iglesia",
    "el parque",
    "el correo",
    "la universidad",
    "el puente",
)
HOURS = (
    "de lunes a viernes de <h1> a <h2>",
    "de lunes a sábado de <h1> a <h2>",
    "todos los días de <h1> a <h2>",
    "de martes a domingo de <h1> a <h2>",
)
