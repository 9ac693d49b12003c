"""Dashboard and experiment page in Chromium, on a real router: buttons with who and why, phone width, axe. Marked `e2e`.

FINETUNE_AXE names axe-core (axe.min.js), FINETUNE_SCREENSHOTS a folder for pictures.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from finetune_assets.registry.traffic import requests
from finetune_assets.serving import experiments
from finetune_assets_tests.serving.servers import Upstream
from finetune_assets_tests.serving.shop import Served, Shop, wait_for

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on the PATH: install Debian's `chromium`")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        made = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield made
        made.close()


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    upstream = Upstream()
    yield Shop(tmp_path, upstream=upstream.url)
    upstream.close()


def press(page: Any, button: str, why: str) -> str:
    """Who, why, a button; the page's notice."""
    page.locator("input[name=who]").first.fill("ana")
    page.locator("input[name=reason]").first.fill(why)
    page.get_by_role("button", name=button, exact=True).click()
    return page.locator(".notice").inner_text()


def readable(browser: Any, served: Served, path: str, name: str) -> None:
    """On a phone nothing is wider than the screen, and axe finds nothing."""
    context = browser.new_context(viewport={"width": 390, "height": 900}, bypass_csp=True)
    page = context.new_page()
    page.goto(served.url + path)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(
        "[...document.querySelectorAll('.history td')].every((td) => td.getBoundingClientRect().right <= innerWidth)"
    )
    if os.environ.get("FINETUNE_AXE"):
        page.add_script_tag(path=os.environ["FINETUNE_AXE"])
        assert page.evaluate("async () => (await axe.run()).violations.map((v) => `${v.id}: ${v.nodes[0].html}`)") == []
    if os.environ.get("FINETUNE_SCREENSHOTS"):
        page.screenshot(path=f"{os.environ['FINETUNE_SCREENSHOTS']}/{name}.png", full_page=True)
    context.close()


def test_a_person_advances_and_rolls_back_with_who_and_why(shop: Shop, browser: Any) -> None:
    version = shop.version("a")
    shop.roll_out(version)
    with shop.served("--no-judge") as served:
        page = browser.new_page()
        page.goto(f"{served.url}/dashboard")
        page.locator("input[name=who]").first.fill("ana")
        page.get_by_role("button", name="Advance", exact=True).click()  # the browser asks for the reason
        with shop.ledger() as book:
            assert book.rollout("aurora").step == "shadow"
        assert press(page, "Advance", "good in staging") == "aurora: advanced"
        assert page.locator("li.now").inner_text() == "10 %"
        readable(browser, served, "/dashboard", "dashboard-phone")
        page.locator("input[name=reason]").first.fill("half a rea")
        page.wait_for_timeout(4500)  # two renewals would have come
        assert page.locator("input[name=reason]").first.input_value() == "half a rea"
        assert page.locator("#paused").is_visible()
        assert press(page, "Roll back", "patients complain") == "aurora: rolled back"
        page.close()
    with shop.ledger() as book:
        last = book.events("aurora")[-2:]
        assert book.rollout("aurora").candidate is None
    assert [(event["event"], event["reason"], event["actor"]) for event in last] == [
        ("advanced", "good in staging", "ana (dashboard)"),
        ("rolled_back", "patients complain", "ana (dashboard)"),
    ]


def test_an_experiment_has_a_page_and_its_result_stays(shop: Shop, browser: Any) -> None:
    first, second = shop.version("a"), shop.version("b")
    people = [f"colleague-{n}" for n in range(20)]
    chosen = {"tenants": [], "users": [f"clinica_aurora/{user}" for user in people]}
    with shop.ledger() as book:
        experiments.begin(book, "aurora", (first, second), 0.5, chosen, ("try", "ana"))
    with shop.served("--no-judge") as served:
        answered = [served.ask(user=user).json()["model"] for user in people]
        assert set(answered) == {f"aurora--{first}", f"aurora--{second}"}
        assert served.ask(user="a patient").json()["model"] == "aurora--base"

        def logged() -> bool:
            with shop.ledger() as book, book.engine.connect() as connection:
                return connection.execute(sa.select(sa.func.count()).select_from(requests)).scalar() == 21

        assert wait_for(logged)
        page = browser.new_page()
        page.goto(f"{served.url}/dashboard")
        page.get_by_role("link", name="Result").click()
        b = page.locator("#now .sides section").nth(1).inner_text()
        assert second in b
        assert f"requests\n{answered.count(f'aurora--{second}')}\n" in b
        assert "Not settled yet" in page.locator("#now").inner_text()
        readable(browser, served, "/dashboard/aurora/experiment", "experiment-phone")
        assert "Not settled yet" in press(page, "End the experiment", "seen enough")
        assert "No experiment runs" in page.locator("#now").inner_text()
        past = page.locator(".ended").inner_text()
        assert second in past
        assert "ana (dashboard): seen enough" in past
        page.close()
