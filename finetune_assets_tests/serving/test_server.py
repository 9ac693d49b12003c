"""The process that looks after the others: models that cannot be loaded, rollouts that cannot be judged, an engine that hangs."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from finetune_assets.environment import Environment
from finetune_assets.serving import server as servers
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
