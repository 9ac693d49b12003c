"""`finetune check`: the standing suite against one model version, asked as it is served."""

from __future__ import annotations

from pathlib import Path

from finetune_assets.assistants import load_assistant
from finetune_assets.assistants.settings.evaluation import Judge
from finetune_assets.chat import Chat
from finetune_assets.environment import ROOT, Environment
from finetune_assets.errors import SettingsError
from finetune_assets.evaluation.judge import ANSWER_TOKENS, case_question, holds
from finetune_assets.evaluation.suite import Case, Message, Outcome, judge_case, read_suite
from finetune_assets.storage import Store, read_json
from finetune_assets.worker.endpoint import Endpoint, answers


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
        chats = [case.chat(settings.system_prompt) for case in cases]
        replies = [chat.answer(messages) for messages in chats]
    judged = _judged(settings.benchmark.judge, cases, chats, replies)
    return chat.title, [judge_case(*one) for one in zip(cases, replies, judged, strict=True)]


def _judged(settings: Judge | None, cases: list[Case], chats: list[list[Message]], replies: list[str]) -> list[bool | None]:
    """What the judging model of the settings says of the cases that ask for one; null for the others."""
    asked = [n for n, case in enumerate(cases) if case.judge] if settings else []
    if settings is None or not asked:
        return [None] * len(cases)
    where = Endpoint(settings.url, settings.model, settings.api_key_env, settings.timeout)
    questions = [case_question(chats[n], replies[n], cases[n].judge or "") for n in asked]
    said = {n: holds(answer["reply"]) for n, answer in zip(asked, answers(where, questions, ANSWER_TOKENS), strict=True)}
    return [said.get(n) for n in range(len(cases))]
