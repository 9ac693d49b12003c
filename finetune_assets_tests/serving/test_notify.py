"""Who is told of what befalls a rollout, and that telling stops nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_assets.assistants.settings.serving import RolloutSettings
from finetune_assets.serving import control, experiments
from finetune_assets.serving.notify import notify
from finetune_assets_tests.serving.servers import Hook
from finetune_assets_tests.serving.shop import Shop


def test_people_are_told_of_each_change(tmp_path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_WEBHOOK", hook.url)
    shop = Shop(tmp_path)
    version = shop.version("a")
    with shop.ledger() as book:
        control.start(book, "aurora", version, "verdict serve", "run 1")
        control.rollback(book, "aurora", "patients complained", "ana")
        experiments.begin(book, "aurora", ("base", version), 0.5, {"tenants": ["staging"], "users": []}, ("try it", "ana"))
        experiments.end(book, "aurora", RolloutSettings(), ("tried", "ana"))
    events = ["started", "rolled_back", "experiment_began", "experiment_ended"]
    assert [message["facts"]["event"] for message in hook.got] == events
    assert hook.got[2]["text"] == f"aurora: an experiment begins, base against {version} at 50%: try it (ana)"
    assert hook.got[1]["text"] == f"aurora: {version} is rolled back. patients complained (ana; live: the base model)"


def test_a_webhook_that_fails_stops_nothing_and_its_url_stays_secret(hook: Hook) -> None:
    hook.status = 500
    problems = notify("text", {}, [hook.url, "http://127.0.0.1:9/secret-token", "ftp://x"])
    assert len(problems) == 3
    assert not any("secret" in problem for problem in problems)
