"""What befalls a running router: clients, disks, databases, clocks, upstreams and people that do what they should not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import aiohttp
import httpx
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from finetune_assets.assistants import load_assistant
from finetune_assets.environment import ROOT
from finetune_assets.registry.traffic import conversations, requests
from finetune_assets.serving import control
from finetune_assets.serving import journal as journals
from finetune_assets.serving import upstream as asking
from finetune_assets.serving.assignment import place
from finetune_assets.serving.journal import Journal, closed
from finetune_assets.serving.router import MOST_CHATS
from finetune_assets.serving.upstream import Target
from finetune_assets.serving.worker import HEAD_SECONDS
from finetune_assets.serving.writer import transfer
from finetune_assets_tests.serving.shop import Shop, Upstream, wait_for
from finetune_assets_tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    made = Upstream()
    yield made
    made.close()


def ids(shop: Shop, table: sa.Table, column: str, **where: Any) -> set[str]:
    query = sa.select(table.c[column]).where(*(table.c[name] == value for name, value in where.items()))
    with shop.ledger() as book, book.engine.connect() as connection:
        return set(connection.execute(query).scalars())


def test_a_client_that_leaves_a_stream_ends_it(tmp_path: Path, upstream: Upstream) -> None:
    shop = Shop(tmp_path, upstream=upstream.url)
    shop.version("a")
    upstream.faults["base"] = "slow"
    body = {"model": "aurora", "stream": True, "messages": [{"role": "user", "content": " ".join(["hola"] * 15)}]}
    with shop.served("--no-judge") as served:
        with served.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert next(answer.iter_lines()).startswith("data:")
        assert wait_for(lambda: ids(shop, requests, "outcome") == {"gone"}, 5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prlimit(2)")
def test_a_journal_that_cannot_be_written_costs_nothing_but_time_and_is_told(tmp_path: Path, upstream: Upstream) -> None:
    """Chats are answered, their rows wait in memory and are written later; feedback, which nothing else holds, is refused."""
    shop = Shop(tmp_path, upstream=upstream.url)
    shop.version("a")
    with shop.served("--no-judge") as served:
        before = served.ask(user="ana")
        assert wait_for(lambda: ids(shop, requests, "request_id"))
        worker = served.children("worker")[0]
        limits = resource.prlimit(worker, resource.RLIMIT_FSIZE)
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (0, limits[1]))  # the kernel refuses every write to a file
        judged = {"request_id": before.json()["id"], "feedback_type": "negative"}
        assert served.client.post("/feedback", json=judged).status_code == 503
        waiting = served.ask(user="ana")
        assert waiting.status_code == 200
        time.sleep(0.3)  # it stays unready: nothing but a write that succeeds ends it
        ready = served.client.get("/readyz")
        assert ready.status_code == 503
        assert "File too large): 4 rows wait in memory, 0 are lost" in ready.json()["problems"][0]
        resource.prlimit(worker, resource.RLIMIT_FSIZE, limits)
        assert wait_for(lambda: served.client.get("/readyz").status_code == 200, 3)
        after = served.ask(user="ana")
        assert served.client.post("/feedback", json=judged).status_code == 202
        told = re.search(r"^finetune_lost_rows_total (\S+)", served.client.get("/metrics").text, re.MULTILINE)
        assert told
        assert float(told[1]) == 0
    assert {answer.json()["id"] for answer in (before, waiting, after)} == ids(shop, requests, "request_id")
    assert any("cannot be written" in line and "File too large" in line for line in served.lines)


def test_more_rows_than_memory_holds_are_counted_as_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "MOST_HELD", 1000)
    journal = Journal(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        taken = [journal.append([("requests", {"request_id": f"r{n}" * 50})], hold=True) for n in range(20)]
        assert not journal.append([("ai_rlhf_feedback", {"feedback_id": "f"})])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert taken == sorted(taken, reverse=True)
    assert 0 < sum(taken) < 20
    assert journal.lost == 20 - sum(taken)
    journal.close()
    (kept,) = [rows for _, rows in closed(tmp_path)]
    assert len(kept) == sum(taken)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("full", ["ledger", "all"])
def test_a_disk_that_is_full_loses_nothing_that_was_answered(
    tmp_path: Path, small_disk: Path, upstream: Upstream, full: str
) -> None:
    """The ledger, or journal and ledger, on a full disk: chats are answered; feedback is taken while the journal has room, else
    refused; the log names the cause, nothing is half done. With room again all rows come to the ledger."""
    shop = Shop(small_disk if full == "all" else tmp_path / "shop", upstream=upstream.url)
    shop.database = shop.url = f"sqlite:///{small_disk / 'ledger.db'}"
    shop.environment["FINETUNE_DATABASE_URL"] = shop.url
    first, second = shop.version("a"), shop.version("b")
    shop.roll_out(first, "done")
    shop.roll_out(second, "50")
    with shop.served("--no-judge", "--workers", "2") as served:
        answers = [served.ask(user=f"u{n}") for n in range(10)]
        judged = {"request_id": answers[0].json()["id"], "feedback_type": "negative"}
        assert wait_for(lambda: len(ids(shop, requests, "request_id")) == 10)
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 512)
        answers += [served.ask("¿Tienen hora? " * 40, user=f"u{n}") for n in range(60)]
        assert {answer.status_code for answer in answers} == {200}
        assert served.client.post("/feedback", json=judged).status_code == (503 if full == "all" else 202)
        with shop.ledger() as book, pytest.raises(SQLAlchemyError, match="full"):
            control.rollback(book, "aurora", "patients complain", "ana")
        if full == "all":
            assert any("No space left on device" in problem for problem in served.client.get("/readyz").json()["problems"])
            assert any("journal" in line and "No space left on device" in line for line in served.lines)
        else:
            assert wait_for(lambda: any("disk is full" in line for line in served.lines), 5)
        assert len(ids(shop, requests, "request_id")) < len(answers)
        filler.unlink()
        assert wait_for(lambda: ids(shop, requests, "request_id") == {answer.json()["id"] for answer in answers}, 15)
        assert wait_for(lambda: served.client.get("/readyz").status_code == 200, 5)
        assert served.client.post("/feedback", json=judged).status_code == 202
        with shop.ledger() as book:
            control.rollback(book, "aurora", "patients complain", "ana")
        assert wait_for(lambda: {served.ask(user=f"u{n}").json()["model"] for n in range(10)} == {f"aurora--{first}"}, 2)
        counts = Path(f"/proc/{served.children('worker')[0]}/environ").read_bytes()
        assert b"PROMETHEUS_MULTIPROC_DIR=/dev/shm/" in counts  # written through a mapping: on a full disk that kills
    assert not any("starting it again" in line for line in served.lines)


def test_a_row_that_the_ledger_refuses_is_set_aside_and_holds_up_nobody(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    folder = tmp_path / "journal"
    journal = Journal(folder)
    journal.append([("conversations", {"conversation_id": "c1"})])
    journal.append([("requests", {"request_id": "r1"}), ("conversations", {"conversation_id": {"no": "text"}})])
    journal.close()
    later = Journal(folder)
    later.append([("conversations", {"conversation_id": "c2"})])
    with shop.ledger() as book:
        transfer(folder, book.engine)
        assert ids(shop, conversations, "conversation_id") == {"c1"}  # the second segment is still its worker's
        later.close()
        transfer(folder, book.engine)
    assert ids(shop, conversations, "conversation_id") == {"c1", "c2"}
    refused = [json.loads(line)[0] for file in (folder / "refused").iterdir() for line in file.read_text().splitlines()]
    assert refused == ["requests", "conversations"]
    assert {file.stat().st_mode & 0o777 for file in (folder / "refused").iterdir()} == {0o600}  # it may hold texts
    assert not list(folder.glob("*.jsonl"))


# upstreams


class Closing:
    """Answers each connection's first request and closes it when the second one comes: a server that gives up idle connections
    in the very moment in which they are used again. `rude`: closes without ever answering; `seconds`: that it takes for it."""

    def __init__(self, rude: bool = False, seconds: float = 0.0) -> None:
        self.rude, self.seconds, self.connections, self.asked = rude, seconds, 0, 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError):
            for first in (True, False):
                head = await reader.readuntil(b"\r\n\r\n")
                found = re.search(rb"Content-Length: (\d+)", head)
                assert found
                await reader.readexactly(int(found[1]))
                self.asked += 1
                if self.rude or not first:
                    await asyncio.sleep(self.seconds)
                    break
                said = {"choices": [{"message": {"content": "Hola"}, "finish_reason": "stop"}]}
                data = json.dumps(said).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))


def test_no_row_is_lost_between_a_new_segment_and_its_lock(tmp_path: Path) -> None:
    """A reader beside four writers that change their segments all the time takes every row once."""
    folder, seen, done = tmp_path / "journal", [], threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.extend(row for _, rows in closed(folder) for row in rows)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        writers = [Journal(folder) for _ in range(4)]
        for number in range(400):
            for writer in writers:
                writer.append([("requests", {"request_id": f"r{number}"})])
                writer._rotate()
        for writer in writers:
            writer.close()
    finally:
        done.set()
        reader.join()
    seen.extend(row for _, rows in closed(folder) for row in rows)
    assert len(seen) == 1600


@pytest.mark.parametrize(("rude", "seconds"), [(False, 0.0), (True, 0.0), (False, 0.5)])
def test_a_connection_that_was_given_up_is_asked_again_and_a_new_one_is_not(rude: bool, seconds: float) -> None:
    """The second chat of each pair meets a connection that is closed on it: at once, so that a new one is asked, or after half
    a second, in which an upstream may have worked on it."""

    async def ask() -> tuple[Closing, list[str]]:
        closing = Closing(rude, seconds)
        server = await asyncio.start_server(closing, "127.0.0.1", 0)
        target = Target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", "m", None, 5, 5)
        upstream = asking.Upstream()
        said: list[str] = []
        try:
            for _ in range(4):
                try:
                    said.append((await upstream.whole(target, {"messages": []})).text)
                except asking.UpstreamFailed as failed:
                    said.append(failed.outcome)
        finally:
            await upstream.close()
            server.close()
            await server.wait_closed()
        return closing, said

    closing, said = asyncio.run(ask())
    if rude:
        assert (said, closing.asked) == (["error"] * 4, 4)
    elif seconds:
        assert (said, closing.asked) == (["Hola", "error"] * 2, 4)
    else:
        assert (said, closing.connections) == (["Hola"] * 4, 4)


@pytest.mark.slow
def test_an_upstream_that_dies_and_comes_back(tmp_path: Path) -> None:
    def start(port: int) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-m", "benchmarks.upstream", str(port)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    def end(process: subprocess.Popen[str]) -> None:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()

    process, port = start(0)
    shop = Shop(tmp_path, upstream=f"http://127.0.0.1:{port}/v1")
    shop.version("a")
    try:
        with shop.served("--no-judge") as served:
            assert served.ask().status_code == 200
            end(process)
            for stream in (False, True):
                refused = served.ask(stream=stream)
                assert refused.status_code == 502
                assert "could not answer" in refused.json()["error"]["message"]
            process, _ = start(port)
            assert served.ask().status_code == 200
            assert wait_for(lambda: len(ids(shop, requests, "request_id", outcome="error")) == 2)
    finally:
        end(process)


@pytest.mark.slow
def test_more_chats_than_can_be_answered_are_told_to_come_back(tmp_path: Path, upstream: Upstream) -> None:
    """A tenant over its rate, and a worker over its chats: 429 with Retry-After at once, and everybody is answered later."""
    shop = Shop(tmp_path, upstream=upstream.url)
    shop.version("a")
    (shop.assistants / "sol.yaml").write_text(
        (shop.assistants / "aurora.yaml")
        .read_text()
        .replace("clinica_aurora", "clinica_sol")
        .replace("serving: {", "serving: {requests_per_minute: 2, ")
    )
    with shop.served("--no-judge") as served:
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


# the router itself


@pytest.mark.slow
def test_a_router_that_is_killed_loses_nothing_it_has_answered_and_no_arm(tmp_path: Path, upstream: Upstream) -> None:
    """All of its processes at once, under load; what the journal holds is in the ledger after the next start."""
    shop = Shop(tmp_path, upstream=upstream.url)
    first, second = shop.version("a"), shop.version("b")
    shop.roll_out(first, "done")
    shop.roll_out(second, "10")
    with shop.ledger() as book:
        state = book.rollout("aurora")
    moved = next(u for u in (f"u{n}" for n in range(999)) if 0.1 < place(state.salt or "", "clinica_aurora", u) < 0.5)
    open_one = {"metadata": {"conversation_id": "c1"}}
    acknowledged: list[str] = []

    def user(url: str, number: int) -> None:
        with httpx.Client(trust_env=False, timeout=10) as client:
            for n in range(100_000):
                body = {"model": "aurora", "user": f"{number}-{n}", "messages": [{"role": "user", "content": "Hola"}]}
                try:
                    answer = client.post(f"{url}/v1/chat/completions", json=body)
                except httpx.HTTPError:
                    return
                if answer.status_code == 200:
                    acknowledged.append(answer.json()["id"])

    with shop.served("--no-judge", "--workers", "2") as served, ThreadPoolExecutor(4) as pool:
        assert first in served.ask(user=moved, **open_one).json()["model"]
        people = [pool.submit(user, served.url, number) for number in range(4)]
        time.sleep(1.5)
        for pid in [*served.children("worker"), *served.children("writer"), served.process.pid]:
            os.kill(pid, signal.SIGKILL)
        served.process.wait()
        for one in people:
            one.result()
    with shop.ledger() as book:
        control.advance(book, "aurora", load_assistant(shop.assistants, "aurora", {}).rollout, "test", "test")
    with shop.served("--no-judge") as served:
        assert wait_for(lambda: set(acknowledged) <= ids(shop, requests, "request_id"))
        assert first in served.ask(user=moved, **open_one).json()["model"]  # begun at 10 %, kept at 50 %
        assert second in served.ask(user=moved).json()["model"]
    assert len(acknowledged) > 20


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_a_rollback_is_in_effect_in_every_worker_within_a_second_and_fails_nobody(
    tmp_path: Path, upstream: Upstream, database: str
) -> None:
    """Three workers under load, half of the users at the candidate: the last chat that it answered began within a second."""
    with postgres() if database == "postgres" else contextlib.nullcontext((None, None)) as (url, _):
        shop = Shop(tmp_path / "shop", upstream=upstream.url, database=url)
        first, second = shop.version("a"), shop.version("b")
        shop.roll_out(first, "done")
        shop.roll_out(second, "50")
        ended, answers = threading.Event(), list[tuple[float, httpx.Response]]()

        def people(url: str, number: int) -> None:
            n = 0
            while not ended.is_set():
                n += 1
                body = {"model": "aurora", "user": f"{number}-{n}", "messages": [{"role": "user", "content": "Hola"}]}
                start = time.monotonic()  # a connection a chat: every worker is met
                answers.append((start, httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=10)))

        with shop.served("--no-judge", "--workers", "3") as served, ThreadPoolExecutor(4) as pool:
            going = [pool.submit(people, served.url, number) for number in range(4)]
            time.sleep(1.0)
            with shop.ledger() as book:
                start = time.monotonic()
                control.rollback(book, "aurora", "patients complain", "ana")
            assert wait_for(lambda: sum(at > start + 1 for at, _ in answers) > 10, 30)
            ended.set()
            for one in going:
                one.result()
            assert wait_for(lambda: len(ids(shop, requests, "request_id")) == len(answers))
        assert {answer.status_code for _, answer in answers} == {200}
        late = [at - start for at, answer in answers if second in answer.json()["model"]]
        assert min(late) < 0
        assert max(late) < 1.0  # and more than ten chats after that were the champion's


@contextlib.contextmanager
def postgres() -> Iterator[tuple[str, Any]]:
    """Address and server of a Postgres of its own."""
    pgserver = pytest.importorskip("pgserver")
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to the user that Postgres runs as
    server = pgserver.get_server(folder, cleanup_mode="stop")
    try:
        yield sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg2").render_as_string(hide_password=False), server
    finally:
        server.ensure_postgres_running()
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_postgres_is_restarted_under_load(tmp_path: Path, upstream: Upstream) -> None:
    """Users are answered from the last known rollouts, their rows wait in the journal, and a rollback after it takes effect."""
    pytest.importorskip("pgserver")
    from pgserver import pg_ctl

    with postgres() as (url, server):
        shop = Shop(tmp_path / "shop", upstream=upstream.url, database=url)
        first, second = shop.version("a"), shop.version("b")
        shop.roll_out(first, "done")
        shop.roll_out(second, "50")
        with shop.served("--no-judge") as served:
            answers = [served.ask(user=f"u{n}") for n in range(5)]
            pg_ctl(["-w", "-m", "immediate", "stop"], pgdata=server.pgdata, user=server.system_user)
            answers += [served.ask(user=f"u{n}") for n in range(20)]
            assert {answer.status_code for answer in answers} == {200}
            assert {answer.json()["model"] for answer in answers} == {f"aurora--{first}", f"aurora--{second}"}
            server.ensure_postgres_running()
            assert wait_for(lambda: ids(shop, requests, "request_id") == {a.json()["id"] for a in answers}, 20)
            with shop.ledger() as book:
                control.rollback(book, "aurora", "patients complain", "ana")
            assert wait_for(lambda: {served.ask(user=f"u{n}").json()["model"] for n in range(10)} == {f"aurora--{first}"}, 5)
            assert served.client.get("/readyz").status_code == 200


CLOCK = """
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long offset(void) {
    long seconds = 0;
    FILE *file = fopen(getenv("CLOCK_OFFSET"), "r");
    if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
    return seconds;
}
int clock_gettime(clockid_t clock, struct timespec *at) {
    int done = syscall(SYS_clock_gettime, clock, at);
    if (!done && clock == CLOCK_REALTIME) at->tv_sec += offset();
    return done;
}
"""
"""What a process that has it preloaded takes for the time of day, seconds off; the clock that only runs forward is left alone."""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None or not sys.platform.startswith("linux"), reason="a C compiler sets the clock")
def test_the_clock_is_set_forward_and_back(tmp_path: Path, upstream: Upstream) -> None:
    """Hours forward, then behind the start: chats, rows, readiness, the arm of an open conversation and the rate go on."""
    shop = Shop(tmp_path, upstream=upstream.url)
    first, second = shop.version("a"), shop.version("b")
    shop.roll_out(first, "done")
    shop.roll_out(second, "50")
    clock, library = tmp_path / "clock", tmp_path / "clock.so"
    clock.write_text("0")
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-o", str(library), "-"], input=CLOCK, text=True, check=True)
    shop.environment |= {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(clock)}
    with shop.served("--no-judge") as served:
        said: dict[str, list[httpx.Response]] = {"0": [], "-10800": [], "18000": []}
        for offset, answers in said.items():
            clock.write_text(offset)
            for n in range(6):
                answers.append(served.ask(user=f"u{n}", metadata={"conversation_id": f"c{n}"}))
            assert {answer.status_code for answer in answers} == {200}
            assert served.client.get("/readyz").json() == {"ready": True, "problems": []}
        models = [[answer.json()["model"] for answer in answers] for answers in said.values()]
        assert models[0] == models[1] == models[2]
        assert wait_for(lambda: len(ids(shop, requests, "request_id")) == 18)
    with shop.ledger() as book, book.engine.connect() as connection:
        times = connection.execute(sa.select(requests.c.created_at)).scalars().all()
    assert (max(times) - min(times)).total_seconds() > 7 * 3600  # it was set


@pytest.mark.slow
def test_two_people_press_rollback_at_once(tmp_path: Path, upstream: Upstream) -> None:
    """On the page, through two workers: one of them does it, the other is told who was first, and nobody goes back twice."""
    shop = Shop(tmp_path, upstream=upstream.url)
    first, second = shop.version("a"), shop.version("b")
    shop.roll_out(first, "done")
    shop.roll_out(second, "50")
    with shop.served("--no-judge", "--workers", "2") as served, ThreadPoolExecutor(2) as pool:

        def press(who: str) -> str:
            form = {"who": who, "reason": f"{who} says so"}
            answer = httpx.post(f"{served.url}/dashboard/aurora/rollback", data=form, trust_env=False, timeout=20)
            assert answer.status_code == 303
            return unquote_plus(answer.headers["location"])

        said = sorted(pool.map(press, ("ana", "bob")), key=len)
    with shop.ledger() as book:
        events = [event for event in book.events("aurora") if event["event"] == "rolled_back"]
        state = book.rollout("aurora")
    assert said[0].endswith("aurora: rolled back")
    assert "was rolled back a moment ago by" in said[1]
    assert (len(events), state.champion, state.candidate) == (1, first, None)


@pytest.mark.slow
def test_a_head_that_never_ends_is_given_up(tmp_path: Path, upstream: Upstream) -> None:
    shop = Shop(tmp_path, upstream=upstream.url)
    shop.version("a")
    with shop.served("--no-judge") as served:
        host, port = served.url.removeprefix("http://").split(":")
        silent, slow = (socket.create_connection((host, int(port))) for _ in range(2))
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
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
@pytest.mark.timeout(300)
def test_an_adapter_whose_file_is_corrupt_is_never_served(tmp_path: Path) -> None:
    """With the embedded engine: the champion answers, the candidate's damaged weights answer nobody, and the log says why."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = make_tiny_model(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    for seed, name in enumerate(("good", "bad")):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's own
            get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / name)
    shop = Shop(tmp_path / "shop", base=str(base))
    good, bad = (shop.version(name[0], model=tmp_path / name) for name in ("good", "bad"))
    weights = shop.home / "models" / "aurora" / bad / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    shop.roll_out(good, "done")
    shop.roll_out(bad, "50")
    with shop.served("--no-judge") as served:
        models = {served.ask(user=f"u{n}").json()["model"] for n in range(12)}
        streamed = served.ask(user="u1", stream=True)
    assert models == {f"aurora--{good}"}
    assert "[DONE]" in streamed.text
    assert any(f"Model aurora--{bad} is not served" in line and "not those that were registered" in line for line in served.lines)
    assert ids(shop, requests, "version") == {good}
    assert "error" in ids(shop, requests, "outcome")  # the candidate's users: its guard will take it back


@pytest.mark.slow
def test_whatever_is_sent_the_api_does_what_its_openapi_says(tmp_path: Path, upstream: Upstream) -> None:
    """schemathesis against the running router: no 500, no undocumented status, no answer of another shape."""
    pytest.importorskip("schemathesis")
    shop = Shop(tmp_path, upstream=upstream.url)
    shop.version("a")
    with shop.served("--no-judge") as served:
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
