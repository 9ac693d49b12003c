"""One chat from the user's question to its rows in the journal: assign, ask the upstream, fall back, record, shadow.

The candidate's failure never reaches the user: before the first token the champion answers instead, and both arms are written
down. A shadow reply is made after the live one, within its own limits, and nobody sees it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import os
import random
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, cast

from finetune_assets.corpus.personal_data import pseudonym
from finetune_assets.evaluation.rules import breaks
from finetune_assets.registry.rollouts import SHADOW
from finetune_assets.serving.assignment import CANDIDATE, CHAMPION, Arm, as_rollout, assign, keep, takes_part
from finetune_assets.serving.directory import Directory
from finetune_assets.serving.exchange import Exchange, turns_of
from finetune_assets.serving.intake import Ask, Options, Refused, history_key, new_conversation
from finetune_assets.serving.journal import Journal, Row
from finetune_assets.serving.metrics import Metrics
from finetune_assets.serving.models import SEPARATOR, model_name
from finetune_assets.serving.records import look_ahead, request_row, shadow_rows, text_rows
from finetune_assets.serving.rented import rented, usd
from finetune_assets.serving.talks import Talk, Talks, in_time
from finetune_assets.serving.upstream import Reply, Target, Upstream, UpstreamFailed, says

log = logging.getLogger(__name__)
MOST_SHADOWS = 64
"""Shadow chats at a time; more are left out and counted."""
DEFAULT_TOKENS = 96
LIMITS = {"max_tokens", "max_completion_tokens"}
"""By which a client cuts replies short."""


class Answering:
    """What the chats of one worker share."""

    def __init__(
        self, directory: Directory, journal: Journal, upstream: Upstream, metrics: Metrics, key: bytes, options: Options
    ) -> None:
        self.directory, self.journal, self.upstream, self.metrics = directory, journal, upstream, metrics
        self.key, self.engine_url = key, options.engine_url
        self.alone = options.workers == 1
        self.talks = Talks(directory.ledger)
        self.shadows: set[asyncio.Task[None]] = set()

    def open(self, ask: Ask, talk: Talk | None) -> Exchange:
        """Finds the arm; `talk` is the conversation that goes on. Raises Refused (403) where it is somebody else's."""
        name = ask.assistant.name
        conversation = talk.conversation if talk else ask.conversation or new_conversation()
        anonymous = not ask.user
        if anonymous:  # the same in every turn, since the conversation is found by what was said in it
            ask = replace(ask, user=conversation)
        user = pseudonym(ask.user, self.key)
        if talk is not None and (talk.tenant, talk.user) != (ask.tenant, user):
            raise Refused(403, "This conversation belongs to somebody else.")
        state = self.directory.rollout(name)
        experiment = self.directory.snapshot.experiments.get(name)
        if experiment is not None and takes_part(experiment, ask.tenant, ask.user):
            state = as_rollout(state, experiment)
        assigned = assign(state, ask.tenant, ask.user)
        kept = False
        if talk is not None and ask.at - talk.last < datetime.timedelta(minutes=ask.assistant.serving.conversation_minutes):
            assigned, kept = keep(state, assigned, talk)
        made = Exchange(ask, state, assigned, kept, conversation, talk is None, user, turns_of(ask.messages))
        made.speaker = None if ask.told else "" if anonymous else user
        return made

    async def find(self, ask: Ask) -> Talk | None:
        """The open conversation that a chat goes on with: the named one, or the one with the same history.

        Raises Refused (503)."""
        if ask.conversation is not None:
            return await self.named(ask.conversation, ask.tenant, ask.user)
        said = turns_of(ask.messages)
        while said and said[-1]["role"] != "assistant":
            said.pop()
        if not said:
            return None
        if not ask.user:
            return await self._of_nobody(history_key(ask.tenant, "", said))
        key = history_key(ask.tenant, pseudonym(ask.user, self.key), said)
        conversation = self.talks.of_history(key) or await in_time(self.talks.read_history, key)
        return None if conversation is None else await self.talk(conversation)

    async def _of_nobody(self, key: str) -> Talk | None:
        """A conversation without a named user that stands at this history, each taken once: of two people who said and heard the
        same nobody can tell who is who, and neither sees more than they send themselves. Raises Refused (503)."""
        known = self.talks.of_history(key)
        if known is not None and self.talks.take(talk := await self.talk(known), key):
            return talk
        for conversation in await in_time(self.talks.read_standing, key):
            if self.talks.take(talk := await self.talk(conversation), key):
                return talk
        return None

    async def named(self, conversation: str, tenant: str, user: str) -> Talk | None:
        """The conversation with this stored id. One that began before a client's ids were stored as `TENANT/ID` goes on under its
        own. Raises Refused (503)."""
        found, own = await self.talk(conversation), conversation.partition("/")[2]
        if found is not None or not own:
            return found
        older = await self.talk(own)
        return older if older is not None and (older.tenant, older.user) == (tenant, pseudonym(user, self.key)) else None

    async def talk(self, conversation: str) -> Talk | None:
        """A conversation as it stands: another worker may have answered last, or the own last reply not be in the ledger yet.

        Raises Refused (503) where the ledger has to be asked and does not answer.
        """
        known = self.talks.get(conversation)
        if known is not None and self.alone:
            return known
        stored = await in_time(self.talks.read, conversation)
        return max((one for one in (known, stored) if one is not None), key=lambda one: one.last, default=None)

    async def whole(self, exchange: Exchange) -> None:
        """The reply at once. Raises Refused (400, 413, 422, 429, 502, 504) where no arm gives one."""
        asyncio.get_running_loop().call_soon(look_ahead, exchange)  # while the upstream answers
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

        Streams begin with an event that names the role and says nothing: it waits for the first that does, since until then
        another arm can answer. A stream that breaks later ends with an event {"error": …}: the user has seen its beginning.
        """
        for arm in self._arms(exchange):
            exchange.served, exchange.reply = arm, Reply(ended=False)
            waiting: list[dict[str, Any]] = []
            stream = self.upstream.chunks(self.target(exchange, arm), {**self.body(exchange.ask), **_USAGE})
            try:
                _fail_if_told(exchange.ask, arm)
                async with contextlib.aclosing(stream):
                    async for event in stream:
                        _take(event, exchange.reply)
                        exchange.reply.usage = event.get("usage") or exchange.reply.usage
                        waiting.append(event)
                        if exchange.first_token is None:
                            if not says(event):
                                continue
                            exchange.first_token = time.perf_counter() - exchange.started
                        for one in waiting:
                            yield one
                        waiting.clear()
                exchange.reply.ended = True
                for one in waiting:  # of a reply that says nothing
                    yield one
            except UpstreamFailed as failed:
                self._note(exchange, arm, failed)
                if exchange.first_token is None:
                    continue
                self._ended(exchange)
                yield {"error": {"message": "the reply was cut off", "type": "upstream_error"}}
                return
            except (GeneratorExit, asyncio.CancelledError):
                if exchange.outcome == "ok":  # else the assigned arm has failed before
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
            exchange.outcome = "timeout" if failed.outcome == "timeout" else "error"
            exchange.error = failed.said(exchange.ask.assistant.serving.texts)
        exchange.status = {"timeout": 504, "busy": 429}.get(failed.outcome, failed.status)
        exchange.refusal = failed.error
        if failed.outcome == "busy" and len(self._arms(exchange)) == 1:
            exchange.outcome = "gone"  # told to come back: nothing that the model did wrong

    def _no_reply(self, exchange: Exchange) -> Refused:
        """What the champion, the last one asked, says decides: where it finds the request wrong, no arm has failed."""
        if exchange.refusal:
            exchange.outcome = "refused"
        self._record(exchange)
        if exchange.refusal:
            message = str(exchange.refusal.get("message") or "") or "The model takes no such request."
            return Refused(exchange.status, message, error=exchange.refusal)
        if exchange.status == 429:
            return Refused(429, "Too many chats wait; try again.", {"Retry-After": "1"})
        return Refused(exchange.status, f"The model could not answer (request {exchange.id}); try again.")

    def _ended(self, exchange: Exchange) -> None:
        exchange.status = 200
        if exchange.outcome == "ok" and self._breaks_policy(exchange):
            exchange.outcome = "policy"
        self._record(exchange)
        self._shadow(exchange)

    def _breaks_policy(self, exchange: Exchange) -> bool:
        """An empty reply, or one that a rule allows to no user. What the client itself has cut short is not judged."""
        ask, reply = exchange.ask, exchange.reply
        if not reply.text.strip():
            return not reply.message.get("tool_calls")
        if reply.finish_reason == "length" and LIMITS & ask.settings.keys():
            return False
        asked = next((str(m["content"]) for m in reversed(ask.messages) if m["role"] == "user"), "")
        return any(breaks(rule, asked, reply.text) for rule in ask.assistant.rules)

    # to the upstream

    def target(self, exchange: Exchange, arm: Arm) -> Target:
        """Where an arm answers."""
        name = model_name(exchange.ask.assistant.name, arm.version)
        settings = self.directory.assistants.get(name.rpartition(SEPARATOR)[0], exchange.ask.assistant).serving
        first = settings.first_token_seconds if arm.name == CANDIDATE else settings.timeout_seconds
        found = rented(self.directory.store, exchange.ask.assistant.name, arm.version)
        if found is not None:
            model, key = found
            return Target((model.base_url or "").rstrip("/"), model.model, key, settings.timeout_seconds, first)
        embedded = settings.upstream == "embedded"
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
        limit = {} if LIMITS & ask.settings.keys() else {"max_tokens": most}
        return {"messages": ask.messages, "temperature": 0, **limit, **ask.settings}

    # to the journal

    def _record(self, exchange: Exchange) -> None:
        """The rows of a chat into the journal, texts scrubbed first; and the conversation into memory."""
        self._measure(exchange)
        ask, reply = exchange.ask, exchange.said
        answered = exchange.status == 200 and bool(reply)
        turns = [*exchange.turns, {"role": "assistant", "content": reply}] if answered else exchange.turns
        key = history_key(ask.tenant, exchange.speaker, turns) if answered and exchange.speaker is not None else None
        rows = [request_row(exchange, "live", key)]
        if answered:
            rows += text_rows(exchange, turns)
            state = exchange.state
            now = exchange.assigned.name, state.salt, state.step, exchange.kept, ask.at
            self.talks.remember(Talk(exchange.conversation, ask.tenant, exchange.user, *now, turns, key))
        else:
            self.talks.taken.pop(exchange.conversation, None)  # the client asks again
        self._keep(rows)
        asyncio.get_running_loop().call_soon(self.metrics.observe, exchange)  # after the reply

    def _measure(self, exchange: Exchange) -> None:
        """Seconds and cost of a chat that has ended."""
        exchange.seconds = time.perf_counter() - exchange.started
        assistant = exchange.ask.assistant
        rate = assistant.budget.usd_per_hour
        machine_usd = exchange.seconds * rate / 3600 if rate else None
        exchange.usd = usd(self.directory.store, assistant.name, exchange.served.version, exchange.reply.usage, machine_usd)

    def _keep(self, rows: list[Row]) -> None:
        if not self.journal.append(rows, hold=True):
            self.metrics.lost_rows.inc(len(rows))

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
        ask = replace(live.ask, at=live.ask.at + datetime.timedelta(seconds=live.seconds))
        made = Exchange(ask, live.state, arm, False, live.conversation, False, live.user, live.turns)
        made.id = f"shadow-{live.id}"
        target = self.target(made, arm)
        embedded = target.url == self.engine_url
        body = {**self.body(ask), "patient": True} if embedded else self.body(ask)
        body.pop("tools", None)  # a shadow never runs a tool
        body.pop("tool_choice", None)
        target = replace(target, seconds=ask.assistant.rollout.shadow_seconds or target.seconds)
        try:
            _fail_if_told(ask, arm)
            made.reply = await self.upstream.whole(target, body)
            if self._breaks_policy(made):
                made.outcome = "policy"
        except UpstreamFailed as failed:
            if failed.outcome == "busy":
                self.metrics.shadows_left_out.inc()
                return
            made.outcome = "timeout" if failed.outcome == "timeout" else "error"  # also of what the live arm did not refuse
            made.error, made.status = failed.said(ask.assistant.serving.texts), 502
            if failed.kind.startswith("HTTP 404") and not embedded:  # nobody has loaded it there yet: it has failed nothing
                made.outcome, made.status = "refused", 404
        self._measure(made)
        self._keep(shadow_rows(made, live))
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


def _take(event: dict[str, Any], reply: Reply) -> None:
    """Adds a piece of a streamed reply: text, or of a tool call; and why it ended."""
    choices = event.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    reply.finish_reason = str(choices[0].get("finish_reason") or reply.finish_reason)
    reply.text += str(delta.get("content") or "")
    for piece in delta.get("tool_calls") or []:
        calls = cast("list[dict[str, Any]]", reply.message.setdefault("tool_calls", []))
        call = next((one for one in calls if one["index"] == piece.get("index")), None)
        if call is None or call["index"] is None:
            call = {"index": piece.get("index"), "function": {"name": "", "arguments": ""}}
            calls.append(call)
        for name in call["function"]:
            call["function"][name] += str((piece.get("function") or {}).get(name) or "")
