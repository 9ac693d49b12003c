"""Models that a provider serves, as the report's own candidates: asked at their address, with their price, judged by texts.

Providers give no likelihoods. What needs them is null, and a gate that stands on them stands on similarity instead.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_assets.assistants.settings import Assistant
from finetune_assets.assistants.settings.evaluation import EndpointSettings
from finetune_assets.dataset.formats import read_lines
from finetune_assets.environment import Environment
from finetune_assets.errors import SettingsError, TrainingError
from finetune_assets.registry import Ledger
from finetune_assets.registry.spending import Limits, Purchase, release, reserve, settle, unsettled
from finetune_assets.storage import Store, read_json
from finetune_assets.training.provider_formats import REPLY_TOKENS, estimate_tokens
from finetune_assets.training.remote import RemoteModel

LIKELIHOODS = ("bits_per_byte", "loss", "perplexity")
INSTEAD = "similarity"
HERE = re.compile(r"https?://(localhost|127\.[\d.]+|\[::1\])(:\d+)?(/|$)")
"""Addresses on this machine."""
RENTED = ("base", "few_shot", "tuned", "champion", "teacher")
"""Candidates that are the assistant's own, so a price for them is expected."""


def address(name: str, model: str) -> EndpointSettings | None:
    """Where a version answers, under a candidate's name; null for a model on this machine. Raises TrainingError without one."""
    remote = RemoteModel.read(model)
    return None if remote is None else address_of(name, remote)


def address_of(name: str, remote: RemoteModel) -> EndpointSettings:
    """Where a rented model answers. Raises TrainingError for one that answers nowhere."""
    if remote.base_url is None:
        raise TrainingError(
            f"{remote.model} at {remote.provider} answers nowhere yet, so it cannot be measured. Set `remote.deploy: true` and "
            "run the training again (nothing is trained twice), or deploy it behind an address that answers like OpenAI's API "
            "and set remote.base_url and remote.key_env."
        )
    return EndpointSettings(
        name=name,
        url=remote.base_url,
        model=remote.model,
        api_key_env=remote.key_env,
        usd_per_million_input=remote.usd_per_million_input,
        usd_per_million_output=remote.usd_per_million_output,
        priced_on=datetime.date.fromisoformat(remote.priced_on) if remote.priced_on else None,
    )


def estimate_replies(endpoints: Sequence[EndpointSettings], work: Path) -> float:
    """US dollars of all replies of a prepared benchmark, were none of them cached; an address without a price costs nothing."""
    usd = 0.0
    for endpoint in endpoints:
        if endpoint.usd_per_million_input is None or endpoint.usd_per_million_output is None:
            continue
        file = work / "prompts" / f"{endpoint.name}.jsonl"
        prompts = list(read_lines(file)) if file.exists() else []
        asked = sum(estimate_tokens({"messages": prompt["messages"]}) for prompt in prompts)
        usd += (asked * endpoint.usd_per_million_input + len(prompts) * REPLY_TOKENS * endpoint.usd_per_million_output) / 1e6
    return usd


def reserve_replies(ledger: Ledger, assistant: Assistant, reference: str, work: Path | None = None) -> None:
    """Reserves the estimate of what is prepared in `work` (the folder of the version that `reference` names) before the settings'
    endpoints are asked. A benchmark that was killed keeps its estimate as the last word.

    Raises BudgetExceeded where it does not fit into the month; SettingsError where a month is limited and a rented model has no
    price, and where the assistant lets nothing leave this machine.
    """
    away = next((one for one in assistant.benchmark.endpoints if not HERE.match(one.url)), None)
    if away is not None and not assistant.remote.allowed:
        raise SettingsError(
            f"{assistant.name} has `remote.allowed: false`: its test rows are not sent to {away.name} ({away.url}). Take it "
            "out of benchmark.endpoints, choose a local champion, or allow it."
        )
    for left in unsettled(ledger, assistant.name, reference.rpartition(":")[0] + ":"):
        settle(ledger, left, None)
    limits = Limits(assistant.budget.monthly_usd, Environment.read().monthly_usd)
    endpoints = assistant.benchmark.endpoints
    unpriced = next((one for one in endpoints if one.name in RENTED and one.usd_per_million_input is None), None)
    version = reference.split(":")[1]
    made = work or Store(Environment.read().home).report(assistant.name, version).parent / "work" / version
    usd = None if unpriced else estimate_replies(endpoints, made)
    mend = (
        f"{unpriced.model} has no price for replies: add input and output to its entry in prices.yaml in the folder that "
        "FINETUNE_TABLES names."
        if unpriced
        else ""
    )
    reserve(ledger, Purchase(reference, assistant.name, "benchmark", "replies", usd, None, mend), limits)


def settle_replies(ledger: Ledger, endpoints: Sequence[EndpointSettings], work: Path, reference: str) -> float:
    """Writes down what the benchmark's new requests cost (cached replies were paid before); US dollars."""
    facts = read_json(work / "result.json")["candidates"] if (work / "result.json").exists() else {}
    usd, tokens = 0.0, 0
    for endpoint in endpoints:
        used = facts.get(endpoint.name, {}).get("bought") or {}
        tokens_in, tokens_out = int(used.get("prompt_tokens", 0)), int(used.get("reply_tokens", 0))
        usd += (tokens_in * (endpoint.usd_per_million_input or 0) + tokens_out * (endpoint.usd_per_million_output or 0)) / 1e6
        tokens += tokens_in + tokens_out
    if tokens:
        settle(ledger, reference, usd, tokens)
    else:
        release(ledger, reference)
    return usd


def with_rented(assistant: Assistant, endpoints: Sequence[EndpointSettings], tuned: str, champion: str | None) -> Assistant:
    """Settings for a report with these addresses among its own candidates: their prices, and gates that can be decided."""
    bench = assistant.benchmark.model_copy(update={"endpoints": [*assistant.benchmark.endpoints, *endpoints]})
    gates: dict[str, Any] = {}
    if any(endpoint.name == tuned for endpoint in endpoints):
        gates |= {"max_perplexity": None, "max_forgetting": None}
        gates |= {"better_than_base": INSTEAD} if assistant.gates.better_than_base in LIKELIHOODS else {}
    if any(endpoint.name in (tuned, champion) for endpoint in endpoints):
        gates |= {"not_worse_than_champion": INSTEAD} if assistant.gates.not_worse_than_champion in LIKELIHOODS else {}
    return assistant.model_copy(update={"benchmark": bench, "gates": assistant.gates.model_copy(update=gates)})
