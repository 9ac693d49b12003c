"""The router's HTTP side, one worker of it (started by `server`).

    POST /v1/chat/completions   OpenAI's shape, also streaming; `model` names the assistant
    POST /chat                  {user_id, message, conversation_id?} -> {response, conversation_id, request_id, action, params, …}
    POST /feedback              {request_id, feedback_type, rating?, expected_response?, comment?}
    GET  /v1/models /openapi.json /healthz /readyz /metrics /dashboard /rate

Every answer names its request, conversation, version and rollout generation in its headers.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import yaml
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from finetune_assets.assistants import Assistant
from finetune_assets.environment import Environment
from finetune_assets.registry import Ledger
from finetune_assets.serving import intake, pages, replies
from finetune_assets.serving.answering import Answering
from finetune_assets.serving.cron import cron_routes
from finetune_assets.serving.directory import ADMIN, METRICS, Directory
from finetune_assets.serving.exchange import Exchange
from finetune_assets.serving.feedback import Feedback
from finetune_assets.serving.intake import Ask, Options, Rates, Refused
from finetune_assets.serving.journal import Journal
from finetune_assets.serving.metrics import CONTENT_TYPE, Metrics
from finetune_assets.serving.rating import rating_routes
from finetune_assets.serving.upstream import Upstream
from finetune_assets.storage import Store

log = logging.getLogger(__name__)
MOST_CHATS = 256
"""Chats at a time in one worker; one more is told to come back."""


OPENAPI = Path(__file__).with_name("openapi.yaml")


class Router:
    """One worker."""

    def __init__(self, environment: Environment, options: Options) -> None:
        self.options = options
        self.ledger = Ledger(environment.database_url)
        self.store = Store(environment.home)
        self.directory = Directory(environment, self.ledger, options.open_door)
        self.journal = Journal(environment.home / "serving" / "journal")
        self.metrics = Metrics()
        self.rates = Rates()
        self.chats = 0
        self.stopping = False
        key = environment.user_key.encode() if environment.user_key else self.store.key()
        self.make_answering: Callable[[], Answering] = lambda: Answering(
            self.directory, self.journal, Upstream(), self.metrics, key, options
        )
        self.answering: Answering
        feedback = Feedback(self.directory, self.journal, self.metrics, self.rates, options)
        routes = [
            Route("/v1/chat/completions", self._guarded(self.completions), methods=["POST"]),
            Route("/chat", self._guarded(self.chat), methods=["POST"]),
            Route("/feedback", self._guarded(feedback.take), methods=["POST"]),
            Route("/v1/models", self._guarded(self.models)),
            Route("/healthz", self.health),
            Route("/readyz", self.ready),
            Route("/metrics", self._guarded(self.prometheus)),
            Route("/openapi.json", self.openapi),
            *pages.routes(self.directory, self.journal),
            *rating_routes(self.store, self.ledger.engine, key),
            *cron_routes(environment, self.ledger),
        ]
        self.app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _unknown})
        self.chats_at = {"/v1/chat/completions": self._guarded(self.completions), "/chat": self._guarded(self.chat)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application: chats go straight to their endpoint, the rest by Starlette's routes."""
        if scope["type"] == "http" and self.directory.is_open and not intake.is_local(Headers(scope=scope)):
            answer = await self._guarded(_foreign)(Request(scope))
            await answer(scope, receive, send)
            return
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
        self.journal.close()  # here: threads may all wait for a ledger that hangs
        self.ledger.close()

    def _guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Turns refusals into OpenAI's error shape; nothing else ever leaves as a 500 without a line in the log."""

        async def call(request: Request) -> Response:
            try:
                return await endpoint(request)
            except Refused as refused:
                self.metrics.refused.labels(str(refused.status)).inc()
                if refused.status == 403:
                    key = intake.key_of(request, self.directory)
                    whose = f"the key {key.name!r} of {key.tenant}" if key else f"no key, Host {request.headers.get('host')!r}"
                    log.warning("403 for %s %r with %s: %s", request.method, request.scope["path"], whose, refused)
                return JSONResponse({"error": refused.error}, status_code=refused.status, headers=refused.headers)

        return call

    # chats

    async def completions(self, request: Request) -> Response:
        """A chat in OpenAI's shape."""
        at = intake.now(request, self.options)
        tenant = intake.authenticate(request, self.directory)
        body = await intake.read_json(request)
        assistant, tenant = intake.who_answers(self.directory, tenant, body)
        user, conversation, messages, settings, channel = intake.openai_ask(request, body, assistant, tenant, at)
        ask = Ask(
            assistant=assistant,
            tenant=tenant,
            vertical=self._vertical(assistant.select.vertical, tenant),
            user=user or conversation or "",
            conversation=intake.conversation_id(tenant, conversation),
            messages=messages,
            settings=settings,
            channel=channel,
            at=at,
            stream=body.get("stream") is True,
            fault=intake.fault(request, self.options),
        )
        self._admit(assistant, tenant)
        streams = False
        try:
            exchange = self.answering.open(ask, await self.answering.find(ask))
            if ask.stream:
                answer = await self._streamed(exchange)
                streams = True
                return answer
            await self.answering.whole(exchange)
        finally:
            if not streams:
                self._leave()
        return replies.whole(replies.completion(exchange), exchange)

    async def _streamed(self, exchange: Exchange) -> Response:
        """The answer as it is made; it leaves when it has ended."""
        events = self.answering.chunks(exchange)
        first = await anext(events, None)  # a fallback, or a refusal, happens before the answer's headers are sent

        async def lines() -> AsyncGenerator[bytes]:
            value = first
            while value is not None:
                yield replies.event(value, exchange)
                value = await anext(events, None)
            yield replies.DONE

        async def ended() -> None:
            self._leave()
            await events.aclose()

        return replies.Events(lines(), replies.headers(exchange), ended)

    async def chat(self, request: Request) -> Response:
        """A chat in the platform's shape: the router knows what was said before."""
        at = intake.now(request, self.options)
        tenant = intake.authenticate(request, self.directory)
        body = await intake.read_json(request)
        assistant, tenant = intake.who_answers(self.directory, tenant, body)
        user = intake.identifier("user_id", body.get("user_id"))
        message = body.get("message")
        if user is None or not isinstance(message, str) or not message.strip():
            raise Refused(400, "A chat needs `user_id` and `message`.")
        conversation = intake.conversation_id(tenant, intake.identifier("conversation_id", body.get("conversation_id")))
        self._admit(assistant, tenant)
        try:
            talk = await self.answering.named(conversation, tenant, user) if conversation is not None else None
            turns = talk.turns[-20:] if talk is not None and talk.tenant == tenant else []  # `open` refuses somebody else's
            said = intake.check_messages([*turns, {"role": "user", "content": message}])
            system = [{"role": "system", "content": assistant.system_prompt}] if assistant.system_prompt else []
            ask = Ask(
                assistant=assistant,
                tenant=tenant,
                vertical=self._vertical(assistant.select.vertical, tenant),
                user=user,
                conversation=conversation or intake.new_conversation(),
                messages=[*system, *said],
                settings={},
                channel="chat",
                at=at,
            )
            exchange = self.answering.open(ask, talk)
            await self.answering.whole(exchange)
        finally:
            self._leave()
        return replies.whole(replies.chat(exchange), exchange)

    def _admit(self, assistant: Assistant, tenant: str) -> None:
        """Lets a chat in; `_leave` lets it out. Raises Refused (429, 503)."""
        if self.stopping:
            raise Refused(503, "This router is stopping; ask again.", {"Retry-After": "1"})
        if self.chats >= MOST_CHATS:
            raise Refused(429, "Too many chats at once; try again.", {"Retry-After": "1"})
        wait = self.rates.take(tenant, assistant.serving.requests_per_minute, self.options.workers)
        if wait:
            raise Refused(429, "Too many requests of this tenant; try again.", {"Retry-After": str(max(1, round(wait)))})
        self.chats += 1

    def _leave(self) -> None:
        self.chats -= 1

    # the rest

    async def models(self, request: Request) -> Response:
        """The assistants of the key's tenant, in OpenAI's shape."""
        tenant = intake.authenticate(request, self.directory)
        own = self.directory.assistant_of(tenant) if tenant not in (None, ADMIN) else None
        names = [own.name] if own else [] if tenant not in (None, ADMIN) else list(self.directory.assistants)
        return JSONResponse(
            {"object": "list", "data": [{"id": n, "object": "model", "created": 0, "owned_by": "finetune"} for n in names]}
        )

    async def openapi(self, _: Request) -> Response:
        """What this API takes and gives, as OpenAPI 3.1."""
        return JSONResponse(yaml.safe_load(OPENAPI.read_text(encoding="utf-8")))

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
        """The metrics; with keys, for Prometheus' own or an administrator's."""
        if intake.authenticate(request, self.directory, metrics=True) not in (None, ADMIN, METRICS):
            raise Refused(403, "/metrics is of all tenants: `finetune keys add --metrics` makes a key for it.")
        states = list(self.directory.snapshot.rollouts.values())
        return Response(self.metrics.text(states, self.directory.seconds_old, self.journal.backlog), media_type=CONTENT_TYPE)

    def _vertical(self, vertical: str | None, tenant: str) -> str:
        return self.directory.tenants.get(tenant) or vertical or "unknown"


async def _foreign(_: Request) -> Response:
    raise Refused(
        403,
        "Without API keys this router answers only who asks for 127.0.0.1 or localhost, and no page of another site. For others "
        "make keys: `finetune keys add`.",
    )


async def _unknown(request: Request, error: Exception) -> Response:
    """404 and 405 of what no route takes, in OpenAI's error shape."""
    assert isinstance(error, HTTPException)
    told = Refused(
        error.status_code, f"{request.method} {request.scope['path']}: {error.detail}. See /openapi.json for what there is."
    )
    return JSONResponse({"error": told.error}, status_code=error.status_code, headers=error.headers)
