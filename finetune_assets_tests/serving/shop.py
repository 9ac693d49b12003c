"""A store with versions, and `finetune serve` as a real process on it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from finetune_assets.assistants import load_assistant
from finetune_assets.environment import ROOT, Environment
from finetune_assets.registry import Ledger
from finetune_assets.registry.traffic import requests
from finetune_assets.serving import control
from finetune_assets.serving.assignment import assign, place
from finetune_assets.serving.intake import Options
from finetune_assets.serving.router import Router
from finetune_assets.serving.writer import transfer
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
  - name: breve donde se pide
    when: breve
    max_chars: 40
  - name: no en inglés
    language: es
  - name: saludo
    contains_any: ["buenos días"]
  - name: urgencias al hospital
    intent: emergency
    max_chars: 1
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

    def sol(self, before: str = "", after: str = "") -> None:
        """A second assistant, of clinica_sol, with `after` for `before` in its settings."""
        text = (self.assistants / "aurora.yaml").read_text().replace("clinica_aurora", "clinica_sol")
        assert before in text
        (self.assistants / "sol.yaml").write_text(text.replace(before, after) if before else text)

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
        with self.ledger() as book:
            control.start(book, assistant, version, "test", "test")
            while step not in (book.rollout(assistant).step, "done") or (step == "done" and book.rollout(assistant).is_open):
                self.advance(assistant)

    def advance(self, assistant: str = "aurora") -> None:
        """A person's yes to the next step."""
        with self.ledger() as book:
            control.advance(book, assistant, load_assistant(self.assistants, assistant, TENANTS).rollout, "test", "test")

    def two_versions(self, step: str) -> tuple[str, str]:
        """The first is champion, the second at a step."""
        first, second = self.version("a"), self.version("b")
        self.roll_out(first, "done")
        self.roll_out(second, step)
        return first, second

    def rows(self, table: sa.Table, **where: Any) -> list[dict[str, Any]]:
        query = sa.select(table).where(*(table.c[name] == value for name, value in where.items()))
        with self.ledger() as book, book.engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def values(self, table: sa.Table, column: str, **where: Any) -> set[Any]:
        return {row[column] for row in self.rows(table, **where)}

    def logged(self, request_id: str) -> dict[str, Any]:
        """A request's row, once it is in the ledger."""
        return wait_for(lambda: self.rows(requests, request_id=request_id))[0]

    def user_of(self, arm: str) -> str:
        """A user who is assigned this arm."""
        with self.ledger() as book:
            state = book.rollout("aurora")
        return next(f"u{n}" for n in range(1000) if assign(state, "clinica_aurora", f"u{n}").name == arm)

    def user_between(self, low: float, high: float) -> str:
        """A user whom shares from `high` on give the candidate, and those up to `low` do not."""
        with self.ledger() as book:
            salt = book.rollout("aurora").salt or ""
        return next(u for u in (f"u{n}" for n in range(999)) if low < place(salt, "clinica_aurora", u) < high)

    @asynccontextmanager
    async def inside(self, engine_url: str = "", open_door: bool = True, **head: str) -> AsyncGenerator[Inside]:
        """A router within the test's own process, without sockets, judge and engine."""
        router = Router(Environment.read(self.environment), Options(engine_url, open_door))
        transport = httpx.ASGITransport(app=router)
        async with (
            router._lifespan(router.app),  # pyright: ignore[reportPrivateUsage]
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=head) as client,
        ):
            yield Inside(router, client)
        with self.ledger() as book:
            transfer(self.home / "serving" / "journal", book.engine)

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
class Inside:
    """A router in the test's own process."""

    router: Router
    client: httpx.AsyncClient

    async def ask(self, text: str = "Hola", user: str = "ana", **more: Any) -> httpx.Response:
        body = {"model": "aurora", "user": user, "messages": [{"role": "user", "content": text}], **more}
        return await self.client.post("/v1/chat/completions", json=body)


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


@dataclass
class Crowd:
    """What people were answered, and when they had asked; how many connections broke."""

    answers: list[tuple[float, httpx.Response]] = field(default_factory=list)
    broken: int = 0

    @property
    def acknowledged(self) -> set[str]:
        """Ids of the replies they got."""
        return {answer.json()["id"] for _, answer in self.answers if answer.status_code == 200}

    def record(self, put: Callable[[str, object], None], stored: set[str]) -> None:
        """Into the test's report: requests sent, acknowledged, and of those lost (`benchmarks/faults.py` shows them)."""
        put("sent", len(self.answers) + self.broken)
        put("acknowledged", len(self.acknowledged))
        put("lost", len(self.acknowledged - stored))


@contextmanager
def crowd(url: str, count: int = 4) -> Generator[Crowd]:
    """People who chat until the block ends, each time as somebody new over a new connection, so that every worker is met."""
    made, ended = Crowd(), threading.Event()

    def chat(number: int) -> None:
        for n in range(100_000):
            if ended.is_set():
                return
            body = {"model": "aurora", "user": f"{number}-{n}", "messages": [{"role": "user", "content": "Hola"}]}
            start = time.monotonic()
            try:
                made.answers.append((start, httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=10)))
            except httpx.HTTPError:
                made.broken += 1
                time.sleep(0.02)

    with ThreadPoolExecutor(count) as pool:
        going = [pool.submit(chat, number) for number in range(count)]
        try:
            yield made
        finally:
            ended.set()
    for one in going:
        one.result()


def wait_for(question: Any, seconds: float = 10.0) -> Any:
    """The first true answer."""
    end = time.monotonic() + seconds
    while True:
        answer = question()
        if answer or time.monotonic() > end:
            return answer
        time.sleep(0.02)


@contextmanager
def postgres() -> Generator[tuple[str, Any]]:
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
