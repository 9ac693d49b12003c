"""A store with versions, `finetune serve` as a real process on it, and an upstream whose faults a test chooses."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from finetune_assets.environment import ROOT
from finetune_assets.registry import Ledger
from finetune_assets.serving import control
from finetune_assets.training.publish import content_hash, publish

SETTINGS = """
select: {{tenant: clinica_aurora}}
language: es
base_model: {base}
benchmark: {{max_new_tokens: 12}}
rollout: {{min_requests: 20, min_users: 5, min_hours: 0}}
serving: {{upstream: {upstream}, timeout_seconds: 3, first_token_seconds: 2}}
rules:
  - name: nada de recetas
    not_contains: ["amoxicilina"]
"""
TENANTS = {"clinica_aurora": "dental", "clinica_sol": "dental"}


@dataclass
class Shop:
    """A store in a folder of the test."""

    folder: Path
    upstream: str = "embedded"
    base: str = "data/base_model"
    database: str | None = None
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.home, self.assistants = self.folder / "home", self.folder / "assistants"
        for made in (self.home / "corpus", self.assistants):
            made.mkdir(parents=True, exist_ok=True)
        (self.home / "corpus" / "tenants.json").write_text(json.dumps(TENANTS))
        self.settings()
        self.url = self.database or f"sqlite:///{self.home / 'ledger.db'}"
        self.environment = {
            **os.environ,
            "FINETUNE_HOME": str(self.home),
            "FINETUNE_ASSISTANTS": str(self.assistants),
            "FINETUNE_DATABASE_URL": self.url,
            "FINETUNE_SOURCE": "data/sample",
            "HF_HUB_OFFLINE": "1",
            "FINETUNE_ENGINE_THREADS": "1",
        }

    def settings(self, more: str = "") -> None:
        (self.assistants / "aurora.yaml").write_text(SETTINGS.format(base=self.base, upstream=self.upstream) + more)

    @contextmanager
    def ledger(self) -> Generator[Ledger]:
        book = Ledger(self.url)
        try:
            yield book
        finally:
            book.close()

    def version(self, letter: str, model: Path | None = None, verdict: str = "serve", assistant: str = "aurora") -> str:
        """Registers a version: of a model folder, or of nothing but a name."""
        spec_hash = hashlib.sha256(f"{assistant} {letter}".encode()).hexdigest()
        job_folder = self.home / "jobs" / spec_hash
        with self.ledger() as book:
            spec = {
                "assistant": assistant,
                "tenant_id": None,
                "dataset_id": "ds",
                "dataset_fingerprint": "f" * 16,
                "provider": "local",
                "base_model": self.base,
                "hyperparameters": {},
                "plan": {},
                "spec_hash": spec_hash,
            }
            job = book.set_job(book.open_job(spec).id, "succeeded")
            digest = letter * 64
            if model is not None:
                (job_folder / "model").parent.mkdir(parents=True, exist_ok=True)
                (job_folder / "model").symlink_to(model)
                digest = content_hash(model, "f" * 16)
            made = book.mint_version(job, digest, self.home / "models" / assistant)
            book.set_job(job.id, "succeeded", fine_tuned_model=made.version)
            if model is not None:
                publish(job_folder, Path(made.path))
                for file in Path(made.path).rglob("*"):  # not the model's own files: a test damages them
                    if file.is_file():
                        data = file.read_bytes()
                        file.unlink()
                        file.write_bytes(data)
            book.register(assistant, made.version, verdict, ["said so"], "report.html")
            return made.version

    def roll_out(self, version: str, step: str = "shadow", assistant: str = "aurora") -> None:
        """Brings a version to a step by a person's hand."""
        from finetune_assets.assistants import load_assistant

        settings = load_assistant(self.assistants, assistant, TENANTS).rollout
        with self.ledger() as book:
            control.start(book, assistant, version, "test", "test")
            while step not in (book.rollout(assistant).step, "done") or (step == "done" and book.rollout(assistant).is_open):
                control.advance(book, assistant, settings, "test", "test")

    @contextmanager
    def served(self, *options: str) -> Generator[Served]:
        """`finetune serve` on a free port, ended with SIGTERM."""
        command = [sys.executable, "-m", "finetune_assets.cli", "serve", "--port", "0", *options]
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        lines: list[str] = []
        ready = threading.Event()
        found: list[str] = []

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                lines.append(line)
                place = re.search(r"Serving on (http://\S+)", line)
                if place:
                    found.append(place[1])
                    ready.set()
            ready.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            assert ready.wait(60), lines
            assert found, "".join(lines)
            with httpx.Client(base_url=found[0], timeout=20, trust_env=False) as client:
                yield Served(process, found[0], client, lines)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    raise
            reader.join(5)
            assert process.stderr is not None
            process.stderr.close()


