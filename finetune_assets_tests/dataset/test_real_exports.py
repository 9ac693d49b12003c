"""The real exports of ../shared through ingestion to the frozen data set, against what `truth.json` says was planted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rapidfuzz import fuzz

from finetune_assets.assistants import Assistant, load_assistant
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.near_duplicates import normalise
from finetune_assets.corpus.personal_data import residual
from finetune_assets.corpus.sources import read_source
from finetune_assets.dataset import Choice, check_leaks, choose, freeze, latest
from finetune_assets.dataset.formats import read_lines
from finetune_assets.environment import ROOT
from finetune_assets.storage import Store, read_json, write_parquet

SGD = Path(__file__).parents[2] / ".." / "shared" / "data" / "sgd"
pytestmark = pytest.mark.skipif(not SGD.is_dir(), reason="../shared/data/sgd is absent")
NAMES = ("dental", "restaurant", "clinic_aurora")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("sgd"))
    source = read_source([str(SGD)])
    weeks = stale_weeks(store, source).all_weeks
    ingest_conversations(store, source, weeks, store.key())
    ingest_feedback(store, source, weeks, store.key())
    build_examples(store, store.weeks("conversations"))
    return store


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    return read_json(SGD / "truth.json")


def assistant(store: Store, name: str) -> Assistant:
    return load_assistant(ROOT / "finetune_assets" / "assistants", name, read_json(store.tenants)).model_copy(
        update={"min_examples": 50}
    )


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest, store: Store) -> tuple[str, Choice, Path]:
    settings = assistant(store, request.param)
    choice = choose(store, settings)
    freeze(store, settings, choice)
    folder = latest(store, request.param)
    assert folder is not None
    return request.param, choice, folder


def lines(folder: Path, kind: str = "") -> pl.DataFrame:
    """The lineage with the objects of its lines."""
    lineage = pl.read_parquet(folder / f"{kind}lineage.parquet")
    parts = []
    for name, splits in (
        [(split, [split]) for split in ("train", "validation", "test")]
        if not kind
        else [(kind.strip("_"), ["train"]), (f"{kind.strip('_')}_heldout", ["validation", "test"])]
    ):
        part = lineage.filter(pl.col("split").is_in(splits)).sort("line")
        parts.append(part.with_columns(pl.Series("object", list(read_lines(folder / f"{name}.jsonl")), dtype=pl.Object)))
    return pl.concat(parts, how="vertical")


def test_bad_replies_are_never_targets(made: tuple[str, Choice, Path], truth: dict[str, Any]) -> None:
    _, choice, folder = made
    bad = set(truth["bad_replies"])
    texts = dict(
        pl.read_parquet(SGD / "messages.parquet").filter(pl.col("message_id").is_in(list(bad)))["message_id", "content"].rows()
    )
    rows = lines(folder)
    for message, source, line in zip(rows["message_id"], rows["source"], rows["object"], strict=True):
        if message in bad:
            assert source in {"corrected", "synthetic"}, "another way to ask it, with the corrected reply"
            assert line["messages"][-1]["content"] != texts[message]
    plain = bad - set(truth["corrected"])
    assert set(choice.dropped.filter(pl.col("message_id").is_in(list(plain)))["reason"]) <= {"negative_feedback"}
    assert not plain & set(rows["message_id"])


def test_every_correction_is_a_reply_and_a_pair(made: tuple[str, Choice, Path], truth: dict[str, Any], store: Store) -> None:
    _, choice, folder = made
    mine = {*choice.kept["message_id"], *choice.dropped["message_id"]}
    feedback = pl.read_parquet([*store.home.glob("corpus/feedback/week=*/*.parquet")], hive_partitioning=False)
    expected = dict(feedback.drop_nulls("expected_response").select("message_id", "expected_response").rows())
    raw = dict(
        pl.read_parquet(SGD / "feedback.parquet").drop_nulls("expected_response").select("message_id", "expected_response").rows()
    )
    corrected = mine & set(truth["corrected"])
    assert corrected
    rows, pairs = lines(folder), lines(folder, "preferences_")
    replies = {m: line["messages"][-1]["content"] for m, line in zip(rows["message_id"], rows["object"], strict=True)}
    chosen = {m: line["chosen"][0]["content"] for m, line in zip(pairs["message_id"], pairs["object"], strict=True)}
    twins = dict(choice.dropped.filter(pl.col("message_id").is_in(list(corrected)))["message_id", "kept_message_id"].rows())
    for message in corrected:
        if message in twins:
            assert twins[message] in corrected, "only another correction replaces a correction"
            continue
        assert replies[message] == chosen[message] == expected[message]
    scrubbed = [m for m in corrected if expected[m] != raw[m]]
    assert len(scrubbed) < max(3, len(corrected) // 5)
    train = set(pairs.filter(pl.col("split") == "train")["user"])
    assert not train & set(rows.filter(pl.col("split") != "train")["user"])


def test_duplicate_conversations_contribute_an_example_once(made: tuple[str, Choice, Path], truth: dict[str, Any]) -> None:
    _, choice, _ = made
    pairs = [*truth["exact_duplicates"], *truth["near_duplicates"]]
    kept = choice.kept.select("conversation_id", text=pl.concat_str("user_text", "reply", separator="\n"))
    kept = kept.with_columns(normalise(kept["text"]).alias("text"))
    by_conversation = {str(key[0]): part["text"].to_list() for key, part in kept.group_by("conversation_id")}
    twice = [
        (one, other)
        for one, other in pairs
        for a in by_conversation.get(one, [])
        for b in by_conversation.get(other, [])
        if fuzz.ratio(a, b) >= 90
    ]
    assert twice == []


def test_splits_are_apart_and_clean(made: tuple[str, Choice, Path], truth: dict[str, Any]) -> None:
    _, choice, folder = made
    assert check_leaks(folder) == []
    for column in ("conversation_id", "user"):
        assert choice.kept.group_by(column).agg(pl.col("split").n_unique())["split"].max() == 1
    planted = {row["value"] for row in truth["pii"]}
    text = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.jsonl"))
    assert not [value for value in planted if value in text]
    contents = [turn["content"] for line in lines(folder)["object"] for turn in line["messages"]]
    assert not residual(contents)
    assert "personal_data_residual" not in choice.notes["rejected"]


@pytest.mark.parametrize("name", ["dental", "restaurant"])
def test_removing_a_tenth_of_the_conversations_moves_nothing_to_train(store: Store, tmp_path: Path, name: str) -> None:
    settings = assistant(store, name)
    before = choose(store, settings).kept
    ids = before["conversation_id"].unique().sort().to_list()
    gone = random.Random(11).sample(ids, len(ids) // 10)
    smaller = Store(tmp_path)
    for table in ("examples", "feedback"):
        for week in store.weeks(table):
            part = pl.read_parquet(store.corpus(table, week) / "part.parquet")
            write_parquet(smaller.corpus(table, week) / "part.parquet", part.filter(~pl.col("conversation_id").is_in(gone)))
    after = choose(smaller, settings).kept
    both = before.select("message_id", old="split").join(after.select("message_id", new="split"), on="message_id")
    assert both.height > before.height * 0.8
    assert both.filter(pl.col("old") != pl.col("new")).is_empty()
