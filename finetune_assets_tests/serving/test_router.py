"""The router as a real process on real sockets, in front of an upstream whose faults a test chooses."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import sqlalchemy as sa

from finetune_assets.environment import Environment
from finetune_assets.registry.traffic import conversations, feedback, messages, requests, shadow_replies
from finetune_assets.serving import control, keys
from finetune_assets.serving.assignment import assign
from finetune_assets.serving.intake import Options
from finetune_assets.serving.observed import observe
from finetune_assets.serving.router import MOST_CHATS, Router
from finetune_assets_tests.serving.shop import Served, Shop, Upstream, wait_for

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    made = Upstream()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def healthy(upstream: Upstream) -> None:
    upstream.faults.clear()
    upstream.shapes.clear()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Shop:
    """Two versions; the first is champion, the second at 50 %. Nothing judges but the tests."""
    made = Shop(tmp_path_factory.mktemp("shop"), upstream=upstream.url)
    first, second = made.version("a"), made.version("b")
    made.roll_out(first, "done")
    made.roll_out(second, "50")
    return made


@pytest.fixture(scope="module")
def served(shop: Shop) -> Iterator[Served]:
    with shop.served("--no-judge", "--workers", "2") as running:
        yield running


def rows(shop: Shop, table: sa.Table, **where: Any) -> list[dict[str, Any]]:
    query = sa.select(table).where(*(table.c[name] == value for name, value in where.items()))
    with shop.ledger() as book, book.engine.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def logged(shop: Shop, request_id: str) -> dict[str, Any]:
    return wait_for(lambda: rows(shop, requests, request_id=request_id))[0]


def user_of(shop: Shop, arm: str) -> str:
    """A user who is assigned this arm."""
    with shop.ledger() as book:
        state = book.rollout("aurora")
    return next(f"u{n}" for n in range(1000) if assign(state, "clinica_aurora", f"u{n}").name == arm)


def test_the_openai_client_and_curl_work_unchanged(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    whole = client.chat.completions.create(model="aurora", messages=[{"role": "user", "content": "Hola"}], user="ana")
    assert whole.choices[0].message.content == f"{whole.model} oye: Hola"
    assert whole.usage
    assert whole.usage.total_tokens == 12
    parts = client.chat.completions.create(
        model="aurora", messages=[{"role": "user", "content": "Hola"}], user="ana", stream=True
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    assert [model.id for model in client.models.list()] == ["aurora"]
    client.close()
    body = json.dumps({"model": "aurora", "messages": [{"role": "user", "content": "Hola"}]})
    curl = [
        "curl",
        "-s",
        "--noproxy",
        "*",
        f"{served.url}/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    answer = json.loads(subprocess.run(curl, capture_output=True, check=True).stdout)
    assert answer["choices"][0]["message"]["content"].endswith("oye: Hola")


def test_a_user_keeps_the_arm_and_both_workers_agree(served: Served, shop: Shop) -> None:
    for arm, version in (("candidate", "v2"), ("champion", "v1")):
        user = user_of(shop, arm)
        with ThreadPoolExecutor(8) as pool:
            models = set(
                pool.map(
                    lambda _, user=user: httpx.post(
                        f"{served.url}/v1/chat/completions",
                        json={"model": "aurora", "user": user, "messages": [{"role": "user", "content": "Hola"}]},
                        trust_env=False,
                    ).json()["model"],
                    range(24),
                )
            )
        assert len(models) == 1
        assert version in models.pop()


@pytest.mark.parametrize("fault", ["error", "half", "hang", "shapeless"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_champion_answers_where_the_candidate_fails(
    served: Served, shop: Shop, upstream: Upstream, fault: str, stream: bool
) -> None:
    if fault == "half" and not stream:
        pytest.skip("half a stream is a stream")
    upstream.faults["v2-"] = fault
    answer = served.ask(user=user_of(shop, "candidate"), stream=stream)
    if fault == "half":  # the user has seen its beginning: it is told, not glued to another reply
        assert "the reply was cut off" in answer.text
        row = logged(shop, answer.headers["x-request-id"])
        assert (row["assigned_arm"], row["served_arm"], row["outcome"]) == ("candidate", "candidate", "error")
        return
    assert answer.status_code == 200
    assert "v1-aaaaaaaa" in answer.text
    row = logged(shop, answer.headers["x-request-id"])
    outcome = "timeout" if fault == "hang" else "error"
    assert (row["assigned_arm"], row["served_arm"], row["outcome"], row["version"]) == (
        "candidate",
        "champion",
        outcome,
        "v1-aaaaaaaa",
    )


@pytest.mark.parametrize("fault", ["half", "hang", "error"])
@pytest.mark.parametrize("failing", ["v2-", "aurora"])
def test_a_stream_that_breaks_behind_its_role_has_not_begun(
    served: Served, shop: Shop, upstream: Upstream, fault: str, failing: str
) -> None:
    """Headers and events are the champion's alone; where it fails too, or is the only arm, the client gets a status."""
    upstream.faults[failing] = f"begun:{fault}"
    if failing == "v2-":
        answer = served.ask(user=user_of(shop, "candidate"), stream=True)
        assert answer.status_code == 200
        assert answer.headers["x-model-version"] == "aurora--v1-aaaaaaaa"
        assert answer.text.count('"role"') == 1
        assert "v2-" not in answer.text
        assert "[DONE]" in answer.text
        row = logged(shop, answer.headers["x-request-id"])
        outcome = "timeout" if fault == "hang" else "error"
        assert (row["served_arm"], row["outcome"]) == ("champion", outcome)
        return
    for user in (user_of(shop, "candidate"), user_of(shop, "champion")):
        answer = served.ask(user=user, stream=True)
        assert answer.status_code == (504 if fault == "hang" else 502)
        assert "could not answer" in answer.json()["error"]["message"]
    assert not any("Traceback" in line for line in served.lines)


