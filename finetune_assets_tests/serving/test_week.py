"""A simulated week through real processes: router, judge and people take a good candidate to everybody, and a bad one back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.environment import ROOT
from finetune_assets_tests.serving.servers import Upstream
from finetune_assets_tests.serving.shop import Shop


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_week_of_traffic_promotes_a_good_version_and_takes_back_a_bad_one(tmp_path: Path) -> None:
    upstream = Upstream()
    shop = Shop(tmp_path, upstream=upstream.url)
    file = shop.assistants / "aurora.yaml"
    least = "min_requests: 20, min_users: 5, min_hours: 1, max_negative_increase: 0.45, max_latency_ratio: 50"
    file.write_text(file.read_text().replace("min_requests: 20, min_users: 5, min_hours: 0", least))
    good, bad = shop.version("a"), shop.version("b")

    def simulate(url: str, *options: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "finetune_assets.cli", "simulate", "--assistant", "aurora", "--url", url, "--json"]
        command += ["--users", "4000", "--concurrency", "8", "--feedback", "1", *options]
        made = subprocess.run(command, cwd=ROOT, env=shop.environment, capture_output=True, text=True, check=True)
        return json.loads(made.stdout)

    try:
        with shop.served("--simulation") as served:
            shop.roll_out(good)
            outcome = simulate(served.url)
            assert (outcome["champion"], outcome["events"]) == (good, ["advanced", "advanced", "promoted"]), outcome
            shop.roll_out(bad)
            outcome = simulate(served.url, "--bad", "0.3", "--seed", "1")
            assert (outcome["champion"], outcome["events"]) == (good, ["rolled_back"]), outcome
            assert outcome.get("broken", 0) == 0
    finally:
        upstream.close()
