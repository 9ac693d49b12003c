"""A version that a provider answers: asked at its own address under its own name, and paid by its tokens."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
import sqlalchemy as sa

from finetune_assets.assistants.settings.serving import RolloutSettings
from finetune_assets.registry.traffic import requests
from finetune_assets.serving import control
from finetune_assets.serving.judge import judge
from finetune_assets.serving.rented import rented
from finetune_assets.storage import Store
from finetune_assets.training.remote import RemoteModel
from finetune_assets_tests.serving.servers import Upstream
from finetune_assets_tests.serving.shop import Served, Shop, wait_for


def metrics(served: Served) -> str:
    return served.client.get("/metrics").text


def test_the_router_asks_the_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RENTED_KEY", "sk-rented-0123456789")
    provider, other = Upstream(), Upstream()
    try:
        model = RemoteModel("openai", "ft:gpt-4o-mini:org:aurora:1", provider.url, "RENTED_KEY", None, 0.15, 0.6)
        model.write(tmp_path / "model")
        shop = Shop(tmp_path / "shop", upstream=other.url)
        shop.settings("budget: {usd_per_hour: 1000}\n")  # the machine's, which does not answer
        shop.roll_out(shop.version("a", tmp_path / "model"), "done")
        with shop.served("--no-judge") as served:
            answer = served.client.post("/chat", json={"user_id": "eva", "message": "Hola"}).json()
            assert answer["response"] == "ft:gpt-4o-mini:org:aurora:1 oye: Hola"

            def row() -> float | None:
                with shop.ledger() as book, book.engine.connect() as connection:
                    where = requests.c.request_id == answer["request_id"]
                    return connection.execute(sa.select(requests.c.usd).where(where)).scalar()

            price = pytest.approx((5 * 0.15 + 7 * 0.6) / 1e6)
            assert wait_for(row) == price
            told = re.search(r'^finetune_usd_total{arm="champion",assistant="aurora",kind="live"} (\S+)', metrics(served), re.M)
            assert told
            assert float(told[1]) == price
        assert not other.seen
    finally:
        provider.close()
        other.close()


def rent(folder: Path, url: str, name: str) -> Path:
    RemoteModel("openai", name, url, "RENTED_KEY", None, 0.15, 0.6).write(folder)
    (folder / "name.txt").write_text(name)  # two folders of one content are one version
    return folder


def test_a_provider_is_sent_nothing_of_the_engines(tmp_path: Path, upstream: Upstream) -> None:
    """A rented candidate in shadow, with the default upstream: OpenAI answers 400 to a field that it does not know."""
    shop = Shop(tmp_path / "shop")
    for letter, step in (("a", "done"), ("b", "shadow")):
        shop.roll_out(shop.version(letter, rent(tmp_path / letter, upstream.url, f"ft:{letter}")), step)

    async def go() -> None:
        async with shop.inside(engine_url="http://127.0.0.1:9/v1") as served:
            assert (await served.ask()).status_code == 200

    asyncio.run(go())
    assert shop.values(requests, "outcome", kind="shadow") == {"ok"}
    asked = [body for body in upstream.seen if body["model"] == "ft:b"]
    assert [sorted(body) for body in asked] == [["max_tokens", "messages", "model", "stream", "temperature"]]


def test_a_folder_that_comes_late_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert rented(store, "aurora", "v1-ab") is None
    assert rented(store, "aurora", None) is None
    rent(store.model("aurora", "v1-ab"), "http://127.0.0.1:9/v1", "ft:a")
    found = rented(store, "aurora", "v1-ab")
    assert found
    assert found[0].model == "ft:a"
    assert rented(store, "clinica_aurora", "aurora--v1-ab") is found


def test_a_candidate_that_its_upstream_does_not_know_has_failed_nothing(tmp_path: Path, upstream: Upstream) -> None:
    """vLLM has not loaded the adapter: a person is told at once, nothing is rolled back, and it is judged when it is there."""
    shop = Shop(tmp_path, upstream=upstream.url)
    shop.settings()
    _, version = shop.two_versions("shadow")
    settings = RolloutSettings(min_requests=8, min_hours=0)

    async def go() -> None:
        async with shop.inside() as served:
            for n in range(8):
                assert (await served.ask(user=f"u{n}")).status_code == 200

    def step() -> tuple[str, str] | None:
        with shop.ledger() as book:
            move = control.step(book, "aurora", settings, "test")
        return (move.event, move.reason) if move else None

    upstream.faults[version] = "status:404:The model does not exist."
    asyncio.run(go())
    event, reason = step() or ("", "")
    assert (event, reason.partition(" (")[0]) == ("held", "upstream: the upstream does not know this version")
    assert shop.values(requests, "status", kind="shadow") == {404}
    assert step() is None
    upstream.faults.clear()
    asyncio.run(go())
    with shop.ledger() as book:
        judged = judge(book, book.rollout("aurora"), settings)
    assert "upstream" not in [guard.name for guard in judged.guards]
    assert judged.requests == 8
    upstream.faults[version] = "status:500:out of memory"
    asyncio.run(go())
    assert shop.values(requests, "outcome", kind="shadow") == {"refused", "ok", "error"}
