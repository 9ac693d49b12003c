"""What became of a message: kept, dropped for a better twin, rejected, erased, unread, nowhere; the reason has its values."""

from __future__ import annotations

import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from finetune_assets import erasure
from finetune_assets.assets.dataset import covers_every_week
from finetune_assets.assistants import Assistant
from finetune_assets.corpus.erasure import Erased
from finetune_assets.corpus.examples import build_examples
from finetune_assets.corpus.ingest import ingest_conversations, ingest_feedback, stale_weeks
from finetune_assets.corpus.sources import SourceTables, read_source
from finetune_assets.dataset import choose, freeze, stage
from finetune_assets.dataset.fate import fate
from finetune_assets.errors import SourceError
from finetune_assets.explain import Asked, explain
from finetune_assets.registry import Ledger
from finetune_assets.resources import AssistantsResource, StoreResource
from finetune_assets.storage import Store
from finetune_assets_tests.corpus import exports
from finetune_assets_tests.dataset.small_corpus import START, Corpus, dental, sentence

KEY = exports.KEY


class World:
    """Ten ordinary conversations and some odd ones, read and frozen."""

    def __init__(self, folder: Path) -> None:
        tables = exports.export(conversations=40, turns=2)
        for number, row in enumerate(tables["messages"]):
            row["content"] = f"{'¿' if row['role'] == 'user' else 'Claro, '}{sentence(number, 'said')}"
        said = {row["message_id"]: row for row in tables["messages"]}
        said["msg_0001"]["content"] = "No entiendo la pregunta."
        said["msg_0003"]["content"] = "x" * 1001
        said["msg_0005"]["content"] = None
        said["msg_0008"]["content"] = said["msg_0010"]["content"] = "¿Cuánto cuesta una limpieza, por favor?"
        said["msg_0009"]["content"] = "Una limpieza cuesta cuarenta euros y dura media hora."
        said["msg_0011"]["content"] = "Una limpieza cuesta cuarenta euros y dura media hora!"
        said["msg_0012"]["content"] = "Me llamo Ana Pérez y mi correo es ana@example.org"
        tables["conversations"][7]["satisfaction_score"] = 2
        tables["conversations"][8]["vertical"] = "restaurant"
        tables["conversations"][9]["satisfaction_score"] = 9  # repaired
        tables["feedback"] = [
            exports.judgement(0, 19, 9, feedback_type="negative"),
            exports.judgement(1, 21, 10, feedback_type="negative", expected_response=f"Mejor {sentence(21, 'better')}"),
        ]
        self.source = exports.write(folder / "source", tables)
        self.store, self.ledger = Store(folder / "home"), Ledger(f"sqlite:///{folder / 'ledger.db'}")
        sources = read_source([str(self.source)])
        weeks = stale_weeks(self.store, sources).stale
        ingest_conversations(self.store, sources, weeks, KEY)
        ingest_feedback(self.store, sources, weeks, KEY)
        build_examples(self.store, weeks)
        assistant = Assistant(name="dental", select={"vertical": "dental"}, min_examples=5)
        freeze(self.store, assistant, choose(self.store, assistant))

    def explain(self, identifier: str) -> dict[str, Any]:
        return explain(self.store, self.ledger, Asked(identifier, (), KEY), lambda: read_source([str(self.source)]))

    def fate(self, message_id: str) -> dict[str, Any]:
        found = self.explain(message_id)
        assert found["kind"] == "message"
        [one] = found["assistants"]
        return one


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("message_id", "reason", "why"),
    [
        (
            "msg_0001",
            "error_reply",
            "the reply says 'No entiendo', one of the error replies; filters.exclude replaces their list",
        ),
        ("msg_0003", "reply_too_long", "the reply's text has 1001 characters, filters.reply_chars allows 10 to 1000"),
        (
            "msg_0015",
            "not_satisfied",
            "satisfaction_score is 2, filters.min_satisfaction is 4, and nobody praised or corrected it",
        ),
        ("msg_0019", "negative_feedback", "rated negative (fb_0000 on 2026-09-07) and not corrected: never a target"),
    ],
)
def test_dropped_by_a_rule_with_its_values(world: World, message_id: str, reason: str, why: str) -> None:
    fate = world.fate(message_id)
    assert (fate["state"], fate["reason"], fate["why"]) == ("dropped", reason, why)


def test_dropped_for_a_better_twin_and_what_that_one_stands_for(world: World) -> None:
    fates = {one: world.fate(one) for one in ("msg_0009", "msg_0011")}
    [gone] = [one for one, fate in fates.items() if fate["state"] == "dropped"]
    [kept] = set(fates) - {gone}
    assert fates[gone]["reason"] == "exact_duplicate"
    assert fates[gone]["kept_message_id"] == kept
    assert fates[gone]["similarity"] == 1
    assert "cuarenta euros" in fates[gone]["kept_text"]
    assert fates[kept]["replaced"] == [gone]


def test_kept_where_and_as_what(world: World) -> None:
    fate = world.fate("msg_0021")
    folder = world.store.datasets("dental") / "latest"
    assert fate["source"] == "corrected"
    assert fate["why"].endswith("a correction: the target is the expected_response of the feedback (fb_0001)")
    name, _, line = fate["place"].partition(":")
    assert f"Mejor {sentence(21, 'better')}" in (folder / name).read_text().splitlines()[int(line) - 1]
    assert len(fate["preferences"]) == 1
    assert fate["fingerprint"] == folder.resolve().name


def test_messages_that_are_no_example(world: World) -> None:
    user = world.explain("msg_0012")
    assert user["scrubbed"] == ["email", "name"]
    assert "Pérez" not in user["text"]
    assert user["why"] == "A user's message is never a target; it is part of what msg_0013 answers."
    assert world.fate("msg_0017")["state"] == "not_selected"
    rejected = world.explain("msg_0005")
    assert rejected["kind"] == "rejected"
    assert [one["reason"] for one in rejected["rejected"]] == ["content_null"]


