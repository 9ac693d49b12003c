"""What befalls a router that serves: rollbacks under load, a database that restarts, clocks that are set, two people at once."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote_plus

import httpx
import pytest
import sqlalchemy as sa

from finetune_assets.registry.traffic import requests
from finetune_assets.serving import control
from finetune_assets_tests.serving.servers import Upstream
from finetune_assets_tests.serving.shop import Shop, crowd, postgres, wait_for

pytestmark = pytest.mark.timeout(120)


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_a_rollback_is_in_effect_in_every_worker_within_a_second_and_fails_nobody(
    tmp_path: Path, upstream: Upstream, database: str, record_property: Callable[[str, object], None]
) -> None:
    """Three workers under load, half of the users at the candidate: the last chat that it answered began within a second."""
    with postgres() if database == "postgres" else contextlib.nullcontext((None, None)) as (url, _):
        shop = Shop(tmp_path / "shop", upstream=upstream.url, database=url)
        _, second = shop.two_versions("50")
        with shop.served("--no-judge", "--workers", "3") as served:
            with crowd(served.url) as people:
                time.sleep(1.0)
                with shop.ledger() as book:
                    start = time.monotonic()
                    control.rollback(book, "aurora", "patients complain", "ana")
                assert wait_for(lambda: sum(at > start + 1 for at, _ in people.answers) > 10, 30)
            assert wait_for(lambda: shop.values(requests, "request_id") == people.acknowledged)
            people.record(record_property, shop.values(requests, "request_id"))
        assert ({answer.status_code for _, answer in people.answers}, people.broken) == ({200}, 0)
        late = [at - start for at, answer in people.answers if second in answer.json()["model"]]
        assert min(late) < 0
        assert max(late) < 1.0  # and more than ten chats after that were the champion's


@pytest.mark.slow
def test_postgres_is_restarted_under_load(
    tmp_path: Path, upstream: Upstream, record_property: Callable[[str, object], None]
) -> None:
    """Users are answered from the last known rollouts, their rows wait in the journal, and a rollback after it takes effect."""
    pytest.importorskip("pgserver")
    from pgserver import pg_ctl

    with postgres() as (url, server):
        shop = Shop(tmp_path / "shop", upstream=upstream.url, database=url)
        first, second = shop.two_versions("50")
        with shop.served("--no-judge") as served:
            with crowd(served.url) as people:

                def goes_on(since: float) -> bool:
                    return bool(wait_for(lambda: sum(at > since for at, _ in people.answers) > 50, 30))

                assert goes_on(0.0)
                pg_ctl(["-w", "-m", "immediate", "stop"], pgdata=server.pgdata, user=server.system_user)
                assert goes_on(time.monotonic())
                server.ensure_postgres_running()
                assert goes_on(time.monotonic())
            assert ({answer.status_code for _, answer in people.answers}, people.broken) == ({200}, 0)
            assert {answer.json()["model"] for _, answer in people.answers} == {f"aurora--{first}", f"aurora--{second}"}
            assert wait_for(lambda: shop.values(requests, "request_id") == people.acknowledged, 20)
            people.record(record_property, shop.values(requests, "request_id"))
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
    shop.two_versions("50")
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
        assert wait_for(lambda: len(shop.values(requests, "request_id")) == 18)
    with shop.ledger() as book, book.engine.connect() as connection:
        times = connection.execute(sa.select(requests.c.created_at)).scalars().all()
    assert (max(times) - min(times)).total_seconds() > 7 * 3600  # it was set


@pytest.mark.slow
def test_two_people_press_rollback_at_once(tmp_path: Path, upstream: Upstream) -> None:
    """On the page, through two workers: one of them does it, the other is told who was first, and nobody goes back twice."""
    shop = Shop(tmp_path, upstream=upstream.url)
    first, _ = shop.two_versions("50")
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