TAKEN = [
    '{"choices": [{"message": {"content": "v2 says"}}], "usage": [5]}',
    '{"choices": [{"message": {"content": "v2 says"}}], "usage": {"prompt_tokens": null, "completion_tokens": "many"}}',
    '{"choices": [{"message": {"content": "v2 says"}}], "usage": {"prompt_tokens": 1.5, "completion_tokens": -1}}',
    '{"choices": [{"message": {"content": "v2 says", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}}]}',
]
NO_REPLY = [
    '{"choices": [{"message": {"content": ' + "[" * 100_000 + "]" * 100_000 + "}}]}",
    '{"choices": [{"message": {"content": "v2 says", "tool_calls": ["f"]}}]}',
    '{"choices": [{"message": {"content": "v2 says", "tool_calls": [{"function": "f"}]}}]}',
    '{"choices": [{"message": {"content": "v2 says", "tool_calls": {"f": 1}}}]}',
]


@pytest.mark.parametrize("way", ["whole", "stream", "chat"])
@pytest.mark.parametrize("number", range(len(TAKEN) + len(NO_REPLY)))
def test_a_reply_of_an_odd_shape_is_mended_or_is_none(
    served: Served, shop: Shop, upstream: Upstream, number: int, way: str
) -> None:
    upstream.shapes["v2-"] = [*TAKEN, *NO_REPLY][number]
    user = user_of(shop, "candidate")
    if way == "chat":
        answer = served.client.post("/chat", json={"user_id": user, "message": "Hola"})
    else:
        answer = served.ask(user=user, stream=way == "stream")
    assert answer.status_code == 200
    taken = number < len(TAKEN)
    assert ("v2 says" in answer.text) is taken
    row = logged(shop, answer.headers["x-request-id"])
    assert (row["served_arm"], row["outcome"]) == (("candidate", "ok") if taken else ("champion", "error"))
    assert not taken or (row["prompt_tokens"], row["completion_tokens"]) == (None, None)
    if way == "chat" and "arguments" in upstream.shapes["v2-"]:
        assert (answer.json()["action"], answer.json()["params"]) == ("f", {"a": 1})


