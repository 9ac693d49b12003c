"""A version that a provider answers: asked at its own address under its own name, and paid by its tokens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sqlalchemy as sa

from finetune_assets.registry.traffic import requests
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
