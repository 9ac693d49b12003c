"""`finetune chat`: a conversation with a model version, which a child process holds in memory."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from finetune_assets.assistants import load_assistant
from finetune_assets.corpus.forms import result_text
from finetune_assets.dataset.tool_calls import Message, Turn, messages_of
from finetune_assets.environment import Environment
from finetune_assets.errors import LaunchError, LedgerError
from finetune_assets.evaluation.called import calls
from finetune_assets.registry import Ledger, Version
from finetune_assets.storage import Store, read_json, write_json


@dataclass
class Chat:
    """A running model and the conversation so far, calls and their results in the corpus' text."""

    title: str
    process: subprocess.Popen[str]
    folder: tempfile.TemporaryDirectory[str]
    tools: list[Message] = field(default_factory=list[Message])
    turns: list[Turn] = field(default_factory=list[Turn])

    @classmethod
    def start(cls, environment: Environment, assistant: str, version: str | None) -> Chat:
        """Starts the model of `version`, or of the champion, or of the newest version. Raises LedgerError if there is none."""
        store = Store(environment.home)
        settings = load_assistant(environment.assistants, assistant, read_json(store.tenants) if store.tenants.exists() else {})
        chosen, role = choose(environment, assistant, version)
        folder = tempfile.TemporaryDirectory(prefix="finetune-chat-")
        spec = Path(folder.name) / "spec.json"
        write_json(
            spec,
            {
                "task": "chat",
                "output": folder.name,
                "model": chosen.path,
                "max_new_tokens": settings.benchmark.max_new_tokens,
                "seed": 0,
                "threads": 1,
            },
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "finetune_assets.worker", str(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        system = [("system", settings.system_prompt)] if settings.system_prompt else []
        session = cls(title(chosen, role), process, folder, settings.tools, system)
        session._ask(None)  # the first line says that the model is loaded
        return session

    def reply(self, text: str) -> str:
        """The model's answer to one more user message. Raises LaunchError if the model died."""
        self.turns.append(("user", text))
        reply = self.answer(messages_of(self.turns), self.tools)
        self.turns.append(("assistant", reply))
        return reply

    @property
    def called(self) -> list[str]:
        """Names of the functions that the last reply calls, whose results it waits for."""
        return [call["name"] for call in calls(self.turns[-1][1])] if self.turns else []

    def results(self, given: Sequence[str]) -> str:
        """The model's answer to the results of what it `called`. Raises LaunchError if the model died."""
        return self.reply("\n".join(result_text(name, text) for name, text in zip(self.called, given, strict=True)))

    def answer(self, messages: list[Message], tools: Sequence[Message] = ()) -> str:
        """The model's answer to a whole conversation, which this one is not. Raises LaunchError if the model died."""
        answer = self._ask({"messages": messages, "tools": list(tools)})
        if "error" in answer:
            raise LaunchError(f"The model of {self.title} could not answer: {answer['error']}")
        return str(answer["reply"])

    def _ask(self, question: dict[str, Any] | None) -> dict[str, Any]:
        """One line to the child, if any, and its answer. Raises LaunchError if it died."""
        stdin, stdout = cast("IO[str]", self.process.stdin), cast("IO[str]", self.process.stdout)
        line = ""
        with contextlib.suppress(BrokenPipeError):
            if question is not None:
                stdin.write(json.dumps(question) + "\n")
                stdin.flush()
            line = stdout.readline()
        if line:
            return json.loads(line)
        error = Path(self.folder.name) / "error.json"
        why = read_json(error)["message"] if error.exists() else f"exit code {self.process.wait()}"
        raise LaunchError(f"The model of {self.title} stopped: {why}")

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        cast("IO[str]", self.process.stdin).close()
        self.process.terminate()
        self.process.wait()
        cast("IO[str]", self.process.stdout).close()
        self.folder.cleanup()


def title(version: Version, role: str) -> str:
    """Who is talked to."""
    verdict = (version.verdict or "not benchmarked").replace("_", " ")
    return f"{version.assistant} {version.version} ({role}, verdict: {verdict})"


def choose(environment: Environment, assistant: str, version: str | None) -> tuple[Version, str]:
    """`version`, or the champion, or the newest version, and its role. Raises LedgerError if there is none."""
    ledger = Ledger(environment.database_url)
    try:
        champion = ledger.rollout(assistant).champion
        if version is not None:
            return ledger.version(assistant, version), "champion" if version == champion else "candidate"
        if champion is not None:
            return ledger.version(assistant, champion), "champion"
        known = ledger.versions(assistant)
    finally:
        ledger.close()
    if not known:
        raise LedgerError(f"{assistant} has no model yet; train one with `finetune run --assistant {assistant}`.")
    return known[0], "candidate"
