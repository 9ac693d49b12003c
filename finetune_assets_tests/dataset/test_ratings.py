"""What raters said on the rating page, in the data set that is built from the same store."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl
import pytest

from finetune_assets.dataset import check_leaks, choose, freeze
from finetune_assets.dataset.formats import read_lines
from finetune_assets.evaluation.human import book, study
from finetune_assets.evaluation.human.training import ratings_of
from finetune_assets.registry import Ledger
from finetune_assets.storage import Store
from finetune_assets_tests.dataset.small_corpus import Corpus, dental, sentence


@pytest.fixture
def ledger(corpus: Corpus) -> Iterator[Ledger]:
    opened = Ledger(f"sqlite:///{corpus.store.home / 'ledger.db'}")
    yield opened
    opened.close()


@pytest.fixture
def store(corpus: Corpus) -> Store:
    for number in range(160):
        corpus.example(number)
    return corpus.write()


def make_study(store: Store, kind: study.Kind, rows: pl.DataFrame) -> study.Study:
    items = []
    for n, row in enumerate(rows.iter_rows(named=True)):
        replies = {"tuned": f"Sí, {sentence(n, 'tuned')}.", "base": f"No, {sentence(n, 'base')}."}
        given = replies if kind == "pairs" else {"example": row["reply"]}
        items.append(study.Item(f"i{n}", row["conversation_id"], row["message_id"], row["tenant_id"], row["context"], "", given))
    names = ["tuned", "base"] if kind == "pairs" else ["example"]
    made = study.Study("dental", kind, kind, "es", "v1", names, study.assign(items, ["ana", "luz"], overlap=0), items)
    study.write(store, made)
    return made


def rate(ledger: Ledger, of: study.Study, item: str, choice: str, rater: str = "ana") -> None:
    book.record(ledger.engine, book.Rating("dental", of.name, item, rater, choice, of.candidates[0], []))


def test_blind_pairs_are_preferences_with_the_split_of_their_message(store: Store, ledger: Ledger) -> None:
    assistant = dental()
    first = choose(store, assistant)
    kept = pl.concat(first.contexts(first.kept))
    rows = pl.concat([kept.filter(pl.col("split") == split).head(6) for split in ("test", "train")])
    pairs = make_study(store, "pairs", rows)
    for n in range(12):
        rate(ledger, pairs, f"i{n}", "base" if n % 6 == 1 else "tie" if n % 6 == 2 else "tuned")
    rate(ledger, pairs, "i3", "base", rater="luz")  # they disagree
    choice = choose(store, assistant, ratings=ratings_of(store, ledger.engine, "dental"))
    found = choice.preferences
    assert set(found["source"]) == {"rated"}
    assert found.group_by("split").len().sort("split").rows() == [("test", 4), ("train", 5)]
    lost = found.filter(pl.col("message_id") == rows["message_id"][1])
    assert lost.select("chosen", "rejected").row(0) == (pairs.items[1].replies["base"], pairs.items[1].replies["tuned"])
    folder = store.dataset("dental", freeze(store, assistant, choice)["fingerprint"])
    assert check_leaks(folder) == []
    assert len(list(read_lines(folder / "preferences.jsonl"))) == 5
    (line, *_) = read_lines(folder / "preferences_heldout.jsonl")
    assert [m["role"] for m in line["prompt"]] == ["system", "user"]
    again = choose(store, assistant, ratings=ratings_of(store, ledger.engine, "dental"))
    assert freeze(store, assistant, again)["fingerprint"] == folder.name


def test_pairs_of_people_without_consent_or_of_others_are_left_out(corpus: Corpus, ledger: Ledger) -> None:
    for number in range(160):
        corpus.example(number, training_consent=number != 7)
    store = corpus.write()
    rows = pl.DataFrame(corpus.examples).filter(pl.col("message_id").is_in(["msg_00007", "msg_00008"]))
    pairs = make_study(store, "pairs", rows.with_columns(message_id=pl.Series(["msg_00007", "gone"])))
    rate(ledger, pairs, "i0", "tuned")
    rate(ledger, pairs, "i1", "tuned")
    assert choose(store, dental(), ratings=ratings_of(store, ledger.engine, "dental")).preferences.is_empty()


def test_a_rejected_example_is_not_trained_on_nor_is_its_twin(corpus: Corpus, ledger: Ledger) -> None:
    for number in range(160):
        corpus.example(number)
    corrected = corpus.example(200, user="u_1")
    corpus.rate(corrected, "negative", expected=f"Mejor así: {sentence(200, 'fix')}")
    first = corpus.examples[4]
    twin = corpus.example(201, user=first["user"], user_text=first["user_text"], reply=first["reply"] + "!")
    store, assistant = corpus.write(), dental()
    before = choose(store, assistant)
    kept = pl.concat(before.contexts(before.kept))
    assert corrected in set(kept["message_id"])
    survivor = next(one for one in (first["message_id"], twin) if one in set(kept["message_id"]))
    wanted = kept.filter(pl.col("message_id").is_in([corrected, survivor, "msg_00010"])).sort("message_id")
    review = make_study(store, "review", wanted)
    for item in review.items:
        rate(ledger, review, item.item, "accept" if item.message_id == "msg_00010" else "reject")
    rate(ledger, review, review.items[0].item, "accept", rater="luz")  # one each: refused
    choice = choose(store, assistant, ratings=ratings_of(store, ledger.engine, "dental"))
    reasons = dict(choice.dropped.select("message_id", "reason").rows())
    assert reasons[corrected] == reasons[survivor] == "rejected_in_review"
    assert reasons[({first["message_id"], twin} - {survivor}).pop()] == "same_as_negative"
    assert "msg_00010" in set(choice.kept["message_id"])
    assert choice.preferences.is_empty()  # the refused correction makes no pair either
    assert choice.kept.height - choice.notes["augmented"]["rows"] + choice.dropped.height == choice.notes["read"]

    corpus.rate(corrected, "negative", expected=f"Mucho mejor: {sentence(200, 'newer')}")
    again = choose(corpus.write(), assistant, ratings=ratings_of(store, ledger.engine, "dental"))
    assert corrected in set(again.kept["message_id"])
