"""What clients send that they should not: broken and endless bodies and heads, control characters, too much at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import aiohttp
import httpx
import pytest

from finetune_assets.registry.traffic import messages
from finetune_assets.serving.router import MOST_CHATS
from finetune_assets.serving.worker import HEAD_SECONDS
from finetune_assets_tests.serving.servers import Upstream
from finetune_assets_tests.serving.shop import Served, Shop

pytestmark = pytest.mark.timeout(120)


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


def test_control_characters_reach_neither_model_nor_store(served: Served, shop: Shop, upstream: Upstream) -> None:
    odd = "\u0000\u001b\u007f\u0080\u0085\u009b\u009f"
    answer = served.ask(f"Hola{odd}\t[31mrojo\ud83d", user="mal")
    assert answer.status_code == 200
    assert upstream.seen[-1]["messages"][-1]["content"] == "Hola\t[31mrojo\ufffd"
    shop.logged(answer.headers["x-request-id"])
    said = shop.rows(messages, conversation_id=answer.headers["x-conversation-id"])
    assert said[0]["content"] == "Hola\t[31mrojo\ufffd"


@pytest.mark.slow
def test_a_slow_loris_holds_nobody_up(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(40)]
    for one in slow:
        one.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    start = time.monotonic()
    assert served.ask().status_code == 200
    assert time.monotonic() - start < 2
    slow[0].settimeout(15)
    assert b"408" in slow[0].recv(1000)
    for one in slow:
        one.close()


@pytest.mark.slow
def test_a_head_that_never_ends_is_given_up(fresh: Shop) -> None:
    with fresh.served("--no-judge") as served:
        host, port = served.url.removeprefix("http://").split(":")
        silent, slow = (socket.create_connection((host, int(port))) for _ in range(2))
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        said = b""
        while b'"ok"' not in said:  # head and body may come apart
            said += slow.recv(1000)
        ended = threading.Event()

        def dribble() -> None:
            while not ended.wait(0.5):
                try:
                    slow.sendall(b"POST /chat HTTP/1.1\r\nX-A: b\r\n" if not begun else b"X-B: c\r\n")
                except OSError:
                    return
                begun.append(True)

        begun: list[bool] = []
        thread = threading.Thread(target=dribble)
        thread.start()
        for one in (silent, slow):
            one.settimeout(HEAD_SECONDS + 5)
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1000) == b""
            one.close()
        ended.set()
        thread.join()
        with socket.create_connection((host, int(port)), timeout=5) as flood:
            flood.sendall(b"POST /chat HTTP/1.1\r\n")
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                flood.sendall((b"X-A: " + b"b" * 10_000 + b"\r\n") * 3_000)
        assert served.ask().status_code == 200


@pytest.mark.slow
def test_more_chats_than_can_be_answered_are_told_to_come_back(fresh: Shop, upstream: Upstream) -> None:
    """A tenant over its rate, and a worker over its chats: 429 with Retry-After at once, and everybody is answered later."""
    fresh.sol("serving: {", "serving: {requests_per_minute: 2, ")
    with fresh.served("--no-judge") as served:
        limited = [served.ask(model="sol") for _ in range(3)]
        assert [answer.status_code for answer in limited] == [200, 200, 429]
        assert int(limited[2].headers["retry-after"]) > 10
        upstream.faults["aurora"] = "hang"

        async def all_at_once() -> list[tuple[int, str | None]]:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

                async def ask(n: int) -> tuple[int, str | None]:
                    body = {"model": "aurora", "user": f"u{n}", "messages": [{"role": "user", "content": "Hola"}]}
                    async with session.post(f"{served.url}/v1/chat/completions", json=body) as answer:
                        await answer.read()
                        return answer.status, answer.headers.get("Retry-After")

                return await asyncio.gather(*(ask(n) for n in range(MOST_CHATS + 40)))

        answers = asyncio.run(all_at_once())
        told = [after for status, after in answers if status == 429]
        assert told == ["1"] * len(told)
        assert len(told) >= 40 - len(limited)
        assert {status for status, _ in answers} == {429, 504}  # full, or the upstream's time is over
        upstream.faults.clear()
        assert served.ask().status_code == 200


@pytest.mark.slow
def test_whatever_is_sent_the_api_does_what_its_openapi_says(fresh: Shop, tmp_path: Path) -> None:
    """schemathesis against the running router: no 500, no undocumented status, no answer of another shape."""
    pytest.importorskip("schemathesis")
    with fresh.served("--no-judge") as served:
        schema = served.client.get("/openapi.json").json()
        shapes = schema["components"]["schemas"]
        shapes["Feedback"]["properties"]["request_id"] = {"const": served.ask().json()["id"]}
        shapes["Chat"]["properties"]["assistant"] = shapes["Completions"]["properties"]["model"] = {"const": "aurora"}
        (tmp_path / "openapi.json").write_text(json.dumps(schema))
        checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
        command = [sys.executable, "-m", "schemathesis.cli", "run", str(tmp_path / "openapi.json"), "--url", served.url]
        command += ["--checks", checks, "--max-examples", "60", "--seed", "1", "--no-color", "--continue-on-failure"]
        made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stdout[-6000:]
        assert "passed" in made.stdout
        assert served.ask().status_code == 200
    assert not any("Traceback" in line for line in served.lines)
