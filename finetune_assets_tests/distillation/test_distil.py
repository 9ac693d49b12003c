"""Distillation: a real frozen data set, a teacher that answers, and what becomes of its replies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import sqlalchemy as sa

from finetune_assets.assistants import Assistant
from finetune_assets.dataset.build import choose, freeze
from finetune_assets.dataset.formats import read_lines
from finetune_assets.dataset.leaks import check_leaks
from finetune_assets.distillation.replies import FILE, Replies
from finetune_assets.distillation.teacher import Answer, Ask, Teacher, asker
from finetune_assets.distillation.work import Wishes, Work
from finetune_assets.errors import BudgetExceeded, LedgerError, ProviderUnsettled, SettingsError, TooFewExamples
from finetune_assets.registry import Ledger
from finetune_assets.registry.spending import Limits, Purchase, extend, month, reserve
from finetune_assets.registry.traffic import requests
from finetune_assets.storage import Store
from finetune_assets_tests.dataset.small_corpus import Corpus, dental
from finetune_assets_tests.training.fake_provider import FakeProvider, start
from finetune_assets_tests.training.fake_provider.process import KEY

TEACHER = "openai/ft:gpt-4o-mini-2024-07-18:org:dental:1"
BAD = "Claro, no sabemos nada de eso y tampoco nos importa demasiado."


def says(prompt: Sequence[dict[str, Any]]) -> Answer:
    """A teacher with a reply of its own for every question."""
    return Answer(f"Con gusto le ayudo: {prompt[-1]['content'].strip('¿?')[::-1]}.", None, 100, 20)


class World:
    """A frozen data set of 120 examples, some corrected, one rated badly; and its ledger."""

    def __init__(self, home: Path, **settings: Any) -> None:
        corpus = Corpus(home)
        self.messages = corpus.fill(150)
        for message in self.messages[:20]:
            corpus.rate(message, expected=f"Una persona dice {message}, que es lo correcto aquí.")
        corpus.example(1, reply=BAD, user_text="¿Abren los domingos de agosto por la tarde?", user="u_bad")
        corpus.rate("msg_00001", "negative")
        self.store: Store = corpus.write()
        self.assistant: Assistant = dental(min_examples=30, **settings)
        manifest = freeze(self.store, self.assistant, choose(self.store, self.assistant))
        self.folder = self.store.dataset("dental", manifest["fingerprint"])
        self.ledger = Ledger(f"sqlite:///{home / 'ledger.db'}")
        self.said: list[str] = []

    def distil(self, ask: Ask | Callable[[Teacher], Ask], made: bool = False, **wishes: Any) -> dict[str, Any]:
        wanted = Wishes(**{"teacher": TEACHER, **wishes})
        how: Any = ask if made else lambda _teacher: nullcontext(ask)
        return Work(self.store, self.ledger, self.assistant, self.said.append, None, how).distil(self.folder, wanted)

    def rows(self, manifest: dict[str, Any], name: str = "train.jsonl") -> list[dict[str, Any]]:
        return list(read_lines(self.store.dataset("dental", manifest["fingerprint"]) / name))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "home"))
    made = World(tmp_path / "home")
    yield made
    made.ledger.close()


def test_the_teachers_replies_take_the_place_of_others_but_corrections_stay(world: World) -> None:
    asked: list[str] = []

    def ask(prompt: Sequence[dict[str, Any]]) -> Answer:
        asked.append(prompt[-1]["content"])
        return says(prompt)

    manifest = world.distil(ask)
    before = pl.read_parquet(world.folder / "lineage.parquet").filter(pl.col("split") == "train")
    corrected = before.filter(pl.col("source") == "corrected").height
    assert len(asked) == before.height - corrected
    folder = world.store.dataset("dental", manifest["fingerprint"])
    after = pl.read_parquet(folder / "lineage.parquet").filter(pl.col("split") == "train")
    assert dict(after["source"].value_counts().rows()) == {"distilled": before.height - corrected, "corrected": corrected}
    replies = [row["messages"][-1]["content"] for row in world.rows(manifest)]
    assert sum(reply.startswith("Con gusto le ayudo") for reply in replies) == before.height - corrected
    assert sum(reply.startswith("Una persona dice") for reply in replies) == corrected
    for same in ("test.jsonl", "validation.jsonl", "preferences.jsonl", "kto.jsonl"):
        assert (folder / same).read_bytes() == (world.folder / same).read_bytes()
    assert check_leaks(folder) == []
    assert manifest["parents"] == [world.folder.name]
    assert manifest["distilled"]["learnt"] == {"asked": before.height - corrected}
    assert (world.store.datasets("dental") / "latest").resolve() == world.folder.resolve()
    [row] = month(world.ledger)
    assert (row["kind"], row["final"]) == ("replies", True)
    assert row["usd"] == pytest.approx(len(asked) * (100 * 0.15 + 20 * 0.60) / 1e6)
    assert world.distil(ask)["fingerprint"] == manifest["fingerprint"]
    assert len(asked) == before.height - corrected  # nothing is asked twice
    assert len(month(world.ledger)) == 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Answer(None, "refused"), "refused"),
        (Answer(None, "unfinished", 1, 512), "unfinished"),
        (Answer("Sí."), "reply_too_short"),
        (Answer("Lo siento, ha ocurrido un error. Intente más tarde."), "error_reply"),
        (Answer("Le llamamos al 612 345 678 o escriba a ana.perez@example.org mañana."), "personal_data_residual"),
        (Answer("Tómese dos antibióticos cada ocho horas y ya está."), "breaks_rule"),
    ],
)
def test_a_reply_passes_the_rules_or_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: Answer, reason: str
) -> None:
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "home"))
    world = World(tmp_path / "home", rules=[{"name": "no_medicine", "not_contains": ["antibi[oó]tic"]}])
    first: list[bool] = []

    def ask(prompt: Sequence[dict[str, Any]]) -> Answer:
        first.append(True)
        return reply if len(first) == 1 else says(prompt)

    manifest = world.distil(ask)
    assert manifest["distilled"]["left_out"] == {reason: 1}
    dropped = pl.read_parquet(world.store.dataset("dental", manifest["fingerprint"]) / "dropped.parquet")
    assert reason in dropped["reason"].to_list()
    world.ledger.close()


def test_a_reply_that_people_rated_badly_or_that_the_test_holds_is_left_out(world: World) -> None:
    held = next(read_lines(world.folder / "test.jsonl"))["messages"]
    rows = list(read_lines(world.folder / "train.jsonl"))
    target = next(row["messages"] for row in rows if not row["messages"][-1]["content"].startswith("Una persona"))
    manifest = world.distil(says)
    path = world.store.datasets("dental") / FILE
    stored = pl.read_parquet(path)
    # the same user turn as in the test set cannot stand in train, so the rule is seen on the texts themselves
    from finetune_assets.distillation.build import _judged

    frame = pl.DataFrame(
        {
            "n": [0, 1, 2],
            "message_id": ["a", "b", "c"],
            "intent": ["hours"] * 3,
            "reply": [held[-1]["content"], BAD, "Con mucho gusto, le esperamos."],
            "user_text": [held[-2]["content"], "¿Abren los domingos de agosto por la tarde?", target[-2]["content"]],
            "source": ["distilled"] * 3,
            "by": ["asked"] * 3,
            "reason": [None] * 3,
        },
        schema_overrides={"reason": pl.String},
    )
    judged = _judged(world.assistant, world.folder, frame, frozenset())
    assert judged["reason"].to_list() == ["same_as_heldout", "same_as_negative", None]
    assert stored.height == manifest["distilled"]["learnt"]["asked"]


def test_the_log_of_the_router_is_not_asked_again(world: World) -> None:
    lineage = pl.read_parquet(world.folder / "lineage.parquet").filter(
        (pl.col("split") == "train") & (pl.col("source") != "corrected")
    )
    logged = lineage["message_id"].to_list()[:10]
    job = world.ledger.open_job(
        {
            **{"assistant": "dental", "tenant_id": None, "dataset_id": "d", "dataset_fingerprint": world.folder.name},
            **{"provider": "openai", "base_model": "gpt-4o-mini-2024-07-18", "hyperparameters": {}, "plan": {}, "spec_hash": "s"},
        }
    )
    version = world.ledger.mint_version(job, "a" * 64, world.store.model("dental", "x").parent)
    from finetune_assets.training.remote import RemoteModel

    RemoteModel("openai", "ft:gpt-4o-mini-2024-07-18:org:dental:1", "http://127.0.0.1:9/v1", "OPENAI_API_KEY").write(
        Path(version.path)
    )
    row = {
        "assistant": "dental",
        "kind": "live",
        "generation": 1,
        "step": "",
        "assigned_arm": "champion",
        "served_arm": "champion",
    }
    row |= {"kept": False, "version": version.version, "outcome": "ok", "status": 200, "created_at": version.created_at}
    with world.ledger.engine.begin() as connection:
        connection.execute(sa.insert(requests), [{**row, "request_id": one, "message_id": one} for one in logged])
    manifest = world.distil(says, teacher=None)  # the newest rented version
    assert manifest["distilled"]["name"] == version.version
    assert manifest["distilled"]["learnt"] == {"asked": lineage.height - 10, "log": 10}
    with pytest.raises(TooFewExamples, match="not_asked"):
        World.distil(world, says, teacher="openai/ft:gpt-4o-mini-2024-07-18:org:other:2", max_usd=0)
    first = lineage["started_at"].min()
    assert first is not None
    since = world.distil(says, teacher=TEACHER.replace(":1", ":3"), max_usd=0, said_since=first.date())  # pyright: ignore
    assert since["distilled"]["learnt"] == {"log": lineage.height}


def test_money_is_asked_for_before_and_never_exceeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "home"))
    world = World(tmp_path / "home", budget={"monthly_usd": 0.0001})
    with pytest.raises(BudgetExceeded, match=r"above budget\.monthly_usd"):
        world.distil(says)
    world.assistant = world.assistant.model_copy(
        update={"budget": world.assistant.budget.model_copy(update={"monthly_usd": 1.0})}
    )
    asked: list[int] = []

    def ask(prompt: Sequence[dict[str, Any]]) -> Answer:
        asked.append(1)
        return Answer(says(prompt).reply, None, 100, 400)

    limit = 0.02
    world.assistant = world.assistant.model_copy(update={"min_examples": 110})
    with pytest.raises(TooFewExamples, match="not_asked"):
        world.distil(ask, max_usd=limit)
    assert 0 < len(asked) < 100
    assert "are not asked" in " ".join(world.said)
    [row] = month(world.ledger)
    assert 0 < row["usd"] <= limit
    before = len(asked)
    world.distil(ask)  # goes on with the others
    assert sum(r["usd"] for r in month(world.ledger)) == pytest.approx(len(asked) * (100 * 0.15 + 400 * 0.60) / 1e6)
    assert len(asked) > before
    world.ledger.close()


@pytest.mark.parametrize("wishes", [{}, {"max_usd": 1.0}])
def test_nothing_is_asked_for_at_a_price_that_nobody_knows(world: World, wishes: dict[str, float]) -> None:
    asked: list[int] = []

    def ask(prompt: Sequence[dict[str, Any]]) -> Answer:
        asked.append(1)
        return says(prompt)

    with pytest.raises(SettingsError, match=r"not asked for \d+ replies: price unknown \(nebius some-model.*0 where it costs"):
        world.distil(ask, teacher="nebius/some-model", **wishes)
    assert (asked, month(world.ledger)) == ([], [])


def test_long_replies_stay_within_the_months_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path / "home"))
    world = World(tmp_path / "home", budget={"monthly_usd": 0.021})
    world.assistant = world.assistant.model_copy(update={"min_examples": 110})
    asked: list[int] = []

    def ask(prompt: Sequence[dict[str, Any]]) -> Answer:
        asked.append(1)
        return Answer(says(prompt).reply, None, 100, 400)

    with pytest.raises(TooFewExamples, match="not_asked"):  # the estimate fits: it is made of replies of 80 tokens
        world.distil(ask)
    assert 0 < len(asked) < 100
    assert "what is left of the month's budget" in " ".join(world.said)
    [row] = month(world.ledger)
    assert row["usd"] == pytest.approx(len(asked) * (100 * 0.15 + 400 * 0.60) / 1e6)
    assert row["usd"] <= 0.021
    world.ledger.close()


def test_what_others_buy_meanwhile_counts(world: World) -> None:
    limits = Limits(None, 1.0)
    reserve(world.ledger, Purchase("one", "dental", "openai", "replies", 0.2), limits)
    assert extend(world.ledger, "one", 0.9, limits)
    assert not extend(world.ledger, "one", 1.1, limits)
    with pytest.raises(BudgetExceeded):  # what was extended is reserved
        reserve(world.ledger, Purchase("two", "other", "openai", "training", 0.2), limits)
    assert extend(world.ledger, "one", 0.1, limits)
    assert [row["usd"] for row in month(world.ledger)] == [0.9]


def test_max_usd_is_for_the_data_set_not_for_each_try(world: World) -> None:
    asked: list[int] = []

    def ask(prompt: Sequence[dict[str, Any]]) -> Answer:
        asked.append(1)
        if len(asked) > 40:
            raise busy
        return Answer(says(prompt).reply, None, 100, 400)

    busy = ProviderUnsettled("openai: asking failed with 429.", 429)
    busy.turned_away = True

    world.assistant = world.assistant.model_copy(update={"min_examples": 110})
    with pytest.raises(ProviderUnsettled):
        world.distil(ask, max_usd=0.02)
    first = sum(row["usd"] for row in month(world.ledger))
    assert 0.01 < first < 0.02
    asked.clear()
    with pytest.raises(TooFewExamples, match="not_asked"):
        world.distil(ask, max_usd=0.02)
    assert sum(row["usd"] for row in month(world.ledger)) <= 0.02
    assert f"${first:.4f} of --max-usd 0.02" in " ".join(world.said)


def test_a_teacher_that_goes_away_loses_nothing_and_what_it_may_have_said_counts_as_paid(world: World) -> None:
    asked: list[int] = []

    def ask(prompt: Sequence[dict[str, Any]]) -> Answer:
        asked.append(1)
        if len(asked) > 40:
            raise ProviderUnsettled("openai: asking failed with 500.")
        return says(prompt)

    with pytest.raises(ProviderUnsettled, match="40 new replies are kept"):
        world.distil(ask)
    rows = Replies(world.store.datasets("dental")).rows.values()
    assert (sum(row["reply"] is not None for row in rows), sum(row["missing"] == "unanswered" for row in rows)) == (40, 40)
    [row] = month(world.ledger)
    assert row["usd"] > (40 * (100 * 0.15 + 20 * 0.60) + 40 * 512 * 0.60) / 1e6  # the longest replies
    asked.clear()
    manifest = world.distil(lambda prompt: (asked.append(1), says(prompt))[1])
    assert len(asked) == manifest["distilled"]["learnt"]["asked"] - 40


def test_a_teacher_that_nobody_could_ask_costs_nothing(world: World) -> None:
    def ask(_prompt: Sequence[dict[str, Any]]) -> Answer:
        raise SettingsError("bedrock needs AWS credentials.")

    with pytest.raises(SettingsError, match="needs AWS credentials"):
        world.distil(ask)
    assert not Replies(world.store.datasets("dental")).rows
    assert [row["usd"] for row in month(world.ledger)] == [0.0]


def test_teachers_that_are_none(world: World) -> None:
    for wanted, error, text in (
        (None, LedgerError, "no version that a provider serves"),
        ("v9-none", LedgerError, "no rented version"),
        ("local/data/base_model", SettingsError, "needs no distillation"),
        ("cohere/command", SettingsError, "not TRAINER/MODEL"),
    ):
        with pytest.raises(error, match=text):
            world.distil(says, teacher=wanted)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeProvider]:
    with start() as running:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", running.url)
        yield running


def test_asked_over_the_wire(world: World, fake: FakeProvider) -> None:
    fake.fault("POST /chat/completions", "error", status=400, code="content_filter", message="filtered")
    fake.fault("POST /chat/completions", "error", status=429, retry_after=0.1)
    fake.fault("POST /chat/completions", "error_after", status=500)  # said, billed and lost: nobody asks the same again at once
    manifest = world.distil(asker, made=True, teacher="openai/gpt-4o-mini-2024-07-18")
    about = manifest["distilled"]
    # the untuned base says the same to everybody: every context is asked, one reply is refused
    assert about["left_out"]["refused"] == 1
    rows = Replies(world.store.datasets("dental")).rows.values()
    missing = [row["missing"] for row in rows if row["reply"] is None]
    assert sorted(missing) == ["refused", "unanswered"]  # several are asked at once
    assert fake.state()["seen"].count("POST /chat/completions") == len(rows) + 1  # only who was turned away asked again
    assert (
        sum(about["learnt"].values()) + sum(about["left_out"].values()) + sum(about["kept_as_they_were"].values())
        == about["contexts"]
    )
    assert sum(row["usd"] for row in month(world.ledger)) > 0