def test_conversations_and_feedback(world: World) -> None:
    talk = world.explain("conv_0000")
    assert [one["message_id"] for one in talk["messages"]] == ["msg_0000", "msg_0001"]
    assert talk["messages"][1]["assistants"][0]["reason"] == "error_reply"
    assert [one["reason"] for one in world.explain("conv_0009")["rejected"]] == ["satisfaction_score_out_of_range"]
    judged = world.explain("fb_0000")
    assert (judged["message_id"], judged["message"]["assistants"][0]["reason"]) == ("msg_0019", "negative_feedback")


def test_what_is_not_there(world: World) -> None:
    nowhere = world.explain("msg_002")
    assert (nowhere["kind"], nowhere["looked"][-1]) == ("unknown", "the source")
    assert "msg_0021" in nowhere["nearest"] or "msg_0023" in nowhere["nearest"]

    def broken() -> SourceTables:
        raise SourceError("The source is away.")

    lost = explain(world.store, world.ledger, Asked("msg_002", (), KEY), broken)
    assert lost["source"] == "The source is away."
    tables = exports.export(conversations=41, turns=2)
    tables["messages"][80]["created_at"] = exports.at() + datetime.timedelta(days=70)
    later = exports.write(world.source.parent / "later", tables)
    unread = explain(world.store, world.ledger, Asked("msg_0081", (), KEY), lambda: read_source([str(later)]))
    assert unread["kind"] == "unread"
    assert unread["why"].startswith("a message of 2026-")


def test_an_id_that_only_the_source_has_is_looked_for_part_by_part(tmp_path: Path) -> None:
    tables = exports.export(conversations=3, turns=2)
    tables["conversations"][1]["user_id"] = "+59170123456"
    source = exports.write(tmp_path / "source", tables)
    store, ledger = Store(tmp_path / "home"), Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    plan = erasure.look(store, ledger, erasure.subject_of("+59170123456", None, KEY), KEY)
    erasure.erase(store, ledger, plan, KEY, lambda needles: 0)

    def kind(identifier: str) -> str:
        opened = read_source([str(source)])
        found = explain(store, ledger, Asked(identifier, (), KEY), lambda: opened)
        assert "_read" not in vars(opened)  # no table was held whole
        return found["kind"]

    assert [kind(one) for one in ("msg_0002", "conv_0001", "fb_0001")] == ["erased"] * 3
    assert [kind(one) for one in ("msg_0000", "conv_0000", "fb_0000", "nothing")] == ["unread"] * 3 + ["unknown"]


def test_a_week_before_the_window_is_named_and_a_gap_within_it_is_no_week_behind(tmp_path: Path) -> None:
    corpus, week = Corpus(tmp_path), datetime.timedelta(weeks=1)
    old = corpus.example(1, started_at=START)
    corpus.fill(started_at=START + 3 * week)
    corpus.fill(first=2000, started_at=START + 5 * week)  # a week without rows lies between
    assistant = dental(window_weeks=3)
    store = corpus.write()
    choice = choose(store, assistant)
    stage(store, assistant, choice)
    freeze(store, assistant, choice)
    [example] = [row for row in corpus.examples if row["message_id"] == old]
    found = fate(store, "dental", example, [])
    assert (found["state"], found["why"]) == (
        "not_read",
        "Its week, 2026-08-03, is older than window_weeks: 3, whose first week is 2026-08-24.",
    )
    settings = "select: {vertical: dental}\nsystem_prompt: Eres amable.\nwindow_weeks: 3\n"
    (tmp_path / "dental.yaml").write_text(settings, encoding="utf-8")
    check: Any = covers_every_week.op.compute_fn
    context = SimpleNamespace(partition_key="dental")
    checked = check.decorated_fn(context, StoreResource(home=str(tmp_path)), AssistantsResource(folder=str(tmp_path)))
    assert checked.passed, checked.description


def test_a_twin_by_meaning_names_the_setting_that_decided(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    corpus.fill()
    gone = corpus.example(1, user_text="¿Dónde queda la clínica?", reply="Estamos en la plaza mayor.", user="u_same")
    best = corpus.example(2, user_text="¿Me da su dirección?", reply="Junto a la catedral vieja.", user="u_same")

    def embed(texts: list[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        vectors = np.eye(len(texts) + 1, dtype=np.float32)[1:]
        vectors[[text.startswith(("¿Dónde", "¿Me da")) for text in texts]] = np.eye(len(texts) + 1, dtype=np.float32)[0]
        return vectors

    assistant = dental(filters={"semantic_duplicate": 0.95})
    store = corpus.write()
    freeze(store, assistant, choose(store, assistant, embed))
    [example] = [row for row in corpus.examples if row["message_id"] == gone]
    found = fate(store, "dental", example, [])
    assert (found["reason"], found["kept_message_id"]) == ("semantic_duplicate", best)
    assert "filters.semantic_duplicate is 0.95" in found["why"]
    assert "near_duplicate" not in found["why"]
    assert "similarity" not in found


def test_erased(tmp_path: Path) -> None:
    world = World(tmp_path)
    plan = erasure.look(world.store, world.ledger, erasure.subject_of("user_0012", None, KEY), KEY)
    erasure.erase(world.store, world.ledger, plan, KEY, lambda needles: 0)
    for identifier in ("msg_0024", "msg_0025", "conv_0012"):
        assert world.explain(identifier)["kind"] == "erased"
    assert Erased(frozenset([plan.subject]), KEY).leave_out(read_source([str(world.source)])).messages.height == 78