def test_an_empty_stream_is_passed_on_whole(served: Served, shop: Shop, upstream: Upstream) -> None:
    upstream.faults["v1-"] = "empty"
    answer = served.ask(user=user_of(shop, "champion"), stream=True)
    assert answer.text.count('"role"') == 1
    assert '"finish_reason":"stop"' in answer.text
    assert logged(shop, answer.headers["x-request-id"])["outcome"] == "policy"


def test_a_client_that_leaves_the_champion_does_not_excuse_the_candidate(served: Served, shop: Shop, upstream: Upstream) -> None:
    upstream.faults |= {"v2-": "error", "v1-": "slow"}
    body = {"model": "aurora", "stream": True, "user": user_of(shop, "candidate")}
    body["messages"] = [{"role": "user", "content": " ".join(["hola"] * 15)}]
    with served.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert next(answer.iter_lines()).startswith("data:")
    row = logged(shop, answer.headers["x-request-id"])
    assert (row["served_arm"], row["outcome"]) == ("champion", "error")


def test_what_no_arm_can_answer_is_said_in_openais_shape(served: Served, shop: Shop, upstream: Upstream) -> None:
    upstream.faults["aurora"] = "error"
    answer = served.ask(user=user_of(shop, "candidate"))
    assert answer.status_code == 502
    assert "could not answer" in answer.json()["error"]["message"]
    upstream.faults["aurora"] = "busy"
    answer = served.ask(user=user_of(shop, "champion"))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


def test_a_streamed_tool_call_is_a_reply(served: Served, shop: Shop, upstream: Upstream) -> None:
    """Not an empty one; and once a piece of it has been sent, nobody else answers behind it."""
    user = user_of(shop, "candidate")
    upstream.faults["v2-"] = "tool"
    called = served.ask(user=user, stream=True)
    assert called.text.count('"tool_calls"') == 2
    row = logged(shop, called.headers["x-request-id"])
    assert (row["outcome"], row["served_arm"]) == ("ok", "candidate")
    assert row["first_token_seconds"] is not None
    upstream.faults["v2-"] = "toolcut"
    cut = served.ask(user=user, stream=True)
    assert "the reply was cut off" in cut.text
    assert "v1-" not in cut.text
    row = logged(shop, cut.headers["x-request-id"])
    assert (row["outcome"], row["served_arm"]) == ("error", "candidate")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_no_model_takes_is_the_clients_and_counts_against_no_arm(
    served: Served, shop: Shop, upstream: Upstream, stream: bool
) -> None:
    """Asked of both arms: the candidate's no is believed where the champion says it too."""
    user = user_of(shop, "candidate")
    upstream.faults["aurora"] = "status:400:This model's maximum context length is 4096 tokens."
    answer = served.ask(user=user, stream=stream)
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "This model's maximum context length is 4096 tokens.",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    with client, pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="aurora", messages=[{"role": "user", "content": "Hola"}], user=user)
    assert refused.value.code == "context_length_exceeded"
    found = wait_for(lambda: rows(shop, requests, outcome="refused"))
    assert {(row["status"], row["assigned_arm"]) for row in found} == {(400, "candidate")}
    with shop.ledger() as book:
        counted = observe(book, book.rollout("aurora")).candidate.requests
    logged_all = rows(shop, requests, assigned_arm="candidate", step="50", kept=False)
    assert counted == sum(row["outcome"] != "refused" for row in logged_all) < len(logged_all)


def test_what_the_candidate_refuses_and_the_champion_takes_is_the_candidates_fault(
    served: Served, shop: Shop, upstream: Upstream
) -> None:
    upstream.faults["v2-"] = "status:422:too long; the user said 70012345"
    answer = served.ask(user=user_of(shop, "candidate"))
    assert answer.status_code == 200
    row = logged(shop, answer.headers["x-request-id"])
    assert (row["outcome"], row["served_arm"]) == ("error", "champion")
    assert "too long" in row["error"]
    assert "70012345" not in row["error"]


