"""`finetune check`: the standing suite against one model version, asked as it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune_assets.assistants import Assistant, load_assistant
from finetune_assets.chat import Chat, choose, title
from finetune_assets.environment import ROOT, Environment
from finetune_assets.errors import SettingsError
from finetune_assets.evaluation.bought import buy
from finetune_assets.evaluation.judge import ANSWER_TOKENS, case_question, holds
from finetune_assets.evaluation.rented import address
from finetune_assets.evaluation.suite import Case, Message, Outcome, judge_case, read_suite
from finetune_assets.registry import Ledger
from finetune_assets.storage import Store, read_json


def check_version(environment: Environment, assistant: str, version: str | None, suite: Path | None) -> tuple[str, list[Outcome]]:
    """What was asked (a title), and what became of each case. Raises SettingsError where there is no suite, LedgerError where
    there is no version, LaunchError where the model dies, TrainingError for a rented one that answers nowhere; and where a rented
    model or a judge is asked BudgetExceeded or SettingsError, as for a benchmark."""
    store = Store(environment.home)
    settings = load_assistant(environment.assistants, assistant, read_json(store.tenants) if store.tenants.exists() else {})
    folder = suite if suite is not None else ROOT / settings.benchmark.checks if settings.benchmark.checks else None
    if folder is None:
        raise SettingsError(f"{assistant} has no standing suite: name its folder in `benchmark.checks`, or give --suite.")
    cases = read_suite(folder)
    chats = [case.chat(settings.system_prompt) for case in cases]
    who, replies = _replies(environment, settings, version, cases, chats)
    judged = _judged(environment, settings, cases, chats, replies)
    return who, [judge_case(*one) for one in zip(cases, replies, judged, strict=True)]


def _replies(
    environment: Environment, settings: Assistant, version: str | None, cases: list[Case], chats: list[list[Message]]
) -> tuple[str, list[str | None]]:
    """Who was asked, and each case's reply: in a child process as it is served, or at a rented model's address (null: none)."""
    tools = [case.offered(settings.tools) for case in cases]
    chosen, role = choose(environment, settings.name, version)
    where = address("tuned", chosen.path)
    if where is not None:
        said = _bought(environment, settings, where, chats, settings.benchmark.max_new_tokens, tools)
        return title(chosen, role), [answer["reply"] for answer in said]
    with Chat.start(environment, settings.name, chosen.version) as chat:
        return chat.title, [chat.answer(messages, offered) for messages, offered in zip(chats, tools, strict=True)]


def _judged(
    environment: Environment, settings: Assistant, cases: list[Case], chats: list[list[Message]], replies: list[str | None]
) -> list[bool | None]:
    """What the judging model of the settings says of the cases that ask for one; null for the others."""
    judge = settings.benchmark.judge
    asked = [n for n, case in enumerate(cases) if case.judge and replies[n] is not None] if judge else []
    if judge is None or not asked:
        return [None] * len(cases)
    questions = [case_question(chats[n], replies[n] or "", cases[n].judge or "") for n in asked]
    verdicts = _bought(environment, settings, judge, questions, ANSWER_TOKENS)
    said = {n: holds(answer["reply"]) for n, answer in zip(asked, verdicts, strict=True)}
    return [said.get(n) for n in range(len(cases))]


def _bought(environment: Environment, settings: Assistant, *asked: Any) -> list[dict[str, Any]]:
    ledger = Ledger(environment.database_url)
    try:
        return buy(ledger, settings, *asked)
    finally:
        ledger.close()
