"""Presidio as an option: what it adds, what it leaves, and what is said where it is not installed."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path

import polars as pl
import pytest

from finetune_assets.corpus import personal_data as pd
from finetune_assets.corpus import presidio
from finetune_assets.corpus.scrubbing import own_digest
from finetune_assets.errors import SettingsError

WALLET = "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa"


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Generator[pytest.MonkeyPatch]:
    presidio.configured.cache_clear()
    pd.found_in.cache_clear()
    yield monkeypatch
    presidio.configured.cache_clear()
    pd.found_in.cache_clear()


def test_without_the_setting_nothing_of_it_is_imported(setting: pytest.MonkeyPatch) -> None:
    setting.delenv(presidio.VARIABLE, raising=False)
    assert pd.find(f"mi monedero es {WALLET}") == []
    assert own_digest({}, {}) == ""
    presidio.check()


def test_what_is_not_installed_is_named(setting: pytest.MonkeyPatch) -> None:
    setting.setenv(presidio.VARIABLE, "es,pt")
    setting.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(SettingsError, match=r"FINETUNE_PRESIDIO=es,pt needs .*pip install finetune-assets\[presidio\]"):
        presidio.check()


@pytest.mark.slow  # its imports alone take some seconds
def test_patterns_and_models_beside_the_built_in_ones(setting: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("presidio_analyzer", reason="presidio is not installed: pip install finetune-assets[presidio]")
    setting.setenv(presidio.VARIABLE, "es,en")
    assert own_digest({}, {}) != ""
    texts = [f"Mi monedero es {WALLET}", "Mi correo es ana@example.org", "Mesa para 12 a las 10:30"]
    assert pd.needs_look(pl.Series([*texts, None])).to_list() == [True] * 3 + [False]
    scrubbed, counts = pd.scrub_conversation(texts)
    assert scrubbed == ["Mi monedero es [SECRET]", "Mi correo es [EMAIL]", texts[2]]
    assert counts == {"secret": 1, "email": 1}
    assert not pd.residual(scrubbed)
    assert pd.scrub_conversation(scrubbed) == (scrubbed, {})
    presidio.configured.cache_clear()
    pd.found_in.cache_clear()
    import spacy

    names = spacy.blank("es")  # stands in for a model of names, which cannot be loaded down here
    names.add_pipe("entity_ruler").add_patterns([{"label": "PER", "pattern": "Zacarías Montepío"}])
    names.to_disk(tmp_path / "names")
    setting.setenv(presidio.VARIABLE, str(tmp_path / "names"))
    talk = ["Ayer me atendió Zacarías Montepío y bien", "Le digo a Zacarías"]
    assert pd.scrub_conversation(talk)[0] == ["Ayer me atendió [NAME] y bien", "Le digo a [NAME]"]
    presidio.configured.cache_clear()
    setting.setenv(presidio.VARIABLE, "es_core_news_none")
    with pytest.raises(SettingsError, match=r"python -m spacy download es_core_news_none"):
        presidio.check()