@dataclass
class Served:
    """A running router."""

    process: subprocess.Popen[str]
    url: str
    client: httpx.Client
    lines: list[str]

    def ask(self, text: str = "Hola, ¿tienen hora mañana?", user: str = "ana", **more: Any) -> httpx.Response:
        body = {"model": "aurora", "user": user, "messages": [{"role": "user", "content": text}], **more}
        return self.client.post("/v1/chat/completions", content=json.dumps(body))  # ASCII: half characters too

    def children(self, name: str) -> list[int]:
        """Process ids of the router's workers, or of the engine."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in found if f"serving.{name}" in Path(f"/proc/{pid}/cmdline").read_text()]


def wait_for(question: Any, seconds: float = 10.0) -> Any:
    """The first true answer."""
    end = time.monotonic() + seconds
    while True:
        answer = question()
        if answer or time.monotonic() > end:
            return answer
        time.sleep(0.02)


class Upstream:
    """An OpenAI-compatible server, whose streams begin with the role alone; `faults`: model's name to what goes wrong: error,
    hang, half, slow, empty, busy, shapeless, tool, toolcut, say:TEXT, status:NUMBER:MESSAGE; of a stream that has named its
    role: begun:half, begun:hang, begun:error. `shapes`: model's name to an answer that is sent as it stands."""

    def __init__(self) -> None:
        self.faults: dict[str, str] = {}
        self.shapes: dict[str, str] = {}
        self.seen: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                outer.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.seen.append(body)
        fault = next((f for name, f in self.faults.items() if name in body["model"]), "")
        if fault == "hang":
            time.sleep(4)
        if fault in ("error", "busy"):
            return self._send(handler, 500 if fault == "error" else 429, {"error": {"message": fault}})
        if fault.startswith("status:"):
            _, status, message = fault.split(":", 2)
            error = {"message": message, "type": "invalid_request_error", "param": "messages", "code": "context_length_exceeded"}
            return self._send(handler, int(status), {"error": error})
        shape = next((s for name, s in self.shapes.items() if name in body["model"]), None)
        if shape is not None:
            return self._shape(handler, shape, bool(body.get("stream")))
        said = body["messages"][-1]["content"]
        text = "" if fault == "empty" else fault[4:] if fault.startswith("say:") else f"{body['model']} oye: {said}"
        usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
        if not body.get("stream"):
            message = None if fault == "shapeless" else {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return self._send(handler, 200, {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})
        return self._stream(handler, fault, text, usage)

    def _shape(self, handler: BaseHTTPRequestHandler, shape: str, stream: bool) -> None:
        event = shape.replace('"message"', '"delta"', 1)
        data = (f"data: {event}\n\ndata: [DONE]\n\n" if stream else shape).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _stream(self, handler: BaseHTTPRequestHandler, fault: str, text: str, usage: dict[str, int]) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        delta = {"role": "assistant", "content": ""}
        self._event(handler, {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        if fault == "begun:hang":
            time.sleep(4)
        if fault == "begun:error":
            handler.wfile.write(b'data: {"error": {"message": "out of memory"}}\n\n')
        if fault.startswith("begun:"):
            return
        if fault.startswith("tool"):  # in pieces, as OpenAI's stream has them; `toolcut`: broken off
            for piece in ({"id": "c1", "function": {"name": "book", "arguments": ""}}, {"function": {"arguments": "{}"}}):
                delta = {"role": "assistant", "content": None, "tool_calls": [{"index": 0, **piece}]}
                self._event(handler, {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            if fault == "toolcut":
                return
        words = [] if fault.startswith("tool") else text.split(" ")
        if fault == "shapeless":
            handler.wfile.write(b"data: 5\n\n")
        for n, word in enumerate(words):
            if fault == "half" and n == len(words) // 2:
                return
            time.sleep(0.1 if fault == "slow" else 0)
            delta = {"content": word if n == 0 else f" {word}"}
            self._event(handler, {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        self._event(handler, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": usage})
        handler.wfile.write(b"data: [DONE]\n\n")

    def _event(self, handler: BaseHTTPRequestHandler, value: dict[str, Any]) -> None:
        value = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", **value}
        handler.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        handler.wfile.flush()

    def _send(self, handler: BaseHTTPRequestHandler, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)
