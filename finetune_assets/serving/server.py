"""`finetune serve`: starts the embedded engine, the journal's writer and the router's workers, judges the rollouts, and ends all.

The listening socket belongs to this process, so a worker that dies is replaced without a refused connection. SIGTERM: workers
take nothing new and end their chats, then the engine goes.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from finetune_assets.assistants import Assistant, assistant_names, load_assistant
from finetune_assets.environment import Environment
from finetune_assets.errors import FinetuneError, ServingError
from finetune_assets.registry import Ledger
from finetune_assets.registry.traffic import api_keys
from finetune_assets.serving import control, experiments
from finetune_assets.serving.intake import drain_seconds
from finetune_assets.serving.models import model_name, tenants
from finetune_assets.storage import Store
from finetune_assets.worker.__main__ import set_environment

log = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
JUDGE = 2.0
"""Seconds between two judgements of all open rollouts."""
REST = 4.0
"""Times what a judgement took, at least: it reads all requests of a step."""
LOAD_AGAIN = 30.0
"""Seconds until a model that could not be loaded is tried again."""
METRICS = "finetune-metrics"
LAST_ROWS = 25.0
"""Seconds that a process has for what is left to write, after a worker's chats have ended."""
RESTART = 1.0
"""Least seconds between two starts of the same child."""


@dataclass(frozen=True)
class Settings:
    """How the router is started."""

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    judge: bool = True
    simulation: bool = False


class Child:
    """One process that is started again when it dies."""

    def __init__(self, command: list[str], sockets: list[socket.socket], environment: dict[str, str]) -> None:
        self.command, self.sockets, self.environment = command, sockets, environment
        self.started = 0.0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self.started = time.monotonic()
        fds = [one.fileno() for one in self.sockets]
        return subprocess.Popen(self.command, pass_fds=fds, env=self.environment, stdin=subprocess.DEVNULL)

    @property
    def name(self) -> str:
        """engine, writer or worker."""
        return self.command[2].rpartition(".")[2]

    def look_after(self, say: Callable[[str], None]) -> bool:
        """Starts it again if it has ended; whether it had to."""
        if self.process.poll() is None or time.monotonic() - self.started <= RESTART:
            return False
        say(f"{self.name} {self.process.pid} ended with {self.process.returncode}; starting it again.")
        self.process = self._start()
        return True


