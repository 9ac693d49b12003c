"""Single measures, on the cases that break them."""

import polars as pl
import pytest

from finetune_assets.evaluation.measures import MEASURES, Outputs, estimates, intervals, is_repeated, personal_data
from finetune_assets.evaluation.statistics import Bootstrap
from finetune_assets.worker.benchmark import COLUMNS
from finetune_assets.worker.scores import texts


@pytest.mark.parametrize(
    "reply",
    ["la cita la cita la cita", "no no no no no", "ok " * 3000, "a" * 10_000, "Sí. ¿A qué hora? ¿A qué hora? ¿A qué hora?"],
)
def test_loops(reply: str):
    assert is_repeated(reply)


@pytest.mark.parametrize(
    "reply", ["", "Sí, sí, sí, con gusto.", "Atendemos de 9 a 12 y de 14 a 18, de lunes a viernes.", "Jajaja muy bien"]
)
def test_talk_is_no_loop(reply: str):
    assert not is_repeated(reply)


def test_placeholders_are_not_personal_data():
    assert not personal_data("Llame al [PHONE] o escriba a [EMAIL_2].")
    assert personal_data("Escriba a ana.perez@example.org") == {"email": 1}


def test_a_clinic_may_say_its_own_contacts():
    contacts = frozenset({"+34 912 345 678"})
    assert not personal_data("Llámenos al 912 345 678.", contacts)
    assert personal_data("Llámenos al 912 345 678 o a ana.perez@example.org", contacts) == {"email": 1}


def frame(replies: list[str], references: list[str], nll: list[float | None]) -> pl.DataFrame:
    count = len(replies)
    columns = {
        "row": list(range(count)),
        "reply": replies,
        "missing": [None] * count,
        "sources": [[]] * count,
        "nll": nll,
        "reference_tokens": [10] * count,
        "reference_bytes": [len(r.encode()) for r in references],
        "prompt_tokens": [5] * count,
        "reply_tokens": [4] * count,
        "stopped": [True] * count,
        "dropped_turns": [0] * count,
        "seconds": [0.2] * count,
        "similarity": [0.9 if r else None for r in references],
        "toxicity": [None] * count,
        "floor": [0.2] * count,
        **texts(replies, references),
    }
    return pl.DataFrame(columns, schema=COLUMNS)


def test_values_by_hand():
    import math

    import numpy as np

    replies, references = ["hola", "", "x" * 10_000, "hola"], ["hola", "adiós", "", "hola"]
    outputs = Outputs(frame(replies, references, [6.931, None, 6.931, 6.931]), {"bytes": 10, "parameters": 5}, np.zeros((4, 2)))
    bootstrap = Bootstrap(["a", "a", "b", "c"])
    found = intervals(outputs, estimates(outputs), bootstrap, 3.6)
    assert list(found) == list(MEASURES)
    assert found["loss"].value == pytest.approx(0.6931)
    assert found["perplexity"].value == pytest.approx(math.exp(0.6931))
    assert found["bits_per_byte"].value == pytest.approx(3 * 6.931 / math.log(2) / 8)
    assert found["empty"].value == 0.25
    assert found["repeated"].value == 0.25
    assert found["rules"].value is None
    assert found["similarity_gain"].value == pytest.approx(0.7)
    assert found["tokens_per_second"].value == pytest.approx(20)
    assert found["usd_per_1000"].value == pytest.approx(0.2)
    assert intervals(outputs, estimates(outputs), bootstrap, None)["usd_per_1000"].value is None


def test_what_nobody_answered_is_nothing_never_zero():
    import numpy as np

    missing = frame(["", ""], ["hola", "adiós"], [None, None]).with_columns(
        reply=pl.lit(None, pl.String), seconds=pl.lit(None, pl.Float64), stopped=pl.lit(None, pl.Boolean)
    )
    outputs = Outputs(missing, {"url": "http://127.0.0.1:9/v1"}, np.zeros((2, 2)))
    found = intervals(outputs, estimates(outputs), Bootstrap(["a", "b"]), 3.6)
    assert {name for name, interval in found.items() if interval.value is not None} == set()
