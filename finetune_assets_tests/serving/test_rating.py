"""The rating page over real HTTP, and as raters meet it: in Chromium, with a phone's screen and a keyboard."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette

from finetune_assets.evaluation.candidates import TestRow as Row
from finetune_assets.evaluation.human import book, links, study
from finetune_assets.registry import Ledger
from finetune_assets.serving.rating import LARGEST, rating_routes
from finetune_assets.storage import Store
from finetune_assets_tests.accessibility import VIEWS, axe, violations

KEY = b"a key"
PAIRS = (
    ("¿Tienen lugar el viernes a las 5 de la tarde?", "Sí, anoto: viernes a las 17:00.", "Con gusto, anoto: jueves a las 18:00."),
    ("¿Cuánto sale una limpieza?", "Una limpieza cuesta 55 €.", "<script>alert(1)</script> ¿Qué día te viene bien?"),
    ("Me duele mucho una muela", "Vení ahora, te atendemos como urgencia.", "Claro que sí. ¿Para qué día?"),
    ("Gracias", "¡De nada! Que tengas un lindo día.", "De nada."),
    ("Quiero cancelar mi cita", "Listo, quedó cancelada.", "¿A nombre de quién está la cita?"),
)


@dataclass
class Site:
    """A server with two studies."""

    url: str
    store: Store
    ledger: Ledger

    def link(self, rater: str = "ana", name: str = "s1", expires: int = 2**31, key: bytes = KEY) -> str:
        return f"{self.url}/rate?{urlencode({'link': links.sign(links.Rater('dental', name, rater, expires), key)})}"

    def rated(self, name: str = "s1") -> list[book.Rating]:
        return book.of_study(self.ledger.engine, "dental", name)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    store, ledger = Store(tmp_path), Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    said = [[{"role": "user", "content": question}] for question, _, _ in PAIRS]
    rows = [Row(m, PAIRS[n][1], f"c{n}", f"m{n}", "clinic_a", "other") for n, m in enumerate(said)]
    items = [
        study.Item(
            f"i{n}",
            row.conversation_id,
            row.message_id,
            "clinic_a",
            row.messages,
            "",
            {"tuned": PAIRS[n][1], "base": PAIRS[n][2]},
        )
        for n, row in enumerate(rows)
    ]
    given = {"ana": [item.item for item in items], "luis": [items[0].item]}
    study.write(store, study.Study("dental", "s1", "pairs", "es", "v1", ["tuned", "base"], given, items))
    examples = study.examples(rows, 5)
    review = {"ana": [item.item for item in examples]}
    study.write(store, study.Study("dental", "review", "review", "en", "data", ["example"], review, examples))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    app = Starlette(routes=rating_routes(store, ledger.engine, KEY))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield Site(f"http://127.0.0.1:{port}", store, ledger)
    server.should_exit = True
    thread.join()
    ledger.close()


def fields(page: str) -> dict[str, str]:
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', page))


def test_a_rater_goes_through_and_can_come_back(site: Site):
    with httpx.Client(follow_redirects=True) as client:
        page = client.get(site.link())
        assert page.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in page.headers["content-security-policy"]
        for n in range(5):
            assert "tuned" not in page.text  # blind
            assert "base" not in page.text.replace("baseline", "")
            assert "<script>alert" not in page.text
            assert f"{n + 1} de 5" in page.text
            item = fields(page.text)["item"]
            page = client.post(f"{site.url}/rate", data={**fields(page.text), "choice": "left", "tag": ["tone", "wrong_fact"]})
            assert item in {rating.item for rating in site.rated()}
            if n == 2:
                page = client.get(site.link())  # the link is opened again: it goes on
        assert "¡gracias!" in page.text
        assert len(site.rated()) == 5
        assert all(rating.choice == rating.left for rating in site.rated())
        assert all(rating.tags == ["wrong_fact", "tone"] for rating in site.rated())
        again = client.get(f"{site.link()}&item=i0")
        assert re.search(r'value="left" aria-pressed="true"', again.text)
        client.post(f"{site.url}/rate", data={**fields(again.text), "choice": "both_bad"})
        assert next(r for r in site.rated() if r.item == "i0").choice == "both_bad"
        assert len(site.rated()) == 5


def test_what_is_refused(site: Site):
    assert httpx.get(f"{site.url}/rate").status_code == 403
    assert httpx.get(site.link(key=b"forged")).status_code == 403
    assert httpx.get(site.link(expires=1)).status_code == 403
    assert httpx.get(site.link(rater="eva")).status_code == 403
    assert httpx.get(site.link(name="gone")).status_code == 403
    token = httpx.URL(site.link("luis")).params["link"]
    other = {"link": token, "item": "i1", "choice": "left"}  # ana's item
    assert httpx.post(f"{site.url}/rate", data=other).status_code == 400
    assert httpx.post(f"{site.url}/rate", data={**other, "item": "i0", "choice": "best"}).status_code == 400
    assert httpx.post(f"{site.url}/rate", content=b"x" * (LARGEST + 1)).status_code == 413
    assert httpx.post(f"{site.url}/rate", content=b"\xff\x00=&;=").status_code == 403
    assert httpx.get(f"{site.url}/rate", params={"link": token.partition(".")[0] + ".ñandú"}).status_code == 403
    assert site.rated() == []


@pytest.mark.parametrize("started", ["²", "1.²", "٣", ".", "nan", "-1", ""])
def test_a_time_that_is_none_is_left_out(site: Site, started: str):
    token = httpx.URL(site.link("luis")).params["link"]
    answer = {"link": token, "item": "i0", "choice": "left", "started": started}
    assert httpx.post(f"{site.url}/rate", data=answer).status_code == 303
    assert [rating.seconds for rating in site.rated()] == [None]


def test_examples_are_accepted_or_rejected(site: Site):
    with httpx.Client(follow_redirects=True) as client:
        page = client.get(site.link(name="review"))
        assert "Is this reply a good example?" in page.text
        client.post(f"{site.url}/rate", data={**fields(page.text), "choice": "reject", "tag": "personal_data"})
    assert [(r.choice, r.tags) for r in site.rated("review")] == [("reject", ["personal_data"])]


@pytest.mark.e2e
def test_in_a_browser(site: Site):
    """Keyboard on a desktop, touch on a phone."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium")
        desk = browser.new_page()
        errors: list[str] = []
        desk.on("pageerror", lambda error: errors.append(str(error)))
        desk.goto(site.link())
        for n, key in enumerate(("a", "ArrowRight", "i")):
            desk.keyboard.press(key)
            desk.wait_for_selector(f"text={n + 2} de 5")
        desk.keyboard.press("z")
        desk.wait_for_selector("text=3 de 5")
        assert desk.locator("button[aria-pressed=true]").get_attribute("value") == "tie"
        phone = browser.new_context(**play.devices["Pixel 5"], color_scheme="dark").new_page()
        phone.goto(site.link())
        phone.wait_for_selector("text=4 de 5")
        assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth")
        phone.locator("label", has_text="tono").tap()
        phone.locator("button[value=both_bad]").tap()
        phone.wait_for_selector("text=5 de 5")
        browser.close()
        assert errors == []
    assert [r.choice for r in site.rated() if r.item == "i3"] == ["both_bad"]
    assert [r.tags for r in site.rated() if r.item == "i3"] == [["tone"]]
    assert len(site.rated()) == 4


@pytest.mark.e2e
@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing(site: Site, view: str):
    """Pairs, reviews, thanks and refusals. FINETUNE_SCREENSHOTS names a folder for pictures."""
    from playwright.sync_api import sync_playwright

    script, folder = axe(), os.environ.get("FINETUNE_SCREENSHOTS")
    width, scheme = VIEWS[view]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium")
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True)
        for name, link in (
            ("pairs", site.link()),
            ("review", site.link(name="review")),
            ("refused", site.link(key=b"forged")),
        ):
            page = context.new_page()
            page.goto(link)
            if folder:
                page.screenshot(path=f"{folder}/rating-{name}-{view}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert violations(page, script) == [], name
        page = context.new_page()
        page.goto(site.link())
        for _ in range(5):
            page.locator("button[value=tie]").click()
        page.wait_for_selector("text=gracias")
        assert violations(page, script) == []
        browser.close()
