"""What goes out: a reply in OpenAI's shape or the platform's, its headers, and server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from finetune_assets.serving import jsons
from finetune_assets.serving.exchange import Exchange


def whole(value: dict[str, Any], exchange: Exchange) -> Response:
    """A reply that is sent at once."""
    return Response(jsons.dumps(value), media_type="application/json", headers=headers(exchange))


def completion(exchange: Exchange) -> dict[str, Any]:
    """OpenAI's chat completion."""
    reply = exchange.reply
    message = {**reply.message, "role": "assistant", "content": reply.text.strip()}
    return {
        "id": exchange.id,
        "object": "chat.completion",
        "created": int(exchange.ask.at.timestamp()),
        "model": exchange.model,
        "choices": [{"index": 0, "message": message, "finish_reason": reply.finish_reason, "logprobs": None}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0, **reply.usage},
    }


def chat(exchange: Exchange) -> dict[str, Any]:
    """The platform's answer to `POST /chat`; `action` and `params` come from the reply's tool call."""
    action, params = _tool_call(exchange.reply.message, exchange.reply.text)
    return {
        "response": exchange.reply.text.strip(),
        "user_id": exchange.ask.user,
        "conversation_id": exchange.conversation_id,
        "request_id": exchange.id,
        "action": action,
        "params": params,
    }


def headers(exchange: Exchange) -> dict[str, str]:
    """Request, conversation, version and rollout generation."""
    return {
        "X-Request-Id": exchange.id,
        "X-Conversation-Id": exchange.conversation_id.encode("ascii", "replace").decode(),
        "X-Model-Version": exchange.model,
        "X-Rollout-Generation": str(exchange.state.generation),
    }


class Events(Response):
    """Server-sent events. Before each it looks whether the client is still there: Starlette's own way costs a task group.

    `ended` is called in any case, even where no event was sent.
    """

    def __init__(self, lines: AsyncGenerator[bytes], headers: dict[str, str], ended: Callable[[], Awaitable[None]]) -> None:
        self.status_code, self.background, self.lines, self.ended = 200, None, lines, ended
        self.init_headers({**headers, "Cache-Control": "no-store", "Content-Type": "text/event-stream; charset=utf-8"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone: asyncio.Future[Any] | None = None
        del scope
        try:
            async with contextlib.aclosing(self.lines) as lines:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for line in lines:
                    await send({"type": "http.response.body", "body": line, "more_body": True})
                    gone = gone or asyncio.ensure_future(receive())
                    if gone.done():
                        return
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if gone is not None:
                gone.cancel()
            await self.ended()


def event(value: dict[str, Any], exchange: Exchange) -> bytes:
    """One chunk of a stream under the chat's own id and model."""
    if "error" not in value:
        value = {**value, "id": exchange.id, "model": exchange.model}
    return b"data: " + jsons.dumps(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def _tool_call(message: dict[str, Any], text: str) -> tuple[str | None, Any]:
    """Name and arguments of the reply's tool call: OpenAI's, or a text that is a JSON object with `action` or `name`."""
    for call in message.get("tool_calls") or []:
        function = call.get("function") or {}
        try:
            return function.get("name"), json.loads(function.get("arguments") or "{}")
        except (ValueError, RecursionError):
            return function.get("name"), None
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None, None
        name = value.get("action") or value.get("name")
        if isinstance(name, str):
            return name, value.get("params") or value.get("arguments")
    return None, None
