"""What is found, for whom, and how it is shown."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from finetune_assets.errors import SettingsError
from finetune_assets.evaluation.retrieval import (
    Bm25,
    Choice,
    Passage,
    best_retriever,
    documents,
    example,
    fuse,
    insert,
    paragraphs,
    top,
)
from finetune_assets.worker.retrieve import Index, choose, choose_shots

CHAT = [{"role": "system", "content": "Eres el asistente."}, {"role": "user", "content": "¿Cuánto cuesta una limpieza?"}]


def passage(source: str, question: str, text: str, tenant: str | None = "a") -> Passage:
    return Passage(source, tenant, question or text, question, text)


PASSAGES = [
    passage("example:1", "¿Cuánto sale una limpieza?", "Una limpieza cuesta 55 €."),
    passage("example:2", "¿A qué hora abren?", "Abrimos a las 9:00."),
    passage("example:3", "¿Cuánto cuesta una limpieza?", "Una limpieza cuesta 99 €.", "b"),
    passage("document:precios.md#1", "", "Precios: limpieza 55 €, revisión gratis.", None),
]


def encode(texts: Sequence[str]) -> np.ndarray:
    """Bags of words as unit vectors: real cosines without a model."""
    vectors = np.zeros((len(texts), 64), np.float32)
    for n, text in enumerate(texts):
        for word in text.lower().split():
            vectors[n, sum(word.encode()) % 64] += 1
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def test_bm25_by_hand():
    import math

    scores = Bm25(["a b", "a c c", "d"]).scores("c")
    weight = math.log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    assert scores.tolist() == pytest.approx([0, weight * 2 / (2 + 1.2 * (1 - 0.75 + 0.75 * 3 / 2)), 0])
    assert Bm25([]).scores("x").size == 0


def test_a_tenant_sees_its_own_and_everybodys_never_anothers():
    index = Index(PASSAGES, encode)
    for retriever in ("bm25", "dense", "hybrid"):
        found = index.find("¿Cuánto cuesta una limpieza?", "a", retriever, 3)
        assert found[0].source in ("example:1", "document:precios.md#1")
        assert all(p.tenant_id != "b" for p in found)
    assert index.find("limpieza", "b", "bm25", 1)[0].source == "example:3"
    assert Index([], encode).find("x", "a", "hybrid", 3) == []


def test_fusion_and_ties():
    assert int(np.argmax(fuse(np.array([3.0, 2, 1]), np.array([2.0, 3, 1])))) in (0, 1)
    assert top(np.array([1.0, 1.0, 2.0]), np.array([True, True, False]), 3) == [0, 1]


def test_templates():
    context = insert(CHAT, PASSAGES[:2], "context", "es")
    assert [m["role"] for m in context] == ["system", "user"]
    assert "55 €" in context[0]["content"]
    turns = insert(CHAT, [PASSAGES[0], PASSAGES[1], PASSAGES[3]], "turns", "es")
    assert [m["role"] for m in turns] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert turns[-2]["content"] == "Una limpieza cuesta 55 €."  # the best stands nearest to the question
    assert "revisión gratis" in turns[0]["content"]
    assert insert(CHAT[1:], [], "context", "es") == CHAT[1:]
    assert CHAT[0]["content"] == "Eres el asistente."


def test_documents_belong_to_their_folder(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "todos.md").write_text("Hola.\n\nAbrimos los lunes.")
    (tmp_path / "a" / "precios.txt").write_text("x " * 500 + "\n\nsegundo")
    (tmp_path / "foto.png").write_bytes(b"\x89PNG")
    found = {p.source: p.tenant_id for p in documents(tmp_path)}
    assert found == {"document:a/precios.txt#1": "a", "document:a/precios.txt#2": "a", "document:todos.md#1": None}
    with pytest.raises(SettingsError, match="no folder"):
        documents(tmp_path / "none")
    assert paragraphs("") == []


def test_the_choice_follows_the_rule():
    rows = [{"messages": CHAT, "reference": "Una limpieza cuesta 55 €.", "tenant_id": "a"}]
    index = Index(PASSAGES, encode)
    costs = {1: 0.9, 3: 0.5}

    def one(shown: dict) -> float:
        k = len(shown.get("sources", []))
        return 1.0 if not k else costs[k] + ("→" in shown["messages"][0]["content"]) * 0.1

    def bits(ways: list[list[dict]]) -> list[float]:
        return [one(asked[0]) for asked in ways]

    choice, numbers = choose(index, rows, bits, "es")
    assert (choice.k, choice.template) == (3, "turns")
    assert numbers["rows"] == 1
    assert numbers["without"] == 1.0
    assert set(numbers["nearness"]) == {"bm25", "dense", "hybrid"}
    costs[1] = 0.1
    assert choose(index, rows, bits, "es")[0].k == 1
    assert choose(index, [], bits, "es")[0] == Choice("hybrid", 1, "context")


def test_as_many_examples_are_shown_as_help_on_validation():
    costs = {1: 0.9, 3: 0.4, 5: 0.5}

    def chosen(count: int, rows: list[dict]) -> tuple[int, dict]:
        return choose_shots(count, rows, lambda k: [{"k": k}] * len(rows), lambda ways: [costs[way[0]["k"]] for way in ways])

    assert chosen(5, [{}, {}]) == (3, {"rows": 2, "bits_per_byte": {"1": 0.9, "3": 0.4, "5": 0.5}})
    costs[1] = 0.1
    assert chosen(3, [{}])[0] == 1
    assert chosen(5, []) == (5, {"rows": 0})


def test_the_retriever_nearest_to_the_references_wins():
    good, bad = [[PASSAGES[0]]], [[PASSAGES[1]]]
    name, means = best_retriever({"bm25": bad, "dense": good}, ["Una limpieza cuesta 55 €."])
    assert name == "dense"
    assert means["dense"] == 1.0


def test_an_example_is_searched_by_what_was_asked():
    made = example(
        "m", "a", [CHAT[0], {"role": "assistant", "content": "¿Qué día?"}, {"role": "user", "content": "lunes"}], "Listo."
    )
    assert made.query == "¿Qué día?\nlunes"
    assert (made.source, made.question, made.text) == ("example:m", "lunes", "Listo.")
