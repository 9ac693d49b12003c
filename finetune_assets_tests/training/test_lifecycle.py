"""Last days of models: what providers say, what the dated table says, and what of the user's they concern."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.assistants.settings import Assistant
from finetune_assets.environment import Environment
from finetune_assets.registry import Ledger
from finetune_assets.registry.remote_jobs import open_journal
from finetune_assets.rented import rented
from finetune_assets.training.lifecycle import Ending, Use, day_of, endings, find
from finetune_assets.training.remote import Connection
from finetune_assets.training.uses import provider_at, uses_of
from finetune_assets_tests.training.fake_provider import FakeProvider
from finetune_assets_tests.training.remote_request import assistant, wire

DAY = datetime.date(2027, 1, 14)
MINI = "gpt-4o-mini-2024-07-18"


@pytest.mark.parametrize(
    "said",
    [
        "2027-01-14",
        "2027-01-14T00:00:00Z",
        "2027-01-14T09:30:00+02:00",
        "2027-01-14 23:59:59",
        "20270114",
        1799884800,
        1799884800.5,
        "1799884800",
        1799884800000,
        "2027/01/14",
        "January 14, 2027",
        "14 Jan 2027",
    ],
)
def test_days_in_many_forms(said: object) -> None:
    assert day_of(said) == DAY


@pytest.mark.parametrize("said", [None, "", "soon", "Q1 2027", "2027-13-41", True, {"day": 14}, [], "9" * 40, -5, float("nan")])
def test_what_is_no_day(said: object) -> None:
    assert day_of(said) is None


def test_an_odd_answer_or_a_missing_model_leaves_the_others_dates(fake: FakeProvider, tmp_path: Path) -> None:
    fake.set(shutdown={MINI: "2026-12-24T00:00:00Z", "gpt-4o-2024-08-06": "in winter"})
    trainer = wire(assistant(), tmp_path)
    asked = ["ft:gpt-4o-mini:gone", "gpt-4o-2024-08-06", MINI]
    assert trainer.shutdown_dates(asked) == {MINI: datetime.date(2026, 12, 24)}
    fake.fault("GET /models/ID", "error", status=500)
    assert trainer.hurried(5).shutdown_dates([MINI, MINI]) == {}  # away: the table has to do


def ending(kind: Any, model: str, provider: str, on: datetime.date) -> Ending:
    [found] = endings([Use("dental", provider, model, "what", kind)], on)
    return found


def test_a_training_that_ends_is_warned_of_where_one_is_to_come() -> None:
    soon = ending("settings", "gpt-5-small", "openai", datetime.date(2026, 12, 20))  # the table knows its last training only
    assert (soon.urgent, soon.stops, soon.next_days) == (True, False, 17)
    assert "the last day for a new training is 2027-01-06" in soon.text()
    assert not ending("version", "ft:gpt-5-small:org::x", "openai", datetime.date(2026, 12, 20)).urgent  # it goes on answering
    both = [ending("settings", MINI, "openai", datetime.date(2027, 1, day)) for day in (5, 7, 12, 15)]
    assert len({one.key for one in both}) == 4 - 1  # a warning as each day nears and passes: 5 → 7 → 15
    assert find("azure", MINI) is not None
    assert find("azure", MINI).shutdown == datetime.date(2027, 10, 1)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("url", "provider"),
    [
        ("https://api.openai.com/v1", "openai"),
        ("https://firm.openai.azure.com/openai/v1/", "azure"),
        ("https://api.tokenfactory.nebius.com/v1/", "nebius"),
        ("bedrock://eu-west-1", "bedrock"),
        ("sagemaker://eu-west-1", "sagemaker"),
        ("http://127.0.0.1:8000/v1", None),
        ("https://api.openai.com.example.org/v1", None),
    ],
)
def test_whose_an_address_is(url: str, provider: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert provider_at(url) == provider


YAML = f"""
select: {{vertical: dental}}
benchmark:
  endpoints: [{{name: rival, url: "https://api.openai.com/v1", model: gpt-4.1, api_key_env: RIVAL_KEY}}]
  judge: {{url: "https://api.openai.com/v1", model: gpt-4o, api_key_env: RIVAL_KEY}}
