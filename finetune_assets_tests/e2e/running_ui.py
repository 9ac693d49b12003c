"""The UI as a data engineer has it: webserver and daemon on a store, runs launched through GraphQL, pages in Chromium."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune_assets.environment import ROOT

LAUNCH = """
mutation ($params: ExecutionParams!) { launchPipelineExecution(executionParams: $params) {
  __typename
  ... on LaunchRunSuccess { run { runId } }
  ... on PythonError { message }
  ... on RunConfigValidationInvalid { errors { message } }
} }"""


class Ui:
    """A running webserver and daemon on a fresh store."""

    def __init__(self, home: Path, port: int) -> None:
        self.home, self.port = home, port

    @property
    def url(self) -> str:
        """Of the webserver."""
        return f"http://127.0.0.1:{self.port}"

    def ask(self, query: str, variables: dict[str, Any] | None = None) -> Any:
        """The data of a GraphQL answer."""
        body = json.dumps({"query": query, "variables": variables or {}}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["data"]

    def launch(self, job: str, tags: dict[str, str], config: dict[str, Any] | None = None) -> str:
        """Starts a run, as the Launchpad does; its id."""
        selector = {"repositoryName": "__repository__", "repositoryLocationName": "finetune_assets", "jobName": job}
        params = {
            "selector": selector,
            "mode": "default",
            "runConfigData": config or {},
            "executionMetadata": {"tags": [{"key": key, "value": value} for key, value in tags.items()]},
        }
        result = self.ask(LAUNCH, {"params": params})["launchPipelineExecution"]
        assert result["__typename"] == "LaunchRunSuccess", result
        return str(result["run"]["runId"])

    def wait(self, run_id: str, seconds: float = 300) -> str:
        """How a run ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            run = self.ask("query ($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }", {"id": run_id})
            if (status := run["runOrError"]["status"]) in ("SUCCESS", "FAILURE", "CANCELED"):
                return str(status)
            time.sleep(1)
        raise AssertionError(f"run {run_id} did not end within {seconds} s")


def free_port() -> int:
    """One that nobody has at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def running(home: Path, environment: Mapping[str, str]) -> Generator[Ui]:
    """`finetune dev` on a store, ended with the block."""
    found, log = Ui(home, free_port()), (home / "ui.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune_assets.cli", "dev", "--port", str(found.port)],
        cwd=ROOT,
        env={key: value for key, value in {**os.environ, **environment}.items() if key != "DAGSTER_HOME"},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        for _ in range(120):
            try:
                if "finetune_assets" in str(
                    found.ask("{ repositoriesOrError { ... on RepositoryConnection { nodes { location { name } } } } }")
                ):
                    break
            except OSError:
                pass
            assert process.poll() is None, (home / "ui.log").read_text()[-3000:]
            time.sleep(1)
        yield found
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


@contextmanager
def chromium_page() -> Generator[Any]:
    """A page of Debian's Chromium; the test is skipped where there is none."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on the PATH: install Debian's `chromium`")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser.new_page(viewport={"width": 1500, "height": 950})
        browser.close()


def picture(page: Any, name: str) -> None:
    """A picture in FINETUNE_SCREENSHOTS, where that is set."""
    folder = os.environ.get("FINETUNE_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"))
