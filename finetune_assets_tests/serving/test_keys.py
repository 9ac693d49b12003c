"""Who may ask for what: API keys, and what a router without any answers."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from starlette.routing import Route

from finetune_assets.environment import Environment
from finetune_assets.errors import ServingError
from finetune_assets.registry.traffic import conversations, messages, requests
from finetune_assets.serving import keys
from finetune_assets.serving.directory import METRICS, Directory
from finetune_assets.serving.intake import Options
from finetune_assets.serving.router import Router
from finetune_assets.serving.server import Server, Settings
from finetune_assets_tests.serving.servers import Upstream
from finetune_assets_tests.serving.shop import Served, Shop, wait_for

pytestmark = pytest.mark.timeout(120)


def test_keys_stand_between_tenants(fresh: Shop) -> None:
    fresh.sol()
    with fresh.ledger() as book:
        aurora, sol, admin = (keys.add(book, tenant) for tenant in ("clinica_aurora", "clinica_sol", "*"))
    with fresh.served("--no-judge") as served:

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
        with fresh.ledger() as book:
            keys.revoke(book, next(row["key_hash"] for row in keys.listed(book) if row["tenant_id"] == "clinica_aurora"))
        assert wait_for(lambda: ask(aurora).status_code == 401, 2)
    assert sum("403 for POST" in line for line in served.lines) >= 4
    assert not any(key in line for line in served.lines for key in (aurora, sol, admin))


@pytest.mark.slow
def test_two_tenants_begin_conversations_of_one_id_at_once(fresh: Shop, upstream: Upstream) -> None:
    """And go on with them, whichever worker answers: neither meets a word of the other's, in a prompt or in a row."""
    fresh.sol()
    with fresh.ledger() as book:
        held = {tenant: keys.add(book, tenant) for tenant in ("clinica_aurora", "clinica_sol")}
    upstream.faults["base"] = "late"  # both are under way before either is known
    with fresh.served("--no-judge", "--workers", "2") as served, ThreadPoolExecutor(2) as pool:

        def say(tenant: str, turn: int) -> httpx.Response:
            body = {"user_id": "ana", "message": f"{tenant} dice {turn}", "conversation_id": "1"}
            head = {"Authorization": f"Bearer {held[tenant]}"}
            return httpx.post(f"{served.url}/chat", json=body, headers=head, trust_env=False, timeout=20)

        for turn in range(3):
            answers = list(pool.map(say, held, [turn] * 2))
            assert [(answer.status_code, answer.json()["conversation_id"]) for answer in answers] == [(200, "1")] * 2
            for answer in answers:
                assert fresh.logged(answer.json()["request_id"])
        for asked in upstream.seen[-6:]:
            texts = [message["content"] for message in asked["messages"] if message["role"] == "user"]
            assert len({text.split()[0] for text in texts}) == 1
        assert sorted(len(asked["messages"]) for asked in upstream.seen[-6:]) == [1, 1, 3, 3, 5, 5]
    for tenant in held:
        said = fresh.rows(messages, conversation_id=f"{tenant}/1")
        assert len(said) == 6
        assert all(f"{tenant} dice" in row["content"] for row in said)
        assert fresh.rows(conversations, conversation_id=f"{tenant}/1")[0]["tenant_id"] == tenant


def test_revoking_the_last_key_opens_nothing(fresh: Shop) -> None:
    with fresh.ledger() as book:
        directory = Directory(Environment.read(fresh.environment), book, open_door=True)
        assert directory.is_open
        key = keys.add(book, "*")
        keys.revoke(book, keys.listed(book)[0]["key_hash"])
        directory = Directory(Environment.read(fresh.environment), book, open_door=True)
        assert (directory.is_open, directory.key(key)) == (False, None)


