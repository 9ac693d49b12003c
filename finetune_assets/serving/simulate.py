"""`finetune simulate`: a week of people at the router, in minutes. They ask what people asked in the data, and judge the replies.

Questions are the assistant's test set, which no version was trained on; without one, the conversations of the source. Each person
asks once, at a time of the simulated week. Who judges a reply says `negative` with a chance that falls with its likeness to the
reply of the data (rapidfuzz): 0.45 up to a third, 0.05 from two thirds; a negative judgement comes with that reply as the
correction four times in ten. Nothing here knows which version answers: it is the router that finds out.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import polars as pl
from rapidfuzz import fuzz

from finetune_assets.assistants import Assistant, load_assistant
from finetune_assets.corpus.schema import SIMULATED
from finetune_assets.corpus.sources import read_source
from finetune_assets.environment import Environment
from finetune_assets.errors import ServingError
from finetune_assets.registry import Ledger
from finetune_assets.serving.models import tenants
from finetune_assets.storage import Store

WORST, BEST = 0.45, 0.05
"""Chance of a negative judgement for a reply with nothing, and with everything, of the reference."""
CORRECTED = 0.4
REPORT = 2.0
"""Seconds between two lines of progress."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is simulated. `bad`: share of the candidate's replies that fail."""

    assistant: str
    url: str
    users: int
    days: float
    concurrency: int
    feedback: float
    bad: float
    seed: int


@dataclass(frozen=True)
class Question:
    """What a person says, and what was answered in the data."""

    said: list[dict[str, str]]
    reference: str


def simulate_week(environment: Environment, plan: Plan, say: Say) -> dict[str, Any]:
    """Sends the traffic; how it ended. Raises ServingError where there is nothing to ask, or no router in simulation."""
    store = Store(environment.home)
    known = dict(tenants(store))
    assistant = load_assistant(environment.assistants, plan.assistant, known)
    people = questions(environment, assistant)
    own = assistant.select.tenant
    names = [own] if own else [tenant for tenant, vertical in known.items() if vertical == assistant.select.vertical]
    ledger = Ledger(environment.database_url)
    try:
        week = _Week(plan, people, names or [plan.assistant], ledger, say)
        return asyncio.run(week.run())
    finally:
        ledger.close()


def questions(environment: Environment, assistant: Assistant) -> list[Question]:
    """The test set's chats; without a data set, those of the source. Raises ServingError where there are none."""
    file = Store(environment.home).datasets(assistant.name) / "latest" / "test.jsonl"
    if file.exists():
        rows = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines() if line]
        chats = [[m for m in row if m["role"] != "system"] for row in rows]
        made = [Question(chat[:-1], chat[-1]["content"]) for chat in chats]
    else:
        made = _of_source(environment, assistant)
    if not made:
        raise ServingError(f"{assistant.name} has no test set and no conversation in the source: there is nothing to ask.")
    return made


def _of_source(environment: Environment, assistant: Assistant) -> list[Question]:
    tables = read_source(environment.sources)
    column, value = ("tenant_id", assistant.select.tenant) if assistant.select.tenant else ("vertical", assistant.select.vertical)
    mine = tables.conversations.filter(pl.col(column) == value)["conversation_id"].unique().implode()
    said = tables.messages.filter(pl.col("conversation_id").is_in(mine) & pl.col("content").is_not_null()).sort("created_at")
    made: list[Question] = []
    for (_,), chat in said.group_by("conversation_id", maintain_order=True):
        roles, texts = chat["role"].to_list(), chat["content"].to_list()
        if len(roles) > 1 and roles[0] == "user" and roles[1] == "assistant":
            made.append(Question([{"role": "user", "content": texts[0]}], texts[1]))
    return made


