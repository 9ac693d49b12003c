"""Near-duplicates against brute force on real texts, the greedy walk's promises, and texts out of templates."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz import fuzz, process

from finetune_assets.corpus import near_duplicates as nd

SGD = Path(__file__).parents[3] / "shared" / "data" / "sgd" / "messages.parquet"


def turns() -> pl.Series:
    if not SGD.exists():
        pytest.skip(f"{SGD.name} of the shared SGD exports is absent")
    messages = pl.read_parquet(SGD).filter(pl.col("content").is_not_null()).sort("conversation_id", "created_at", "message_id")
    previous = pl.col("content").shift(1).over("conversation_id")
    messages = messages.with_columns(turn=previous + " " + pl.col("content"))
    turn = messages.filter((pl.col("role") == "assistant") & pl.col("turn").is_not_null())["turn"]
    short = messages.filter(pl.col("content").str.len_chars() <= 55)["content"]
    return pl.concat([turn.sample(3_000, seed=1), short.sample(4_000, seed=1)])


@pytest.fixture(scope="module")
def real() -> list[str]:
    return nd.normalise(turns()).unique(maintain_order=True).head(5_000).to_list()


def brute(texts: list[str], threshold: float) -> dict[tuple[int, int], float]:
    pairs: dict[tuple[int, int], float] = {}
    for first in range(0, len(texts), 500):
        block = texts[first : first + 500]
        scores = process.cdist(block, texts, scorer=fuzz.ratio, score_cutoff=100 * threshold, dtype=np.float32)
        for i, j in zip(*(axis.tolist() for axis in np.nonzero(scores)), strict=True):
            if first + i < j:
                pairs[first + i, j] = float(scores[i, j]) / 100
    return pairs


def as_set(pairs: nd.Pairs) -> set[tuple[int, int]]:
    return set(zip(pairs.left.tolist(), pairs.right.tolist(), strict=True))


@pytest.mark.parametrize("threshold", [0.75, 0.85, 0.9, 0.95])
def test_agrees_with_brute_force_on_real_texts(real: list[str], threshold: float) -> None:
    exact = brute(real, threshold)
    found = nd.find_pairs(real, threshold)
    assert len(exact) > 20
    assert not as_set(found) - set(exact), "a pair below the threshold"
    assert len(as_set(found)) >= 0.995 * len(exact)
    rows = list(zip(found.left.tolist(), found.right.tolist(), strict=True))
    assert rows == sorted(rows)
    assert all(abs(exact[pair] - score) < 1e-5 for pair, score in zip(rows, found.score.tolist(), strict=True))


def test_order_of_real_texts_never_matters(real: list[str]) -> None:
    texts = real[:2_000]
    order = np.random.default_rng(3).permutation(len(texts))
    names = {frozenset((texts[i], texts[j])) for i, j in as_set(nd.find_pairs(texts))}
    shuffled = [texts[i] for i in order]
    assert names == {frozenset((shuffled[i], shuffled[j])) for i, j in as_set(nd.find_pairs(shuffled))}


def test_blocks_answer_like_the_walk_over_all_pairs(real: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nd, "FIRST_BLOCK", 200)
    monkeypatch.setattr(nd, "ENOUGH", 0)
    rank = np.random.default_rng(4).permutation(len(real))
    walked = nd.keep_best(len(real), nd.find_pairs(real), rank)
    assert (walked >= 0).sum() > 50
    assert (nd.drop_near_duplicates(real, rank) == walked).all()


def test_texts_out_of_templates_do_not_explode() -> None:
    draw = random.Random(1)
    templates = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=160)) for _ in range(20)]
    texts = sorted({f"{t[:60]}{draw.randrange(10**6):06d}{t[60:]}" for t in templates for _ in range(1_000)}, key=hash)
    kept_by = nd.drop_near_duplicates(texts, np.arange(len(texts)))
    assert (kept_by == -1).sum() == len(templates)


words = st.sampled_from(
    ["cita", "hora", "mañana", "quiero", "reservar", "mesa", "para", "dos", "tres", "gracias", "sí", "no", "el viernes"]
)
sentence = st.lists(words, max_size=14).map(" ".join) | st.text(max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(sentence, max_size=40), st.sampled_from([0.8, 0.9]), st.randoms(use_true_random=False))
def test_every_dropped_text_has_a_verified_kept_partner(texts: list[str], threshold: float, draw: random.Random) -> None:
    rank = list(range(len(texts)))
    draw.shuffle(rank)
    kept_by = nd.drop_near_duplicates(texts, np.array(rank, dtype=np.int64), threshold)
    for row, kept in enumerate(kept_by.tolist()):
        if kept >= 0:
            assert kept_by[kept] == -1
            assert rank[kept] < rank[row]
            assert fuzz.ratio(texts[kept], texts[row]) >= 100 * threshold - 1e-9
    assert len({texts[i] for i in range(len(texts)) if kept_by[i] == -1}) == int((kept_by == -1).sum())


@settings(max_examples=60, deadline=None)
@given(st.lists(sentence, max_size=30, unique=True), st.randoms(use_true_random=False))
def test_order_never_matters(texts: list[str], draw: random.Random) -> None:
    shuffled = draw.sample(texts, len(texts))
    pairs = {frozenset((texts[i], texts[j])) for i, j in as_set(nd.find_pairs(texts))}
    assert pairs == {frozenset((shuffled[i], shuffled[j])) for i, j in as_set(nd.find_pairs(shuffled))}


def test_new_texts_against_stored_signatures(real: list[str]) -> None:
    old, new = real[:3_000], real[3_000:]
    between = as_set(nd.pairs_between(nd.signatures(old), old, nd.signatures(new), new))
    assert between == {(i, j - 3_000) for i, j in as_set(nd.find_pairs(real)) if i < 3_000 <= j}
    with pytest.raises(ValueError, match="sign them again"):
        nd.pairs_between(nd.signatures(old, 0.95), old, nd.signatures(new), new)


def test_a_text_is_dropped_only_if_its_partner_is_kept() -> None:
    chain = nd.Pairs(np.array([0, 1], dtype=np.int32), np.array([1, 2], dtype=np.int32), np.ones(2, dtype=np.float32))
    assert nd.keep_best(3, chain, np.array([0, 1, 2])).tolist() == [-1, 0, -1]
    assert nd.keep_best(3, chain, np.array([1, 0, 2])).tolist() == [1, -1, 1]


def test_equal_texts() -> None:
    assert nd.drop_near_duplicates(["hola", "hola", "", "hola", ""], np.array([4, 1, 3, 2, 0])).tolist() == [1, -1, 4, 1, -1]
    with pytest.raises(ValueError, match="2 of 4 texts repeat"):
        nd.find_pairs(["a", "a", "a", "b"])
    with pytest.raises(ValueError, match=r"threshold 1\.5"):
        nd.find_pairs(["a"], 1.5)
    assert len(nd.find_pairs([])) == 0


def test_normalise() -> None:
    texts = pl.Series(["  ¡Hola,   Señor! 👍🏽 ", "ＡＢＣ ﬁn", "STRASSE Straße", "cafe\u0301", "10:30\n\tOK ☎️", None, "👋"])
    assert nd.normalise(texts).to_list() == ["hola señor", "abc fin", "strasse strasse", "café", "1030 ok", None, ""]


@given(
    st.lists(
        st.text(st.one_of(st.characters(max_codepoint=0x24F), st.sampled_from(" \t\n.¿¡ñÁ\u0301ﬁ👍")), max_size=30), max_size=8
    )
)
def test_the_kernel_normalises_as_the_patterns_do(texts: list[str]) -> None:
    few = pl.Series("text", [*texts, "", " a\t. B ", "ÑANDÚ ¿qué?"])
    many = pl.concat([few] * (nd.FEW // len(few) + 1))
    assert nd.normalise(many).head(len(few)).equals(nd.normalise(few))
    assert nd.normalise(many).tail(len(few)).equals(nd.normalise(few))


def test_exact_keys_are_the_same_everywhere() -> None:
    assert nd.exact_keys(["", "señal"]).tolist() == [13020603013274838756, 974497926554310029]
    assert len(set(nd.exact_keys([str(i) for i in range(1_000)]).tolist())) == 1_000


def test_numba_is_imported_at_the_first_call_only() -> None:
    code = "import sys, finetune_assets.corpus.near_duplicates; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0
