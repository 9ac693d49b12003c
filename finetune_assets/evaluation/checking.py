"""`finetune check`: the standing suite against one model version, asked as it is served."""

from __future__ import annotations

from pathlib import Path

from finetune_assets.assistants import load_assistant
from finetune_assets.chat import Chat
from finetune_assets.environment import ROOT, Environment
from finetune_assets.errors import SettingsError
from finetune_assets.evaluation.suite import Outcome, judge_case, read_suite
from finetune_assets.storage import Store, read_json


def check_version(environment: Environment, assistant: str, version: str | None, suite: Path | None) -> tuple[str, list[Outcome]]:
    """What was asked (a title), and what became of each case. Raises SettingsError where there is no suite, LedgerError where
    there is no version, LaunchError where the model dies."""
    store = Store(environment.home)
    settings = load_assistant(environment.assistants, assistant, read_json(store.tenants) if store.tenants.exists() else {})
    folder = suite if suite is not None else ROOT / settings.benchmark.checks if settings.benchmark.checks else None
    if folder is None:
        raise SettingsError(f"{assistant} has no standing suite: name its folder in `benchmark.checks`, or give --suite.")
    cases = read_suite(folder)
    with Chat.start(environment, assistant, version) as chat:
        return chat.title, [judge_case(case, chat.answer(case.chat(settings.system_prompt))) for case in cases]
