"""What may leave this machine, and what it may cost: tenants that forbid it, and replies that a benchmark buys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_assets.assistants.settings import Assistant
from finetune_assets.assistants.settings.evaluation import EndpointSettings
from finetune_assets.errors import BudgetExceeded, SettingsError
from finetune_assets.evaluation.rented import estimate_replies, reserve_replies, settle_replies, with_rented
from finetune_assets.registry import Ledger
from finetune_assets.registry.spending import month
from finetune_assets.training.screening import check_permission
from finetune_assets_tests.training.remote_request import assistant

ROWS = 100


def test_an_assistant_or_a_tenant_whose_rows_it_holds_may_forbid_it() -> None:
    check_permission("dental", True, ["aurora", "norte"], [])
    with pytest.raises(SettingsError, match=r"dental has `remote\.allowed: false`: nothing of it leaves this machine"):
        check_permission("dental", False, [], [])
    with pytest.raises(SettingsError, match=r"holds rows of norte, whose settings.*filters\.exclude_tenants"):
        check_permission("dental", True, ["aurora", "norte"], ["norte", "elsewhere"])


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield made
    made.close()


def prepared(work: Path, *names: str) -> Path:
    """A benchmark's prompts, about 100 tokens each."""
    (work / "prompts").mkdir(parents=True)
    line = json.dumps({"messages": [{"role": "user", "content": "Hola, ¿abren mañana por la tarde? " * 10}]}) + "\n"
    for name in names:
        (work / "prompts" / f"{name}.jsonl").write_text(line * ROWS, encoding="utf-8")
    return work


def endpoint(name: str, usd: float | None) -> EndpointSettings:
    url = "http://127.0.0.1:9/v1"
    return EndpointSettings(name=name, url=url, model="ft:x", usd_per_million_input=usd, usd_per_million_output=usd)


def asking(settings: Assistant, endpoints: list[EndpointSettings]) -> Assistant:
    """Settings whose benchmark asks these addresses."""
    return with_rented(settings, endpoints, "tuned", None)


def test_a_benchmark_reserves_its_replies_and_is_refused_above_the_month(book: Ledger, tmp_path: Path) -> None:
    work, both = prepared(tmp_path / "work", "tuned", "base"), [endpoint("tuned", 100.0), endpoint("base", 100.0)]
    usd = estimate_replies(both, work)
    assert 2 * ROWS * 80 * 100 / 1e6 < usd < 2 * ROWS * 300 * 100 / 1e6
    poor, rich = assistant(budget={"monthly_usd": usd / 2}), assistant(budget={"monthly_usd": 2.5 * usd})
    with pytest.raises(BudgetExceeded, match=rf"about \${usd:.2f}.*above budget\.monthly_usd"):
        reserve_replies(book, asking(poor, both), "benchmark:v1:a", work)
    assert month(book) == []
    reserve_replies(book, asking(rich, both), "benchmark:v1:a", work)  # killed before it was settled: its estimate stands
    reserve_replies(book, asking(rich, both), "benchmark:v1:b", work)
    assert {row["reference"]: row["final"] for row in month(book)} == {"benchmark:v1:a": True, "benchmark:v1:b": False}
    bought = {"tuned": {"bought": {"prompt_tokens": 1000, "reply_tokens": 500}}, "base": {}}
    (work / "result.json").write_text(json.dumps({"candidates": bought}))
    assert settle_replies(book, both, work, "benchmark:v1:b") == pytest.approx(0.15)
    assert [row["usd"] for row in month(book) if row["reference"].endswith(":b")] == [pytest.approx(0.15)]


def test_replies_without_a_price_are_refused_where_a_month_is_limited(book: Ledger, tmp_path: Path) -> None:
    work, unpriced = prepared(tmp_path / "work", "tuned", "here"), [endpoint("tuned", None)]
    with pytest.raises(SettingsError, match=r"budget\.monthly_usd is 5, but.*ft:x has no price for replies.*prices\.yaml"):
        reserve_replies(book, asking(assistant(budget={"monthly_usd": 5}), unpriced), "benchmark:v1:a", work)
    reserve_replies(book, asking(assistant(), unpriced), "benchmark:v1:a", work)
    own_server = [endpoint("here", None)]  # an address of the settings, such as a server of one's own
    reserve_replies(book, asking(assistant(budget={"monthly_usd": 5}), own_server), "benchmark:v1:b", work)


def test_test_rows_stay_here_where_nothing_may_leave(book: Ledger) -> None:
    closed = assistant(remote={"allowed": False})
    away = endpoint("tuned", 1.0).model_copy(update={"url": "https://api.openai.com/v1"})
    with pytest.raises(SettingsError, match=r"its test rows are not sent to tuned \(https://api\.openai\.com/v1\)"):
        reserve_replies(book, asking(closed, [away]), "benchmark:v1:a")
    for url in ("bedrock://us-east-1", "http://localhost.example.com/v1"):
        with pytest.raises(SettingsError, match="are not sent"):
            reserve_replies(book, asking(closed, [away.model_copy(update={"url": url})]), "benchmark:v1:a")
    reserve_replies(book, asking(closed, [endpoint("here", None)]), "benchmark:v1:a")
