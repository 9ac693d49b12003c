"""Upstreams that close connections, die and come back, or hold damaged files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from finetune_assets.environment import ROOT
from finetune_assets.registry.traffic import requests
from finetune_assets.serving import upstream as asking
from finetune_assets.serving.upstream import Target
from finetune_assets_tests.serving.shop import Shop, wait_for
from finetune_assets_tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.timeout(120)


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
            assert wait_for(lambda: len(shop.values(requests, "request_id", outcome="error")) == 2)
    finally:
        end(process)


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
    assert shop.values(requests, "version") == {good}
    assert "error" in shop.values(requests, "outcome")  # the candidate's users: its guard will take it back