def test_nothing_ends_what_follows_the_ledger(fresh: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """A row that no program can read, then a good one: the worker knows of the good one, and the log has the cause once."""
    fresh.roll_out(fresh.version("b"))
    with fresh.ledger() as book, fresh.ledger() as other:
        directory = Directory(Environment.read(fresh.environment), book)
        directory.start()
        with other.engine.begin() as connection:
            connection.execute(sa.text("UPDATE rollouts SET experiment = '{broken'"))
        assert wait_for(lambda: "The ledger cannot be read (JSONDecodeError" in caplog.text, 5)
        time.sleep(1.5)
        assert caplog.text.count("The ledger cannot be read") == 1
        assert directory.thread.is_alive()
        with other.engine.begin() as connection:
            connection.execute(sa.text("UPDATE rollouts SET experiment = NULL, share = 0.1"))
        assert wait_for(lambda: directory.rollout("aurora").share == 0.1, 5)
        directory.close()


def test_another_address_needs_a_key_first(fresh: Shop) -> None:
    with pytest.raises(ServingError, match="no API key yet"):
        Server(Environment.read(fresh.environment), Settings(host="0.0.0.0", port=0), print)


def test_the_actor_in_the_history_is_the_keys_owner_whatever_is_typed(fresh: Shop) -> None:
    fresh.roll_out(fresh.version("b"))
    with fresh.ledger() as book:
        nobodys, anas = keys.add(book, "*"), keys.add(book, "*", "ana")
    with fresh.served("--no-judge") as served, fresh.ledger() as book:
        for action, typed, login in (
            ("hold", "bob", ("ana", nobodys)),
            ("release", "ana", ("ana", anas)),
            ("hold", "", ("boss\u0007", anas)),
            ("release", "bob\nadvanced by boss", ("", anas)),
        ):
            form = {"who": typed, "reason": "wait"}
            assert served.client.post(f"/dashboard/aurora/{action}", data=form, auth=login).status_code == 303
        actors = [event["actor"].removesuffix(" (dashboard)") for event in book.events("aurora")][-4:]
    assert actors == ["ana for bob", "ana", "ana as boss", "ana for bob advanced by boss"]


def test_prometheus_key_opens_metrics_and_nothing_else(fresh: Shop) -> None:
    fresh.roll_out(fresh.version("b"))
    with fresh.ledger() as book:
        key = keys.add(book, METRICS, "prometheus")
    with fresh.served("--no-judge") as served:
        bearer, login = {"headers": {"Authorization": f"Bearer {key}"}}, {"auth": ("prometheus", key)}
        asked = {
            ("GET", "/metrics"): 200,
            ("GET", "/v1/models"): 403,
            ("POST", "/v1/chat/completions"): 403,
            ("POST", "/chat"): 403,
            ("POST", "/feedback"): 403,
            ("GET", "/dashboard"): 401,
            ("GET", "/dashboard/body"): 401,
            ("GET", "/dashboard/aurora/experiment"): 401,
            ("POST", "/dashboard/aurora/rollback"): 401,
            ("GET", "/rate"): 403,
            ("GET", "/cron/finetuning"): 404,
        }
        for (method, path), status in asked.items():
            for how in (bearer, login) if "dashboard" in path else (bearer,):
                answer = served.client.request(method, path, **how, **({"json": {}} if method == "POST" else {}))
                assert answer.status_code == status, path
        open_to_all = {"/", "/healthz", "/readyz", "/openapi.json"}
        router = Router(Environment.read(fresh.environment), Options("", open_door=False))
        paths = {route.path.replace("{assistant}", "aurora") for route in router.app.routes if isinstance(route, Route)}
        router.journal.close()
        router.ledger.close()
        assert {path.replace("{action}", "rollback") for path in paths} == open_to_all | {path for _, path in asked}
        with fresh.ledger() as book:
            assert book.rollout("aurora").is_open
    assert any("403 for POST '/chat' with the key 'prometheus' of *metrics" in line for line in served.lines)


def test_a_key_is_looked_at_before_the_body(fresh: Shop) -> None:
    """Whoever has none is refused with the head alone; what they send on is not taken."""
    with fresh.ledger() as book:
        keys.add(book, "clinica_aurora")
    with fresh.served("--no-judge") as served:
        host, port = served.url.removeprefix("http://").split(":")
        for path in ("/v1/chat/completions", "/chat", "/feedback"):
            with socket.create_connection((host, int(port)), timeout=5) as one:
                one.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000\r\n\r\n{{".encode())
                assert one.recv(1000).startswith(b"HTTP/1.1 401")
                with pytest.raises((BrokenPipeError, ConnectionResetError)):
                    one.sendall(b"x" * 10_000_000)
        assert fresh.rows(requests) == []


@pytest.mark.parametrize(
    ("path", "head", "status"),
    [
        ("/dashboard", {"Host": "localhost:8000"}, 200),
        ("/v1/models", {"Host": "[::1]:8000"}, 200),
        ("/v1/models", {"Origin": "http://localhost:3000"}, 200),
        ("/dashboard", {"Host": "evil.example:8000"}, 403),
        ("/dashboard/body", {"Host": "127.0.0.1.evil.example"}, 403),
        ("/metrics", {"Host": "evil.example"}, 403),
        ("/v1/models", {"Origin": "https://evil.example"}, 403),
        ("/v1/models", {"Origin": "null"}, 403),
        ("/v1/models", {"Host": "[", "Origin": "http://["}, 403),
        ("/v1/chat/completions", {"Host": "evil.example"}, 403),
        ("/feedback", {"Origin": "https://evil.example"}, 403),
    ],
)
def test_without_keys_only_this_machine_is_answered(served: Served, path: str, head: dict[str, str], status: int) -> None:
    """A page whose name was made to lead here, or that posts here, is somebody else."""
    method = "POST" if path in ("/v1/chat/completions", "/feedback") else "GET"
    answer = served.client.request(method, path, headers=head, content=b"{}" if method == "POST" else None)
    assert answer.status_code == status
    assert status == 200 or "127.0.0.1 or localhost" in answer.json()["error"]["message"]
