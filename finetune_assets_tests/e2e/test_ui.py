"""The product as a data engineer meets it: webserver and daemon, runs launched through GraphQL, pages read in Chromium.

Marked `e2e`. Pictures go to FINETUNE_SCREENSHOTS where that is set, e.g. for the README.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.environment import ROOT
from finetune_assets.registry import Ledger
from finetune_assets_tests.e2e.running_ui import Ui, chromium_page, picture, running
from finetune_assets_tests.test_definitions import BLOCKING

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SETTINGS = """
select: {vertical: dental}
hyperparameters: {epochs: 1}
benchmark: {max_rows: 60}
gates: {max_perplexity: null, max_training_loss: null, max_reply_seconds: null, max_personal_data: null, min_rules: null}
"""


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    home, settings = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("assistants")
    shipped = ROOT / "finetune_assets" / "assistants" / "dental.yaml"
    (settings / "base.yaml").write_text(shipped.read_text(encoding="utf-8"), encoding="utf-8")
    (settings / "dental.yaml").write_text("extends: base\n" + SETTINGS, encoding="utf-8")
    environment = {
        "FINETUNE_HOME": str(home),
        "FINETUNE_SOURCE": "data/sample",
        "FINETUNE_ASSISTANTS": str(settings),
        "FINETUNE_FIRST_WEEK": "2026-08-03",
        "HF_HUB_OFFLINE": "1",
    }
    with running(home, environment) as found:
        yield found


@pytest.fixture(scope="module")
def page(ui: Ui) -> Iterator[Any]:
    with chromium_page() as opened:
        yield opened


def test_an_assistant_is_trained_benchmarked_and_registered_from_the_ui(ui: Ui) -> None:
    weeks = {"dagster/asset_partition_range_start": "2026-08-03", "dagster/asset_partition_range_end": "2026-11-16"}
    assert ui.wait(ui.launch("prepare_corpus", weeks)) == "SUCCESS"
    assert ui.wait(ui.launch("train", {"dagster/partition": "dental"})) == "SUCCESS"
    ledger = Ledger(f"sqlite:///{ui.home / 'ledger.db'}")
    try:
        job = ledger.jobs("dental")[0]
        assert job.status == "succeeded"
        # The ledger sensor takes the job into phase two by itself.
        end = time.monotonic() + 300
        while ledger.job(job.id).released_at is None and time.monotonic() < end:
            time.sleep(2)
        version = ledger.versions("dental")[0]
        assert version.verdict is not None, "phase two did not end"
        assert Path(version.report or "").exists()
        assert [one.id for one in ledger.jobs("dental")] == [job.id]
    finally:
        ledger.close()


def test_the_graph_and_the_asset_pages_read_well(ui: Ui, page: Any) -> None:
    page.set_viewport_size({"width": 2600, "height": 620})
    page.goto(f"{ui.url}/assets/jsonl_splits?view=lineage&lineageScope=neighbors&lineageDepth=8", wait_until="domcontentloaded")
    for name in ("raw_conversations", "clean_examples", "trained_model", "rollout"):
        page.get_by_text(name, exact=True).first.wait_for(timeout=60_000)
    page.wait_for_timeout(3000)
    groups = [
        page.get_by_text(group, exact=True).count() for group in ("corpus", "dataset", "training", "evaluation", "deployment")
    ]
    assert all(groups)
    picture(page, "graph")
    page.set_viewport_size({"width": 1500, "height": 950})
    for asset, partition, text in (
        ("training_examples", "dental", "dropped_by_reason"),
        ("training_job", "dental", "loss_curve"),
        ("benchmark_report", "dental", "verdict"),
        ("raw_conversations", "2026-09-07", "messages/kept"),
    ):
        page.goto(f"{ui.url}/assets/{asset}?view=partitions&partition={partition}", wait_until="domcontentloaded")
        page.get_by_text(text).first.wait_for(timeout=60_000)
        page.wait_for_timeout(1500)
        assert page.get_by_text("Materialized", exact=True).count()
        picture(page, asset)


def test_the_gates_are_checks_of_the_registered_model(ui: Ui, page: Any) -> None:
    page.goto(f"{ui.url}/assets/registered_model?view=checks", wait_until="domcontentloaded")
    page.get_by_text("verdict_is_serve").first.wait_for(timeout=60_000)
    page.wait_for_timeout(1500)
    assert page.get_by_text("This is a blocking asset check").count()
    assert page.get_by_text(f"Checks ({len(BLOCKING['registered_model'])})").count()
    picture(page, "gates")


def test_the_report_is_for_people(ui: Ui, page: Any) -> None:
    report = ui.home / "reports" / "dental" / "latest" / "report.html"
    page.goto(report.resolve().as_uri())
    assert page.title()
    text = page.inner_text("body")
    assert len(text) > 1000
    assert not page.locator("text=/undefined|NaN|None/").count()
    picture(page, "report")
