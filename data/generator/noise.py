"""What thumbs do to text: missing accents and marks, abbreviations, slips, emoji. Only users write like this."""

from __future__ import annotations

import random
import re

from .grammar import SHIELD_CLOSE, SHIELD_OPEN

NO_ACCENT = str.maketrans("áéíóúÁÉÍÓÚü", "aeiouAEIOUu")
SHORT = {
    "que": "q",
    "qué": "q",
    "porque": "xq",
    "por": "x",
    "también": "tb",
    "para": "pa",
    "bien": "bn",
    "cuánto": "cto",
    "favor": "fa",
    "buenas": "bns",
    "mensaje": "msj",
    "gracias": "grax",
    "estoy": "toy",
    "quiero": "kiero",
    "días": "dias",
}
KEEP = {"nombre", "llamo", "soy", "correo", "mañana", "martes"}
EMOJI = ("🙂", "🙏", "😊", "👍", "😅", "🙏🏻", "👋", "😁", "✨", "🤗", "❤️", "😬")
NEIGHBOURS = {
    "a": "sq",
    "e": "wr",
    "i": "uo",
    "o": "ip",
    "u": "yi",
    "n": "mb",
    "m": "n",
    "s": "ad",
    "r": "et",
    "t": "ry",
    "c": "xv",
    "l": "k",
}


def roughen(rng: random.Random, text: str, level: int) -> str:
    """Noise of level 0 (careful writer), 1 (casual) or 2 (sloppy); shielded spans stay as they are."""
    if level:
        if rng.random() < 0.85:
            text = text.replace("¿", "").replace("¡", "")
        spans = re.split(f"({SHIELD_OPEN}[^{SHIELD_CLOSE}]*{SHIELD_CLOSE})", text)
        lower, bare = rng.random() < 0.3 * level, rng.random() < 0.4 * level
        text = "".join(span if span.startswith(SHIELD_OPEN) else _span(rng, span, level, lower, bare) for span in spans)
        if rng.random() < 0.45:
            text = re.sub(r"\.$", "", text)
        if rng.random() < 0.12:
            text = re.sub(r"([?!])$", lambda found: found[1] * rng.randint(2, 3), text)
    if rng.random() < (0.04, 0.13, 0.1)[level]:
        text += rng.choice(("", " ")) + rng.choice(EMOJI)
    return text


def _span(rng: random.Random, text: str, level: int, lower: bool, bare: bool) -> str:
    if lower:
        text = text.lower()
    slips, shorts = (0.0, 0.012, 0.03)[level], (0.0, 0.02, 0.13)[level]

    def word(found: re.Match[str]) -> str:
        token = found[0]
        key = token.lower()
        if key in SHORT and rng.random() < shorts:
            return SHORT[key]
        if len(token) > 4 and key not in KEEP and rng.random() < slips:
            token = _slip(rng, token)
        return token

    text = re.sub(r"[^\W\d_]+", word, text)
    return text.translate(NO_ACCENT) if bare else text


def _slip(rng: random.Random, token: str) -> str:
    at, kind = rng.randrange(1, len(token) - 1), rng.random()
    if kind < 0.35:
        return token[:at] + token[at + 1] + token[at] + token[at + 2 :]
    if kind < 0.65:
        return token[:at] + token[at + 1 :]
    if kind < 0.85:
        return token[:at] + token[at] + token[at:]
    return token[:at] + rng.choice(NEIGHBOURS.get(token[at], token[at])) + token[at + 1 :]
