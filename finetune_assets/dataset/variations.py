"""Light variations of what a user says: spelling, accents, greetings, politeness, tú and vos, abbreviations.

    vary("¿Puedes darme cita el martes a las 10:30?", reply, "es", chance)  ->  "hola, Podés darme cita el martes a las 10:30?"

Slots stay as they are, character by character: words that the reply repeats, words with a digit, a placeholder or a capital
letter, and words of the calendar and of numbers. So the reply still answers the question.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

_PIECE = re.compile(r"\s+|[^\s]+")
_CORE = re.compile(r"^(\W*)(.*?)(\W*)$", re.DOTALL)
_FIXED = {
    "es": """lunes martes miércoles miercoles jueves viernes sábado sabado domingo enero febrero marzo abril mayo junio julio
    agosto septiembre setiembre octubre noviembre diciembre hoy mañana pasado ayer tarde noche mediodía mediodia
    medianoche media cuarto un uno una dos tres cuatro cinco seis siete ocho nueve diez once doce quince veinte
    treinta primera segunda no sin ni nunca""",
    "en": """monday tuesday wednesday thursday friday saturday sunday january february march april may june july august
    september october november december today tomorrow yesterday morning afternoon evening night noon midnight half
    quarter a an one two three four five six seven eight nine ten eleven twelve fifteen twenty thirty first second
    no not without never""",
    "pt": """segunda terça quarta quinta sexta sábado domingo janeiro fevereiro março abril maio junho julho agosto setembro
    outubro novembro dezembro hoje amanhã ontem manhã tarde noite meio meia um uma dois duas três quatro cinco seis
    sete oito nove dez onze doze quinze vinte trinta primeira não sem nem nunca""",
}
_STOP_TEXT = (
    """de la el los las en y a que por con para del al me te se su mi lo es o si the of to and in is it for on do da e os as"""
)
_STOP = set(_STOP_TEXT.split())
_GREETINGS = {
    "es": ("hola", "buenas", "buen día", "hola, qué tal"),
    "en": ("hi", "hello", "hey", "good day"),
    "pt": ("oi", "olá", "bom dia"),
}
_GREETED = re.compile(r"^\W*(hola|buen[oa]s?|hi|hello|hey|good|oi|olá|bom)\b", re.IGNORECASE)
_POLITE = {"es": (("por favor", "porfa"), "gracias"), "en": (("please",), "thanks"), "pt": (("por favor",), "obrigado")}
_IS_POLITE = re.compile(r"favor|porfa|gracias|please|pls|thank|obrigad")
_ASKS = re.compile(r"[?]|quier|quisiera|necesit|pued|podr|puéd|want|need|could|can |would|quero|preciso|pode")
_VOSEO = {
    **{"puedes": "podés", "tienes": "tenés", "quieres": "querés", "sabes": "sabés", "dices": "decís", "haces": "hacés"},
    **{"vienes": "venís", "atiendes": "atendés", "necesitas": "necesitás", "dime": "decime", "eres": "sos"},
    **{
        "puedas": "podás",
        "tú": "vos",
        "contigo": "con vos",
        "ofreces": "ofrecés",
        "recomiendas": "recomendás",
        "aceptas": "aceptás",
    },
}
_FORMS = {"es": {**_VOSEO, **{vos: tu for tu, vos in _VOSEO.items() if " " not in vos}}}
_SHORT = {
    "es": {
        "que": "q",
        "porque": "xq",
        "también": "tmb",
        "estoy": "toy",
        "para": "pa",
        "por": "x",
        "quiero": "kiero",
        "buenos": "bnos",
    },
    "en": {"you": "u", "are": "r", "please": "pls", "because": "cuz", "thanks": "thx", "your": "ur", "would": "wd"},
    "pt": {"você": "vc", "também": "tb", "porque": "pq", "que": "q", "quero": "qro", "beleza": "blz"},
}
_VARIABLE = {language: {*_SHORT[language], *_FORMS.get(language, {})} for language in _SHORT}
_FIXED_WORDS = {language: set(words.split()) for language, words in _FIXED.items()}
_AROUND = "¿¡?!.,;:()\"'…«»"
Pieces = list[str]


def slots(text: str, reply: str, language: str) -> list[str]:
    """The words of `text` that no variation touches, in order, without the punctuation around them."""
    said = _words(reply)
    found = [piece.strip(_AROUND) for piece in _PIECE.findall(text) if not piece.isspace() and _is_slot(piece, said, language)]
    return [piece for piece in found if piece and piece.casefold() not in _VARIABLE[language]]


def keeps_slots(parent: str, said: str, reply: str, language: str) -> bool:
    """True where every slot of the parent stands in the variation."""
    low = said.casefold()
    return all(slot.casefold() in low for slot in slots(parent, reply, language))


def vary(text: str, reply: str, language: str, chance: random.Random, *, opens: bool = True) -> str | None:
    """Another way to say `text`, in other words or letters; None where no way is found. `opens`: it begins the conversation."""
    said = _words(reply)
    ways: list[Callable[[Pieces], Pieces | None]] = [
        lambda pieces: _typo(pieces, said, language, chance),
        lambda pieces: _accents(pieces, said, language),
        lambda pieces: _greeting(pieces, language, chance) if opens else None,
        lambda pieces: _politeness(pieces, language, chance),
        lambda pieces: _swap(pieces, _FORMS.get(language, {}), said, language),
        lambda pieces: _swap(pieces, _SHORT[language], said, language),
    ]
    chance.shuffle(ways)
    pieces, wanted, before = _PIECE.findall(text.strip()), chance.choice((1, 2, 2)), _normal(text)
    for way in ways:
        changed = way(pieces)
        if changed is not None and changed != pieces:
            pieces, wanted = changed, wanted - 1
        if not wanted:
            break
    varied = "".join(pieces)
    return varied if _normal(varied) != before else None


def _normal(text: str) -> list[str]:
    """Words without case and punctuation."""
    return re.findall(r"\w+", text.casefold())


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.casefold()) if len(word) > 1} - _STOP


def _is_slot(piece: str, said: set[str], language: str) -> bool:
    core = _core(piece)
    if not core.isalpha() or core != core.lower():
        return bool(core) or any(sign in piece for sign in "[]@€$£%")
    return core in said or core in _FIXED_WORDS[language]


@lru_cache(maxsize=50_000)
def _core(piece: str) -> str:
    match = _CORE.match(piece)
    return match[2] if match else piece


def _free(pieces: Pieces, said: set[str], language: str) -> list[int]:
    return [place for place, piece in enumerate(pieces) if _core(piece) and not _is_slot(piece, said, language)]


def _typo(pieces: Pieces, said: set[str], language: str, chance: random.Random) -> Pieces | None:
    """Two letters change places, one is lost, or one is doubled, inside a word of five letters and more."""
    long = [place for place in _free(pieces, said, language) if len(_core(pieces[place])) >= 5]
    if not long:
        return None
    place = chance.choice(long)
    core = _core(pieces[place])
    at = chance.randrange(1, len(core) - 2)
    wrong = chance.choice(
        (core[:at] + core[at + 1] + core[at] + core[at + 2 :], core[:at] + core[at + 1 :], core[:at] + core[at] + core[at:])
    )
    return [*pieces[:place], pieces[place].replace(core, wrong, 1), *pieces[place + 1 :]]


def _accents(pieces: Pieces, said: set[str], language: str) -> Pieces:
    """Without accents and opening marks."""
    free = set(_free(pieces, said, language))
    plain = [_bare(piece) if place in free else piece for place, piece in enumerate(pieces)]
    return [piece.lstrip("¿¡") if len(piece) > 1 else piece for piece in plain]


def _bare(word: str) -> str:
    parts = unicodedata.normalize("NFD", word)
    return unicodedata.normalize("NFC", "".join(c for c in parts if c not in "\u0301\u0300\u0302"))


def _greeting(pieces: Pieces, language: str, chance: random.Random) -> Pieces | None:
    if _GREETED.match("".join(pieces)):
        return None
    greeting = chance.choice(_GREETINGS[language])
    return [greeting + chance.choice((",", "", "!")), " ", *pieces]


def _politeness(pieces: Pieces, language: str, chance: random.Random) -> Pieces | None:
    """A polite word at the end."""
    text = "".join(pieces).casefold()
    if _IS_POLITE.search(text):
        return None
    asks, thanks = _POLITE[language]
    return [*pieces, " ", chance.choice((*asks, thanks)) if _ASKS.search(text) else thanks]


def _swap(pieces: Pieces, table: dict[str, str], said: set[str], language: str) -> Pieces | None:
    changed = list(pieces)
    for place, piece in enumerate(pieces):
        core = _core(piece)
        low = core.lower()
        if low in table and low not in said and low not in _FIXED_WORDS[language] and core in (low, low.capitalize()):
            new = table[low] if core == low else table[low].capitalize()
            changed[place] = piece.replace(core, new, 1)
    return changed if changed != pieces else None
