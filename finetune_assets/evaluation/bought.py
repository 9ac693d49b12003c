"""What a benchmark and `finetune check` buy: replies of rented models, verdicts of a judge; reserved before, settled after."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_assets.assistants.settings import Assistant
from finetune_assets.assistants.settings.evaluation import Benchmark, EndpointSettings, Judge
from finetune_assets.assistants.settings.group import HERE
from finetune_assets.dataset.formats import read_lines
from finetune_assets.environment import Environment
from finetune_assets.errors import SettingsError
from finetune_assets.evaluation.candidates import TUNED
from finetune_assets.evaluation.judge import ANSWER_TOKENS
from finetune_assets.registry import Ledger
from finetune_assets.registry.spending import Limits, Purchase, release, reserve, settle, unsettled
from finetune_assets.storage import Store, read_json
from finetune_assets.training import prices
from finetune_assets.training.provider_formats import REPLY_TOKENS, estimate_tokens
from finetune_assets.training.uses import provider_at

RENTED = ("base", "few_shot", "tuned", "champion", "teacher")
"""Candidates that are the assistant's own, so a price for them is expected."""
JUDGE = "benchmark.judge"
JUDGE_TOKENS = 120
"""Of the question around a conversation and its replies."""


@dataclass(frozen=True)
class Priced:
    """An address that a benchmark asks, and what a million tokens cost there; null: nothing that anybody knows of."""

    name: str
    url: str
    model: str
    input: float | None
    output: float | None
    expected: bool
    """Whether it is a provider's, so that a price is missing where there is none."""

    def usd(self, tokens_in: int, tokens_out: int) -> float:
        """US dollars."""
        return (tokens_in * (self.input or 0) + tokens_out * (self.output or 0)) / 1e6


def asked(benchmark: Benchmark) -> list[Priced]:
    """Every address of a benchmark's settings: its endpoints, then the judge. Prices: their own, else the dated table's."""
    judge = benchmark.judge
    named = [(one.name, one) for one in benchmark.endpoints] + ([(JUDGE, judge)] if judge is not None else [])
    return [_priced(name, one) for name, one in named]


def leaves(benchmark: Benchmark) -> bool:
    """Whether one of its addresses is outside this machine."""
    return any(not HERE.match(one.url) for one in asked(benchmark))


def _priced(name: str, one: EndpointSettings | Judge) -> Priced:
    provider = provider_at(one.url)
    known = prices.find(provider, one.model, Environment.read().tables) if provider is not None else None
    own = one.usd_per_million_input is not None and one.usd_per_million_output is not None
    tokens_in, tokens_out = (
        (one.usd_per_million_input, one.usd_per_million_output) if own or known is None else (known.input, known.output)
    )
    return Priced(name, one.url, one.model, tokens_in, tokens_out, provider is not None or name in RENTED)


def estimate_replies(assistant: Assistant, work: Path) -> float:
    """US dollars of all replies of a prepared benchmark, were none of them cached; an address without a price costs nothing.

    The judge is asked twice about each of its rows: a conversation and two replies of the greatest length.
    """
    usd, bench = 0.0, assistant.benchmark
    for one in asked(bench):
        file = work / "prompts" / f"{one.name if one.name != JUDGE else TUNED}.jsonl"
        prompts = list(read_lines(file)) if file.exists() else []
        asked_for = ("messages",) if one.name == JUDGE else ("messages", "tools")
        tokens = [estimate_tokens({key: prompt.get(key) for key in asked_for}) for prompt in prompts]
        if one.name == JUDGE and bench.judge is not None:
            rows = min(len(prompts), bench.judge.rows)
            talk = round(sum(tokens) / max(len(tokens), 1)) + 2 * bench.max_new_tokens + JUDGE_TOKENS
            cases = read_json(work / "rows.json").get("cases", []) if (work / "rows.json").exists() else []
            questions = 2 * rows + len(cases) * len(list((work / "prompts").glob("*.jsonl")))
            usd += one.usd(questions * talk, questions * ANSWER_TOKENS)
        else:
            usd += one.usd(sum(tokens), len(prompts) * REPLY_TOKENS)
    return usd