@pytest.mark.parametrize("status", [401, 403, 404, 405, 503])
def test_an_upstreams_own_trouble_is_no_clients(served: Served, shop: Shop, upstream: Upstream, status: int) -> None:
    upstream.faults["aurora"] = f"status:{status}:Incorrect API key provided: sk-abcdefghijklmnopqrstuvwx"
    answer = served.ask(user=user_of(shop, "champion"))
    assert answer.status_code == 502
    assert "sk-abc" not in answer.text
    row = wait_for(lambda: [r for r in rows(shop, requests, status=502) if f"HTTP {status}" in (r["error"] or "")])[0]
    assert row["outcome"] == "error"
    assert "sk-abc" not in row["error"]


def test_forbidden_words_and_empty_replies_are_policy_violations(served: Served, shop: Shop, upstream: Upstream) -> None:
    user = user_of(shop, "candidate")
    upstream.faults["v2-"] = "say:Toma amoxicilina"
    assert logged(shop, served.ask(user=user).headers["x-request-id"])["outcome"] == "policy"
    upstream.faults["v2-"] = "empty"
    assert logged(shop, served.ask(user=user).headers["x-request-id"])["outcome"] == "policy"


def test_personal_data_never_reach_the_ledger_and_the_conversation_goes_on(served: Served, shop: Shop) -> None:
    first = served.ask("Soy Ana Pérez, mi teléfono es 70012345", user="perez")
    chat = [
        {"role": "user", "content": "Soy Ana Pérez, mi teléfono es 70012345"},
        {"role": "assistant", "content": first.json()["choices"][0]["message"]["content"]},
        {"role": "user", "content": "¿Y mañana?"},
    ]
    logged(shop, first.headers["x-request-id"])
    second = served.ask(user="perez", messages=chat)
    assert second.headers["x-conversation-id"] == first.headers["x-conversation-id"]  # found by what was said
    logged(shop, second.headers["x-request-id"])
    said = rows(shop, messages, conversation_id=first.headers["x-conversation-id"])
    assert [row["role"] for row in said] == ["user", "assistant", "user", "assistant"]
    assert not any("Pérez" in row["content"] or "70012345" in row["content"] for row in said)
    assert "[NAME]" in said[0]["content"]
    stored = logged(shop, first.headers["x-request-id"])
    assert stored["user"].startswith("u_")
    assert "perez" not in json.dumps(stored, default=str)


@pytest.mark.slow
def test_an_open_conversation_keeps_its_arm_when_the_share_grows(tmp_path: Path, upstream: Upstream) -> None:
    shop = Shop(tmp_path, upstream=upstream.url)
    first, second = shop.version("a"), shop.version("b")
    shop.roll_out(first, "done")
    shop.roll_out(second, "10")
    with shop.ledger() as book:
        state = book.rollout("aurora")
    user = next(f"u{n}" for n in range(999) if assign(state, "clinica_aurora", f"u{n}").name == "champion")
    user = next(u for u in (f"u{n}" for n in range(999)) if 0.1 < _place(state, u) < 0.5)
    with shop.served("--no-judge") as served:
        open_one = {"metadata": {"conversation_id": "c1"}}
        assert first in served.ask(user=user, **open_one).json()["model"]
        with shop.ledger() as book:
            control.advance(book, "aurora", _settings(shop), "test", "test")
        assert wait_for(lambda: second in served.ask(user=user).json()["model"], 2)  # a new conversation
        kept = served.ask(user=user, **open_one)
        assert first in kept.json()["model"]
        assert logged(shop, kept.headers["x-request-id"])["kept"]
        os.kill(served.children("worker")[0], signal.SIGKILL)  # what a worker remembers is in the ledger
        again = wait_for(lambda: _try(served, user, open_one), 20)
        assert first in again.json()["model"]
        with shop.ledger() as book:
            control.rollback(book, "aurora", "test", "test")
        start = time.monotonic()
        other = next(u for u in (f"u{n}" for n in range(999)) if _place(state, u) < 0.1)
        assert wait_for(lambda: first in served.ask(user=other).json()["model"], 3)
        assert time.monotonic() - start < 1.0


