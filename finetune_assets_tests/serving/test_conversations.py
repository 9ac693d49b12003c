"""Conversations through the router: their arm, their turns in every worker, what is stored of them, and feedback."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from finetune_assets.corpus.sources import read_source
from finetune_assets.corpus.validation import validate
from finetune_assets.dataset.tool_calls import messages_of
from finetune_assets.environment import Environment
from finetune_assets.registry.traffic import conversations, feedback, messages, requests, shadow_replies
from finetune_assets.serving import control, keys, talks
from finetune_assets.serving import feedback as feedbacks
from finetune_assets.serving.intake import Options, conversation_id
from finetune_assets.serving.router import MOST_CHATS, Router
from finetune_assets.serving.writer import transfer
from finetune_assets_tests.serving.servers import Upstream
from finetune_assets_tests.serving.shop import Served, Shop, wait_for
from finetune_assets_tests.serving.shop import postgres as databases

pytestmark = pytest.mark.timeout(120)


def test_personal_data_never_reach_the_ledger_and_the_conversation_goes_on(served: Served, shop: Shop) -> None:
    first = served.ask("Soy Ana Pérez, mi teléfono es 70012345", user="perez")
    chat = [
        {"role": "user", "content": "Soy Ana Pérez, mi teléfono es 70012345"},
        {"role": "assistant", "content": first.json()["choices"][0]["message"]["content"]},
        {"role": "user", "content": "¿Y mañana?"},
    ]
    shop.logged(first.headers["x-request-id"])
    second = served.ask(user="perez", messages=chat)
    assert second.headers["x-conversation-id"] == first.headers["x-conversation-id"]  # found by what was said
    shop.logged(second.headers["x-request-id"])
    said = shop.rows(messages, conversation_id=first.headers["x-conversation-id"])
    assert [row["role"] for row in said] == ["user", "assistant", "user", "assistant"]
    assert not any("Pérez" in row["content"] or "70012345" in row["content"] for row in said)
    assert "[NAME]" in said[0]["content"]
    stored = shop.logged(first.headers["x-request-id"])
    assert stored["user"].startswith("u_")
    assert "perez" not in json.dumps(stored, default=str)


@pytest.mark.slow
def test_an_open_conversation_keeps_its_arm_when_the_share_grows(tmp_path: Path, upstream: Upstream) -> None:
    shop = Shop(tmp_path, upstream=upstream.url)
    first, second = shop.two_versions("10")
    user, other = shop.user_between(0.1, 0.5), shop.user_between(0.0, 0.1)
    with shop.served("--no-judge") as served:
        open_one, others = {"metadata": {"conversation_id": "c1"}}, {"metadata": {"conversation_id": "c2"}}
        assert first in served.ask(user=user, **open_one).json()["model"]
        assert second in served.ask(user=other, **others).json()["model"]
        shop.advance()
        assert wait_for(lambda: second in served.ask(user=user).json()["model"], 2)  # a new conversation
        kept = served.ask(user=user, **open_one)
        assert first in kept.json()["model"]
        assert shop.logged(kept.headers["x-request-id"])["kept"]
        same = served.ask(user=other, **others)  # its arm would be the same today: it counts as little
        assert second in same.json()["model"]
        assert shop.logged(same.headers["x-request-id"])["kept"]
        os.kill(served.children("worker")[0], signal.SIGKILL)  # what a worker remembers is in the ledger
        again = wait_for(lambda: _try(served, user, open_one), 20)
        assert first in again.json()["model"]
        assert shop.logged(again.headers["x-request-id"])["kept"]
        with shop.ledger() as book:
            control.rollback(book, "aurora", "test", "test")
        assert wait_for(lambda: first in served.ask(user=other).json()["model"], 1)


def _try(served: Served, user: str, more: dict[str, Any]) -> httpx.Response | None:
    try:
        answer = served.ask(user=user, **more)
    except httpx.HTTPError:
        return None
    return answer if answer.status_code == 200 else None


def test_feedback_is_kept_and_the_unknown_is_named(served: Served, shop: Shop) -> None:
    answer = served.ask(user="leo")
    sent = {"request_id": answer.json()["id"], "feedback_type": "negative", "rating": 2, "expected_response": "Sí, a las diez."}
    reply = served.client.post("/feedback", json=sent)
    assert reply.status_code == 202
    stored = wait_for(lambda: shop.rows(feedback, feedback_id=reply.json()["feedback_id"]))[0]
    assert (stored["message_id"], stored["rating"], stored["expected_response"]) == (
        f"m-{answer.json()['id']}",
        2,
        "Sí, a las diez.",
    )
    assert served.client.post("/feedback", json={**sent, "request_id": "nobody"}).status_code == 404
    assert served.client.post("/feedback", json={**sent, "rating": 6}).status_code == 400


def test_the_platforms_chat_remembers_what_was_said(served: Served, upstream: Upstream) -> None:
    first = served.client.post("/chat", json={"user_id": "eva", "message": "Hola"}).json()
    assert set(first) == {"response", "user_id", "conversation_id", "request_id", "action", "params"}
    time.sleep(0.3)  # the other worker reads it from the ledger
    for _ in range(4):
        more = {"user_id": "eva", "message": "¿Y mañana?", "conversation_id": first["conversation_id"]}
        assert served.client.post("/chat", json=more).status_code == 200
        assert upstream.seen[-1]["messages"][0]["content"] == "Hola"
    other = {"user_id": "otro", "message": "¿Qué dijo?", "conversation_id": first["conversation_id"]}
    assert served.client.post("/chat", json=other).status_code == 403
    upstream.faults["aurora"] = 'say:{"action": "book", "params": {"day": "lunes"}}'
    called = served.client.post("/chat", json={"user_id": "eva", "message": "Resérvame"}).json()
    assert (called["action"], called["params"]) == ("book", {"day": "lunes"})


def test_every_turn_is_known_to_whichever_worker_answers_next(served: Served, shop: Shop, upstream: Upstream) -> None:
    """A connection a turn, so that both workers meet the conversation; each turn waits until the last one is in the ledger."""
    talk = {"user_id": "inés", "conversation_id": "conv-turns"}
    for turn in range(8):
        answer = httpx.post(f"{served.url}/chat", json={**talk, "message": f"turno {turn}"}, trust_env=False)
        assert answer.status_code == 200
        asked = [m["content"] for m in upstream.seen[-1]["messages"] if m["role"] == "user"]
        assert asked == [f"turno {n}" for n in range(turn + 1)]
        shop.logged(answer.json()["request_id"])


async def _in_process(shop: Shop, ask: Callable[[httpx.AsyncClient, list[str]], Awaitable[None]], **client: Any) -> None:
    """A router of two workers, this one of them; the list holds the SELECTs that it sends from now on."""
    router = Router(Environment.read(shop.environment), Options("", open_door=True, workers=2))
    sent: list[str] = []

    def saw(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    async with router._lifespan(router.app):
        sa.event.listen(router.ledger.engine, "before_cursor_execute", saw)
        transport = httpx.ASGITransport(app=router)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", **client) as made:
            await ask(made, sent)


def test_a_turn_of_an_open_conversation_asks_the_ledger_once(fresh: Shop) -> None:
    counts: list[int] = []

    async def turns(client: httpx.AsyncClient, sent: list[str]) -> None:
        chat = {"user_id": "eva", "message": "Hola", "conversation_id": "c1"}
        openai_shaped = {"model": "aurora", "user": "eva", "metadata": {"conversation_id": "c1"}}
        openai_shaped["messages"] = [{"role": "user", "content": "Hola"}]
        for path, body in (("/chat", chat), ("/chat", chat), ("/v1/chat/completions", openai_shaped)):
            sent.clear()
            assert (await client.post(path, json=body)).status_code == 200
            counts.append(sum("FROM requests" in one for one in sent))

    asyncio.run(_in_process(fresh, turns))
    assert counts == [2, 1, 1]  # the first looks for one that began under an id without its tenant


def test_a_conversation_from_before_ids_were_their_tenants_goes_on(fresh: Shop, upstream: Upstream) -> None:
    """Its owner's, with what was said; who names another's like that begins a new one."""
    said: list[int] = []

    async def begin(client: httpx.AsyncClient, _: list[str]) -> None:
        await client.post("/chat", json={"user_id": "eva", "message": "Hola", "conversation_id": "7"})

    async def ask(client: httpx.AsyncClient, _: list[str]) -> None:
        for user in ("eva", "otro"):
            answer = await client.post("/chat", json={"user_id": user, "message": "Hola", "conversation_id": "7"})
            assert answer.json()["conversation_id"] == "7"
            said.append(len(upstream.seen[-1]["messages"]))

    asyncio.run(_in_process(fresh, begin))
    with fresh.ledger() as book:
        transfer(fresh.home / "serving" / "journal", book.engine)
        with book.engine.begin() as connection:
            for table in (requests, messages):
                connection.execute(sa.update(table).values(conversation_id="7"))
    asyncio.run(_in_process(fresh, ask))
    assert said == [3, 1]
    with fresh.ledger() as book:
        transfer(fresh.home / "serving" / "journal", book.engine)
    assert sorted(row["conversation_id"] for row in fresh.rows(requests)) == ["7", "7", "clinica_aurora/7"]


def test_a_tenants_slash_is_not_the_one_that_ends_it() -> None:
    assert conversation_id("a/b", "c") != conversation_id("a", "b/c")
    assert conversation_id("clínica", "c/1") == "clínica/c/1"


def test_where_no_texts_are_kept_an_upstreams_words_are_none(fresh: Shop, upstream: Upstream) -> None:
    """They may quote the prompt. What is left of an error is its kind."""
    file = fresh.assistants / "aurora.yaml"
    file.write_text(file.read_text().replace("serving: {", "serving: {texts: none, "))

    async def ask(client: httpx.AsyncClient, _: list[str]) -> None:
        body: dict[str, Any] = {"model": "aurora", "messages": [{"role": "user", "content": "Soy alérgica"}]}
        for fault in ("status:500:you said: Soy alérgica", "status:400:too long: Soy alérgica", "shapeless"):
            upstream.faults["aurora"] = fault
            assert (await client.post("/v1/chat/completions", json=body)).status_code in (400, 502)
        upstream.shapes["aurora"], upstream.faults["aurora"] = '{"error": {"message": "Soy alérgica"}}', ""
        assert (await client.post("/v1/chat/completions", json={**body, "stream": True})).status_code == 502

    asyncio.run(_in_process(fresh, ask))
    with fresh.ledger() as book:
        transfer(fresh.home / "serving" / "journal", book.engine)
    said = [row["error"] for row in sorted(fresh.rows(requests), key=lambda row: row["created_at"])]
    assert said == ["HTTP 500", "HTTP 400", "AttributeError", "an error inside the stream"]
    assert fresh.rows(messages) == []


def test_control_characters_of_an_upstream_cost_no_row(tmp_path: Path, upstream: Upstream, postgres: str) -> None:
    """Postgres takes no NUL: in a reply, live or a shadow's, a channel or a tenant. A chat goes on after such a reply."""
    shop = Shop(tmp_path, upstream=upstream.url, database=postgres)
    shop.two_versions("shadow")
    upstream.faults["aurora"] = "say:Sí,\u0000 a las\ud83d diez"
    ids: list[str] = []

    async def ask(client: httpx.AsyncClient, _: list[str]) -> None:
        metadata = {"channel": "we\u0000b", "tenant_id": "clinica\u0000_aurora"}
        body: dict[str, Any] = {"model": "aurora", "user": "eva", "metadata": metadata}
        body["messages"] = [{"role": "user", "content": "¿Hay hora?"}]
        answer = await client.post("/v1/chat/completions", json=body)
        body["messages"] += [answer.json()["choices"][0]["message"], {"role": "user", "content": "¿Y mañana?"}]
        ids.extend([answer.headers["x-conversation-id"]])
        ids.append((await client.post("/v1/chat/completions", content=json.dumps(body))).headers["x-conversation-id"])
        await asyncio.sleep(0.2)  # the shadows

    asyncio.run(_in_process(shop, ask))
    with shop.ledger() as book:
        transfer(shop.home / "serving" / "journal", book.engine)
    assert not (shop.home / "serving" / "journal" / "refused").exists()
    assert len(set(ids)) == 1
    said = shop.values(messages, "content", role="assistant"), shop.values(shadow_replies, "content")
    assert said == ({"Sí, a las\ufffd diez"},) * 2
    assert shop.values(conversations, "channel") == {"web"}
    assert shop.values(requests, "tenant_id") == {"clinica_aurora"}


