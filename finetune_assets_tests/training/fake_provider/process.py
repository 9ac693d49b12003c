"""Starting the fake as a process of its own, and talking to it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from finetune_assets.environment import ROOT

KEY = "sk-fake-0123456789abcdef"


@dataclass
class FakeProvider:
    """A running fake."""

    port: int

    @property
    def url(self) -> str:
        """The API's address, as OPENAI_BASE_URL has it."""
        return f"http://127.0.0.1:{self.port}/v1"

    def fault(self, on: str, do: str, **more: Any) -> None:
        """Queues a fault for the next requests of a kind, e.g. `POST /fine_tuning/jobs`."""
        self._post("/_fake/faults", {"on": on, "do": do, **more})

    def set(self, **values: Any) -> None:
        """Attributes of its state."""
        self._post("/_fake/set", values)

    def reset(self) -> None:
        """Forgets everything."""
        self._post("/_fake/reset", {})

    def clone(self, times: int) -> None:
        """Copies of its only job."""
        self._post("/_fake/clone", {"times": times})

    def forget_model(self, model: str) -> None:
        """A tuned model that somebody deleted."""
        self._post("/_fake/forget_model", {"model": model})

    def state(self, **options: Any) -> dict[str, Any]:
        """Jobs, files, requests, violations."""
        return self._post("/_fake/state", options)

    @property
    def jobs(self) -> list[dict[str, Any]]:
        """All jobs ever created."""
        return self.state()["jobs"]

    def wait_hanging(self, seconds: float = 60) -> None:
        """Until somebody waits for an answer that never comes."""
        end = time.monotonic() + seconds
        while not self.state()["hanging"]:
            if time.monotonic() > end:
                raise AssertionError("nobody asked for what hangs")
            time.sleep(0.05)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())


@contextmanager
def start() -> Iterator[FakeProvider]:
    """A fake on a free port of the loopback, ended with the block."""
    command = [sys.executable, "-m", "finetune_assets_tests.training.fake_provider.server"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield FakeProvider(int(process.stdout.readline()))
    finally:
        process.terminate()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
