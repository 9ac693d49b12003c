"""What may leave this machine, and what it may cost: tenants that forbid it, and replies that a benchmark buys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.assets.remote import forbidding_tenants
from finetune_assets.assistants.settings import Assistant
from finetune_assets.assistants.settings.evaluation import EndpointSettings
from finetune_assets.errors import BudgetExceeded, SettingsError
from finetune_assets.evaluation.bought import buy, estimate_replies, leaves, reserve_replies, settle_replies
from finetune_assets.evaluation.rented import with_rented
from finetune_assets.registry import Ledger
from finetune_assets.registry.spending import month
from finetune_assets.resources import AssistantsResource, StoreResource
from finetune_assets.storage import write_json
from finetune_assets.training.screening import check_permission
from finetune_assets_tests.training.fake_provider import FakeProvider
from finetune_assets_tests.training.remote_request import assistant

ROWS = 100


def test_an_assistant_or_a_tenant_whose_rows_it_holds_may_forbid_it() -> None:
    check_permission("dental", True, [])
    with pytest.raises(SettingsError, match=r"dental has `remote\.allowed: false`: nothing of it leaves this machine"):
        check_permission("dental", False, [])
    with pytest.raises(SettingsError, match=r"holds rows of norte, whose settings.*filters\.exclude_tenants"):
        check_permission("dental", True, ["norte"])


def test_a_tenant_forbids_it_in_its_own_file_whatever_that_is_called(tmp_path: Path) -> None:
    for name, text in (
        ("dental", "select: {vertical: dental}\n"),
        ("north", "select: {tenant: clinica_norte}\nremote: {allowed: false}\n"),
        ("clinica_sur", "select: {tenant: clinica_sur}\nremote: {allowed: false}\n"),
        ("clinica_este", "select: {tenant: clinica_este}\n"),
    ):
        (tmp_path / f"{name}.yaml").write_text(text)
    store, frozen = StoreResource(home=str(tmp_path / "home")), tmp_path / "frozen"
    write_json(frozen / "manifest.json", {"counts": {"tenant": {"clinica_norte": 5, "clinica_este": 4}}})
    assistants = AssistantsResource(folder=str(tmp_path))
    assert forbidding_tenants(assistants, store, frozen) == ["clinica_norte"]
    (tmp_path / "north.yaml").write_text("select: {tenant: clinica_norte}\nremote: {allowed: false, alowed: 1}\n")  # a typo
    with pytest.raises(SettingsError, match=r"No rows leave.*settings of north cannot be read.*alowed"):
        forbidding_tenants(assistants, store, frozen)


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
    usd = estimate_replies(asking(assistant(), both), work)
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
    assert settle_replies(book, asking(rich, both), work, "benchmark:v1:b") == pytest.approx(0.15)
    assert [row["usd"] for row in month(book) if row["reference"].endswith(":b")] == [pytest.approx(0.15)]


def test_tools_that_are_offered_cost_too(tmp_path: Path) -> None:
    settings = asking(assistant(), [endpoint("tuned", 100.0)])
    plain = prepared(tmp_path / "plain", "tuned")
    tools = [{"type": "function", "function": {"name": "libre", "parameters": {"enum": ["lunes"] * 50}}}]
    offered = prepared(tmp_path / "offered", "tuned") / "prompts" / "tuned.jsonl"
    offered.write_text(
        "".join(json.dumps({**json.loads(line), "tools": tools}) + "\n" for line in offered.read_text("utf-8").splitlines())
    )
    assert estimate_replies(settings, tmp_path / "offered") > estimate_replies(settings, plain) + ROWS * 100 * 100 / 1e6


def test_replies_without_a_price_are_refused_where_a_month_is_limited(book: Ledger, tmp_path: Path) -> None:
    work, unpriced = prepared(tmp_path / "work", "tuned", "here"), [endpoint("tuned", None)]
    with pytest.raises(
        SettingsError, match=r"budget\.monthly_usd is 5, but.*ft:x \(tuned\) has no price for replies.*prices\.yaml"
    ):
        reserve_replies(book, asking(assistant(budget={"monthly_usd": 5}), unpriced), "benchmark:v1:a", work)
    reserve_replies(book, asking(assistant(), unpriced), "benchmark:v1:a", work)
    own_server = [endpoint("here", None)]  # an address of the settings, such as a server of one's own
    reserve_replies(book, asking(assistant(budget={"monthly_usd": 5}), own_server), "benchmark:v1:b", work)


def test_test_rows_stay_here_where_nothing_may_leave(book: Ledger) -> None:
    closed = assistant(remote={"allowed": False})
    here, there = (
        asking(closed, [endpoint("tuned", 1.0).model_copy(update={"url": f"http://{at}/v1"})]) for at in ("[::1]", "a")
    )
    assert (leaves(here.benchmark), leaves(there.benchmark)) == (False, True)
    away = endpoint("tuned", 1.0).model_copy(update={"url": "https://api.openai.com/v1"})
    with pytest.raises(SettingsError, match=r"dental say .*no rows are sent to tuned \(https://api\.openai\.com/v1\)"):
        reserve_replies(book, asking(closed, [away]), "benchmark:v1:a")
    for url in ("bedrock://us-east-1", "http://localhost.example.com/v1"):
        with pytest.raises(SettingsError, match="no rows are sent"):
            reserve_replies(book, asking(closed, [away.model_copy(update={"url": url})]), "benchmark:v1:a")
    reserve_replies(book, asking(closed, [endpoint("here", None)]), "benchmark:v1:a")


def test_a_local_version_of_a_pool_is_not_measured_beside_a_rented_one_where_a_tenant_forbids_it(book: Ledger) -> None:
    away = endpoint("champion", 1.0).model_copy(update={"url": "https://api.openai.com/v1"})
    local = Assistant.model_validate({"name": "dental", "select": {"vertical": "dental"}})
    with pytest.raises(SettingsError, match=r"norte in its data set say .*sent to champion.*filters\.exclude_tenants"):
        reserve_replies(book, asking(local, [away]), "benchmark:v1:a", forbidding=["norte"])
    reserve_replies(book, asking(local, [endpoint("here", None)]), "benchmark:v1:a", forbidding=["norte"])


def judged_by(model: str, url: str, **settings: Any) -> Assistant:
    """An assistant whose replies a judge compares, 40 rows of them."""
    return assistant(benchmark={"judge": {"url": url, "model": model, "rows": 40}}, **settings)


def test_what_a_judge_costs_is_reserved_and_settled(book: Ledger, tmp_path: Path) -> None:
    work, openai = prepared(tmp_path / "work", "tuned", "base"), "https://api.openai.com/v1"
    settings = judged_by("gpt-4o-mini", openai, budget={"monthly_usd": 1.0})
    usd = estimate_replies(settings, work)
    assert 2 * 40 * 300 * 0.15 / 1e6 < usd < 2 * 40 * 900 * 0.15 / 1e6 + 2 * 40 * 8 * 0.60 / 1e6  # the dated table's prices
    with pytest.raises(BudgetExceeded, match=r"above budget\.monthly_usd"):
        reserve_replies(book, judged_by("gpt-4o-mini", openai, budget={"monthly_usd": usd / 2}), "benchmark:v1:a", work)
    reserve_replies(book, settings, "benchmark:v1:b", work)
    (work / "result.json").write_text(
        json.dumps({"candidates": {}, "judge_bought": {"prompt_tokens": 1_000_000, "reply_tokens": 0}})
    )
    assert settle_replies(book, settings, work, "benchmark:v1:b") == pytest.approx(0.15)
    assert [(row["usd"], row["final"]) for row in month(book)] == [(pytest.approx(0.15), True)]
    with pytest.raises(SettingsError, match=r"gpt-99 \(benchmark\.judge\) has no price for replies"):
        reserve_replies(book, judged_by("gpt-99", openai, budget={"monthly_usd": 1.0}), "benchmark:v2:a", work)
    with pytest.raises(SettingsError, match=r"no rows are sent to benchmark\.judge"):
        reserve_replies(book, judged_by("gpt-4o-mini", openai, remote={"allowed": False}), "benchmark:v2:a", work)


def test_what_a_check_asks_is_out_of_the_same_month(fake: FakeProvider, book: Ledger) -> None:
    prompts = [[{"role": "user", "content": "¿Abren mañana? " * 50}]] * 8
    settings = judged_by("gpt-4o-mini", fake.url, budget={"monthly_usd": 1.0})  # OPENAI_BASE_URL: the table's prices
    poor, judge = assistant(budget={"monthly_usd": 0.0001}), settings.benchmark.judge
    assert judge is not None
    with pytest.raises(BudgetExceeded, match=r"above budget\.monthly_usd"):
        buy(book, poor, judge, prompts, 8)
    assert (month(book), fake.state()["seen"]) == ([], [])
    replies = buy(
        book, settings, judge.model_copy(update={"model": "gpt-4o-mini-2024-07-18", "api_key_env": "OPENAI_API_KEY"}), prompts, 8
    )
    [row] = month(book)
    used = sum(one["prompt_tokens"] for one in replies), sum(one["reply_tokens"] for one in replies)
    assert used[0] > 8 * 100
    assert (row["provider"], row["kind"], row["final"], row["tokens"]) == ("check", "replies", True, sum(used))
    assert row["usd"] == pytest.approx((used[0] * 0.15 + used[1] * 0.60) / 1e6)
    buy(book, settings, judge, prompts, 8)  # without a key: nothing was bought
    assert len(month(book)) == 1
