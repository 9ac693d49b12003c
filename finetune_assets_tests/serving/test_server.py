"""The process that looks after the others: models that cannot be loaded, rollouts that cannot be judged, an engine that hangs."""

from __future__ import annotations

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from finetune_assets.environment import Environment
from finetune_assets.serving import control, pages
from finetune_assets.serving import server as servers
from finetune_assets.serving.directory import Directory
from finetune_assets.serving.journal import Journal
from finetune_assets.serving.server import Server, Settings
from finetune_assets_tests.serving.servers import Hook
from finetune_assets_tests.serving.shop import Shop, wait_for

pytestmark = pytest.mark.timeout(120)


def test_a_model_that_could_not_be_loaded_is_tried_again(tmp_path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later, and at once when the engine is another; told once."""
    shop, said = Shop(tmp_path), list[str]()
    server = Server(Environment.read(shop.environment), Settings(port=0), said.append)
    try:
        server.engine_url, hook.status = hook.url, 500
        server._load_models()
        server._load_models()
        assert [message["model"] for message in hook.got] == ["aurora--base"]
        monkeypatch.setattr(servers, "LOAD_AGAIN", 0.0)
        server._load_models()
        hook.status = 200
        server._load_models()
        server._load_models()
        assert len(hook.got) == 3
        assert len(said) == 1
        ended = servers.Child([sys.executable, "-c", "pass", "engine"], [], {})
        ended.command = [sys.executable, "-m", "finetune_assets.serving.engine", "--help"]
        ended.process.wait()
        ended.started = -servers.RESTART
        server.children.append(ended)
        server._look_after()
        ended.process.kill()
        ended.process.wait()
        server._load_models()
        assert len(hook.got) == 4
    finally:
        server.close()


def test_a_judgement_that_takes_long_comes_less_often(tmp_path: Path) -> None:
    server, began = Server(Environment.read(Shop(tmp_path).environment), Settings(port=0), print), list[float]()

    def judge() -> None:
        began.append(time.monotonic())
        time.sleep(0.2)

    try:
        server._in_thread(judge, 0.01, servers.REST)
        assert wait_for(lambda: len(began) > 1)
        assert began[1] - began[0] >= 0.2 * (1 + servers.REST)
    finally:
        server.close()


def test_a_dashboard_that_many_look_at_reads_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Shop(tmp_path)
    shop.roll_out(shop.version("a"))
    monkeypatch.setattr(pages, "REST", 1e6)
    read: list[str] = []
    with shop.ledger() as book:
        dashboard = pages.Dashboard(Directory(Environment.read(shop.environment), book), Journal(tmp_path / "journal"))
        sa.event.listen(book.engine, "before_cursor_execute", lambda *told: read.append(told[2]))
        with ThreadPoolExecutor(4) as viewers:
            looks = [viewers.submit(dashboard._data) for _ in range(8)]
        assert len({str(look.result()["assistants"]) for look in looks}) == 1
        assert sum("avg(requests.seconds)" in one for one in read) == 1
        control.hold(book, "aurora", "wait", "ana")
        assert dashboard._data()["assistants"][0]["state"].status == "held"


def test_a_rollout_that_cannot_be_judged_holds_up_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shop = Shop(tmp_path)
    shop.sol()
    shop.roll_out(shop.version("a"))
    server = Server(Environment.read(shop.environment), Settings(port=0), print)
    judged: list[str] = []

    def step(_: object, name: str, *_more: object) -> None:
        judged.append(name)
        if name == "aurora":
            raise RuntimeError("a row that nobody can read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers.control, "step", step)
        server._judge()
    server.close()
    assert judged == ["aurora", "sol"]
    assert "The rollout of aurora could not be judged: RuntimeError: a row that nobody can read" in caplog.text


@pytest.mark.slow
def test_an_engine_that_hangs_holds_up_neither_workers_nor_the_end(tmp_path: Path) -> None:
    """A model is loaded for ever; a killed worker is replaced all the same, and SIGTERM ends it all."""
    shop = Shop(tmp_path)
    with shop.served() as served:
        engine = served.children("engine")[0]
        os.kill(engine, signal.SIGSTOP)
        try:
            shop.roll_out(shop.version("a"))  # the engine is asked to load it
            time.sleep(3)
            worker = served.children("worker")[0]
            os.kill(worker, signal.SIGKILL)
            assert wait_for(lambda: served.children("worker") not in ([], [worker]), 5)
        finally:
            os.kill(engine, signal.SIGCONT)
