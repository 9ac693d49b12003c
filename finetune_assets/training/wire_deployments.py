"""Providers where a tuned model answers once a person has deployed it (Azure): whether it does, under which name, and what to do.

A deployment has a name of its own, 64 characters at most, which a tuned model's name may exceed; the job's id never does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_assets.errors import ProviderError
from finetune_assets.training.wire_errors import translated

if TYPE_CHECKING:
    from openai import OpenAI

THERE = (400, 422, 429)
"""Refusals that come from a model which is there; asking it takes one token."""


def place(client: OpenAI, provider: str, key: str | None, names: tuple[str, ...]) -> tuple[str | None, str]:
    """The first of these names under which a model answers, else null and what was said instead."""
    said, once = "", client.with_options(max_retries=0)
    for name in names:
        try:
            with translated(provider, f"asking {name}", key):
                once.chat.completions.create(model=name, messages=[{"role": "user", "content": "."}], max_tokens=1)
        except ProviderError as error:
            if error.status not in THERE:
                said = said or " ".join(str(part) for part in (error.status, error.code) if part) or "no answer"
                continue
        return name, ""
    return None, said


def deploy_it(model: str, job_id: str) -> str:
    """What a person has to do."""
    return f"deploy {model} under that name, or where that is too long under the name {job_id}"
