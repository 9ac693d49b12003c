"""Studies, links, ratings: who rates what, what is stored, what it says."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest

from finetune_assets.assistants.settings.evaluation import Judge
from finetune_assets.errors import DataError
from finetune_assets.evaluation.candidates import TestRow as Row
from finetune_assets.evaluation.human import book, links, statistics, study
from finetune_assets.evaluation.subject import rated as rated_pairs
from finetune_assets.registry import Ledger
from finetune_assets.storage import Store

KEY = b"a key"


def rows(count: int) -> list[Row]:
    said = [{"role": "system", "content": "Eres…"}, {"role": "user", "content": "hola"}]
    return [Row(said, f"referencia {n}", f"c{n // 2}", f"m{n}", "clinic_a", "other") for n in range(count)]


def made(count: int = 40, raters: tuple[str, ...] = ("ana", "luis"), kind: str = "pairs") -> study.Study:
    frames = {name: pl.DataFrame({"reply": [f"{name} {n}" for n in range(count)]}) for name in ("tuned", "base")}
    items = study.pairs(rows(count), frames, ["tuned", "base"], 30) if kind == "pairs" else study.examples(rows(count), 30)
    names = ["tuned", "base"] if kind == "pairs" else ["example"]
    return study.Study("dental", "s1", kind, "es", "v1", names, study.assign(items, raters), items)


def test_pairs_are_different_replies_of_many_conversations():
    frames = {
        "tuned": pl.DataFrame({"reply": ["a", "b", " c ", None, "e", "f"]}),
        "base": pl.DataFrame({"reply": ["a", "x", "c", "y", "z", "w"]}),
    }
    found = study.pairs(rows(6), frames, ["tuned", "base"], 10)
    assert {item.message_id for item in found} == {"m1", "m4", "m5"}
    assert len({item.conversation_id for item in found[:2]}) == 2
    same = {name: pl.DataFrame({"reply": ["a"] * 6}) for name in ("tuned", "base")}
    with pytest.raises(DataError, match="nothing to compare"):
        study.pairs(rows(6), same, ["tuned", "base"], 10)


def test_a_fifth_of_the_items_has_two_raters():
    given = Counter(name for names in made().raters.values() for name in names)
    assert len(given) == 30
    assert sum(count == 2 for count in given.values()) == 6
    assert sum(given.values()) == 36
    alone = made(raters=("ana",))
    assert len(alone.raters["ana"]) == 30


def test_sides_are_random_and_stay():
    one = made(400)
    sides = [one.sides(item, "ana")[0] for item in one.items]
    assert 5 < sides.count("tuned") < 25
    assert sides == [one.sides(item, "ana")[0] for item in one.items]
    assert any(one.sides(item, "ana") != one.sides(item, "luis") for item in one.items)


def test_links_are_signed_and_run_out():
    rater = links.Rater("dental", "s1", "ana", 1000)
    token = links.sign(rater, KEY)
    assert links.read(token, KEY, 999) == rater
    for bad in (token[:-1], "x" + token, token.replace(".", "!"), "", "…", links.sign(rater, b"another key")):
        with pytest.raises(links.LinkRefused, match="not valid"):
            links.read(bad, KEY, 0)
    with pytest.raises(links.LinkRefused, match="expired"):
        links.read(token, KEY, 1001)


def test_an_answer_counts_once_and_the_last_one(tmp_path: Path):
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    one = made()
    item = one.raters["ana"][0]
    side = {"left": one.sides(one.item(item), "ana")[0], "right": one.sides(one.item(item), "ana")[1]}
    for choice in ("left", "right", "right"):
        book.record(ledger.engine, book.rating_of(one, "ana", item, choice, ["tone", "nonsense"], 3.0))
    (stored,) = book.of_study(ledger.engine, "dental", "s1")
    assert stored.choice == side["right"]
    assert stored.left == side["left"]
    assert stored.tags == ["tone"]
    with pytest.raises(DataError, match="none of left"):
        book.rating_of(one, "ana", item, "accept", [], None)
    with pytest.raises(DataError, match="not one of the items"):
        book.rating_of(one, "ana", "nothing", "left", [], None)
    ledger.close()


def test_a_judge_is_held_to_ratings_of_its_own_pairs(tmp_path: Path):
    store, ledger = Store(tmp_path), Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    for at, (name, against) in enumerate((("theirs", "gpt"), ("s1", "base"), ("live", "live"))):
        one = study.Study(**{**vars(made()), "name": name, "candidates": ["tuned", against]})
        os.utime(study.write(store, one), (at, at))
        choice = "left" if one.sides(one.items[0], "ana")[0] == "tuned" else "right"
        rater = next(rater for rater, items in one.raters.items() if one.items[0].item in items)
        rated = book.rating_of(one, rater, one.items[0].item, choice, [], None)
        book.record(ledger.engine, book.Rating(**{**vars(rated), "choice": "tuned" if against == "base" else against}))
    version = SimpleNamespace(assistant="dental", version="v1")

    def said(against: str) -> list[str]:
        judge = Judge(url="http://127.0.0.1:9/v1", model="m", against=against)
        return list(rated_pairs(store, ledger, version, judge).values())  # type: ignore[arg-type]

    assert (said("base"), said("gpt"), said("other")) == (["first"], ["second"], [])
    assert rated_pairs(store, ledger, version, None) == {}  # type: ignore[arg-type]
    version.version = "v2"
    assert said("base") == []
    ledger.close()


def test_export_and_import_are_each_others_inverse(tmp_path: Path):
    one = made()
    shared = next(name for name in one.raters["ana"] if name in one.raters["luis"])
    names = [name for name in one.raters["ana"] if name != shared]
    rated = [
        book.Rating("dental", "s1", names[0], "ana", "tuned", "base", [], 1.5),
        book.Rating("dental", "s1", names[1], "ana", "tie", "base", ["tone"]),
        book.Rating("dental", "s1", shared, "ana", "tuned", "base", []),
        book.Rating("dental", "s1", shared, "luis", "base", "base", []),
    ]
    assert book.export(one, rated, tmp_path) == {"ratings.jsonl": 4, "preferences.jsonl": 1}
    assert book.read_ratings(tmp_path / "ratings.jsonl", one) == rated
    (pair,) = map(json.loads, (tmp_path / "preferences.jsonl").read_text().splitlines())
    assert pair["chosen"][0]["content"] == one.item(names[0]).replies["tuned"]
    assert pair["rejected"][0]["content"] == one.item(names[0]).replies["base"]
    assert [m["role"] for m in pair["prompt"]] == ["system", "user"]
    (tmp_path / "ratings.jsonl").write_text('{"item": "x"}\n')
    with pytest.raises(DataError, match="jsonl:1"):
        book.read_ratings(tmp_path / "ratings.jsonl", one)


def test_a_rejected_example_is_negative_feedback_that_the_corpus_reads(tmp_path: Path):
    from finetune_assets.corpus.sources import read_source

    one = made(kind="review")
    rated = [
        book.Rating("dental", "s1", one.items[n].item, "ana", choice, "example", ["tone"])
        for n, choice in ((0, "accept"), (1, "reject"))
    ]
    assert book.export(one, rated, tmp_path)["feedback.parquet"] == 2
    frame = pl.read_parquet(tmp_path / "feedback.parquet")
    assert frame["feedback_type"].to_list() == ["positive", "negative"]
    assert frame["message_id"].to_list() == [item.message_id for item in one.items[:2]]
    sample = Path(__file__).parents[3] / "data" / "sample"
    for name in ("conversations", "messages"):
        (tmp_path / f"{name}.parquet").symlink_to(sample / f"{name}.parquet")
    (tmp_path / "ratings.jsonl").unlink()
    assert read_source([str(tmp_path)]).feedback.height == 2


def test_win_rate_agreement_and_bias_of_simulated_raters():
    chance = random.Random(5)
    one = made(600, tuple(f"r{n}" for n in range(4)))
    one = study.Study(**{**vars(one), "items": study.pairs(rows(600), frames(600), ["tuned", "base"], 300)})
    one = study.Study(**{**vars(one), "raters": study.assign(one.items, list(one.raters))})
    better = {item.item: chance.random() < 0.7 for item in one.items}
    rated = []
    for rater, names in one.raters.items():
        for name in names:
            true = better[name] if chance.random() < 0.9 else not better[name]
            won = "tie" if chance.random() < 0.1 else "tuned" if true else "base"
            rated.append(book.Rating("dental", "s1", name, rater, won, one.sides(one.item(name), rater)[0], []))
    found = statistics.evaluate(one, rated)
    assert found.win_rate.low < 0.66 < found.win_rate.high
    assert found.win_rate.low > 0.5
    assert 0.3 < found.alpha < 0.95
    assert found.left.low < 0.5 < found.left.high
    assert found.raters == 4
    always_left = [book.Rating("dental", "s1", r.item, r.rater, r.left, r.left, []) for r in rated]
    assert statistics.evaluate(one, always_left).left.value == 1.0
    assert statistics.evaluate(one, []).win_rate.value is None


def frames(count: int) -> dict[str, pl.DataFrame]:
    return {name: pl.DataFrame({"reply": [f"{name} {n}" for n in range(count)]}) for name in ("tuned", "base")}


def test_krippendorff_by_hand():
    """The nominal example of Krippendorff (2011), section C: two observers, ten units, alpha 0.095."""
    one = list("0100000010")
    two = list("1110010000")
    assert statistics.krippendorff(list(zip(one, two, strict=True))) == pytest.approx(0.095, abs=5e-4)
    assert statistics.krippendorff([["a", "a"], ["b", "b"]]) == 1
    assert statistics.krippendorff([["a"], ["b"]]) is None
    assert statistics.krippendorff([["a", "a"]]) is None


def test_pairs_needed_as_published():
    assert [study.pairs_needed(rate) for rate in (0.6, 0.65, 0.7)] == [194, 85, 47]


def test_a_study_is_never_overwritten(tmp_path: Path):
    store = Store(tmp_path)
    study.write(store, made())
    assert study.load(store, "dental", "s1") == made()
    with pytest.raises(DataError, match="is there already"):
        study.write(store, made())
    with pytest.raises(DataError, match="there are: s1"):
        study.load(store, "dental", "s2")
    assert study.newest(store, "dental") == made()
    assert study.newest(store, "none") is None