class Server:
    """Engine, writer, workers and judge of one store. The main thread looks after the processes and waits for nothing else:
    rollouts are judged (and people told) in a second thread, models loaded in a third."""

    def __init__(self, environment: Environment, settings: Settings, say: Callable[[str], None]) -> None:
        """Raises ServingError for an address that is taken, or open to others without an API key; LedgerError."""
        self.environment, self.settings, self.say = environment, settings, say
        self.ledger = Ledger(environment.database_url)
        self.stop = False
        if settings.host not in LOOPBACK and not self._has_keys():
            raise ServingError(
                f"--host {settings.host} is open to others, and there is no API key yet: make one with "
                "`finetune keys add --tenant …`, or serve on 127.0.0.1."
            )
        if settings.simulation and settings.host not in LOOPBACK:
            raise ServingError("--simulation lets clients set the time of their requests; it is for 127.0.0.1 only.")
        self.socket = _listen(settings.host, settings.port)
        self.engine_socket = _listen("127.0.0.1", 0)
        self.port = int(self.socket.getsockname()[1])
        self.engine_url = f"http://127.0.0.1:{self.engine_socket.getsockname()[1]}"
        self.children: list[Child] = []
        self.loaded: set[str] = set()
        self.not_loaded: dict[str, tuple[float, str]] = {}
        """Models that could not be loaded: when it was tried, and why not."""
        self.tried = threading.Event()
        """Set when all models have been asked for once."""
        self.threads: list[threading.Thread] = []
        self.drain = 0.0

    def run(self) -> None:
        """Serves until SIGTERM or SIGINT."""
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, self._end)
        environment = self._child_environment()
        if any(a.serving.upstream == "embedded" for a in self._assistants().values()):
            fd = str(self.engine_socket.fileno())
            self.children.append(
                Child([sys.executable, "-m", "finetune_assets.serving.engine", "--fd", fd], [self.engine_socket], environment)
            )
            self._in_thread(self._load_models, JUDGE)
            while not self.stop and not self.tried.wait(0.1):
                self._look_after()
        self.children.append(Child([sys.executable, "-m", "finetune_assets.serving.writer"], [], environment))
        worker = [sys.executable, "-m", "finetune_assets.serving.worker", "--fd", str(self.socket.fileno())]
        worker += ["--engine", f"{self.engine_url}/v1"]
        worker += ["--open-door"] if self.settings.host in LOOPBACK else []
        worker += ["--simulation"] if self.settings.simulation else []
        worker += ["--workers", str(self.settings.workers)]
        self.children += [Child(worker, [self.socket], environment) for _ in range(self.settings.workers)]
        self._wait_ready()
        self.say(f"Serving on {self._url(self.settings.host)}  (dashboard: /dashboard, {self.settings.workers} worker(s))")
        if self.settings.judge:
            self._in_thread(self._judge, JUDGE / 8 if self.settings.simulation else JUDGE, REST)
        try:
            while not self.stop:
                time.sleep(0.1)
                self._look_after()
        finally:
            self._shut_down()

    def _look_after(self) -> None:
        for child in self.children:
            if child.look_after(self.say) and child.name == "engine":
                self.loaded, self.not_loaded = set(), {}

    def _in_thread(self, work: Callable[[], None], seconds: float, rest: float = 0.0) -> None:
        """Does it now and then every so many seconds, until the end; pauses `rest` times what it took at least."""

        def repeat() -> None:
            while not self.stop:
                start, pause = time.monotonic(), seconds
                try:
                    work()
                    pause = max(seconds, rest * (time.monotonic() - start))
                except Exception as error:
                    log.warning("%s failed, and is tried again: %s", work.__name__.strip("_"), _line(error))
                end = time.monotonic() + pause
                while not self.stop and time.monotonic() < end:
                    time.sleep(0.05)

        thread = threading.Thread(target=repeat, daemon=True)
        self.threads.append(thread)
        thread.start()

    def _judge(self) -> None:
        """One look at every rollout. An assistant whose rollout cannot be judged holds up no other."""
        for name, assistant in self._assistants().items():
            try:
                move = control.step(self.ledger, name, assistant.rollout, "router")
            except Exception as error:
                log.warning("The rollout of %s could not be judged: %s", name, _line(error))
                continue
            if move is not None:
                self.say(move.text)

    def _load_models(self) -> None:
        """Has the engine load what it will be asked for. One that cannot be loaded is told, and tried again later; the router
        falls back."""
        loaded, failed = self.loaded, self.not_loaded  # of this engine: another begins with none
        names = {
            model_name(name, version)
            for name, assistant in self._assistants().items()
            if assistant.serving.upstream == "embedded"
            for version in self.asked_for(name, at_start=not loaded)
        }
        for name in sorted(names - loaded):
            at, before = failed.get(name, (-LOAD_AGAIN, ""))
            if self.stop or (before and time.monotonic() - at < LOAD_AGAIN):
                continue
            problem = self._load(name, wait=0.0 if self.tried.is_set() else 60.0)
            if problem is None:
                loaded.add(name)
                failed.pop(name, None)
                continue
            failed[name] = time.monotonic(), problem
            if problem != before:
                self.say(f"Model {name} is not served: {problem}")
        self.tried.set()

    def asked_for(self, assistant: str, at_start: bool = False) -> set[str | None]:
        """Versions that users of an assistant, or of its experiment, get; null: the base model. At the start of all, later of
        those that ever had a rollout."""
        state = self.ledger.rollout(assistant)
        found: set[str | None] = {state.champion} if state.generation or at_start else set()
        experiment = experiments.current(self.ledger, assistant)
        if experiment is not None:
            found |= {experiment["a"], experiment["b"]}
        return found | ({state.candidate} if state.candidate else set())

    def _load(self, name: str, wait: float) -> str | None:
        end = time.monotonic() + wait
        while True:
            try:
                _post(f"{self.engine_url}/load", {"model": name})
                return None
            except urllib.error.HTTPError as error:
                return str(json.loads(error.read() or b"{}").get("error", {}).get("message", error))
            except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
                if self.stop or time.monotonic() >= end:
                    return f"the engine does not answer ({error})"
                time.sleep(0.1)

    def _wait_ready(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and not self.stop:
            with contextlib.suppress(urllib.error.URLError, OSError):
                anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
                with urllib.request.urlopen(
                    f"{self._url(anywhere.get(self.settings.host, self.settings.host))}/readyz", timeout=2
                ):
                    return
            if any(child.process.poll() not in (None, 0) for child in self.children):
                self._shut_down()
                raise ServingError("A process of the router could not start; its own message stands above.")
            time.sleep(0.05)

    def _url(self, host: str) -> str:
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def _assistants(self) -> dict[str, Assistant]:
        store = Store(self.environment.home)
        known = tenants(store)
        found: dict[str, Assistant] = {}
        for name in sorted(
            {*assistant_names(self.environment.assistants), *(state.assistant for state in self.ledger.rollouts())}
        ):
            with contextlib.suppress(FinetuneError):  # a worker's log says what is wrong with it
                found[name] = load_assistant(self.environment.assistants, name, known)
        self.drain = drain_seconds(found.values())
        return found

    def _has_keys(self) -> bool:
        with self.ledger.engine.connect() as connection:
            query = sa.select(sa.func.count()).select_from(api_keys).where(api_keys.c.revoked_at.is_(None))
            return bool(connection.execute(query).scalar_one())

    def _child_environment(self) -> dict[str, str]:
        self.metrics = _metrics_folder()
        set_environment(0)  # threads of the engine sleep while they wait
        return {
            **os.environ,
            "PROMETHEUS_MULTIPROC_DIR": str(self.metrics),
            "FINETUNE_DIE_WITH_PARENT": str(os.getpid()),
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
            "TRANSFORMERS_VERBOSITY": "error",
        }

    def _end(self, *_: Any) -> None:
        self.stop = True

    def _shut_down(self) -> None:
        """Workers first, so that they can end their chats; then the writer, with what they left; then the engine."""
        for name in ("worker", "writer", "engine"):
            group = [child for child in self.children if child.command[2].endswith(name)]
            for child in group:
                with contextlib.suppress(ProcessLookupError):
                    child.process.terminate()
            for child in group:
                try:
                    child.process.wait(timeout=self.drain + LAST_ROWS if name == "worker" else LAST_ROWS)
                except subprocess.TimeoutExpired:
                    child.process.kill()
                    child.process.wait()
        self.children.clear()
        for thread in self.threads:  # what they wait for has ended, or is a webhook
            thread.join(5)
        self.close()
        shutil.rmtree(self.metrics, ignore_errors=True)

    def close(self) -> None:
        """Lets go of the sockets and the ledger."""
        self.socket.close()
        self.engine_socket.close()
        self.ledger.close()


def _line(error: Exception) -> str:
    """The first line of what an error says: a driver's others hold the statement."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _metrics_folder() -> Path:
    """A folder for what the workers count, in memory where there is such a file system: they write through a mapping, and a
    process that does so on a full disk is killed by the kernel. Those that a killed router left are removed."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    for left in place.glob(f"{METRICS}-*-*"):
        if not Path("/proc", left.name.split("-")[2]).exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{METRICS}-{os.getpid()}-", dir=place))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    one = socket.socket(family, socket.SOCK_STREAM)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted connections inherit it; the server does not set it on a socket that it was handed: 40 ms more for each answer.
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        one.bind((host, port))
    except OSError as error:
        one.close()
        raise ServingError(f"{host}:{port} cannot be served on: {error.strerror}. Choose another --port.") from None
    one.listen(2048)
    one.set_inheritable(True)
    return one


def _post(url: str, value: dict[str, Any]) -> None:
    request = urllib.request.Request(url, json.dumps(value).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        answer.read()
