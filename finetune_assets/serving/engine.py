"""The embedded engine: an OpenAI-compatible server over models of this store, `python -m finetune_assets.serving.engine --fd N`.

One process for all router workers, so a model is in memory once and chats of all workers share a batch. Full models are lanes of
their own, LoRA adapters share the lane of their base. A model is loaded at its first request (or at `POST /load`), its content
checked first. On a GPU or with many users put vLLM here instead: the router speaks to both in the same way.

    GET /healthz   GET /v1/models   POST /load {"model"}   POST /v1/chat/completions (also streaming)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from finetune_assets.environment import Environment
from finetune_assets.errors import FinetuneError
from finetune_assets.serving.batching import NO_ADAPTER, Chat, Lane
from finetune_assets.serving.low_rank import is_plain
from finetune_assets.serving.models import locate
from finetune_assets.training.machine import default_threads
from finetune_assets.worker.__main__ import die_with_parent
from finetune_assets.worker.models import encode_prompt

QUEUE = 512
"""Chats that may wait; one more is told to come back."""
MOST_LANES = 8
"""Full models in memory; the one that was idle longest goes first."""
MOST_TOKENS = 512
DEFAULT_TOKENS = 128


class Engine:
    """Lanes, stepped by one thread; everything else only queues chats."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.lanes: dict[str, Lane] = {}
        self.used: dict[str, float] = {}
        self.names: dict[str, tuple[str, str]] = {}  # model name: lane, adapter
        self.loading = threading.Lock()
        self.condition = threading.Condition()
        self.stepping = threading.Lock()
        self.inbox: list[tuple[str, Chat]] = []
        self.pending = 0
        self.ended = False
        self.loader = ThreadPoolExecutor(1)
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def load(self, name: str) -> None:
        """Brings a model into memory, if it is not there. Raises FinetuneError."""
        with self.loading:
            known = self.names.get(name)
            if known is not None and known[0] in self.lanes:
                return
            place = locate(name, self.environment)
            model, adapter = place.base, place.adapter
            if adapter is not None and not is_plain(adapter):
                model, adapter = str(adapter), None  # merged with its base: a lane of its own
            base = f"{model}@{place.revision}" if place.revision else model
            if base not in self.lanes:
                lane = Lane(model, revision=place.revision)
                with self.condition:
                    self._make_room()
                    self.lanes[base] = lane
                    self.used[base] = time.monotonic()
            if adapter is not None:
                with self.stepping:
                    self.lanes[base].add_adapter(name, adapter)
            self.names[name] = (base, NO_ADAPTER if adapter is None else name)

    def _make_room(self) -> None:
        idle = sorted((self.used[base], base) for base, lane in self.lanes.items() if not lane.busy)
        while len(self.lanes) >= MOST_LANES and idle:
            _, base = idle.pop(0)
            del self.lanes[base]
            self.names = {name: place for name, place in self.names.items() if place[0] != base}  # with its adapters

    def submit(self, name: str, chat: Chat) -> bool:
        """Queues a chat for a loaded model; false where too many wait."""
        with self.condition:
            if self.pending >= QUEUE:
                return False
            self.pending += 1
            self.inbox.append((self.names[name][0], chat))
            self.condition.notify()
        return True

    def _run(self) -> None:
        while not self.ended:
            with self.condition:
                if not self.inbox and not any(lane.busy for lane in self.lanes.values()):
                    self.condition.wait(timeout=1.0)
                for base, chat in self.inbox:
                    self.used[base] = time.monotonic()
                    lane = self.lanes.get(base)
                    if lane is not None and lane.has(chat.adapter):
                        lane.add(chat)
                    else:
                        chat.deliver(None, "error: the model was put out of memory; ask again")
                self.inbox.clear()
                busy = [lane for lane in self.lanes.values() if lane.busy]
            for lane in busy:
                with self.stepping:
                    self._step(lane)

    def _step(self, lane: Lane) -> None:
        try:
            lane.step()
        except Exception as error:  # out of memory, or a model that cannot do this: its chats are told, the engine lives on
            lane.fail(f"error: {type(error).__name__}: {error}")

    def done(self) -> None:
        """One chat less."""
        with self.condition:
            self.pending -= 1


