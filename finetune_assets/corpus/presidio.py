"""Presidio beside the built-in recognisers, for those who bring a model of names or want its patterns: an optional extra.

    FINETUNE_PRESIDIO=es,en               its pattern recognisers for these languages, with a blank spaCy pipeline and no model
    FINETUNE_PRESIDIO=es_core_news_md     an installed spaCy model, or the folder of one: names too, some hundred texts a second

Every text is looked at then, not only those in which a cheap pattern sees something. Values of SCORE and more count; the built-in
recognisers win where both find something. Install: `pip install finetune-assets[presidio]`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from typing import Any

from finetune_assets.environment import variable
from finetune_assets.errors import SettingsError

VARIABLE = "FINETUNE_PRESIDIO"
SCORE = 0.5
KIND_OF = {
    "PERSON": "name",
    "PHONE_NUMBER": "phone",
    "CREDIT_CARD": "credit_card",
    "IBAN_CODE": "iban",
    "IP_ADDRESS": "ip",
    "CRYPTO": "secret",
    "MEDICAL_LICENSE": "national_id",
    "US_SSN": "national_id",
    "US_ITIN": "national_id",
    "US_PASSPORT": "national_id",
    "UK_NHS": "national_id",
    "UK_NINO": "national_id",
    "ES_NIF": "national_id",
    "ES_NIE": "national_id",
    "IT_FISCAL_CODE": "national_id",
    "PL_PESEL": "national_id",
}
"""Presidio's entities that are replaced. Dates, places and links stay; its e-mail recogniser asks the network for domains."""


@cache
def configured() -> tuple[str, ...]:
    """The languages or models of the setting; empty where it is not set. Read once a process."""
    return tuple(name for part in (variable(VARIABLE) or "").split(",") if (name := part.strip()))


def find(text: str) -> Iterator[tuple[str, int, int]]:
    """Kind, start and end of what presidio finds. Raises SettingsError where it, or a model, is not installed."""
    engine, languages = _engine(configured())
    for language in languages:
        for found in engine.analyze(text, language, entities=_entities(engine, language), score_threshold=SCORE):
            yield KIND_OF[found.entity_type], found.start, found.end


def check() -> None:
    """Raises SettingsError where the setting names what is not installed; nothing where it is not set."""
    if configured():
        _engine(configured())


@cache
def _entities(engine: Any, language: str) -> list[str]:
    return sorted(set(engine.get_supported_entities(language)) & set(KIND_OF))


@cache
def _engine(names: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """An engine and its languages."""
    try:
        analyzer: Any = import_module("presidio_analyzer")
        nlp: Any = import_module("presidio_analyzer.nlp_engine")
        spans: Any = import_module("spacy.tokens")
    except ImportError:
        mend = "install it with `pip install finetune-assets[presidio]`, or unset the variable"
        raise SettingsError(f"{VARIABLE}={','.join(names)} needs the package presidio-analyzer; {mend}.") from None
    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)  # it names every recogniser of other languages
    pipelines: dict[str, Any] = {pipeline.lang: pipeline for pipeline in map(_pipeline, names)}

    class Pipelines(nlp.NlpEngine):
        """The spaCy pipelines of the setting, as presidio asks for them."""

        def load(self) -> None:
            """They are loaded."""

        def is_loaded(self) -> bool:
            return True

        def process_text(self, text: str, language: str) -> Any:
            doc = pipelines[language](text)
            people = [spans.Span(doc, one.start, one.end, "PERSON") for one in doc.ents if one.label_ in ("PER", "PERSON")]
            lemmas = [token.lemma_ or token.text.lower() for token in doc]
            return nlp.NlpArtifacts(people, doc, [token.idx for token in doc], lemmas, self, language)

        def process_batch(self, texts: Iterable[str], language: str, **_: Any) -> Any:
            return ((text, self.process_text(text, language)) for text in texts)

        def is_stopword(self, word: str, language: str) -> bool:
            return bool(pipelines[language].vocab[word].is_stop)

        def is_punct(self, word: str, language: str) -> bool:
            return bool(pipelines[language].vocab[word].is_punct)

        def get_supported_entities(self) -> list[str]:
            return ["PERSON"]

        def get_supported_languages(self) -> list[str]:
            return list(pipelines)

    engine = Pipelines()
    registry = analyzer.RecognizerRegistry(supported_languages=list(pipelines))
    registry.load_predefined_recognizers(languages=list(pipelines))
    people: Any = import_module("presidio_analyzer.predefined_recognizers").SpacyRecognizer
    for language, pipeline in pipelines.items():
        if pipeline.pipe_names:
            registry.add_recognizer(people(supported_language=language, supported_entities=["PERSON"]))
    return analyzer.AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=list(pipelines)), tuple(pipelines)


def _pipeline(name: str) -> Any:
    """A blank pipeline of a language, or a model: an installed one, or a folder."""
    spacy: Any = import_module("spacy")
    try:
        return spacy.load(name) if _is_model(name) else spacy.blank(name)
    except (OSError, ImportError):
        what = f"install the model: `python -m spacy download {name}`" if _is_model(name) else "it is no language of spaCy's"
        raise SettingsError(f"{VARIABLE} names {name!r}, which cannot be loaded; {what}.") from None


def _is_model(name: str) -> bool:
    return "_" in name or "/" in name