class _Week:
    def __init__(self, plan: Plan, people: list[Question], names: list[str], ledger: Ledger, say: Say) -> None:
        self.plan, self.people, self.names, self.ledger, self.say = plan, people, names, ledger, say
        self.random = random.Random(plan.seed)
        self.begins = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=plan.days)
        self.salt = f"{plan.seed}-{self.begins:%Y%m%d%H%M%S}"
        self.counts: Counter[str] = Counter()
        self.done = 0
        self.over = False

    async def run(self) -> dict[str, Any]:
        start = self.ledger.rollout(self.plan.assistant)
        if not start.is_open:
            name = self.plan.assistant
            self.say(f"{name} has no rollout: everybody gets {start.champion or 'the base model'}.")
            self.say(f"A version comes into shadow with `finetune run`, or `finetune rollout start {name} VERSION --reason …`.")
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            await self._check(session)
            reporter = asyncio.ensure_future(self._report(start.is_open))
            numbers = iter(range(self.plan.users))
            try:
                await asyncio.gather(*(self._person_after_person(session, numbers) for _ in range(self.plan.concurrency)))
            finally:
                reporter.cancel()
            if start.is_open and not self.over:
                await asyncio.sleep(1.5)  # the journal, and one more judgement
        end = self.ledger.rollout(self.plan.assistant)
        events = [event for event in self.ledger.events(self.plan.assistant) if event["generation"] > start.generation]
        for event in events:
            self.say(f"  {event['event'].replace('_', ' '):<12} {event['step'] or '':<7} {event['reason']} ({event['actor']})")
        live = end.champion or "base model"
        where = f"{end.candidate} at {end.step}, {end.status.replace('_', ' ')}" if end.is_open else "no rollout"
        self.say(f"After {self.done} people and {self.counts['requests']} requests: live {live}; {where}.")
        return {
            "people": self.done,
            **self.counts,
            "champion": end.champion,
            "candidate": end.candidate,
            "step": end.step,
            "status": end.status,
            "events": [event["event"] for event in events],
        }

    async def _check(self, session: aiohttp.ClientSession) -> None:
        try:
            async with session.get(f"{self.plan.url}/readyz") as answer:
                if answer.status == 200:
                    return
                problem = await answer.text()
        except aiohttp.ClientError as error:
            problem = str(error)
        raise ServingError(f"No router is ready at {self.plan.url} ({problem}); start one: `finetune serve --simulation`.")

    async def _report(self, was_open: bool) -> None:
        while True:
            await asyncio.sleep(REPORT / 4)
            state = await asyncio.to_thread(self.ledger.rollout, self.plan.assistant)
            self.over = was_open and not state.is_open
            self.counts["looks"] += 1
            if self.counts["looks"] % 4 == 0:
                day = self.done / self.plan.users * self.plan.days
                at = f"{state.candidate} at {state.step}" if state.is_open else f"live {state.champion or 'base model'}"
                self.say(f"day {day:.1f}: {self.done} people, {self.counts['requests']} requests, {at}")

    async def _person_after_person(self, session: aiohttp.ClientSession, numbers: Any) -> None:
        for number in numbers:
            if self.over:
                return
            await self._person(session, number)
            self.done += 1

    async def _person(self, session: aiohttp.ClientSession, number: int) -> None:
        at = self.begins + datetime.timedelta(days=self.plan.days * number / self.plan.users)
        question = self.people[self.random.randrange(len(self.people))]
        body = {
            "model": self.plan.assistant,
            "user": f"simulated-{self.salt}-{number}",
            "messages": question.said,
            "metadata": {"tenant_id": self.random.choice(self.names), "channel": SIMULATED},
        }
        headers = {"X-Simulated-Time": at.isoformat(), "X-Simulated-Fault": str(self.plan.bad)}
        answer = await self._post(session, "/v1/chat/completions", body, headers)
        if answer is not None and self.random.random() < self.plan.feedback:
            reply = answer["choices"][0]["message"]["content"]
            await self._judge(session, answer["id"], reply, question.reference, at)

    async def _judge(
        self, session: aiohttp.ClientSession, request: str, reply: str, reference: str, at: datetime.datetime
    ) -> None:
        likeness = min(1.0, max(0.0, fuzz.ratio(reply, reference) / 100 * 3 - 1))
        negative = self.random.random() < WORST + (BEST - WORST) * likeness
        body: dict[str, Any] = {"request_id": request, "feedback_type": "negative" if negative else "positive"}
        if negative and self.random.random() < CORRECTED:
            body["expected_response"] = reference
        headers = {"X-Simulated-Time": (at + datetime.timedelta(minutes=1)).isoformat()}
        if await self._post(session, "/feedback", body, headers) is not None:
            self.counts["negative" if negative else "positive"] += 1

    async def _post(self, session: aiohttp.ClientSession, path: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
        """The answer, or null after it was refused three times."""
        for pause in (0.2, 0.5, 1.0):
            try:
                async with session.post(f"{self.plan.url}{path}", json=body, headers=headers) as answer:
                    if answer.status < 300:
                        self.counts["requests" if path != "/feedback" else "judged"] += 1
                        return await answer.json()
                    self.counts[f"status_{answer.status}"] += 1
                    if answer.status not in (429, 503):
                        return None
            except aiohttp.ClientError:
                self.counts["broken"] += 1
            await asyncio.sleep(pause)
        return None
