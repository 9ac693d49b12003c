"""The router's HTTP side, one worker of it (started by `server`).

    POST /v1/chat/completions   OpenAI's shape, also streaming; `model` names the assistant
    POST /chat                  {user_id, message, conversation_id?} -> {response, conversation_id, request_id, action, params, …}
    POST /feedback              {request_id, feedback_type, rating?, expected_response?, comment?}
    GET  /v1/models /healthz /readyz /metrics /dashboard /rate

Every answer names its request, conversation, version and rollout generation in its headers.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from finetune_assets.corpus.personal_data import scrub_conversation
from finetune_assets.environment import Environment
from finetune_assets.registry import Ledger
from finetune_assets.registry.traffic import requests
from finetune_assets.serving import intake, pages
from finetune_assets.serving.answering import Answering, Exchange
from finetune_assets.serving.cron import cron_routes
from finetune_assets.serving.directory import ADMIN, Directory
from finetune_assets.serving.intake import Ask, Rates, Refused
from finetune_assets.serving.journal import Journal
from finetune_assets.serving.metrics import CONTENT_TYPE, Metrics
from finetune_assets.serving.rating import rating_routes
from finetune_assets.serving.upstream import Upstream
from finetune_assets.storage import Store

log = logging.getLogger(__name__)
MOST_CHATS = 256
"""Chats at a time in one worker; one more is told to come back."""
LOOK_AGAIN = (0.1, 0.2, 0.4)
"""Seconds after which feedback looks again for its request, which another worker may be about to write."""
SIMULATED_TIME = "x-simulated-time"
SIMULATED_FAULT = "x-simulated-fault"
"""Headers of a simulated request: its time, and the share of the candidate's replies that fail. Heeded in a simulation only."""


@dataclass(frozen=True)
class Options:
    """How a worker is started. `open_door`: no key is needed as long as none exists (loopback only)."""

    engine_url: str
    open_door: bool
    simulation: bool = False