def _place(state: Any, user: str) -> float:
    from finetune_assets.serving.assignment import place

    return place(state.salt, "clinica_aurora", user)


def _settings(shop: Shop) -> Any:
    from finetune_assets.assistants import load_assistant

    return load_assistant(shop.assistants, "aurora", {}).rollout


def _try(served: Served, user: str, more: dict[str, Any]) -> httpx.Response | None:
    try:
        answer = served.ask(user=user, **more)
    except httpx.HTTPError:
        return None
    return answer if answer.status_code == 200 else None


def test_shadow_answers_unseen_and_never_harms(tmp_path: Path, upstream: Upstream) -> None:
    shop = Shop(tmp_path, upstream=upstream.url)
    version = shop.version("a")
    shop.roll_out(version, "shadow")
    with shop.served("--no-judge") as served:
        answer = served.ask("Soy Ana Pérez")
        assert answer.json()["model"] == "aurora--base"
        shadow = wait_for(lambda: rows(shop, requests, kind="shadow"))[0]
        assert (shadow["request_id"], shadow["version"]) == (f"shadow-{answer.headers['x-request-id']}", version)
        made = rows(shop, shadow_replies)[0]
        assert version in made["content"]
        assert "Pérez" not in made["content"]
        upstream.faults[version] = "hang"
        start = time.monotonic()
        assert served.ask().status_code == 200
        assert time.monotonic() - start < 1
        assert wait_for(lambda: [r for r in rows(shop, requests, kind="shadow") if r["outcome"] == "timeout"], 8)


def test_feedback_is_kept_and_the_unknown_is_named(served: Served, shop: Shop) -> None:
    answer = served.ask(user="leo")
    sent = {"request_id": answer.json()["id"], "feedback_type": "negative", "rating": 2, "expected_response": "Sí, a las diez."}
    reply = served.client.post("/feedback", json=sent)
    assert reply.status_code == 202
    stored = wait_for(lambda: rows(shop, feedback, feedback_id=reply.json()["feedback_id"]))[0]
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
        logged(shop, answer.json()["request_id"])


async def _in_process(shop: Shop, ask: Callable[[httpx.AsyncClient, list[str]], Awaitable[None]]) -> None:
    """A router of two workers, this one of them; the list holds the SELECTs that it sends from now on."""
    router = Router(Environment.read(shop.environment), Options("", open_door=True, workers=2))
    sent: list[str] = []

    def saw(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    async with router._lifespan(router.app):
        sa.event.listen(router.ledger.engine, "before_cursor_execute", saw)
        transport = httpx.ASGITransport(app=router)
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            await ask(client, sent)


def test_a_turn_of_an_open_conversation_asks_the_ledger_once(tmp_path: Path, upstream: Upstream) -> None:
    shop = Shop(tmp_path, upstream=upstream.url)
    shop.version("a")
    counts: list[int] = []

    async def turns(client: httpx.AsyncClient, sent: list[str]) -> None:
        chat = {"user_id": "eva", "message": "Hola", "conversation_id": "c1"}
        openai_shaped = {"model": "aurora", "user": "eva", "metadata": {"conversation_id": "c1"}}
        openai_shaped["messages"] = [{"role": "user", "content": "Hola"}]
        for path, body in (("/chat", chat), ("/chat", chat), ("/v1/chat/completions", openai_shaped)):
            sent.clear()
            assert (await client.post(path, json=body)).status_code == 200
            counts.append(sum("FROM requests" in one for one in sent))

    asyncio.run(_in_process(shop, turns))
    assert counts == [1, 1, 1]


def test_a_ledger_that_cannot_be_asked_is_a_503_and_holds_no_place(tmp_path: Path, upstream: Upstream) -> None:
    shop = Shop(tmp_path, upstream=upstream.url)
    shop.version("a")
    said: list[tuple[int, str | None]] = []

    async def ask(client: httpx.AsyncClient, _: list[str]) -> None:
        with shop.ledger() as book, book.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE requests RENAME TO away")
        for _ in range(MOST_CHATS + 1):
            answer = await client.post("/chat", json={"user_id": "eva", "message": "Hola", "conversation_id": "c1"})
            said.append((answer.status_code, answer.headers.get("retry-after")))

    asyncio.run(_in_process(shop, ask))
    assert set(said) == {(503, "1")}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b'{"model": "aurora"}', 400),
        (b'{"model": "aurora", "messages": []}', 400),
        (b'{"model": "aurora", "messages": [{"role": "boss", "content": "x"}]}', 400),
        (b'{"model": "aurora", "messages": [{"role": "user", "content": 7}]}', 400),
        (b'{"model": "aurora", "messages": [{"role": "user", "content": "x"}], "temperature": "hot"}', 400),
        (b'{"model": "aurora", "messages": [{"role": "user", "content": "x"}], "stop": [1]}', 400),
        (b'{"model": ["aurora"], "messages": [{"role": "user", "content": "x"}], "assistant": "nobody"}', 404),
        (b'{"model": "aurora", "user": {"a": 1}, "messages": [{"role": "user", "content": "x"}]}', 400),
        (b"x" * (10 << 20), 413),
    ],
)
def test_bad_bodies_are_refused_with_a_reason(served: Served, body: bytes, status: int) -> None:
    try:
        answer = httpx.post(f"{served.url}/v1/chat/completions", content=body, trust_env=False, timeout=20)
    except httpx.WriteError:  # the router has answered and hung up before ten megabytes were sent
        assert status == 413
        return
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/chat", 405), ("POST", "/v1/models", 405)]
)
def test_what_there_is_not_is_said_in_openais_shape(served: Served, method: str, path: str, status: int) -> None:
    answer = served.client.request(method, path)
    assert answer.status_code == status
    assert f"{method} {path}" in answer.json()["error"]["message"]


