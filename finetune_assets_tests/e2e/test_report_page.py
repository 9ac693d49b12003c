"""The report as a clinic's manager sees it: in Chromium, light, dark, on a phone, searched. Marked `e2e`.

Reads FINETUNE_REPORT (a report.html), else one of tiny models. FINETUNE_AXE names axe-core, FINETUNE_SCREENSHOTS a folder.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("FINETUNE_REPORT")
    if given:
        return Path(given)
    from finetune_assets.assistants.settings import Assistant
    from finetune_assets.evaluation import benchmark, candidates, report
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
    made = benchmark.Made("v1-1a2b3c4d", dataset, {"train_loss": 1.5, "seconds": 90.0}, requests_per_month=4000)
    return report.write_report(benchmark.summarise(assistant, folder / "out", made), folder / "report")["html"]


def test_it_is_readable_searchable_and_accessible(page_file: Path):
    from playwright.sync_api import sync_playwright

    pictures, axe = os.environ.get("FINETUNE_SCREENSHOTS"), os.environ.get("FINETUNE_AXE")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium")
        for name, scheme, width in (("desktop", "light", 1200), ("dark", "dark", 1200), ("phone", "light", 390)):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            asked: list[str] = []
            errors: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.goto(page_file.as_uri())
            assert page.locator("#verdict h2").is_visible()
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
            if pictures:
                page.screenshot(path=f"{pictures}/report-{name}.png", full_page=True)
            if axe:
                page.add_script_tag(path=axe)
                assert page.evaluate("async () => (await axe.run()).violations.map((v) => `${v.id}: ${v.nodes[0].html}`)") == []
            total = page.locator(".sample").count()
            page.fill("#find", page.locator(".sample .turn dd").first.inner_text()[:12])
            shown = page.locator(".sample:visible").count()
            assert 1 <= shown <= total
            page.fill("#find", "zzzz nothing like it")
            assert page.locator(".sample:visible").count() == 0
            assert (
                f"0 de {total}" in page.locator("#found").inner_text() or f"0 of {total}" in page.locator("#found").inner_text()
            )
            assert errors == []
            assert [url for url in asked if not url.startswith("file:")] == []  # nothing is loaded from elsewhere
            page.close()
        browser.close()
