"""A candidate behind an OpenAI-compatible address, or one of AWS: asked row by row, several at a time.

A row that cannot be had (time-out, refusal, an answer that is none) is missing: its reply is null and its cause is kept. Nothing
here is ever a zero. Asked again is only what was certainly not answered (`once`); what may have been counts in `bought`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from finetune_assets import once
from finetune_assets.dataset.tool_calls import said
from finetune_assets.errors import FinetuneError, ProviderUnsettled, SettingsError
from finetune_assets.training import aws_calls
from finetune_assets.training.provider_formats import estimate_tokens

Prompt = Sequence[dict[str, Any]]
AT_ONCE = 4  # requests


@dataclass(frozen=True)
class Endpoint:
    """Where a model answers."""

    url: str
    """Up to and with `/v1`; or `bedrock://REGION`, `sagemaker://REGION`."""
    model: str
    api_key_env: str | None = None
    """Environment variable that holds the key."""
    timeout: float = 30.0
    """Seconds of one try."""

    @property
    def headers(self) -> dict[str, str]:
        """With the key. Raises SettingsError where its variable is not set."""
        if self.api_key_env is None:
            return {}
        key = os.environ.get(self.api_key_env)
        if not key:
            raise SettingsError(f"{self.api_key_env} is not set; the endpoint {self.url} of {self.model} needs it.")
        return {"Authorization": f"Bearer {key}"}


def answers(
    endpoint: Endpoint, prompts: Sequence[Prompt], max_tokens: int, tools: Sequence[list[dict[str, Any]]] = ()
) -> list[dict[str, Any]]:
    """For each prompt `reply`, `prompt_tokens`, `reply_tokens`, `stopped`, `seconds`; or reply null and `missing`, the cause, and
    `perhaps`, the prompt's and the longest reply's tokens, where it may be billed nevertheless.

    Tokens and `stopped` are null where the endpoint does not tell them.
    `tools`: the functions that each prompt may call; a reply that calls is the corpus' text of its calls. AWS is offered none.
    """
    if aws_calls.is_aws(endpoint.url):
        with ThreadPoolExecutor(AT_ONCE) as pool:
            calls = [pool.submit(_aws_answer, endpoint, prompt, max_tokens) for prompt in prompts]
            return [call.result() for call in calls]
    with (
        httpx.Client(base_url=endpoint.url.rstrip("/"), headers=endpoint.headers, timeout=endpoint.timeout) as client,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        offered = tools or [[] for _ in prompts]
        bodies = [_body(endpoint, prompt, max_tokens, some) for prompt, some in zip(prompts, offered, strict=True)]
        asked = [pool.submit(_answer, client, endpoint, body) for body in bodies]
        return [one.result() for one in asked]


def bought(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """`prompt_tokens` and `reply_tokens` that are paid for, or may be, by these answers."""
    kinds = ("prompt_tokens", "reply_tokens")
    return {kind: sum(int(row.get(kind) or row.get("perhaps", {}).get(kind, 0)) for row in rows) for kind in kinds}


def _lost(asked: Mapping[str, Any], cause: str) -> dict[str, Any]:
    """An answer that did not come, although it may have been made."""
    tokens = {
        "prompt_tokens": estimate_tokens({"messages": asked["messages"], "tools": asked.get("tools")}),
        "reply_tokens": asked["max_tokens"],
    }
    return {"reply": None, "missing": cause, "perhaps": tokens}


def _body(endpoint: Endpoint, prompt: Prompt, max_tokens: int, tools: list[dict[str, Any]]) -> dict[str, Any]:
    asked = {"model": endpoint.model, "messages": list(prompt), "max_tokens": max_tokens, "temperature": 0, "seed": 0}
    return {**asked, "tools": tools} if tools else asked


def _aws_answer(endpoint: Endpoint, prompt: Prompt, max_tokens: int) -> dict[str, Any]:
    """Credentials, roles and regions are the same for every row: what is wrong with them ends the benchmark."""
    body = {"messages": list(prompt), "max_tokens": max_tokens, "temperature": 0}
    cause = "no answer"
    for attempt in range(once.TRIES):
        start = time.perf_counter()
        try:
            answer = aws_calls.chat(endpoint.url, endpoint.model, body, endpoint.timeout)
        except SettingsError:
            raise
        except ProviderUnsettled as error:
            cause = str(error)
            if not error.turned_away:
                return _lost(body, cause)
            once.wait(attempt, error.wait)
        except FinetuneError as error:
            return {"reply": None, "missing": str(error)}
        else:
            return _read(answer, time.perf_counter() - start)
    return {"reply": None, "missing": cause}


def _answer(client: httpx.Client, endpoint: Endpoint, asked: dict[str, Any]) -> dict[str, Any]:
    cause = "no answer"
    for attempt in range(once.TRIES):
        start = time.perf_counter()
        try:
            answer = client.post("/chat/completions", json=asked)
        except httpx.HTTPError as error:
            late, after = isinstance(error, httpx.TimeoutException), None
            cause = f"no answer within {endpoint.timeout:g} s" if late else type(error).__name__
            if not once.turned_away(None, None, error):
                return _lost(asked, cause)
        else:
            cause, after = _said(endpoint, answer.status_code), answer.headers.get("retry-after")
            if answer.status_code == 200:
                read = _read_http(answer, time.perf_counter() - start)
                return read if read["reply"] is not None else _lost(asked, read["missing"])
            if not once.turned_away(answer.status_code, after):
                return _lost(asked, cause) if answer.status_code >= 500 else {"reply": None, "missing": cause}
        once.wait(attempt, once.seconds(after))
    return {"reply": None, "missing": cause}


def _said(endpoint: Endpoint, status: int) -> str:
    """A status as the cause of a reply that is missing: of 404, which may be a deleted model's, what to look at."""
    if status != 404:
        return f"status {status}"
    return (
        f"status 404: {endpoint.url} has no model {endpoint.model}. Look there whether it or its deployment was deleted; if so, "
        "take another version or train again with another hyperparameters.seed; else correct the endpoint's url or model"
    )


def _read_http(answer: httpx.Response, seconds: float) -> dict[str, Any]:
    try:
        return _read(answer.json(), seconds)
    except ValueError as error:
        return {"reply": None, "missing": f"not an answer: {type(error).__name__}"}


def _read(body: Any, seconds: float) -> dict[str, Any]:
    try:
        choice = body["choices"][0]
        text = choice["message"]["content"]
        if choice["message"].get("tool_calls"):
            text = said({"role": "assistant", **choice["message"]})
        if not isinstance(text, str):
            raise TypeError(f"content is {type(text).__name__}")
        usage = body.get("usage") or {}
        return {
            "reply": text.strip(),
            "stopped": _stopped(choice.get("finish_reason")),
            "prompt_tokens": _count(usage.get("prompt_tokens")),
            "reply_tokens": _count(usage.get("completion_tokens")),
            "seconds": round(seconds, 6),
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return {"reply": None, "missing": f"not an answer: {type(error).__name__}"}


def _stopped(reason: Any) -> bool | None:
    """Whether the reply came to its end; null where the endpoint does not tell."""
    return None if reason is None else reason != "length"


def _count(told: Any) -> int | None:
    """Null where the endpoint tells none: what it cost is unknown, and no zero."""
    return None if told is None else int(told)