def test_control_characters_reach_neither_model_nor_store(served: Served, shop: Shop, upstream: Upstream) -> None:
    answer = served.ask("Hola\u0000 \u001b[31mrojo\ud83d", user="mal")
    assert answer.status_code == 200
    assert not set(upstream.seen[-1]["messages"][-1]["content"]) & {"\u0000", "\u001b"}
    logged(shop, answer.headers["x-request-id"])
    said = rows(shop, messages, conversation_id=answer.headers["x-conversation-id"])
    assert "\u0000" not in said[0]["content"]


@pytest.mark.slow
def test_a_slow_loris_holds_nobody_up(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(40)]
    for one in slow:
        one.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    start = time.monotonic()
    assert served.ask().status_code == 200
    assert time.monotonic() - start < 2
    slow[0].settimeout(15)
    assert b"408" in slow[0].recv(1000)
    for one in slow:
        one.close()


def test_keys_stand_between_tenants(tmp_path: Path, upstream: Upstream) -> None:
    shop = Shop(tmp_path, upstream=upstream.url)
    (shop.assistants / "sol.yaml").write_text(
        (shop.assistants / "aurora.yaml").read_text().replace("clinica_aurora", "clinica_sol")
    )
    shop.version("a")
    with shop.ledger() as book:
        aurora, sol, admin = (keys.add(book, tenant) for tenant in ("clinica_aurora", "clinica_sol", "*"))
    with shop.served("--no-judge") as served:

        def ask(key: str | None, **more: Any) -> httpx.Response:
            head = {"Authorization": f"Bearer {key}"} if key else {}
            body = {"messages": [{"role": "user", "content": "Hola"}], "user": "ana", **more}
            return served.client.post("/v1/chat/completions", json=body, headers=head)

        assert ask(None).status_code == 401
        assert ask("ft-guess").status_code == 401
        mine = ask(aurora)
        assert (mine.status_code, mine.json()["model"]) == (200, "aurora--base")
        assert ask(aurora, metadata={"tenant_id": "clinica_sol"}).status_code == 403
        assert ask(aurora, model="sol").status_code == 403
        judged = {"request_id": mine.json()["id"], "feedback_type": "positive"}
        assert served.client.post("/feedback", json=judged, headers={"Authorization": f"Bearer {sol}"}).status_code == 403
        assert served.client.post("/feedback", json=judged, headers={"Authorization": f"Bearer {aurora}"}).status_code == 202
        same = {"metadata": {"conversation_id": mine.headers["x-conversation-id"]}}
        assert ask(sol, **same).status_code == 403
        assert served.client.get("/metrics", headers={"Authorization": f"Bearer {sol}"}).status_code == 403
        assert served.client.get("/metrics", headers={"Authorization": f"Bearer {admin}"}).status_code == 200
        assert served.client.get("/dashboard", auth=("ana", sol)).status_code == 401
        assert served.client.get("/dashboard", auth=("ana", admin)).status_code == 200
        with shop.ledger() as book:
            keys.revoke(book, next(row["key_hash"] for row in keys.listed(book) if row["tenant_id"] == "clinica_aurora"))
        assert wait_for(lambda: ask(aurora).status_code == 401, 2)
    assert sum("403 for POST" in line for line in served.lines) >= 4
    assert not any(key in line for line in served.lines for key in (aurora, sol, admin))


