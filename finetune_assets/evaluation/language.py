"""In which of the project's languages a text is written, by its function words: the commonest words of a language that the other
two do not write.

Short texts, lists of names and other languages hold too few of them, so the answer is often "cannot tell"; it is seldom wrong.
After the "small word" technique of Grefenstette 1995 (Comparing two language identification schemes).
"""

from __future__ import annotations

import re

from finetune_assets.assistants.settings.evaluation import Language

WORDS: dict[Language, str] = {
    "es": """
        el los del y con una unos unas lo le les su sus muy pero hay están es usted ustedes vos nosotros tiene tienes tenés
        tengo tenemos puede puedes podés puedo quiere quieres querés quiero cuando cuándo donde dónde cuánto cuántos cuántas
        hasta sin también aquí ahora hoy mañana ya gracias hola buenos buenas bueno qué quién cuál cómo sí más eso ese esa
        esto fue en gusto día
    """,
    "en": """
        the of and to is are was were you your we our it its this that these those with for from at on in by be have has will
        would can could does not what when where which who how if there they she his her an or but my any please thank thanks
        i'm i'll we'll you're it's don't let's
    """,
    "pt": """
        um uma uns umas ao aos à às na nas em com pela não nao você voce vocês seu seus sua suas meu minha é são estão tem têm
        foi mais muito muita também então quando onde até sem já agora hoje amanhã isso isto ele ela eles elas obrigado
        obrigada olá bom boa pode posso quer quero gostaria nós lhe qual quais quanto quantos
    """,
}
_KNOWN: dict[Language, frozenset[str]] = {name: frozenset(words.split()) for name, words in WORDS.items()}
LEAST, LEAD = 2, 3
"""A language is told where it has at least LEAST words more than LEAD times those of any other."""
LONGEST = 20_000  # characters of a text that are read
_WORD = re.compile(r"(?<![\w.@/])[^\W\d_]+(?:['’][^\W\d_]+)?(?![\w@/])")  # no parts of addresses


def language_of(text: str) -> Language | None:
    """The text's language; null where its words do not tell."""
    words = [word.replace("’", "'").lower() for word in _WORD.findall(text[:LONGEST])]
    counts: dict[Language, int] = {name: sum(word in known for word in words) for name, known in _KNOWN.items()}
    first, second, _third = sorted(_KNOWN, key=lambda name: counts[name], reverse=True)
    return first if counts[first] >= LEAST + LEAD * counts[second] else None
