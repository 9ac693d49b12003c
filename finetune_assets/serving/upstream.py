"""Calls an upstream: the embedded engine, vLLM, OpenAI, Azure; Bedrock and SageMaker by AWS's own calls, in threads.

Failures are errors or timeouts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
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
    it says that the request is wrong, with this status and this error in OpenAI's shape. `kind` is what of the message is none of
    the upstream's own words, which may quote the prompt."""

    def __init__(
        self, outcome: str, message: str, status: int = 502, error: dict[str, Any] | None = None, kind: str | None = None
    ) -> None:
        super().__init__(message[:300])
        self.outcome, self.status, self.error, self.kind = outcome, status, error or {}, kind or outcome

    def said(self, texts: str) -> str:
        """What is stored of it, where an assistant keeps these `texts`."""
        return self.kind if texts == "none" else str(self)


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
    """What an upstream answered. `ended`: whether a stream has come to its end."""

    text: str = ""
    finish_reason: str = "stop"
    usage: dict[str, int] = field(default_factory=dict[str, int])
    message: dict[str, Any] = field(default_factory=dict[str, Any])
    ended: bool = True


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
        connection: Connection | None = None
        try:
            async with asyncio.timeout(target.seconds):
                if aws_calls.is_aws(target.url):
                    call = partial(aws_calls.chat, target.url, target.model, body, target.seconds)
                    return _reply(await asyncio.get_running_loop().run_in_executor(self.threads, call))
                connection = await self._post(target, {**body, "stream": False})
                data = await connection.read()
            return _reply(jsons.loads(data))
        except TimeoutError:
            raise UpstreamFailed("timeout", f"no reply within {target.seconds:g} s") from None
        except FinetuneError as error:
            raise _failure_of_aws(error) from None
        except BROKEN as error:
            raise _broken(error) from None
        finally:
            if connection is not None:
                self.pool.release(connection)

    async def chunks(self, target: Target, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """The events of a streamed chat, as they come. Raises UpstreamFailed, also where the stream ends without its end."""
        events = (self._events_of_aws if aws_calls.is_aws(target.url) else self._events)(target, body)
        try:
            async with asyncio.timeout(target.seconds) as limit, contextlib.aclosing(events):
                loop = asyncio.get_running_loop()
                start = loop.time()
                if aws_calls.streams(target.url):  # else the first piece is the last
                    limit.reschedule(start + min(target.seconds, target.first_seconds))
                async for event in events:
                    yield event
                    if says(event):
                        limit.reschedule(start + target.seconds)
        except TimeoutError:
            raise UpstreamFailed("timeout", "no token in time") from None
        except FinetuneError as error:
            raise _failure_of_aws(error) from None
        except BROKEN as error:
            raise _broken(error) from None

    async def _events(self, target: Target, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """Server-sent events up to `[DONE]`."""
        connection, ended = await self._post(target, {**body, "stream": True}), False
        try:
            while (line := await connection.line()) is not None:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    ended = True
                    return
                event = _event(jsons.loads(data))
                if "error" in event:
                    raise UpstreamFailed("error", str(event["error"]), kind="an error inside the stream")
                yield event
        finally:
            self.pool.release(connection, ending=ended)
        raise UpstreamFailed("error", "the stream ended in the middle of a reply")

    async def _events_of_aws(self, target: Target, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """AWS's events, read in a thread: boto3 knows no event loop. A thread whose reader has left ends with the next event."""
        loop, left = asyncio.get_running_loop(), threading.Event()
        queue = asyncio.Queue[dict[str, Any] | Exception | None]()

        def read() -> None:
            last: Exception | None = None
            try:
                with contextlib.closing(aws_calls.events(target.url, target.model, body, target.seconds)) as events:
                    while not left.is_set() and (event := next(events, None)) is not None:
                        loop.call_soon_threadsafe(queue.put_nowait, event)
            except Exception as error:
                last = error
            loop.call_soon_threadsafe(queue.put_nowait, last)

        self.threads.submit(read)
        try:
            while (event := await queue.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield _event(event)
        finally:
            left.set()

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


def _broken(error: Exception) -> UpstreamFailed:
    return UpstreamFailed("error", f"{type(error).__name__}: {error}", kind=type(error).__name__)


def _failure_of_aws(error: FinetuneError) -> UpstreamFailed:
    """What an error of AWS, or of its settings here, means."""
    text = str(error)
    kind = f"HTTP {error.status} {error.code}" if isinstance(error, ProviderError) and error.status else type(error).__name__
    if any(word in text for word in aws_calls.TOO_LONG):
        told = {"type": "invalid_request_error", "param": "messages", "code": "context_length_exceeded", "message": text}
        return UpstreamFailed("refused", text, 400, told, kind)
    busy = isinstance(error, ProviderError) and (error.status == 429 or (error.code or "").startswith(aws_calls.BUSY))
    return UpstreamFailed("busy" if busy else "error", text, kind=kind)


def _failure(status: int, body: bytes) -> UpstreamFailed:
    """What an answer that is no reply means."""
    if status == 429:
        return UpstreamFailed("busy", "the upstream is busy")
    text = without_secrets(body.decode("utf-8", "replace"))
    if status not in CLIENTS:
        return UpstreamFailed("error", f"HTTP {status}: {text}", kind=f"HTTP {status}")
    try:
        told: Any = json.loads(text)["error"]
        message = str(told["message"])
    except (ValueError, LookupError, TypeError):
        told, message = {}, text
    error = {name: told[name] for name in ("type", "param", "code") if isinstance(told.get(name), str | int)}
    told = {**error, "message": message[:1000]}
    return UpstreamFailed("refused", f"HTTP {status}: {message}", status, told, f"HTTP {status}")


def _event(event: Any) -> dict[str, Any]:
    """One event of a stream. Raises ValueError where it has not OpenAI's shape."""
    if not isinstance(event, dict):
        raise ValueError(f"an event of the stream is no object: {str(event)[:80]}")
    for choice in event.get("choices") or []:
        delta = choice.get("delta") or {}
        if not isinstance(delta, dict):
            raise ValueError(f"an event of the stream has no delta: {str(event)[:80]}")
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