class Router:
    """One worker."""

    def __init__(self, environment: Environment, options: Options) -> None:
        self.options = options
        self.ledger = Ledger(environment.database_url)
        self.store = Store(environment.home)
        self.directory = Directory(environment, self.ledger)
        self.journal = Journal(environment.home / "serving" / "journal")
        self.metrics = Metrics()
        self.rates = Rates()
        self.chats = 0
        self.stopping = False
        key = environment.user_key.encode() if environment.user_key else self.store.key()
        self.make_answering: Callable[[], Answering] = lambda: Answering(
            self.directory, self.journal, Upstream(), self.metrics, key, options.engine_url
        )
        self.answering: Answering
        routes = [
            Route("/v1/chat/completions", self._guarded(self.completions), methods=["POST"]),
            Route("/chat", self._guarded(self.chat), methods=["POST"]),
            Route("/feedback", self._guarded(self.feedback), methods=["POST"]),
            Route("/v1/models", self._guarded(self.models)),
            Route("/healthz", self.health),
            Route("/readyz", self.ready),
            Route("/metrics", self._guarded(self.prometheus)),
            *pages.routes(self),
            *rating_routes(self.store, self.ledger.engine, key),
            *cron_routes(environment, self.ledger),
        ]
        self.app = Starlette(routes=routes, lifespan=self._lifespan)
        self.chats_at = {"/v1/chat/completions": self._guarded(self.completions), "/chat": self._guarded(self.chat)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application: chats go straight to their endpoint, the rest by Starlette's routes."""
        endpoint = self.chats_at.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if endpoint is None:
            await self.app(scope, receive, send)
            return
        answer = await endpoint(Request(scope, receive, send))
        await answer(scope, receive, send)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        self.answering = self.make_answering()
        self.directory.start()
        self.journal.start()
        yield
        self.stopping = True
        await self.answering.finish()
        await self.answering.upstream.close()
        self.directory.close()
        await asyncio.get_running_loop().run_in_executor(None, self.journal.close)
        self.ledger.close()

    def _guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Turns refusals into OpenAI's error shape; nothing else ever leaves as a 500 without a line in the log."""

        async def call(request: Request) -> Response:
            try:
                return await endpoint(request)
            except Refused as refused:
                self.metrics.refused.labels(str(refused.status)).inc()
                if refused.status == 403:
                    client = request.client.host if request.client else "?"
                    log.warning("403 for %s %s from %s: %s", request.method, request.url.path, client, refused)
                kind = "invalid_request_error" if refused.status < 500 else "upstream_error"
                error = {"message": str(refused), "type": kind, "code": refused.status, "param": None}
                return JSONResponse({"error": error}, status_code=refused.status, headers=refused.headers)

        return call

    # chats

    async def completions(self, request: Request) -> Response:
        """A chat in OpenAI's shape."""
        at = self._now(request)
        body = await intake.read_json(request)
        assistant, tenant = self._who(request, body)
        user, conversation, messages, settings, channel = intake.openai_ask(request, body, assistant, tenant, at)
        ask = Ask(
            assistant=assistant,
            tenant=tenant,
            vertical=self._vertical(assistant.select.vertical, tenant),
            user=user or conversation or f"anonymous-{uuid.uuid4().hex}",
            conversation=conversation,
            messages=messages,
            settings=settings,
            channel=channel,
            at=at,
            stream=body.get("stream") is True,
            fault=self._fault(request),
        )
        exchange = await self._begin(ask)
        if ask.stream:
            return await self._streamed(exchange)
        try:
            await self.answering.whole(exchange)
        finally:
            self.chats -= 1
        reply = exchange.reply
        message = {**reply.message, "role": "assistant", "content": reply.text.strip()}
        value = {
            "id": exchange.id,
            "object": "chat.completion",
            "created": int(at.timestamp()),
            "model": exchange.model,
            "choices": [{"index": 0, "message": message, "finish_reason": reply.finish_reason, "logprobs": None}],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0, **reply.usage},
        }
        return JSONResponse(value, headers=self._headers(exchange))

    async def _streamed(self, exchange: Exchange) -> Response:
        events = self.answering.chunks(exchange)
        try:
            first = await anext(events, None)  # a fallback, or a refusal, happens before the answer's headers are sent
        except BaseException:
            self.chats -= 1
            raise

        async def lines() -> AsyncGenerator[bytes]:
            try:
                event = first
                while event is not None:
                    if "error" not in event:
                        event = {**event, "id": exchange.id, "model": exchange.model}
                    yield b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"
                    event = await anext(events, None)
                yield b"data: [DONE]\n\n"
            finally:
                self.chats -= 1
                await events.aclose()

        headers = {**self._headers(exchange), "Cache-Control": "no-store"}
        return _Events(lines(), headers)

    async def chat(self, request: Request) -> Response:
        """A chat in the platform's shape: the router knows what was said before."""
        at = self._now(request)
        body = await intake.read_json(request)
        assistant, tenant = self._who(request, body)
        user = intake.identifier("user_id", body.get("user_id"))
        message = body.get("message")
        if user is None or not isinstance(message, str) or not message.strip():
            raise Refused(400, "A chat needs `user_id` and `message`.")
        conversation = intake.identifier("conversation_id", body.get("conversation_id"))
        turns: list[dict[str, Any]] = []
        if conversation is not None:
            known = self.answering.talks.get(conversation)
            if known is None:
                loop = asyncio.get_running_loop()
                known = await loop.run_in_executor(None, self.answering.talks.read, conversation)
            turns = list(known.turns) if known and known.tenant == tenant else []  # `open` refuses somebody else's
        system = [{"role": "system", "content": assistant.system_prompt}] if assistant.system_prompt else []
        said = intake.check_messages([*turns[-20:], {"role": "user", "content": message}])
        ask = Ask(
            assistant=assistant,
            tenant=tenant,
            vertical=self._vertical(assistant.select.vertical, tenant),
            user=user,
            conversation=conversation or f"conv-{uuid.uuid4().hex}",
            messages=[*system, *said],
            settings={},
            channel="chat",
            at=at,
        )
        exchange = await self._begin(ask)
        try:
            await self.answering.whole(exchange)
        finally:
            self.chats -= 1
        action, params = _tool_call(exchange.reply.message, exchange.reply.text)
        value = {
            "response": exchange.reply.text.strip(),
            "user_id": user,
            "conversation_id": exchange.conversation,
            "request_id": exchange.id,
            "action": action,
            "params": params,
        }
        return JSONResponse(value, headers=self._headers(exchange))

    async def _begin(self, ask: Ask) -> Exchange:
        """Admits a chat. Raises Refused (429, 503)."""
        if self.stopping:
            raise Refused(503, "This router is stopping; ask again.", {"Retry-After": "1"})
        if self.chats >= MOST_CHATS:
            raise Refused(429, "Too many chats at once; try again.", {"Retry-After": "1"})
        wait = self.rates.take(ask.tenant, ask.assistant.serving.requests_per_minute)
        if wait:
            raise Refused(429, "Too many requests of this tenant; try again.", {"Retry-After": str(max(1, round(wait)))})
        self.chats += 1
        try:
            return await self.answering.open(ask)
        except SQLAlchemyError as error:
            self.chats -= 1
            log.warning("The ledger could not be asked for a conversation: %s", type(error).__name__)
            raise Refused(503, "The conversation cannot be looked up right now; try again.", {"Retry-After": "1"}) from None
        except BaseException:
            self.chats -= 1
            raise

    # feedback

    async def feedback(self, request: Request) -> Response:
        """A judgement of a reply; the corpus reads it. 202: it is kept."""
        at = self._now(request)
        body = await intake.read_json(request)
        tenant = intake.authenticate(request, self.directory, self.options.open_door)
        request_id = intake.identifier("request_id", body.get("request_id"))
        kind, rating = body.get("feedback_type"), body.get("rating")
        if request_id is None or kind not in ("positive", "negative"):
            raise Refused(400, "Feedback needs `request_id` and `feedback_type` (positive, negative).")
        if rating is not None and (isinstance(rating, bool) or not isinstance(rating, int) or not 1 <= rating <= 5):
            raise Refused(400, "`rating` must be a whole number from 1 to 5.")
        texts = [body.get(name) for name in ("expected_response", "comment")]
        if any(text is not None and (not isinstance(text, str) or len(text) > 8_000) for text in texts):
            raise Refused(400, "`expected_response` and `comment` must be texts of at most 8,000 characters.")
        found = await self._request(request_id)
        if found is None:
            raise Refused(404, f"There is no request {request_id}.")
        if tenant not in (None, ADMIN, found["tenant_id"]):
            raise Refused(403, "This request belongs to another tenant.")
        settings = self.directory.assistants.get(str(found["assistant"]))
        cleaned = [intake.clean(text) if isinstance(text, str) else None for text in texts]
        if settings is None or settings.serving.texts != "raw":
            cleaned = [scrub_conversation([text])[0][0] if text else None for text in cleaned]
        row = {
            "feedback_id": f"f-{uuid.uuid4().hex}",
            "tenant_id": found["tenant_id"],
            "conversation_id": found["conversation_id"],
            "message_id": found["message_id"],
            "feedback_type": kind,
            "rating": rating,
            "expected_response": cleaned[0],
            "comment": cleaned[1],
            "created_at": at.isoformat(),
        }
        if not self.journal.append([("ai_rlhf_feedback", row)]):
            raise Refused(503, "The feedback cannot be kept right now; send it again.", {"Retry-After": "5"})
        self.metrics.feedback.labels(str(found["assistant"]), kind).inc()
        return JSONResponse({"feedback_id": row["feedback_id"], "request_id": request_id}, status_code=202)

    async def _request(self, request_id: str) -> Any:
        """The row of a live request, once it is in the ledger."""
        query = sa.select(requests).where((requests.c.request_id == request_id) & (requests.c.kind == "live"))

        def look() -> Any:
            with self.ledger.engine.connect() as connection:
                return connection.execute(query).mappings().first()

        for wait in (*LOOK_AGAIN, None):
            try:
                found = await asyncio.get_running_loop().run_in_executor(None, look)
            except SQLAlchemyError:
                raise Refused(503, "The request cannot be looked up right now; try again.", {"Retry-After": "1"}) from None
            if found is not None or wait is None:
                return found
            await asyncio.sleep(wait)
        return None

    # the rest

    async def models(self, request: Request) -> Response:
        """The assistants of the key's tenant, in OpenAI's shape."""
        tenant = intake.authenticate(request, self.directory, self.options.open_door)
        own = self.directory.assistant_of(tenant) if tenant not in (None, ADMIN) else None
        names = [own.name] if own else [] if tenant not in (None, ADMIN) else list(self.directory.assistants)
        return JSONResponse(
            {"object": "list", "data": [{"id": n, "object": "model", "created": 0, "owned_by": "finetune"} for n in names]}
        )

    async def health(self, _: Request) -> Response:
        """200 as long as the process answers."""
        return JSONResponse({"ok": True})

    async def ready(self, _: Request) -> Response:
        """200 where chats can be taken: the ledger was reached lately, the disk takes rows, and the process is not stopping."""
        problems: list[str] = []
        if self.directory.seconds_old > 10:
            problems.append(f"the ledger was last reached {self.directory.seconds_old:.0f} s ago")
        if self.journal.problem:
            problems.append(self.journal.problem)
        if self.stopping:
            problems.append("stopping")
        return JSONResponse({"ready": not problems, "problems": problems}, status_code=503 if problems else 200)

    async def prometheus(self, request: Request) -> Response:
        """The metrics; with keys, only for an administrator's."""
        if intake.authenticate(request, self.directory, self.options.open_door) not in (None, ADMIN):
            raise Refused(403, "Metrics of all tenants need an administrator's key.")
        states = list(self.directory.snapshot.rollouts.values())
        return Response(self.metrics.text(states, self.directory.seconds_old, self.journal.backlog), media_type=CONTENT_TYPE)

    def _who(self, request: Request, body: dict[str, Any]) -> tuple[Any, str]:
        tenant = intake.authenticate(request, self.directory, self.options.open_door)
        return intake.who_answers(self.directory, tenant, body)

    def _vertical(self, vertical: str | None, tenant: str) -> str:
        return self.directory.tenants.get(tenant) or vertical or "unknown"

    def _now(self, request: Request) -> datetime.datetime:
        told = request.headers.get(SIMULATED_TIME) if self.options.simulation else None
        if told is not None:
            try:
                return datetime.datetime.fromisoformat(told).astimezone(datetime.UTC)
            except ValueError:
                raise Refused(400, f"`{SIMULATED_TIME}` is no time.") from None
        return datetime.datetime.now(datetime.UTC)

    def _fault(self, request: Request) -> float:
        told = request.headers.get(SIMULATED_FAULT, "0") if self.options.simulation else "0"
        return float(told) if told.replace(".", "", 1).isdigit() else 0.0

    def _headers(self, exchange: Exchange) -> dict[str, str]:
        return {
            "X-Request-Id": exchange.id,
            "X-Conversation-Id": exchange.conversation.encode("ascii", "replace").decode(),
            "X-Model-Version": exchange.model,
            "X-Rollout-Generation": str(exchange.state.generation),
        }


class _Events(Response):
    """Server-sent events. Before each it looks whether the client is still there: Starlette's own way costs a task group."""

    def __init__(self, lines: AsyncGenerator[bytes], headers: dict[str, str]) -> None:
        self.status_code, self.background, self.lines = 200, None, lines
        self.init_headers({**headers, "Content-Type": "text/event-stream; charset=utf-8"})

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


def _tool_call(message: dict[str, Any], text: str) -> tuple[str | None, Any]:
    """Name and arguments of the reply's tool call: OpenAI's, or a text that is a JSON object with `action` or `name`."""
    for call in message.get("tool_calls") or []:
        function = call.get("function") or {}
        try:
            return function.get("name"), json.loads(function.get("arguments") or "{}")
        except ValueError:
            return function.get("name"), None
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except ValueError:
            return None, None
        name = value.get("action") or value.get("name")
        if isinstance(name, str):
            return name, value.get("params") or value.get("arguments")
    return None, None
