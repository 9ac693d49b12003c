"""Drift by what is asked for: intents are told from words, chance is taken off, and too little says nothing."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest

from finetune_assets.serving import drift

SAYS = {
    "booking": ["quisiera reservar una hora", "¿tienen cita libre el {}?", "necesito agendar una visita para el {}"],
    "prices": ["¿cuánto cuesta la limpieza?", "precio de una endodoncia el {}", "¿cuál es la tarifa del blanqueamiento?"],
    "address": ["¿dónde queda la clínica?", "¿en qué calle están?", "¿cómo llego al consultorio el {}?"],
}
DAYS = ["lunes", "martes", "jueves", "viernes"]


def messages(shares: dict[str, float], count: int, seed: int) -> list[tuple[str, str]]:
    """(text, intent) drawn by their shares."""
    chance = random.Random(seed)
    drawn = chance.choices(list(shares), list(shares.values()), k=count)
    return [(chance.choice(SAYS[intent]).format(chance.choice(DAYS)), intent) for intent in drawn]


def dataset(folder: Path, rows: dict[str, Sequence[tuple[str, str]]]) -> Path:
    """A frozen data set's files, as far as drift reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    lineage: list[dict[str, object]] = []
    for split, said in rows.items():
        lines = [json.dumps({"messages": [{"role": "user", "content": text}]}) for text, _ in said]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        lineage += [{"split": split, "line": line, "intent": intent} for line, (_, intent) in enumerate(said)]
    pl.DataFrame(lineage).write_parquet(folder / "lineage.parquet")
    return folder


USUAL = {"booking": 0.6, "prices": 0.3, "address": 0.1}


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    splits = {"train": 300, "validation": 40, "test": 40}
    return dataset(tmp_path / "set", {split: messages(USUAL, count, n) for n, (split, count) in enumerate(splits.items())})


def test_people_who_ask_for_something_else_have_drifted(frozen: Path) -> None:
    texts = [text for text, _ in messages({"booking": 0.15, "prices": 0.3, "address": 0.55}, 400, 9)]
    found = {one.measure: one for one in drift.of_texts(texts, frozen)}
    assert not found["unknown_words"].drifted  # the words are those of the training set
    assert found["intents"].drifted
    assert found["intents"].distance == pytest.approx(0.45, abs=0.12)
    assert found["intents"].detail.startswith(("booking ", "address "))
    assert "(limit 0.2): " in found["intents"].text


@pytest.mark.parametrize("count", [100, 400, 3000])
def test_people_who_ask_as_before_have_not(frozen: Path, count: int) -> None:
    for seed in range(10, 30):
        found = drift.of_intents([text for text, _ in messages(USUAL, count, seed)], frozen)
        assert found.distance is not None
        assert found.distance < 0.12


def test_a_balanced_training_set_is_no_drift(tmp_path: Path) -> None:
    """Caps of intents change train alone: validation and test say what is really asked."""
    even = dict.fromkeys(SAYS, 1 / 3)
    made = dataset(
        tmp_path, {"train": messages(even, 300, 0), "validation": messages(USUAL, 60, 1), "test": messages(USUAL, 60, 2)}
    )
    assert not drift.of_intents([text for text, _ in messages(USUAL, 500, 3)], made).drifted


def test_too_little_says_nothing(frozen: Path, tmp_path: Path) -> None:
    few = [text for text, _ in messages(USUAL, 99, 1)]
    assert [one.distance for one in drift.of_texts(few, frozen)] == [None] * 3
    assert drift.of_intents(few * 2, tmp_path / "none") == drift.Drift("intents")
    unlabelled = {split: [(text, "unknown") for text, _ in messages(USUAL, 60, 1)] for split in ("train", "validation", "test")}
    assert drift.of_intents(few * 2, dataset(tmp_path / "unlabelled", unlabelled)).distance is None


def test_chance_is_what_two_samples_differ_by() -> None:
    chance = random.Random(1)
    kinds = [f"k{n}" for n in range(12)]

    def sample(count: int) -> Counter[str]:
        return Counter(chance.choices(kinds, range(1, 13), k=count))

    for sizes in ((100, 60), (2000, 80)):
        apart, expected = [], []
        for _ in range(200):
            a, b = (sample(size) for size in sizes)
            apart.append(sum(abs(a[k] / sizes[0] - b[k] / sizes[1]) for k in kinds) / 2)
            expected.append(drift.by_chance(a, b))
        assert sum(expected) / 200 == pytest.approx(sum(apart) / 200, rel=0.08)
