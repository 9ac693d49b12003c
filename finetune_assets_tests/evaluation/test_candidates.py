"""Test rows and few-shot examples: stable, from the right split."""

import json
from pathlib import Path

import pytest

from finetune_assets.assistants.settings.evaluation import Benchmark
from finetune_assets.errors import DataError
from finetune_assets.evaluation.candidates import choose_shots, standard, with_shots
from finetune_assets.evaluation.candidates import test_rows as rows_of
from finetune_assets_tests.evaluation.frozen import make_dataset
from finetune_assets_tests.tiny_model import dialogues


def test_rows_stay_when_others_are_added(tmp_path: Path):
    chats = dialogues(80, seed=4, turns=2)
    few = rows_of(make_dataset(tmp_path / "a", rows={"test": chats[:60]}), 20)
    more = rows_of(make_dataset(tmp_path / "b", rows={"test": chats}), 20)
    asked = [(row.messages, row.reference) for row in few]
    assert len(few) == 20
    assert sum((row.messages, row.reference) in asked for row in more) >= 10
    again = rows_of(make_dataset(tmp_path / "c", rows={"test": chats[:60]}), 20)
    assert again == few


def test_no_test_rows_is_a_clear_error(tmp_path: Path):
    with pytest.raises(DataError, match="no test rows"):
        rows_of(make_dataset(tmp_path, rows={"test": []}), 10)


def test_shots_are_train_examples_of_different_intents(tmp_path: Path):
    folder = make_dataset(tmp_path)
    shots = choose_shots(folder, 3)
    train = [json.loads(line)["messages"] for line in (folder / "train.jsonl").read_text().splitlines()]
    places = [next(n for n, chat in enumerate(train) if (chat[-2]["content"], chat[-1]["content"]) == shot) for shot in shots]
    assert len({n % 3 for n in places}) == 3  # three intents
    assert shots == choose_shots(folder, 3)
    assert len(choose_shots(folder, 20)) == 20


def test_shots_stand_between_system_and_conversation():
    shots = (("¿Abren hoy?", "Sí, hasta las seis."),)
    chat = dialogues(1, turns=2)[0][:-1]
    prompt = with_shots(chat, shots)
    assert [m["role"] for m in prompt] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert prompt[1]["content"] == "¿Abren hoy?"
    assert prompt[3:] == chat[1:]
    assert [m["role"] for m in with_shots(chat[-1:], shots)] == ["user", "assistant", "user"]


def test_fewer_examples_than_shots(tmp_path: Path):
    folder = make_dataset(tmp_path, train=2)
    assert len(choose_shots(folder, 5)) == 2
    assert [candidate.name for candidate in standard(folder, "b", "t", Benchmark(few_shot=3, retrieval=False))] == [
        "base",
        "few_shot",
        "tuned",
    ]
