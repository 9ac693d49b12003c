"""One chat from the user's question to its rows in the journal: assign, ask the upstream, fall back, record, shadow.

The candidate's failure never reaches the user: before the first token the champion answers instead, and both arms are written
down. A shadow reply is made after the live one, within its own limits, and nobody sees it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import random
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from finetune_assets.corpus.personal_data import pseudonym, scrub_conversation
from finetune_assets.evaluation.rules import holds
from finetune_assets.registry import Rollout
from finetune_assets.registry.rollouts import SHADOW
from finetune_assets.serving.assignment import CANDIDATE, CHAMPION, Arm, assign, keep
from finetune_assets.serving.directory import Directory
from finetune_assets.serving.intake import Ask, Refused, history_key
from finetune_assets.serving.journal import Journal, Row
from finetune_assets.serving.metrics import Metrics
from finetune_assets.serving.models import model_name
from finetune_assets.serving.rented import rented, usd
from finetune_assets.serving.talks import Talk, Talks
from finetune_assets.serving.upstream import Reply, Target, Upstream, UpstreamFailed

MOST_SHADOWS = 64
"""Shadow chats at a time; more are left out and counted."""
CONTEXT_TURNS = 8
"""Turns before the newest that are looked at when personal data are replaced."""
DEFAULT_TOKENS = 96


@dataclass
class Exchange:
    """What is known of one chat while it is answered."""

    ask: Ask
    state: Rollout
    assigned: Arm
    kept: bool
    conversation: str
    is_new: bool
    user: str
    turns: list[dict[str, str]]
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    served: Arm = field(init=False)
    outcome: str = "ok"
    error: str | None = None
    status: int = 200
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    first_token: float | None = None
    reply: Reply = field(default_factory=Reply)

    def __post_init__(self) -> None:
        self.served = self.assigned

    @property
    def model(self) -> str:
        """Name of the version that answers."""
        return model_name(self.ask.assistant.name, self.served.version)


class Answering:
    """What the chats of one worker share."""

    def __init__(
        self, directory: Directory, journal: Journal, upstream: Upstream, metrics: Metrics, key: bytes, engine_url: str
    ) -> None:
        self.directory, self.journal, self.upstream, self.metrics = directory, journal, upstream, metrics
        self.key, self.engine_url = key, engine_url
        self.talks = Talks(directory.ledger)
        self.shadows: set[asyncio.Task[None]] = set()

    async def open(self, ask: Ask) -> Exchange:
        """Finds the conversation and the arm. Raises Refused (403) for a conversation of somebody else."""
        name = ask.assistant.name
        user = pseudonym(ask.user, self.key)
        talk = await self._talk(ask, user)
        if talk is not None and (talk.tenant, talk.user) != (ask.tenant, user):
            raise Refused(403, "This conversation belongs to somebody else.")
        state = self.directory.rollout(name)
        experiment = self.directory.snapshot.experiments.get(name)
        if experiment is not None and _takes_part(experiment, ask.tenant, ask.user):
            state = _as_rollout(state, experiment)
        assigned = assign(state, ask.tenant, ask.user)
        kept = False
        if talk is not None and ask.at - talk.last < datetime.timedelta(minutes=ask.assistant.serving.conversation_minutes):
            stays = keep(state, assigned, talk.salt, talk.arm)
            kept, assigned = stays.name != assigned.name, stays
        conversation = talk.conversation if talk else ask.conversation or f"conv-{uuid.uuid4().hex}"
        turns = [
            {"role": str(m["role"]), "content": str(m["content"])} for m in ask.messages if m["role"] in ("user", "assistant")
        ]
        return Exchange(ask, state, assigned, kept, conversation, talk is None, user, turns)

    async def _talk(self, ask: Ask, user: str) -> Talk | None:
        """The open conversation that this chat goes on with: the named one, or the one with the same history."""
        loop = asyncio.get_running_loop()
        conversation = ask.conversation
        if conversation is None:
            said = [m for m in ask.messages if m["role"] in ("user", "assistant")]
            if not any(m["role"] == "assistant" for m in said):
                return None
            key = history_key(ask.tenant, user, said[:-1])
            conversation = self.talks.of_history(key) or await loop.run_in_executor(None, self.talks.read_history, key)
            if conversation is None:
                return None
        found = self.talks.get(conversation)
        return found or await loop.run_in_executor(None, self.talks.read, conversation)

    async def whole(self, exchange: Exchange) -> None:
        """The reply at once. Raises Refused (429, 502, 504) where no arm gives one."""
        for arm in self._arms(exchange):
            exchange.served = arm
            try:
                _fail_if_told(exchange.ask, arm)
                exchange.reply = await self.upstream.whole(self.target(exchange, arm), self.body(exchange.ask))
            except UpstreamFailed as failed:
                self._note(exchange, arm, failed)
                continue
            self._ended(exchange)
            return
        raise self._no_reply(exchange)

    async def chunks(self, exchange: Exchange) -> AsyncGenerator[dict[str, Any]]:
        """The reply as it is made: the upstream's events. Raises Refused only before the first of them.

        A stream that breaks later ends with an event {"error": …}, since the user has seen its beginning.
        """
        for arm in self._arms(exchange):
            exchange.served = arm
            stream = self.upstream.chunks(self.target(exchange, arm), {**self.body(exchange.ask), **_USAGE})
            try:
                _fail_if_told(exchange.ask, arm)
                async with contextlib.aclosing(stream):
                    async for event in stream:
                        text = _delta(event)
                        if text and exchange.first_token is None:
                            exchange.first_token = time.perf_counter() - exchange.started
                        exchange.reply.text += text
                        exchange.reply.usage = event.get("usage") or exchange.reply.usage
                        yield event
            except UpstreamFailed as failed:
                self._note(exchange, arm, failed)
                if exchange.first_token is None:
                    continue
                self._ended(exchange)
                yield {"error": {"message": "the reply was cut off", "type": "upstream_error"}}
                return
            except (GeneratorExit, asyncio.CancelledError):
                exchange.outcome = "gone"
                self._ended(exchange)
                raise
            self._ended(exchange)
            return
        raise self._no_reply(exchange)

    def _arms(self, exchange: Exchange) -> list[Arm]:
        """The assigned arm, then the champion."""
        champion = Arm(CHAMPION, exchange.state.champion)
        return [exchange.assigned] if exchange.assigned.name == CHAMPION else [exchange.assigned, champion]

    def _note(self, exchange: Exchange, arm: Arm, failed: UpstreamFailed) -> None:
        self.metrics.upstream_failures.labels(exchange.ask.assistant.name, arm.name, failed.outcome).inc()
        if arm == exchange.assigned:
            exchange.outcome = "error" if failed.outcome == "busy" else failed.outcome
            exchange.error = str(failed)
        exchange.status = {"timeout": 504, "busy": 429}.get(failed.outcome, 502)
        if failed.outcome == "busy" and len(self._arms(exchange)) == 1:
            exchange.outcome = "gone"  # told to come back: nothing that the model did wrong

    def _no_reply(self, exchange: Exchange) -> Refused:
        self._record(exchange)
        if exchange.status == 429:
            return Refused(429, "Too many chats wait; try again.", {"Retry-After": "1"})
        return Refused(exchange.status, f"The model could not answer (request {exchange.id}); try again.")

    def _ended(self, exchange: Exchange) -> None:
        exchange.status = 200
        if exchange.outcome == "ok" and self._breaks_policy(exchange.ask, exchange.reply):
            exchange.outcome = "policy"
        self._record(exchange)
        self._shadow(exchange)

    def _breaks_policy(self, ask: Ask, reply: Reply) -> bool:
        """An empty reply, or one that says what a rule for every intent forbids."""
        if not reply.text.strip() and not reply.message.get("tool_calls"):
            return True
        rules = [rule for rule in ask.assistant.rules if rule.intent is None and rule.when is None and rule.not_contains]
        return not all(holds(rule, reply.text) for rule in rules if not rule.contains_any)

    # to the upstream

    def target(self, exchange: Exchange, arm: Arm) -> Target:
        """Where an arm answers."""
        settings = exchange.ask.assistant.serving
        first = settings.first_token_seconds if arm.name == CANDIDATE else settings.timeout_seconds
        found = rented(self.directory.store, exchange.ask.assistant.name, arm.version)
        if found is not None:
            model, key = found
            return Target((model.base_url or "").rstrip("/"), model.model, key, settings.timeout_seconds, first)
        embedded = settings.upstream == "embedded"
        name = model_name(exchange.ask.assistant.name, arm.version)
        if arm.version is None and settings.champion_model and not embedded:
            name = settings.champion_model
        return Target(
            url=self.engine_url if embedded else settings.upstream.rstrip("/"),
            model=name,
            key=os.environ.get(settings.upstream_key) if settings.upstream_key else None,
            seconds=settings.timeout_seconds,
            first_seconds=first,
        )

    def body(self, ask: Ask) -> dict[str, Any]:
        """The upstream's request; greedy unless the client says otherwise, as the benchmark was."""
        most = ask.assistant.benchmark.max_new_tokens or DEFAULT_TOKENS
        limit = {} if {"max_tokens", "max_completion_tokens"} & ask.settings.keys() else {"max_tokens": most}
        return {"messages": ask.messages, "temperature": 0, **limit, **ask.settings}

    # to the journal

    def _record(self, exchange: Exchange) -> None:
        """The rows of a chat into the journal, texts scrubbed first; and the conversation into memory."""
        exchange.seconds = time.perf_counter() - exchange.started
        ask, reply = exchange.ask, exchange.reply.text.strip()
        done = ask.at + datetime.timedelta(seconds=max(exchange.seconds, 1e-6))
        answered = exchange.status == 200 and bool(reply)
        turns = [*exchange.turns, {"role": "assistant", "content": reply}] if answered else exchange.turns
        key = history_key(ask.tenant, exchange.user, turns) if answered and not ask.told else None
        rows: list[Row] = [self._request_row(exchange, "live", key)]
        if ask.assistant.serving.texts != "none" and answered:
            rows += self._text_rows(exchange, turns, done)
        if not self.journal.append(rows):
            self.metrics.lost_rows.inc(len(rows))
        if answered:
            talk = Talk(
                exchange.conversation, ask.tenant, exchange.user, exchange.assigned.name, exchange.state.salt, ask.at, turns
            )
            self.talks.remember(talk, key)
        self.metrics.observe(exchange)

    def _request_row(self, exchange: Exchange, kind: str, key: str | None) -> Row:
        ask, usage = exchange.ask, exchange.reply.usage
        rate = ask.assistant.budget.usd_per_hour
        machine_usd = exchange.seconds * rate / 3600 if rate else None
        values = {
            "request_id": exchange.id,
            "assistant": ask.assistant.name,
            "tenant_id": ask.tenant,
            "user": exchange.user,
            "conversation_id": exchange.conversation,
            "message_id": f"m-{exchange.id}",
            "kind": kind,
            "rollout": exchange.state.salt,
            "generation": exchange.state.generation,
            "step": exchange.state.step,
            "assigned_arm": exchange.assigned.name,
            "served_arm": exchange.served.name,
            "kept": exchange.kept,
            "version": exchange.served.version or "base",
            "outcome": exchange.outcome,
            "status": exchange.status,
            "error": exchange.error,
            "seconds": exchange.seconds,
            "first_token_seconds": exchange.first_token,
            "prompt_tokens": usage.get("prompt_tokens"),
            "completion_tokens": usage.get("completion_tokens"),
            "usd": usd(self.directory.store, ask.assistant.name, exchange.served.version, usage, machine_usd),
            "user_chars": len(exchange.turns[-1]["content"]) if exchange.turns else 0,
            "reply_chars": len(exchange.reply.text),
            "created_at": ask.at.isoformat(),
            "history_key": key,
        }
        return "requests", values

    def _text_rows(self, exchange: Exchange, turns: list[dict[str, str]], done: datetime.datetime) -> list[Row]:
        """The user's message and the reply; of a conversation that is new here, what was said before too."""
        ask = exchange.ask
        before = max(0, len(turns) - 2 - CONTEXT_TURNS)
        texts = [turn["content"] for turn in turns[before:]]
        if ask.assistant.serving.texts == "scrubbed":
            texts, _ = scrub_conversation(texts)
        first = len(texts) - 2 if not exchange.is_new else 0
        rows: list[Row] = []
        if exchange.is_new:
            hashed = ask.assistant.serving.users == "pseudonym"
            conversation = {
                "conversation_id": exchange.conversation,
                "tenant_id": ask.tenant,
                "user_id": exchange.user if hashed else ask.user,
                "vertical": ask.vertical,
                "channel": ask.channel,
                "satisfaction_score": None,
                "started_at": ask.at.isoformat(),
                "ended_at": None,
            }
            rows.append(("conversations", conversation))
        for n in range(first, len(texts)):
            role = turns[before + n]["role"]
            is_reply = n == len(texts) - 1
            at = done if is_reply else ask.at - datetime.timedelta(microseconds=len(texts) - 2 - n)
            message_id = f"m-{exchange.id}" if is_reply else f"t{before + n}-{exchange.id}"
            message = {"message_id": message_id, "conversation_id": exchange.conversation, "role": role, "content": texts[n]}
            rows.append(("messages", {**message, "intent": None, "created_at": at.isoformat()}))
        return rows

    # shadow

    def _shadow(self, exchange: Exchange) -> None:
        """Lets the candidate of a shadow step answer too, later and unseen."""
        state = exchange.state
        if state.step != SHADOW or state.candidate is None or exchange.status != 200 or exchange.outcome == "gone":
            return
        if random.random() >= exchange.ask.assistant.rollout.shadow_sample:
            return
        if len(self.shadows) >= MOST_SHADOWS:
            self.metrics.shadows_left_out.inc()
            return
        task = asyncio.get_running_loop().create_task(self._shadow_reply(exchange))
        self.shadows.add(task)
        task.add_done_callback(self.shadows.discard)

    async def _shadow_reply(self, live: Exchange) -> None:
        arm = Arm(CANDIDATE, live.state.candidate)
        made = Exchange(live.ask, live.state, arm, False, live.conversation, False, live.user, live.turns)
        made.id = f"shadow-{live.id}"
        body = (
            {**self.body(live.ask), "patient": True} if live.ask.assistant.serving.upstream == "embedded" else self.body(live.ask)
        )
        body.pop("tools", None)  # a shadow never runs a tool
        body.pop("tool_choice", None)
        try:
            _fail_if_told(live.ask, arm)
            made.reply = await self.upstream.whole(self.target(made, arm), body)
            if self._breaks_policy(live.ask, made.reply):
                made.outcome = "policy"
        except UpstreamFailed as failed:
            if failed.outcome == "busy":
                self.metrics.shadows_left_out.inc()
                return
            made.outcome, made.error, made.status = failed.outcome, str(failed), 502
        made.seconds = time.perf_counter() - made.started
        rows: list[Row] = [self._request_row(made, "shadow", None)]
        text = made.reply.text.strip()
        if text and live.ask.assistant.serving.texts != "none":
            if live.ask.assistant.serving.texts == "scrubbed":
                said = [turn["content"] for turn in live.turns[-CONTEXT_TURNS:]]
                text = scrub_conversation([*said, text])[0][-1]
            values = {"request_id": made.id, "assistant": live.ask.assistant.name, "live_message_id": f"m-{live.id}"}
            values |= {"version": arm.version or "base", "content": text, "created_at": live.ask.at.isoformat()}
            rows.append(("shadow_replies", values))
        if not self.journal.append(rows):
            self.metrics.lost_rows.inc(len(rows))
        self.metrics.observe(made, kind="shadow")

    async def finish(self, seconds: float = 10.0) -> None:
        """Waits for the shadows that are under way."""
        if self.shadows:
            await asyncio.wait(self.shadows, timeout=seconds)


_USAGE = {"stream_options": {"include_usage": True}}


def _fail_if_told(ask: Ask, arm: Arm) -> None:
    """A simulated fault of the candidate."""
    if ask.fault and arm.name == CANDIDATE and random.random() < ask.fault:
        raise UpstreamFailed("error", "a simulated fault")


def _delta(event: dict[str, Any]) -> str:
    choices = event.get("choices") or [{}]
    return str((choices[0].get("delta") or {}).get("content") or "")


def _takes_part(experiment: dict[str, Any], tenant: str, user: str) -> bool:
    """Whether a user is in an experiment: its tenant or its id is named; nobody else ever sees its versions."""
    return tenant in experiment.get("tenants", []) or user in experiment.get("users", [])


def _as_rollout(state: Rollout, experiment: dict[str, Any]) -> Rollout:
    """An experiment seen as a rollout: version A is its champion, B its candidate."""
    first, second = experiment.get("a"), experiment.get("b")
    return Rollout(
        state.assistant,
        first,
        state.generation,
        state.updated_at,
        candidate=second,
        step="a/b",
        status="running",
        share=float(experiment["share"]),
        salt=str(experiment["salt"]),
    )