@pytest.mark.slow
def test_what_was_answered_is_logged_though_the_worker_is_killed(tmp_path: Path, upstream: Upstream) -> None:
    shop = Shop(tmp_path, upstream=upstream.url)
    shop.version("a")
    acknowledged: list[str] = []
    stop = threading.Event()

    def user(url: str, number: int) -> None:
        with httpx.Client(trust_env=False, timeout=10) as client:
            while not stop.is_set():
                body = {"model": "aurora", "user": f"u{number}", "messages": [{"role": "user", "content": "Hola"}]}
                try:
                    answer = client.post(f"{url}/v1/chat/completions", json=body)
                except httpx.HTTPError:
                    continue
                if answer.status_code == 200:
                    acknowledged.append(answer.json()["id"])

    with shop.served("--no-judge", "--workers", "2") as served, ThreadPoolExecutor(4) as pool:
        for number in range(4):
            pool.submit(user, served.url, number)
        for _ in range(3):
            time.sleep(0.5)
            os.kill(served.children("worker")[0], signal.SIGKILL)
        time.sleep(1.5)
        assert wait_for(lambda: len(acknowledged) > 50, 60)
        stop.set()
    stored = {row["request_id"] for row in rows(shop, requests)}
    assert set(acknowledged) <= stored
    assert {row["conversation_id"] for row in rows(shop, messages)} == {
        row["conversation_id"] for row in rows(shop, conversations)
    }


@pytest.mark.slow
def test_a_locked_ledger_costs_time_and_nothing_else(tmp_path: Path, upstream: Upstream) -> None:
    shop = Shop(tmp_path, upstream=upstream.url)
    shop.version("a")
    with shop.served("--no-judge") as served, shop.ledger() as book:
        with book.engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            answers = [served.ask(user=f"u{n}") for n in range(20)]
            assert {answer.status_code for answer in answers} == {200}
            connection.rollback()
        assert wait_for(lambda: len(rows(shop, requests)) == 20)


@pytest.mark.slow
def test_it_stops_in_order(tmp_path: Path, upstream: Upstream) -> None:
    shop = Shop(tmp_path, upstream=upstream.url)
    shop.version("a")
    upstream.faults["base"] = ""
    with shop.served("--no-judge") as served, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(lambda: served.ask("Hola"))
        served.process.send_signal(signal.SIGTERM)
        assert slow.result().status_code == 200
        assert served.process.wait(20) == 0
    assert not list((shop.home / "serving" / "journal").glob("*.jsonl"))


def test_another_address_needs_a_key_first(tmp_path: Path, upstream: Upstream) -> None:
    from finetune_assets.errors import ServingError
    from finetune_assets.serving.server import Server, Settings

    shop = Shop(tmp_path, upstream=upstream.url)
    with pytest.raises(ServingError, match="no API key yet"):
        Server(Environment.read(shop.environment), Settings(host="0.0.0.0", port=0), print)