def test_a_ledger_that_cannot_be_asked_is_a_503_and_holds_no_place(fresh: Shop) -> None:
    said: list[tuple[int, str | None]] = []

    async def ask(client: httpx.AsyncClient, _: list[str]) -> None:
        with fresh.ledger() as book, book.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE requests RENAME TO away")
        for _ in range(MOST_CHATS + 1):
            answer = await client.post("/chat", json={"user_id": "eva", "message": "Hola", "conversation_id": "c1"})
            said.append((answer.status_code, answer.headers.get("retry-after")))

    asyncio.run(_in_process(fresh, ask))
    assert set(said) == {(503, "1")}


def _signalled(parent: int, number: int) -> list[int]:
    """A process and its children, each of which got a signal; the parent first, so that there are no new ones."""
    os.kill(parent, number)
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [parent, *(one for child in children for one in _signalled(int(child), number))]


def test_a_ledger_that_hangs_is_a_503_in_time(tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen machine: it neither answers nor breaks the connection. Who needs no look-up is answered; afterwards, everybody."""
    monkeypatch.setattr(talks, "LOOK_SECONDS", 0.5)
    said: list[int] = []

    async def ask(client: httpx.AsyncClient, _: list[str]) -> None:
        body: dict[str, Any] = {"model": "aurora", "user": "eva", "messages": [{"role": "user", "content": "Hola"}]}
        named = {**body, "metadata": {"conversation_id": "c1"}}
        request = (await client.post("/v1/chat/completions", json=named)).json()["id"]
        server = _signalled(postmaster, signal.SIGSTOP)
        try:
            async with asyncio.timeout(10):
                chats = [client.post("/v1/chat/completions", json=named) for _ in range(20)]  # more than there are threads
                answers = await asyncio.gather(*chats)
                said.extend({answer.status_code for answer in answers})
                judged = {"request_id": request, "feedback_type": "positive"}
                said.append((await client.post("/feedback", json=judged)).status_code)
                said.append((await client.post("/v1/chat/completions", json=body)).status_code)
        finally:
            for pid in server:
                os.kill(pid, signal.SIGCONT)
        said.append((await client.post("/v1/chat/completions", json=named)).status_code)

    with databases() as (url, running):
        shop = Shop(tmp_path, upstream=upstream.url, database=url)
        shop.version("a")
        postmaster = int((Path(running.pgdata) / "postmaster.pid").read_text().split()[0])
        asyncio.run(_in_process(shop, ask))
    assert said == [503, 503, 200, 200]


def test_judgements_have_the_limits_of_chats(fresh: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant's own, and so many at a time."""
    file = fresh.assistants / "aurora.yaml"
    file.write_text(file.read_text().replace("serving: {", "serving: {requests_per_minute: 10, "))
    monkeypatch.setattr(feedbacks, "LOOK_AGAIN", (0.05,))
    monkeypatch.setattr(feedbacks, "MOST_AT_ONCE", 3)
    said: list[int] = []

    async def ask(client: httpx.AsyncClient, _: list[str]) -> None:
        body = {"request_id": "nobody", "feedback_type": "negative"}
        answers = [await client.post("/feedback", json=body) for _ in range(6)]
        answers += await asyncio.gather(*(client.post("/feedback", json=body) for _ in range(5)))
        said.extend(answer.status_code for answer in answers)
        chat = {"model": "aurora", "user": "eva", "messages": [{"role": "user", "content": "Hola"}]}
        assert (await client.post("/v1/chat/completions", json=chat)).status_code == 200

    asyncio.run(_in_process(fresh, ask))  # without keys
    assert sorted(said) == [404] * 9 + [429] * 2
    with fresh.ledger() as book:
        key = keys.add(book, "clinica_aurora")
    said.clear()
    asyncio.run(_in_process(fresh, ask, headers={"Authorization": f"Bearer {key}"}))
    assert said[:6] == [404] * 5 + [429]  # one of two workers


def test_a_client_that_names_nobody_has_one_conversation_and_takes_nobody_elses(fresh: Shop, upstream: Upstream) -> None:
    """Two strangers and a named user say the same and hear the same; then the strangers go on at once, in another worker."""
    first: list[dict[str, Any]] = [{"role": "user", "content": "Hola"}]
    went: dict[str, list[str]] = {"one": [], "two": [], "ana": [], "late": []}

    async def turn(client: httpx.AsyncClient, who: str, said: list[dict[str, Any]]) -> list[dict[str, Any]]:
        body = {"model": "aurora", "messages": said, **({"user": "ana"} if who == "ana" else {})}
        answer = await client.post("/v1/chat/completions", json=body)
        went[who].append(answer.headers["x-conversation-id"])
        return [*said, answer.json()["choices"][0]["message"], {"role": "user", "content": "¿Y mañana?"}]

    async def begin(client: httpx.AsyncClient, _: list[str]) -> None:
        assert await turn(client, "one", first) == await turn(client, "two", first) == await turn(client, "ana", first)

    async def go_on(client: httpx.AsyncClient, _: list[str]) -> None:
        second = [*first, {"role": "assistant", "content": fresh.rows(messages, role="assistant")[0]["content"]}, *first]
        upstream.faults["aurora"] = "error"
        assert (await client.post("/v1/chat/completions", json={"model": "aurora", "messages": second})).status_code == 502
        upstream.faults.clear()
        third, _same = await asyncio.gather(turn(client, "one", second), turn(client, "two", second))
        await turn(client, "late", second)
        await turn(client, "ana", second)
        await turn(client, "one", third)

    for ask in (begin, go_on):
        asyncio.run(_in_process(fresh, ask))
        with fresh.ledger() as book:
            transfer(fresh.home / "serving" / "journal", book.engine)
    begun = {went["one"][0], went["two"][0]}
    assert {went["one"][1], went["two"][1]} == begun  # which beginning is whose nobody can tell
    assert went["one"][2] in begun | set(went["late"])  # now three stand there
    assert went["ana"][0] == went["ana"][1]
    assert len({*begun, went["ana"][0], went["late"][0]}) == 4
    assert len(fresh.values(requests, "user")) == 4
    assert len(fresh.rows(conversations)) == 4
    assert len(fresh.rows(messages)) == 2 * (3 + 4 + 1 + 1)  # with what was said before, of the late one


def test_calls_of_tools_and_their_answers_are_rows_that_the_corpus_reads(fresh: Shop, upstream: Upstream) -> None:
    """Whole and streamed; found by what was said; with a correction. One that broke off in a call is none."""
    call = {"id": "c1", "type": "function", "function": {"name": "free", "arguments": '{"phone": "70012345"}'}}
    calls = [call, {**call, "id": "c2", "function": {"name": "price", "arguments": "{}"}}]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    answers = [{"role": "tool", "tool_call_id": one, "content": text} for one, text in (("c1", "10:30"), ("c2", "Bs 200"))]
    tools = [{"type": "function", "function": {"name": one}} for one in ("free", "price", "book")]
    body: dict[str, Any] = {"model": "aurora", "user": "tina", "tools": tools}
    ids: list[str] = []

    async def ask(client: httpx.AsyncClient, _: list[str]) -> None:
        said: list[dict[str, Any]] = [{"role": "user", "content": "Quiero una limpieza"}]
        upstream.shapes["aurora"] = json.dumps({"choices": [{"message": message, "finish_reason": "tool_calls"}]})
        called = await client.post("/v1/chat/completions", json={**body, "messages": said})
        upstream.shapes.clear()
        said += [called.json()["choices"][0]["message"], *answers]
        told = await client.post("/v1/chat/completions", json={**body, "messages": said})
        said += [told.json()["choices"][0]["message"], {"role": "user", "content": "Resérvela"}]
        upstream.faults["aurora"] = "tool"
        booked = await client.post("/v1/chat/completions", json={**body, "messages": said, "stream": True})
        upstream.faults["aurora"] = "toolcut"
        await client.post("/v1/chat/completions", json={**body, "messages": said, "stream": True})
        ids.extend(answer.headers["x-conversation-id"] for answer in (called, told, booked))
        await asyncio.sleep(0.2)
        with fresh.ledger() as book:
            transfer(fresh.home / "serving" / "journal", book.engine)
        judged = {"request_id": called.json()["id"], "feedback_type": "negative", "expected_response": "¿Para qué día?"}
        assert (await client.post("/feedback", json=judged)).status_code == 202

    asyncio.run(_in_process(fresh, ask))
    with fresh.ledger() as book:
        transfer(fresh.home / "serving" / "journal", book.engine)
    assert len(set(ids)) == 1
    valid = validate(read_source([fresh.url]))
    assert len(valid.rejected) == 0
    rows = valid.messages.sort("created_at").select("role", "content").rows()
    said = messages_of(rows)
    assert [one["role"] for one in said] == ["user", "assistant", "tool", "tool", "assistant", "user", "assistant"]
    assert [one["function"]["name"] for one in said[1]["tool_calls"]] == ["free", "price"]
    assert json.loads(said[1]["tool_calls"][0]["function"]["arguments"]) == {"phone": "[PHONE]"}
    assert [(one["name"], one["content"]) for one in said[2:4]] == [("free", "10:30"), ("price", "Bs 200")]
    assert [one["function"]["name"] for one in said[-1]["tool_calls"]] == ["book"]
    assert set(valid.feedback["message_id"]) <= set(valid.messages["message_id"])