def reserve_replies(
    ledger: Ledger, assistant: Assistant, reference: str, work: Path | None = None, forbidding: Sequence[str] = ()
) -> None:
    """Reserves the estimate of what is prepared in `work` (the folder of the version that `reference` names) before the settings'
    addresses are asked. A benchmark that was killed keeps its estimate as the last word. `forbidding`: tenants with rows in the
    data set that let nothing leave this machine.

    Raises BudgetExceeded where it does not fit into the month; SettingsError where a month is limited and a provider's model has
    no price, and where the assistant or such a tenant forbids what is asked for.
    """
    where, version = asked(assistant.benchmark), reference.split(":")[1]
    made = work or Store(Environment.read().home).report(assistant.name, version).parent / "work" / version
    _reserve(ledger, assistant, reference, where, lambda: estimate_replies(assistant, made), forbidding)


def _reserve(
    ledger: Ledger,
    assistant: Assistant,
    reference: str,
    where: Sequence[Priced],
    estimate: Callable[[], float],
    forbidding: Sequence[str] = (),
) -> None:
    away = next((one for one in where if not HERE.match(one.url)), None)
    if away is not None and (forbidding or not assistant.remote.allowed):
        whose = f"{', '.join(forbidding)} in its data set" if assistant.remote.allowed else assistant.name
        mend = "Add it to filters.exclude_tenants, take" if assistant.remote.allowed else "Take"
        raise SettingsError(
            f"{assistant.name}: the settings of {whose} say `remote.allowed: false`, so no rows are sent to {away.name} "
            f"({away.url}). {mend} that address out of the benchmark, choose a local champion, or allow it."
        )
    for left in unsettled(ledger, assistant.name, reference.rpartition(":")[0] + ":"):
        settle(ledger, left, None)
    limits = Limits(assistant.budget.monthly_usd, Environment.read().monthly_usd)
    unpriced = next((one for one in where if one.expected and (one.input is None or one.output is None)), None)
    usd = None if unpriced else estimate()
    mend = (
        f"{unpriced.model} ({unpriced.name}) has no price for replies: add input and output to its entry in prices.yaml in the "
        "folder that FINETUNE_TABLES names."
        if unpriced
        else ""
    )
    reserve(ledger, Purchase(reference, assistant.name, reference.partition(":")[0], "replies", usd, None, mend), limits)


def settle_replies(ledger: Ledger, assistant: Assistant, work: Path, reference: str) -> float:
    """Writes down what the benchmark's new requests cost (cached replies were paid before); US dollars."""
    result = read_json(work / "result.json") if (work / "result.json").exists() else {}
    facts: dict[str, Any] = {**result.get("candidates", {}), JUDGE: {"bought": result.get("judge_bought")}}
    usd, tokens = 0.0, 0
    for one in asked(assistant.benchmark):
        used = facts.get(one.name, {}).get("bought") or {}
        tokens_in, tokens_out = int(used.get("prompt_tokens", 0)), int(used.get("reply_tokens", 0))
        usd += one.usd(tokens_in, tokens_out)
        tokens += tokens_in + tokens_out
    if tokens:
        settle(ledger, reference, usd, tokens)
    else:
        release(ledger, reference)
    return usd


def buy(
    ledger: Ledger,
    assistant: Assistant,
    where: EndpointSettings | Judge,
    prompts: Sequence[Sequence[dict[str, Any]]],
    most_tokens: int,
    tools: Sequence[list[dict[str, Any]]] = (),
) -> list[dict[str, Any]]:
    """`worker.endpoint.answers` of one address for `finetune check`, out of the month's budgets like a benchmark's.

    Raises as `reserve_replies` does, and SettingsError where the address's key is not set.
    """
    from finetune_assets.worker.endpoint import Endpoint, answers, bought  # noqa: PLC0415 - an HTTP client

    one, reference = _priced(getattr(where, "name", JUDGE), where), f"check:{assistant.name}:{uuid.uuid4().hex[:12]}"
    offered = tools or [[] for _ in prompts]
    tokens = sum(
        estimate_tokens({"messages": list(prompt), "tools": some}) for prompt, some in zip(prompts, offered, strict=True)
    )
    at = Endpoint(where.url, where.model, where.api_key_env, where.timeout)
    _reserve(ledger, assistant, reference, [one], lambda: one.usd(tokens, len(prompts) * min(most_tokens, REPLY_TOKENS)))
    try:
        said = answers(at, prompts, most_tokens, tools)
    except SettingsError:
        release(ledger, reference)
        raise
    used = bought(said)
    tokens = sum(used.values())
    if tokens or any(row["reply"] is not None for row in said):  # where no tokens are told, the estimate stays
        settle(ledger, reference, one.usd(used["prompt_tokens"], used["reply_tokens"]) if tokens else None, tokens)
    else:
        release(ledger, reference)
    return said
