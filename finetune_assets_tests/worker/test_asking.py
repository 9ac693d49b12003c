"""Ways of asking are compared on the rows that every one of them fits, and one that fits none never wins."""

import math

import pytest

from finetune_assets.worker.asking import _bits
from finetune_assets.worker.generate import Generator
from finetune_assets.worker.retrieve import choose_shots
from finetune_assets_tests.tiny_model import make_tiny_model


def row(question: str, reference: str = "Claro, anoto la cita.") -> dict:
    return {"messages": [{"role": "user", "content": question}], "reference": reference}


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return Generator(str(make_tiny_model(tmp_path_factory.mktemp("tiny"), context=128)), 8)


SHORT = [row("hola"), row("una cita", "Con gusto, ¿qué día?")]
LONG = [{**one, "reference": "una cita " * 300} for one in SHORT]


def test_a_way_that_fits_nothing_is_infinite_and_not_chosen(generator: Generator):
    assert _bits(generator, [LONG, SHORT]) == [math.inf, pytest.approx(_bits(generator, [SHORT])[0])]
    assert _bits(generator, [LONG]) == [math.inf]
    count, numbers = choose_shots(2, SHORT, lambda k: LONG if k == 1 else SHORT, lambda ways: _bits(generator, ways))
    assert count == 2
    assert numbers["bits_per_byte"]["1"] is None


def test_ways_are_compared_on_the_rows_that_fit_both(generator: Generator):
    first, both = _bits(generator, [[SHORT[0], LONG[1]], SHORT])
    assert first == pytest.approx(both)
    assert both != pytest.approx(_bits(generator, [SHORT])[0])
