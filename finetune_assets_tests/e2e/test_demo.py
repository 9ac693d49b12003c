"""The demo to its end, with the real model: run, serve, a simulated week to everybody, and back when the candidate is made bad.

As a user does it: four commands on a fresh store, the dashboard and Dagster looked at. FINETUNE_SCREENSHOTS names a folder for
pictures. About ten minutes on two cores.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.environment import ROOT
from finetune_assets_tests.e2e.running_ui import chromium_page, picture, running

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3000)]
OBSERVED = """
{ assetNodeOrError(assetKey: {path: ["rollout"]}) { ... on AssetNode {
  assetObservations(partitions: ["dental"]) { metadataEntries { label ... on TextMetadataEntry { text } } } } } }"""


class Store:
    """A fresh store of the project's own sample and settings."""

    def __init__(self, home: Path) -> None:
        self.home = home
        gone = ("FINETUNE_", "DAGSTER_")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(gone)}
        self.environment |= {"FINETUNE_HOME": str(home), "HF_HUB_OFFLINE": "1"}

    def finetune(self, *arguments: str) -> str:
        """Output of a command."""
        command = [sys.executable, "-m", "finetune_assets.cli", *arguments]
        made = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        return made.stdout

    @contextmanager
    def served(self) -> Generator[str]:
        """The URL of `finetune serve --simulation`."""
        command = [sys.executable, "-m", "finetune_assets.cli", "serve", "--simulation", "--port", "0"]
        process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        try:
            reader = threading.Thread(target=process.stderr.read, daemon=True)
            place = next((found for line in process.stderr if (found := re.search(r"Serving on (http://\S+)", line))), None)
            assert place is not None
            reader.start()
            yield place[1]
        finally:
            process.terminate()
            process.wait(60)
            reader.join(10)
            process.stderr.close()


def test_the_demo_goes_to_everybody_and_a_bad_candidate_goes_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    made = json.loads(store.finetune("run", "--assistant", "dental", "--json"))
    assert made["verdict"] == "serve"
    version = made["version"]
    with chromium_page() as page, store.served() as url:
        page.goto(f"{url}/dashboard")
        assert page.locator("#dental li.now").inner_text() == "shadow"
        picture(page, "demo-shadow")
        outcomes: list[str] = []
        week = threading.Thread(
            target=lambda: outcomes.append(store.finetune("simulate", "--assistant", "dental", "--url", url, "--json"))
        )
        week.start()
        page.locator("#dental li.now", has_text="50 %").wait_for(timeout=600_000)
        page.locator("#dental table.guards").first.locator(".scale").nth(1).wait_for(timeout=300_000)  # intervals are drawn
        picture(page, "demo-50")
        week.join()
        good: dict[str, Any] = json.loads(outcomes[0])
        assert (good["champion"], good["events"]) == (version, ["advanced", "advanced", "promoted"]), good
        page.locator("#dental .head", has_text=f"live: {version}").wait_for(timeout=20_000)
        picture(page, "demo-promoted")

        store.finetune("rollout", "rollback", "dental", "--to", "base", "--reason", "once more, made bad")
        store.finetune("rollout", "start", "dental", version, "--reason", "once more, made bad")
        again = ["simulate", "--assistant", "dental", "--url", url, "--bad", "0.2", "--seed", "1", "--json"]
        bad = json.loads(store.finetune(*again))
        assert (bad["champion"], bad["events"]) == (None, ["rolled_back"]), bad
        page.locator("#dental td", has_text="too many errors").first.wait_for(timeout=20_000)
        picture(page, "demo-back")

        with running(store.home, {**store.environment}) as dagster:

            def seen() -> list[str]:
                node = dagster.ask(OBSERVED)["assetNodeOrError"]
                facts = [{e["label"]: e.get("text") for e in one["metadataEntries"]} for one in node["assetObservations"]]
                return [str(one["event"]) for one in facts]

            end = time.monotonic() + 120  # the sensor looks every half a minute
            while "rolled_back" not in seen() and time.monotonic() < end:
                time.sleep(2)
            moves = ["started", "advanced", "advanced", "promoted", "rolled_back", "started", "rolled_back"]
            assert [event for event in reversed(seen()) if event != "verdict"] == moves
            page.goto(f"{dagster.url}/assets/rollout?partition=dental&view=events")
            page.get_by_text("rolled_back").first.wait_for(timeout=60_000)
            picture(page, "demo-dagster")
