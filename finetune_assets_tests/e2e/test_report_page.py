"""The report and the history as a clinic's manager sees them: in Chromium, light, dark, on a phone, searched. Marked `e2e`.

Reads FINETUNE_REPORT (a report.html), else one of tiny models. FINETUNE_SCREENSHOTS names a folder for pictures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.evaluation.history import FILE
from finetune_assets_tests.accessibility import VIEWS, axe, violations

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("FINETUNE_REPORT")
    if given:
        return Path(given)
    from finetune_assets.assistants.settings import Assistant
    from finetune_assets.evaluation import benchmark, candidates, report
    from finetune_assets.evaluation.history import write_history
    from finetune_assets.storage import write_json
    from finetune_assets.worker import benchmark as worker
    from finetune_assets.worker.progress import Progress
    from finetune_assets_tests.evaluation.frozen import make_dataset
    from finetune_assets_tests.tiny_model import make_tiny_model

    folder = tmp_path_factory.mktemp("page")
    dataset = make_dataset(folder / "data")
    models = [str(make_tiny_model(folder / name, context=256, seed=seed)) for name, seed in (("base", 0), ("tuned", 1))]
    assistant = Assistant(
        name="dental",
        select={"vertical": "dental"},
        rules=[{"name": "anota", "contains_any": ["anoto"]}],
        budget={"usd_per_hour": 0.4},
        benchmark={"max_rows": 20, "max_new_tokens": 16},
    )
    spec = benchmark.prepare(
        assistant, dataset, candidates.standard(dataset, *models, assistant.benchmark), folder / "out", threads=1
    )
    write_json(folder / "out" / "result.json", worker.run(spec, Progress.open(folder / "out")))
    for version in ("v1-1a2b3c4d", "v2-5e6f7a8b"):
        made = benchmark.Made(version, dataset, {"train_loss": 1.5, "seconds": 90.0}, requests_per_month=4000)
        report.write_report(benchmark.summarise(assistant, folder / "out", made), folder / "reports" / version)
    write_history(folder / "reports")
    return folder / "reports" / version / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path="/usr/bin/chromium")
        yield chromium
        chromium.close()


@pytest.fixture(params=VIEWS)
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page of each width and scheme; it loads nothing from elsewhere, and no script of it fails."""
    width, scheme = VIEWS[request.param]
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked: list[str] = []
    errors: list[str] = []
    opened.on("request", lambda one: asked.append(one.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    yield opened
    assert errors == []
    assert [url for url in asked if not url.startswith("file:")] == []
    opened.close()


def look(page: Any, file: Path, name: str, request: pytest.FixtureRequest) -> None:
    """Opens the file; nothing is wider than the screen."""
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if folder := os.environ.get("FINETUNE_SCREENSHOTS"):
        view = next(view for view in VIEWS if view in request.node.name)
        page.screenshot(path=f"{folder}/{name}-{view}.png", full_page=True)


def test_the_report_is_readable_and_searchable(page: Any, page_file: Path, request: pytest.FixtureRequest):
    look(page, page_file, "report", request)
    assert page.locator("#verdict h2").is_visible()
    total = page.locator(".sample").count()
    page.fill("#find", page.locator(".sample .turn dd").first.inner_text()[:12])
    assert 1 <= page.locator(".sample:visible").count() <= total
    page.fill("#find", "zzzz nothing like it")
    assert page.locator(".sample:visible").count() == 0
    assert page.locator("#found").inner_text() in (f"0 de {total} a la vista", f"0 of {total} shown")


def test_the_history_leads_to_the_reports(page: Any, page_file: Path, request: pytest.FixtureRequest):
    history = page_file.parent.parent / FILE
    look(page, history, "history", request)
    page.locator("tbody a").first.click()
    assert page.locator("#verdict h2").is_visible()


@pytest.mark.parametrize("name", ["report", "history"])
def test_axe_finds_nothing(page: Any, page_file: Path, name: str):
    script = axe()
    page.goto((page_file if name == "report" else page_file.parent.parent / FILE).as_uri())
    assert violations(page, script) == []
