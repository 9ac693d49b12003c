"""The frozen folder: files of the contract, fingerprint, lineage, proof, and nothing half-written."""

from __future__ import annotations

import datetime
import json
import random
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from finetune_assets.assistants import Assistant
from finetune_assets.dataset import (
    Choice,
    build,
    check_foreign,
    check_leaks,
    choose,
    freeze,
    latest,
    load_staged,
    new_feedback,
    sample_rows,
    stage,
)
from finetune_assets.dataset.formats import LINEAGE
from finetune_assets.dataset.lines import lines_of
from finetune_assets.errors import DataError, LeakError, TooFewExamples
from finetune_assets.storage import Store, read_json
from finetune_assets_tests.dataset.small_corpus import START, Corpus, dental

FILES = {
    *("train.jsonl", "validation.jsonl", "test.jsonl", "preferences.jsonl", "preferences_heldout.jsonl", "kto.jsonl"),
    *("kto_heldout.jsonl", "dropped.parquet", "lineage.parquet", "preferences_lineage.parquet", "kto_lineage.parquet"),
    "manifest.json",
}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def talk(corpus: Corpus, count: int = 240) -> Store:
    corpus.fill(count)
    for number in range(0, count, 6):
        kind = ("positive", "negative", "correction")[number // 6 % 3]
        if kind == "correction":
            corpus.rate(f"msg_{1000 + number:05d}", "negative", f"Corrección {number}: {corpus.examples[number]['reply'][::-1]}")
        else:
            corpus.rate(f"msg_{1000 + number:05d}", kind)
    corpus.example(1, user_text=corpus.examples[0]["user_text"], reply=corpus.examples[0]["reply"], user="u_0", bucket=0)
    return corpus.write()


def test_the_folder_holds_the_contract(corpus: Corpus, assistant: Assistant) -> None:
    store = talk(corpus)
    choice = choose(store, assistant)
    manifest = freeze(store, assistant, choice)
    folder = latest(store, "dental")
    assert folder == store.dataset("dental", manifest["fingerprint"]).resolve()
    assert {path.name for path in folder.iterdir()} == FILES
    lineage = pl.read_parquet(folder / "lineage.parquet")
    assert dict(lineage.schema) == LINEAGE
    by_id = {row["message_id"]: row for part in choice.contexts(choice.kept) for row in part.iter_rows(named=True)}
    for split in ("train", "validation", "test"):
        lines = rows(folder / f"{split}.jsonl")
        origin = lineage.filter(pl.col("split") == split).sort("line")
        assert origin["line"].to_list() == list(range(len(lines)))
        for line, message in zip(lines, origin["message_id"], strict=True):
            kept = by_id[message]
            turns = [
                {"role": "system", "content": "Eres amable."},
                *kept["context"],
                {"role": "assistant", "content": kept["reply"]},
            ]
            assert line == {"messages": turns}
    assert manifest["counts"]["examples"] == lineage.height == choice.kept.height
    assert manifest["counts"]["split"] == dict(lineage["split"].value_counts().rows())
    assert sum(manifest["rejected"].values()) == pl.read_parquet(folder / "dropped.parquet").height
    assert manifest["leaks"]["found"] == check_leaks(folder) == []
    assert manifest["parents"] == []
    assert len(sample_rows(choice.kept)) == 5


def test_preferences_and_thumbs(corpus: Corpus, assistant: Assistant) -> None:
    store = talk(corpus)
    freeze(store, assistant, choose(store, assistant))
    folder = latest(store, "dental")
    assert folder is not None
    originals = {row["message_id"]: row["reply"] for row in corpus.examples}
    corrections = {row["message_id"]: row["expected_response"] for row in corpus.feedback if row["expected_response"]}
    lineage = pl.read_parquet(folder / "preferences_lineage.parquet")
    train = lineage["split"] == "train"
    assert sorted(lineage["message_id"]) == sorted(corrections)
    for name, part in (("preferences", lineage.filter(train)), ("preferences_heldout", lineage.filter(~train))):
        for pair, message in zip(rows(folder / f"{name}.jsonl"), part.sort("line")["message_id"], strict=True):
            assert set(pair) == {"prompt", "chosen", "rejected"}
            assert pair["prompt"][-1]["role"] == "user"
            assert pair["chosen"] == [{"role": "assistant", "content": corrections[message]}]
            assert pair["rejected"] == [{"role": "assistant", "content": originals[message]}]
    thumbs = pl.read_parquet(folder / "kto_lineage.parquet")
    labels = [row["label"] for name in ("kto", "kto_heldout") for row in rows(folder / f"{name}.jsonl")]
    assert (labels.count(True), labels.count(False)) == (
        13 + 13,
        13 + 13,
    )  # the first liked reply is a twin of a held-out example
    assert set(thumbs["source"]) == {"corrected", "positive", "negative"}


def test_the_fingerprint_is_of_content_and_data_settings_alone(corpus: Corpus, assistant: Assistant, tmp_path: Path) -> None:
    store = talk(corpus)
    first = freeze(store, assistant, choose(store, assistant))["fingerprint"]
    assert len(first) >= 16
    other = Corpus(tmp_path / "elsewhere")
    rng = random.Random(1)
    names: dict[str, str] = {}
    for row in corpus.examples:
        copy = dict(row)
        for key, prefix in (("message_id", "x"), ("conversation_id", "y"), ("user", "u_")):
            copy[key] = names.setdefault(str(row[key]), f"{prefix}{rng.getrandbits(48):012x}")
        other.examples.append(copy)
    for row in corpus.feedback:
        other.feedback.append(row | {"message_id": names[row["message_id"]], "feedback_id": f"other{len(other.feedback)}"})
    rng.shuffle(other.examples)
    moved = freeze(other.write(), assistant, choose(other.store, assistant))
    assert moved["fingerprint"] == first
    for file in ("train.jsonl", "kto.jsonl", "preferences.jsonl"):
        mine = store.dataset("dental", first) / file
        assert mine.read_bytes() == (other.store.dataset("dental", first) / file).read_bytes()
    same = dental(base_model="other/model", hyperparameters={"epochs": 1}, rules=[], min_examples=3)
    assert freeze(store, same, choose(store, same))["fingerprint"] == first
    for given in (
        {"system_prompt": "Otra."},
        {"filters": {"context_turns": 7}},
        {"split": {"train": 0.6, "validation": 0.2, "test": 0.2}},
    ):
        changed = dental(**given)
        assert freeze(store, changed, choose(store, changed))["fingerprint"] != first


def test_an_equal_data_set_is_not_rewritten_and_a_new_one_names_its_parent(corpus: Corpus, assistant: Assistant) -> None:
    store = talk(corpus)
    first = freeze(store, assistant, choose(store, assistant))
    stamp = (store.dataset("dental", first["fingerprint"]) / "manifest.json").stat().st_mtime_ns
    assert freeze(store, assistant, choose(store, assistant)) == first
    assert (store.dataset("dental", first["fingerprint"]) / "manifest.json").stat().st_mtime_ns == stamp
    corpus.example(7000)
    second = freeze(corpus.write(), assistant, choose(store, assistant))
    assert second["parents"] == [first["fingerprint"]]
    assert (store.datasets("dental") / "latest").readlink() == Path(second["fingerprint"])


def test_staged_is_frozen_as_chosen_and_refused_after_a_change_of_settings(corpus: Corpus, assistant: Assistant) -> None:
    store = talk(corpus)
    choice = choose(store, assistant)
    with pytest.raises(DataError, match="training_examples"):
        load_staged(store, assistant)
    stage(store, assistant, choice)
    loaded = load_staged(store, assistant)
    one, other = (pl.concat(each.contexts(each.kept)).drop("place").sort("message_id", "source") for each in (loaded, choice))
    assert one.equals(other)
    assert one.height == choice.kept.height
    assert loaded.notes == choice.notes
    assert freeze(store, assistant, loaded) == freeze(store, assistant, choice)
    with pytest.raises(DataError, match="other settings"):
        load_staged(store, dental(system_prompt="Otra."))


def test_lines_that_do_not_fit_the_memory_are_the_same(
    corpus: Corpus, assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = talk(corpus)
    choice = choose(store, assistant)
    first = freeze(store, assistant, choice)
    folder = store.dataset("dental", first["fingerprint"])
    made = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    shutil.rmtree(folder)
    monkeypatch.setattr(build, "SPOOL_SHARE", 0.0)
    assert freeze(store, assistant, choice)["fingerprint"] == first["fingerprint"]
    assert {path.name: path.read_bytes() for path in folder.glob("*.jsonl")} == made
    assert made["train.jsonl"]


def test_a_week_that_is_built_again_meanwhile_is_seen(corpus: Corpus, assistant: Assistant) -> None:
    store = talk(corpus)
    choice = choose(store, assistant)
    corpus.examples.reverse()
    corpus.write()
    with pytest.raises(DataError, match="written again while"):
        stage(store, assistant, choice)
    assert not (store.datasets("dental") / "staged").exists()


def test_nothing_is_half_written(corpus: Corpus, assistant: Assistant) -> None:
    store = talk(corpus)
    with pytest.raises(TooFewExamples):
        choose(store, dental(min_examples=10_000))
    assert not store.datasets("dental").exists()
    good = freeze(store, assistant, choose(store, assistant))["fingerprint"]
    bad = _leaking(choose(store, assistant))
    with pytest.raises(LeakError, match="user u_"):
        freeze(store, assistant, bad)
    assert (store.datasets("dental") / "latest").readlink() == Path(good)
    assert {path.name for path in store.datasets("dental").iterdir()} == {good, "latest", "feedback_seen"}


def _leaking(choice: Choice) -> Choice:
    """A row of a test user is moved to train."""
    users = choice.kept.filter(pl.col("split") == "test")["user"].value_counts().filter(pl.col("count") > 1)["user"].sort()
    moved = choice.kept.with_row_index("n").with_columns(
        split=pl.when((pl.col("user") == users[0]) & (pl.col("n").rank().over("user") == 1))
        .then(pl.lit("train"))
        .otherwise("split")
    )
    return build.Choice(**(choice.__dict__ | {"kept": moved.drop("n")}))


def test_leaks_are_found_in_the_files_alone(corpus: Corpus, assistant: Assistant) -> None:
    store = talk(corpus)
    freeze(store, assistant, choose(store, assistant))
    folder = latest(store, "dental")
    assert folder is not None
    test = (folder / "test.jsonl").read_text().splitlines()
    train = (folder / "train.jsonl").read_text().splitlines()
    stolen = json.loads(test[0])
    stolen["messages"][-1]["content"] += " ok"
    (folder / "train.jsonl").write_text("\n".join([json.dumps(stolen), *train[1:]]) + "\n")
    assert any(p.startswith("train.jsonl:0") and "near-duplicate of test.jsonl:0" in p for p in check_leaks(folder))
    (folder / "train.jsonl").write_text("\n".join(train[1:]) + "\n")
    assert any("train.jsonl has" in problem for problem in check_leaks(folder))


def test_a_row_of_another_tenant_or_out_of_time_is_found(corpus: Corpus) -> None:
    corpus.fill(150, first=0)
    late = START + datetime.timedelta(days=4)
    assistant = dental(select={"tenant": "clinic_a"}, split={"mode": "time", "date": late.date()})
    freeze(corpus.write(), assistant, choose(corpus.store, assistant))
    folder = latest(corpus.store, "dental")
    assert folder is not None
    manifest = read_json(folder / "manifest.json")
    assert manifest["leaks"]["compared"]["dates"] == 150
    assert check_leaks(folder) == check_foreign(folder) == []
    lineage = pl.read_parquet(folder / "lineage.parquet")
    first = (pl.col("split") == "test") & (pl.col("line") == 0)
    bad = lineage.with_columns(
        started_at=pl.when(first).then(pl.lit(START)).otherwise("started_at"),
        source=pl.when(first).then(pl.lit("synthetic")).otherwise("source"),
        tenant_id=pl.when(first).then(pl.lit("clinic_b")).otherwise("tenant_id"),
    )
    bad.write_parquet(folder / "lineage.parquet")
    message = lineage.filter(first)["message_id"].item()
    foreign = f"1 rows of tenant clinic_b (dental), e.g. {message}, stand in a data set of tenant: clinic_a"
    assert check_leaks(folder) == [
        f"test.jsonl:0 ({message}) starts before 2026-08-07 and is in test",
        f"test.jsonl:0 ({message}) is synthetic",
        foreign,
    ]
    assert check_foreign(folder) == [foreign]
    ahead = pl.when(pl.col("split") == "train").then(pl.lit(late)).otherwise("started_at")
    lineage.with_columns(started_at=ahead).write_parquet(folder / "lineage.parquet")
    assert "starts on or after 2026-08-07 and is not in test" in check_leaks(folder)[0]


def test_new_feedback_counts_what_a_data_set_has_not_seen(corpus: Corpus, assistant: Assistant) -> None:
    store = talk(corpus)
    assert new_feedback(store, assistant, None) == len(corpus.feedback)
    first = freeze(store, assistant, choose(store, assistant))["fingerprint"]
    assert new_feedback(store, assistant, first) == 0
    corpus.rate("msg_01001")
    corpus.rate("msg_gone", "negative")
    corpus.rate("msg_01003", tenant_id="clinic_elsewhere")
    corpus.write()
    assert new_feedback(store, assistant, first) == 2
    second = freeze(store, assistant, choose(store, assistant))["fingerprint"]
    assert second != first
    assert (new_feedback(store, assistant, second), new_feedback(store, assistant, first)) == (0, 2)
    corpus.rate("msg_gone", "negative")  # changes nothing: the fingerprint stays, and the row counts as seen
    corpus.write()
    assert new_feedback(store, assistant, second) == 1
    assert freeze(store, assistant, choose(store, assistant))["fingerprint"] == second
    assert new_feedback(store, assistant, second) == 0


def test_a_line_is_one_line_to_every_reader() -> None:
    row = {"context": [{"role": "user", "content": "a\u2028b\x85c\nd"}], "reply": "ñ \u2029"}
    frame = pl.DataFrame([row | {"message_id": "m", "split": "train"}])
    line = lines_of("examples", frame, "")["jsonl"].item()
    assert len(line.splitlines()) == 1
    assert json.loads(line) == {"messages": [*row["context"], {"role": "assistant", "content": row["reply"]}]}
    assert "ñ" in line
