"""A tenant's first own version beside its vertical's: until it is champion, its users stay with what they have."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from finetune_assets.registry.traffic import requests
from finetune_assets.serving import control, directory, keys
from finetune_assets.serving.assignment import assign
from finetune_assets_tests.serving.servers import Upstream
from finetune_assets_tests.serving.shop import Shop


def test_a_tenants_first_own_version_leaves_its_users_where_they_are(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "SETTINGS", 0.05)
    shop, elsewhere = Shop(tmp_path, upstream=upstream.url), Upstream()
    vertical = shop.assistants / "dental.yaml"
    (shop.assistants / "aurora.yaml").rename(vertical)
    vertical.write_text(vertical.read_text().replace("{tenant: clinica_aurora}", "{vertical: dental}"))
    live, own = shop.version("a", assistant="dental"), shop.version("b", assistant="clinica_aurora")
    shop.roll_out(live, "done", assistant="dental")
    with shop.ledger() as book:
        key = keys.add(book, "clinica_aurora")

    async def go() -> None:
        async with shop.inside(open_door=False, Authorization=f"Bearer {key}") as served:

            async def answered(model: str = "dental", user: str = "eva", name: str = f"dental--{live}") -> None:
                for _ in range(100):  # the ledger is followed within a second
                    answer = await served.ask(user=user, model=model)
                    assert answer.status_code == 200, answer.text
                    if answer.json()["model"] == name:
                        assert answer.json()["choices"][0]["message"]["content"] == f"{name} oye: Hola"
                        return
                    await asyncio.sleep(0.02)
                raise AssertionError(f"{name} does not answer")

            await answered()
            shop.roll_out(own, assistant="clinica_aurora")
            while "clinica_aurora" not in served.router.directory.assistants:
                await asyncio.sleep(0.02)
            for model in ("dental", "clinica_aurora", "gpt-4o"):
                await answered(model)
            (shop.assistants / "clinica_aurora.yaml").write_text(  # which asks its own upstream, not for the vertical's version
                f"select: {{tenant: clinica_aurora}}\nserving: {{upstream: {elsewhere.url}}}\n"
            )
            await asyncio.sleep(0.5)
            await answered()
            shop.advance("clinica_aurora")
            while not (state := served.router.directory.rollout("clinica_aurora")).share:
                await asyncio.sleep(0.02)
            first = next(u for u in map(str, range(200)) if assign(state, "clinica_aurora", u).name == "candidate")
            await answered(user=first, name=f"clinica_aurora--{own}")
            with shop.ledger() as book:
                control.rollback(book, "clinica_aurora", "bad", "ana")
            await answered(user=first)
            await answered("gpt-4o")

    try:
        asyncio.run(go())
    finally:
        elsewhere.close()
    assert shop.values(requests, "version", assistant="clinica_aurora", kind="live") == {f"dental--{live}", own}