serving: {{upstream: "https://api.openai.com/v1", champion_model: "ft:{MINI}:org::1", upstream_key: RIVAL_KEY}}
"""


@pytest.mark.parametrize(
    ("model", "kind", "day"),
    [
        (MINI, "asked", datetime.date(2026, 10, 1)),  # the base itself
        (f"{MINI}.ft-0123-dental", "asked", datetime.date(2027, 10, 1)),
        (MINI, "settings", datetime.date(2027, 10, 1)),  # what is to be trained on it
        ("gpt-4.1-2025-04-14", "asked", datetime.date(2026, 10, 14)),
    ],
)
def test_a_base_at_azure_stops_before_what_was_tuned_on_it(model: str, kind: Any, day: datetime.date) -> None:
    [ending] = endings([Use("dental", "azure", model, "judge of the benchmark", kind)], datetime.date(2026, 11, 22))
    assert ending.lifecycle.shutdown == day
    assert ending.stops == (day.year == 2026)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    folder = tmp_path / "assistants"
    folder.mkdir()
    (folder / "dental.yaml").write_text(YAML)
    (folder / "resting.yaml").write_text(
        "select: {vertical: restaurant}\ntrainer: azure\nremote: {base_url: http://127.0.0.1:9}\n"
    )
    for name, value in (("HOME", tmp_path / "home"), ("ASSISTANTS", folder), ("DATABASE_URL", f"sqlite:///{tmp_path}/l.db")):
        monkeypatch.setenv(f"FINETUNE_{name}", str(value))
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "AZURE_OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return Environment.read()


def test_an_address_is_asked_about_its_own_models_only(environment: Environment) -> None:
    book = Ledger(environment.database_url)
    places = {"norte": ("https://norte.openai.azure.com/openai/v1/", "ft-norte"), "sur": ("https://sur.openai.azure.com", MINI)}
    settings = [
        Assistant.model_validate(
            {"name": name, "select": {"vertical": "r"}, "trainer": "azure", "base_model": model, "remote": {"base_url": url}}
        )
        for name, (url, model) in places.items()
    ]
    uses = uses_of(settings, book)
    book.close()
    asked = {str(connection.base_url): uses.models_at(connection) for connection in uses.connections}
    assert asked == {url: [model] for url, model in places.values()}


def test_the_doctor_sees_every_rented_model_in_use(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIVAL_KEY", "sk-0123456789")
    book = Ledger(environment.database_url)
    columns: dict[str, Any] = {"assistant": "dental", "tenant_id": None, "dataset_id": "d", "dataset_fingerprint": "f1"}
    columns |= {"provider": "openai", "base_model": MINI, "hyperparameters": {}, "plan": {}, "spec_hash": "s"}
    job = book.open_job(columns)
    open_journal(book, job.id, Connection("openai").to_dict(), 72)
    assert {use.kind for use in uses_of([Assistant(name="resting", trainer="azure", select={"vertical": "r"})], book).uses} == {  # type: ignore[arg-type]
        "settings",
        "job",
    }
    book.close()
    found = rented(environment, datetime.date(2026, 12, 20))
    dying = [one.text for one in found if one.level == "problem" and "2027-01-14" in one.text]
    for what in ("benchmark endpoint rival", "judge of the benchmark", "upstream of the router", f"open job {job.id}"):
        assert [text for text in dying if what in text], what
    assert [one.level for one in found if "RIVAL_KEY is set" in one.text] == ["ok"]
    [azure] = [one for one in found if "(azure gpt-4o-mini-2024-07-18)" in one.text]
    assert (azure.level, "2027-10-01" in azure.text) == ("ok", True)
    assert [one for one in found if one.level == "problem" and "OPENAI_API_KEY is not set" in one.text]