class Api:
    """OpenAI's shape over an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        routes = [
            Route("/healthz", self.health),
            Route("/v1/models", self.list),
            Route("/load", self.load, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes)

    async def health(self, _: Request) -> Response:
        """200 while the batching thread lives."""
        alive = self.engine.thread.is_alive()
        return JSONResponse({"ok": alive, "pending": self.engine.pending}, status_code=200 if alive else 503)

    async def list(self, _: Request) -> Response:
        """Loaded models."""
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in self.engine.names]})

    async def load(self, request: Request) -> Response:
        """Loads a model before anybody asks for it."""
        name = str((await request.json())["model"])
        error = await self._load(name)
        return error or JSONResponse({"model": name})

    async def _load(self, name: str) -> Response | None:
        known = self.engine.names.get(name)
        if known is not None and known[0] in self.engine.lanes:
            self.engine.used[known[0]] = time.monotonic()  # not the next to leave
            return None
        try:
            await asyncio.get_running_loop().run_in_executor(self.engine.loader, self.engine.load, name)
        except FinetuneError as error:
            return _error(404, str(error))
        return None

    async def chat(self, request: Request) -> Response:
        """One reply, whole or as it is made."""
        body: dict[str, Any] = await request.json()
        name = str(body["model"])
        failed = await self._load(name)
        if failed is not None:
            return failed
        reply = _Reply(self.engine, name, body)
        if not reply.submit():
            return _error(429, "too many chats wait", {"Retry-After": "1"})
        if body.get("stream"):
            return StreamingResponse(reply.events(), media_type="text/event-stream")
        return await reply.whole(request)


class _Reply:
    """One chat between the engine's thread and the event loop."""

    def __init__(self, engine: Engine, name: str, body: dict[str, Any]) -> None:
        self.engine, self.name, self.body = engine, name, body
        base, adapter = engine.names[name]
        self.tokenizer = engine.lanes[base].tokenizer
        context = engine.lanes[base].context
        wanted = body.get("max_completion_tokens") or body.get("max_tokens") or DEFAULT_TOKENS
        most = max(1, min(int(wanted), MOST_TOKENS, context // 2))
        messages = [{"role": str(m["role"]), "content": _text(m.get("content"))} for m in body["messages"]]
        prompt, _ = encode_prompt(self.tokenizer, messages, context - most)
        shared = engine.lanes[base].shared(prompt, messages)
        self.stops = _texts(body.get("stop"))
        self.reason = "stop"
        loop, stream = asyncio.get_running_loop(), bool(body.get("stream") or self.stops)
        self.queue: asyncio.Queue[tuple[int | None, str | None]] = asyncio.Queue()
        self.ids: list[int] = []

        def deliver(token: int | None, reason: str | None) -> None:
            if token is None:
                engine.done()
            elif not stream:  # nobody waits for it: only the end wakes the event loop
                self.ids.append(token)
                return
            with contextlib.suppress(RuntimeError):  # the loop is closed: the engine is being stopped
                loop.call_soon_threadsafe(self.queue.put_nowait, (token, reason))

        self.chat = Chat(
            prompt,
            most,
            deliver,
            adapter=adapter,
            temperature=float(body.get("temperature") or 0.0),
            top_p=float(body.get("top_p") or 1.0),
            seed=body.get("seed"),
            patient=bool(body.get("patient")),
            shared=shared,
        )
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def submit(self) -> bool:
        return self.engine.submit(self.name, self.chat)

    async def whole(self, request: Request) -> Response:
        watcher = asyncio.ensure_future(self._cancel_when_gone(request))
        try:
            if self.stops:
                text = "".join([piece async for piece in self._pieces()])
            else:
                self.reason = (await self.queue.get())[1] or "stop"
                text = self._text()
        finally:
            watcher.cancel()
        reason = self.reason
        if reason.startswith("error"):
            return _error(500, reason)
        if reason == "busy":
            return _error(429, "too many chats wait", {"Retry-After": "1"})
        message = {"role": "assistant", "content": text.strip()}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return JSONResponse({**self._head("chat.completion"), "choices": [choice], "usage": self._usage()})

    async def _cancel_when_gone(self, request: Request) -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.25)
        self.chat.cancelled = True

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events of `chat.completion.chunk`."""
        ended = False
        try:
            yield self._event({"role": "assistant", "content": ""}, None)
            async for piece in self._pieces():
                yield self._event({"content": piece}, None)
            ended = True
            if self.reason.startswith("error"):
                yield f"data: {json.dumps({'error': {'message': self.reason, 'type': 'server_error'}})}\n\n"
                return
            yield self._event({}, self.reason, self._usage())
            yield "data: [DONE]\n\n"
        finally:
            self.chat.cancelled = self.chat.cancelled or not ended

    async def _pieces(self) -> AsyncIterator[str]:
        """The text as it is made, up to one of the request's `stop` texts; what may be the beginning of one is held back."""
        sent = 0
        while True:
            token, reason = await self.queue.get()
            if token is not None:
                self.ids.append(token)
            text = self._text()
            found = min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=-1)
            if found >= 0:
                self.chat.cancelled = True
                yield text[sent:found]
                return
            if token is None:
                self.reason = reason or "stop"
                yield text[sent:]
                return
            if text.endswith("\ufffd"):
                continue  # half of a character
            end = len(text) - max((_overlap(text, stop) for stop in self.stops), default=0)
            if end > sent:
                yield text[sent:end]
                sent = end

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True)).lstrip()

    def _usage(self) -> dict[str, int]:
        prompt = len(self.chat.prompt)
        return {"prompt_tokens": prompt, "completion_tokens": self.chat.made, "total_tokens": prompt + self.chat.made}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def _event(self, delta: dict[str, str], reason: str | None, usage: dict[str, int] | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        value = {**self._head("chat.completion.chunk"), "choices": [choice], **({"usage": usage} if usage else {})}
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _text(content: Any) -> str:
    """OpenAI's content: a text, or a list of parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))  # pyright: ignore
    return "" if content is None else str(content)


def _texts(value: Any) -> list[str]:
    """OpenAI's `stop`: a text, several, or null."""
    given: list[Any] = value if isinstance(value, list) else [value]  # pyright: ignore[reportUnknownVariableType]
    return [text for text in given if isinstance(text, str) and text]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text with which a stop text may begin."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "engine_error"}}, status_code=status, headers=headers)


def main(arguments: list[str]) -> None:
    """Serves on an inherited listening socket until SIGTERM."""
    die_with_parent()
    torch.set_num_threads(int(os.environ.get("FINETUNE_ENGINE_THREADS") or default_threads()))
    api = Api(Engine(Environment.read()))
    config = uvicorn.Config(
        api.app, fd=int(arguments[arguments.index("--fd") + 1]), log_level="warning", lifespan="off", timeout_graceful_shutdown=10
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the supervisor says when to end
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main(sys.argv[1:])
