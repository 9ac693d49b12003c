"""Models that a provider serves, as the report's own candidates: asked at their address, with their price, judged by texts.

Providers give no likelihoods. What needs them is null; a comparison that a gate stands on is by similarity instead, and the
other such gates say that they were not judged.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from finetune_assets.assistants.settings import Assistant
from finetune_assets.assistants.settings.evaluation import EndpointSettings
from finetune_assets.errors import TrainingError
from finetune_assets.evaluation.measures import LIKELIHOODS
from finetune_assets.training.remote import RemoteModel

INSTEAD = "similarity"


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


def with_rented(assistant: Assistant, endpoints: Sequence[EndpointSettings], tuned: str, champion: str | None) -> Assistant:
    """Settings for a report with these addresses among its own candidates: their prices, and gates that can be decided."""
    bench = assistant.benchmark.model_copy(update={"endpoints": [*assistant.benchmark.endpoints, *endpoints]})
    gates: dict[str, Any] = {}
    if any(endpoint.name == tuned for endpoint in endpoints):
        gates |= {"better_than_base": INSTEAD} if assistant.gates.better_than_base in LIKELIHOODS else {}
    if any(endpoint.name in (tuned, champion) for endpoint in endpoints):
        gates |= {"not_worse_than_champion": INSTEAD} if assistant.gates.not_worse_than_champion in LIKELIHOODS else {}
    return assistant.model_copy(update={"benchmark": bench, "gates": assistant.gates.model_copy(update=gates)})
