"""Calls an upstream: the embedded engine, vLLM, OpenAI, Azure; Bedrock and SageMaker by their own calls, which do not stream.

Failures are errors or timeouts.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from finetune_assets.errors import FinetuneError, ProviderError
from finetune_assets.serving import jsons
from finetune_assets.serving.wire import Broken, Connection, Pool
from finetune_assets.training import aws_calls
from finetune_assets.training.remote import without_secrets

BROKEN = (Broken, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError, RecursionError)
"""A connection that broke, or an answer of another shape than OpenAI's."""
MOST_TOKENS = 1 << 31
"""A count from here on is none."""
CLIENTS = (400, 413, 422)
"""Statuses that speak of the request itself; all others from 400 on are troubles of the upstream."""


class UpstreamFailed(Exception):
    """An upstream that did not give a reply; `outcome` is `error`, `timeout`, `busy` (it asked to come back later) or `refused`:
    it says that the request is wrong, with this status and this error in OpenAI's shape."""

    def __init__(self, outcome: str, message: str, status: int = 502, error: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.outcome, self.status, self.error = outcome, status, error or {}


@dataclass(frozen=True)
class Target:
    """Where a version answers: URL of the API, the model's name there, the API key if it needs one, and the longest times."""

    url: str
    model: str
    key: str | None
    seconds: float
    first_seconds: float


@dataclass
class Reply:
    """What an upstream answered."""

    text: str = ""
    finish_reason: str = "stop"
    usage: dict[str, int] = field(default_factory=dict[str, int])
    message: dict[str, Any] = field(default_factory=dict[str, Any])


class Upstream:
    """Asks the upstreams; one pool of connections for all."""

    def __init__(self) -> None:
        self.pool = Pool()
        self.threads = ThreadPoolExecutor(aws_calls.MOST_CALLS, "aws")  # each waits for one reply

    async def close(self) -> None:
        """Gives the connections back."""
        await self.pool.close()
        self.threads.shutdown(wait=False, cancel_futures=True)

    async def whole(self, target: Target, body: dict[str, Any]) -> Reply:
        """The reply to a chat. Raises UpstreamFailed."""
        if aws_calls.is_aws(target.url):
            return _reply(await self._of_aws(target, body))
        connection: Connection | None = None
        try:
            async with asyncio.timeout(target.seconds):
                connection = await self._post(target, {**body, "stream": False})
                data = await connection.read()
            return _reply(jsons.loads(data))
        except TimeoutError:
            raise UpstreamFailed("timeout", f"no reply within {target.seconds:g} s") from None
        except BROKEN as error:
            raise UpstreamFailed("error", f"{type(error).__name__}: {error}"[:300]) from None
        finally:
            if connection is not None:
                self.pool.release(connection)

    async def chunks(self, target: Target, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """The events of a streamed chat, as they come. Raises UpstreamFailed, also where the stream ends without its end."""
        if aws_calls.is_aws(target.url):
            for event in _as_events(await self._of_aws(target, body)):
                yield event
            return
        ended = False
        connection: Connection | None = None
        try:
            async with asyncio.timeout(target.seconds) as limit:
                loop = asyncio.get_running_loop()
                limit.reschedule(loop.time() + min(target.seconds, target.first_seconds))
                start = loop.time()
                connection = await self._post(target, {**body, "stream": True})
                while (line := await connection.line()) is not None:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        ended = True
                        break
                    event = _event(data)
                    if "error" in event:
                        raise UpstreamFailed("error", str(event["error"])[:300])
                    yield event
                    if says(event):
                        limit.reschedule(start + target.seconds)
        except TimeoutError:
            raise UpstreamFailed("timeout", "no token in time") from None
        except BROKEN as error:
            raise UpstreamFailed("error", f"{type(error).__name__}: {error}"[:300]) from None
        finally:
            if connection is not None:
                self.pool.release(connection, ending=ended)
        if not ended:
            raise UpstreamFailed("error", "the stream ended in the middle of a reply")

    async def _of_aws(self, target: Target, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion by AWS's own call, in a thread: boto3 knows no event loop. Raises UpstreamFailed."""
        call = partial(aws_calls.chat, target.url, target.model, body, target.seconds)
        try:
            async with asyncio.timeout(target.seconds):
                return await asyncio.get_running_loop().run_in_executor(self.threads, call)
        except TimeoutError:
            raise UpstreamFailed("timeout", f"no reply within {target.seconds:g} s") from None
        except FinetuneError as error:
            text = str(error)
            if any(word in text for word in aws_calls.TOO_LONG):
                told = {"type": "invalid_request_error", "param": "messages", "code": "context_length_exceeded", "message": text}
                raise UpstreamFailed("refused", text[:300], 400, told) from None
            busy = isinstance(error, ProviderError) and (error.status == 429 or (error.code or "").startswith(aws_calls.BUSY))
            raise UpstreamFailed("busy" if busy else "error", text[:300]) from None

    async def _post(self, target: Target, body: dict[str, Any]) -> Connection:
        """A connection with the head of a good answer. Raises UpstreamFailed, Broken, OSError, ValueError."""
        data = jsons.dumps({**body, "model": target.model})
        connection = await self.pool.post(f"{target.url}/chat/completions", target.key, data)
        if connection.status >= 300:
            try:
                raise _failure(connection.status, await connection.read())
            finally:
                self.pool.release(connection)
        return connection


def _failure(status: int, body: bytes) -> UpstreamFailed:
    """What an answer that is no reply means."""
    if status == 429:
        return UpstreamFailed("busy", "the upstream is busy")
    text = without_secrets(body.decode("utf-8", "replace"))
    if status not in CLIENTS:
        return UpstreamFailed("error", f"HTTP {status}: {text[:300]}")
    try:
        told: Any = json.loads(text)["error"]
        message = str(told["message"])
    except (ValueError, LookupError, TypeError):
        told, message = {}, text
    error = {name: told[name] for name in ("type", "param", "code") if isinstance(told.get(name), str | int)}
    return UpstreamFailed("refused", f"HTTP {status}: {message[:300]}", status, {**error, "message": message[:1000]})


def _as_events(made: dict[str, Any]) -> list[dict[str, Any]]:
    """A whole completion as the events of a stream: the text at once, the end, the usage."""
    choice = made["choices"][0]
    head = {"id": made.get("id", "chatcmpl-aws"), "object": "chat.completion.chunk", "model": made.get("model")}
    said = {"index": 0, "delta": {"role": "assistant", "content": choice["message"]["content"]}, "finish_reason": None}
    end = {"index": 0, "delta": {}, "finish_reason": choice.get("finish_reason") or "stop"}
    return [{**head, "choices": [said]}, {**head, "choices": [end]}, {**head, "choices": [], "usage": made.get("usage") or {}}]


def _event(data: bytes) -> dict[str, Any]:
    """One event of a stream. Raises ValueError where it has not OpenAI's shape."""
    event = jsons.loads(data)
    if not isinstance(event, dict):
        raise ValueError(f"an event of the stream is no object: {data[:80]!r}")
    for choice in event.get("choices") or []:
        delta = choice.get("delta") or {}
        if not isinstance(delta, dict):
            raise ValueError(f"an event of the stream has no delta: {data[:80]!r}")
        if delta.get("tool_calls"):
            delta["tool_calls"] = _calls(delta["tool_calls"])
    if event.get("usage") is not None:
        event["usage"] = _usage(event["usage"])
    return event


def _usage(value: Any) -> dict[str, Any]:
    """Counts of tokens as far as they are numbers; empty where there are none."""
    if not isinstance(value, dict):
        return {}
    return {
        str(name): count
        for name, count in value.items()
        if (isinstance(count, dict) and str(name).endswith("_details"))
        or (isinstance(count, int) and not isinstance(count, bool) and 0 <= count < MOST_TOKENS)
    }


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls with their arguments as text, which is OpenAI's way. Raises ValueError where one is no call."""
    if not isinstance(value, list):
        raise ValueError(f"tool_calls is no list: {str(value)[:80]}")
    for call in value:
        function = call.get("function") if isinstance(call, dict) else 0
        if not isinstance(function, dict | None):
            raise ValueError(f"a tool call is no object with a function: {str(call)[:80]}")
        if function and not isinstance(function.get("arguments", ""), str | None):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return value


def says(event: dict[str, Any]) -> bool:
    """Whether an event holds a piece of the reply: text, thoughts, a refusal, or of a tool call; not the role alone."""
    deltas = [choice.get("delta") or {} for choice in event.get("choices") or []]
    return any(value for delta in deltas for name, value in delta.items() if name != "role")


def _reply(value: Any) -> Reply:
    choice = value["choices"][0]
    message = choice["message"]
    if message.get("tool_calls"):
        message["tool_calls"] = _calls(message["tool_calls"])
    usage = _usage(value.get("usage"))
    return Reply(str(message.get("content") or ""), str(choice.get("finish_reason") or "stop"), usage, message)
