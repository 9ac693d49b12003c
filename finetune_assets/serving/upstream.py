"""Calls an upstream: the embedded engine, vLLM, OpenAI, Azure; Bedrock and SageMaker by their own calls, which do not stream.

Failures are errors or timeouts.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import aiohttp

from finetune_assets.errors import FinetuneError
from finetune_assets.training import aws_calls

BROKEN = (aiohttp.ClientError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError)
"""A connection that broke, or an answer of another shape than OpenAI's."""

_REUSED: ContextVar[bool] = ContextVar("reused", default=False)


class UpstreamFailed(Exception):
    """An upstream that did not give a reply; `outcome` is `error`, `timeout` or `busy` (it asked to come back later)."""

    def __init__(self, outcome: str, message: str, retry_after: str = "1") -> None:
        super().__init__(message)
        self.outcome, self.retry_after = outcome, retry_after


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


IDLE_SECONDS = 4.0
"""A connection that was idle for so long is not used again: servers close theirs after 5 s (uvicorn) or more."""
TRIES = 3
"""A connection that the server closed while it lay in the pool gives no answer at all; the next one is asked."""


class Upstream:
    """One pool of connections for all targets."""

    def __init__(self, connections: int = 256) -> None:
        self.session = aiohttp.ClientSession(connector=_Pool(limit=connections, keepalive_timeout=IDLE_SECONDS))

    async def close(self) -> None:
        """Gives the connections back."""
        await self.session.close()

    async def whole(self, target: Target, body: dict[str, Any]) -> Reply:
        """The reply to a chat. Raises UpstreamFailed."""
        if aws_calls.is_aws(target.url):
            return _reply(await _of_aws(target, body))
        try:
            async with asyncio.timeout(target.seconds), await self._post(target, {**body, "stream": False}) as answer:
                await _check(answer)
                return _reply(await answer.json(content_type=None))
        except TimeoutError:
            raise UpstreamFailed("timeout", f"no reply within {target.seconds:g} s") from None
        except BROKEN as error:
            raise UpstreamFailed("error", f"{type(error).__name__}: {error}"[:300]) from None

    async def chunks(self, target: Target, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """The events of a streamed chat, as they come. Raises UpstreamFailed, also where the stream ends without its end."""
        if aws_calls.is_aws(target.url):
            for event in _as_events(await _of_aws(target, body)):
                yield event
            return
        ended = False
        try:
            async with asyncio.timeout(target.seconds) as limit:
                loop = asyncio.get_running_loop()
                limit.reschedule(loop.time() + min(target.seconds, target.first_seconds))
                start = loop.time()
                async with await self._post(target, {**body, "stream": True}) as answer:
                    await _check(answer)
                    async for line in answer.content:
                        data = line.strip()
                        if not data.startswith(b"data:"):
                            continue
                        data = data[5:].strip()
                        if data == b"[DONE]":
                            ended = True
                            break
                        event = _event(data)
                        if "error" in event:
                            raise UpstreamFailed("error", str(event["error"])[:300])
                        yield event
                        if _has_text(event):
                            limit.reschedule(start + target.seconds)
        except TimeoutError:
            raise UpstreamFailed("timeout", "no token in time") from None
        except BROKEN as error:
            raise UpstreamFailed("error", f"{type(error).__name__}: {error}"[:300]) from None
        if not ended:
            raise UpstreamFailed("error", "the stream ended in the middle of a reply")

    async def _post(self, target: Target, body: dict[str, Any]) -> aiohttp.ClientResponse:
        """The head of the answer. Raises aiohttp.ClientError.

        A server that closes an idle connection may do so in the moment in which it is used again: then the request was never
        read, nothing was answered, and it is sent again. One that failed on a new connection is not.
        """
        headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
        for left in reversed(range(TRIES)):
            _REUSED.set(False)
            try:
                url = f"{target.url}/chat/completions"
                return await self.session.post(url, json={**body, "model": target.model}, headers=headers)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if not (_REUSED.get() and left):
                    raise
        raise AssertionError  # the last try returns or raises


class _Pool(aiohttp.TCPConnector):
    """Tells the task that asked for a connection whether it had been used before (aiohttp's tracing costs more)."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.used: WeakSet[Any] = WeakSet()

    async def connect(self, *arguments: Any, **settings: Any) -> Any:
        """A connection, from the pool or new."""
        connection: Any = await super().connect(*arguments, **settings)
        _REUSED.set(connection.protocol in self.used)
        self.used.add(connection.protocol)
        return connection


async def _of_aws(target: Target, body: dict[str, Any]) -> dict[str, Any]:
    """A chat completion by AWS's own call, in a thread: boto3 knows no event loop."""
    try:
        call = asyncio.to_thread(aws_calls.chat, target.url, target.model, body, target.seconds)
        return await asyncio.wait_for(call, target.seconds)
    except TimeoutError:
        raise UpstreamFailed("timeout", f"no reply within {target.seconds:g} s") from None
    except FinetuneError as error:
        busy = any(word in str(error) for word in aws_calls.BUSY)
        raise UpstreamFailed("busy" if busy else "error", str(error)[:300]) from None


def _as_events(made: dict[str, Any]) -> list[dict[str, Any]]:
    """A whole completion as the events of a stream: the text at once, the end, the usage."""
    choice = made["choices"][0]
    head = {"id": made.get("id", "chatcmpl-aws"), "object": "chat.completion.chunk", "model": made.get("model")}
    said = {"index": 0, "delta": {"role": "assistant", "content": choice["message"]["content"]}, "finish_reason": None}
    end = {"index": 0, "delta": {}, "finish_reason": choice.get("finish_reason") or "stop"}
    return [{**head, "choices": [said]}, {**head, "choices": [end]}, {**head, "choices": [], "usage": made.get("usage") or {}}]


async def _check(answer: aiohttp.ClientResponse) -> None:
    if answer.status == 429:
        raise UpstreamFailed("busy", "the upstream is busy", answer.headers.get("Retry-After", "1"))
    if answer.status >= 400:
        raise UpstreamFailed("error", f"HTTP {answer.status}: {(await answer.text())[:300]}")


def _event(data: bytes) -> dict[str, Any]:
    """One event of a stream. Raises ValueError where it has not OpenAI's shape."""
    event = json.loads(data)
    if not isinstance(event, dict):
        raise ValueError(f"an event of the stream is no object: {data[:80]!r}")
    for choice in event.get("choices") or []:
        if not isinstance(choice.get("delta") or {}, dict):
            raise ValueError(f"an event of the stream has no delta: {data[:80]!r}")
    return event


def _has_text(event: dict[str, Any]) -> bool:
    return any((choice.get("delta") or {}).get("content") for choice in event.get("choices") or [])


def _reply(value: Any) -> Reply:
    choice = value["choices"][0]
    message = choice["message"]
    usage = value.get("usage") or {}
    return Reply(str(message.get("content") or ""), str(choice.get("finish_reason") or "stop"), usage, message)
