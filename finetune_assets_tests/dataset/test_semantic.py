"""Examples that say the same: the walk against its definition, real embeddings of a real child process, and the lineage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_assets.dataset import choose, semantic
from finetune_assets.dataset.semantic import Floats, embedding, walk
from finetune_assets.errors import DataError
from finetune_assets_tests.dataset.small_corpus import Corpus, dental


@given(st.integers(0, 60), st.integers(1, 9), st.sampled_from([0.5, 0.8, 0.95]), st.integers(0, 10**6))
def test_a_row_is_dropped_for_the_first_kept_one_that_is_near(rows: int, block: int, threshold: float, seed: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(rows, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected: list[int] = []
    for row in range(rows):
        near = [other for other in range(row) if expected[other] == -1 and vectors[row] @ vectors[other] >= threshold]
        expected.append(near[0] if near else -1)
    before, semantic.BLOCK = semantic.BLOCK, block
    try:
        assert walk(vectors, threshold).tolist() == expected
    finally:
        semantic.BLOCK = before


def launch(spec: Path, output: Path) -> None:
    del output
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-m", "finetune_assets.worker", str(spec)], check=True, env=environment)


def test_paraphrases_with_the_packaged_model(corpus: Corpus, tmp_path: Path) -> None:
    corpus.fill()
    said = {
        1: ("Where is your restaurant located?", "We are at the main square, next to the old cathedral."),
        2: ("What is the location of your restaurant?", "You can find us at the main square, beside the old cathedral."),
        3: ("Do you have vegan dishes?", "Yes, three starters and four mains are vegan."),
    }
    one, two, other = (corpus.example(n, user_text=user, reply=reply, user="u_same") for n, (user, reply) in said.items())
    copy = corpus.example(4, user_text=said[1][0], reply=said[1][1] + " ok", user="u_same")  # newer than the first: it survives
    store = corpus.write()
    plain = choose(store, dental())
    assert {one: "near_duplicate"}.items() <= dict(plain.dropped.select("message_id", "reason").rows()).items()
    settings = dental(min_examples=1, filters={"semantic_duplicate": 0.85})  # the filler is a salad of the same words
    choice = choose(store, settings, embedding(launch, tmp_path / "work", settings.filters.semantic_model))
    dropped = {row[0]: row[1:] for row in choice.dropped.rows()}
    assert dropped[two] == ("semantic_duplicate", copy)
    assert dropped[one] == ("near_duplicate", copy)
    assert other not in dropped
    replaced = choice.kept.filter(pl.col("message_id") == copy)["replaced"].to_list()
    assert replaced == [sorted([one, two])]
    assert not list((tmp_path / "work").iterdir())


def test_twins_of_a_dropped_one_name_the_one_that_is_left(corpus: Corpus) -> None:
    corpus.fill()
    first = corpus.example(1, user_text="abcdefghij klmnop", reply="qrstuvwxyz 0123456789", user="u_same")
    twin = corpus.example(2, user_text="abcdefghij klmnop", reply="qrstuvwxyz 0123456780", user="u_same")
    best = corpus.example(3, user_text="otra cosa bien distinta", reply="una respuesta sin parecido", user="u_same")

    def embed(texts: list[str]) -> Floats:
        same = [text.startswith(("abc", "otra")) for text in texts]
        rows = np.eye(len(texts) + 1, dtype=np.float32)[1:]
        rows[same] = np.eye(len(texts) + 1, dtype=np.float32)[0]
        return rows

    choice = choose(corpus.write(), dental(filters={"semantic_duplicate": 0.9}), embed)
    dropped = {row[0]: row[1:] for row in choice.dropped.rows()}
    assert dropped[twin] == ("semantic_duplicate", best)
    assert dropped[first] == ("near_duplicate", best)


def test_without_a_way_to_embed_it_says_so(corpus: Corpus) -> None:
    corpus.fill()
    with pytest.raises(DataError, match="semantic_duplicate"):
        choose(corpus.write(), dental(filters={"semantic_duplicate": 0.9}))
