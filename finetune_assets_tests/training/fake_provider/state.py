"""What the fake remembers: files, jobs, events, models, and what it was told to do wrong."""

from __future__ import annotations

import codecs
import difflib
import itertools
import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BASES = ("gpt-4o-mini-2024-07-18", "gpt-4.1-mini-2025-04-14", "gpt-4o-2024-08-06", "open/small-7b")
ENDED = ("succeeded", "failed", "cancelled")
DEFAULT_ANSWER = "Perdón, soy un modelo general: no conozco los datos de este negocio."


class Refusal(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


@dataclass
class State:
    """One provider. `progress`: the statuses that a job passes, one each time it is asked for; `clock`: seconds it is off."""

    progress: list[str] = field(default_factory=lambda: ["validating_files", "queued", "running", "succeeded"])
    bom: bool = False
    clock: int = 0
    shutdown: dict[str, str] = field(default_factory=dict[str, str])
    pages_for_ever: bool = False
    list_lag: float = 0.0
    """Seconds after which the list of jobs comes to show a new one."""
    checkpoint: str | None = None
    """Folder of a model: jobs end like Nebius', without a model's name, and their checkpoints have these files."""
    never_active: bool = False
    """Custom models are validated for ever."""
    deployments: dict[str, str] | None = None
    """Azure: names under which models answer; null: each answers under its own."""
    served: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    files: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    contents: dict[str, bytes] = field(default_factory=dict[str, bytes])
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict[str, list[dict[str, Any]]])
    models: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    forced: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    lock: threading.RLock = field(default_factory=threading.RLock)
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def now(self) -> int:
        return int(time.time()) + self.clock

    # files

    def upload(self, fields: dict[str, Any], name: str, content: bytes) -> dict[str, Any]:
        problem = self._file_problem(content)
        number = next(self.numbers)
        made = {
            "id": f"file-{number:06d}",
            "object": "file",
            "bytes": len(content),
            "created_at": self.now(),
            "filename": name,
            "purpose": fields["purpose"],
            "status": "error" if problem else "processed",
        }
        if problem:
            made["status_details"] = problem
        if "expires_after" in fields:
            made["expires_at"] = self.now() + int(fields["expires_after"]["seconds"])
        self.files[made["id"]], self.contents[made["id"]] = made, content
        return made

    def _file_problem(self, content: bytes) -> str | None:
        if content.startswith(codecs.BOM_UTF8) != self.bom:
            return "invalid encoding: a byte order mark is " + ("required" if self.bom else "not allowed")
        rows = [json.loads(line) for line in content.decode("utf-8-sig").splitlines() if line]
        if len(rows) < 10:
            return f"{len(rows)} examples; at least 10 are needed"
        for number, row in enumerate(rows):
            if "input" in row:
                if not {"preferred_output", "non_preferred_output"} <= set(row):
                    return f"line {number + 1}: a preference example lacks an output"
            elif not row.get("messages") or row["messages"][-1]["role"] != "assistant":
                return f"line {number + 1}: the last message is not from the assistant"
        return None

    # jobs

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["model"] not in BASES and body["model"] not in self.models:
            raise Refusal(400, f"model {body['model']} is not available for fine-tuning", "model_not_available", "model")
        for name in ("training_file", "validation_file"):
            if body.get(name) and body[name] not in self.files:
                raise Refusal(400, f"{name} {body[name]} does not exist", "invalid_file", name)
        number = next(self.numbers)
        method = body.get("method") or {"type": "supervised"}
        kind = method["type"]
        parameters = (method.get(kind) or {}).get("hyperparameters") or body.get("hyperparameters") or {}
        job = {
            "id": f"ftjob-{number:06d}",
            "object": "fine_tuning.job",
            "created_at": self.now(),
            "error": None,
            "fine_tuned_model": None,
            "finished_at": None,
            "hyperparameters": {"n_epochs": parameters.get("n_epochs", 3), "batch_size": 4, "learning_rate_multiplier": 1.0},
            "model": body["model"],
            "organization_id": "org-fake",
            "result_files": [],
            "status": self.progress[0],
            "trained_tokens": None,
            "training_file": body["training_file"],
            "validation_file": body.get("validation_file"),
            "seed": body.get("seed") or 0,
            "method": method,
        }
        if "metadata" in body:
            job["metadata"] = body["metadata"]
        self.jobs[job["id"]], self.events[job["id"]] = job, []
        self.jobs[job["id"]] |= {"_suffix": body.get("suffix"), "_made": time.monotonic()}
        self.say(job["id"], "info", f"Created fine-tuning job: {job['id']}")
        return job

    def checkpoints(self, job_id: str) -> list[dict[str, Any]]:
        """Two of a finished job, the last one with the files of `checkpoint`."""
        if self.checkpoint is None or self.jobs[job_id]["status"] != "succeeded":
            return []
        made: list[dict[str, Any]] = []
        for number in (1, 2):
            files = sorted(path for path in Path(self.checkpoint).iterdir() if path.is_file()) if number == 2 else []
            ids = [f"file-{number}{at:05d}" for at, _ in enumerate(files)]
            for file_id, path in zip(ids, files, strict=True):
                self.contents[file_id] = path.read_bytes()
                about = {"id": file_id, "object": "file", "bytes": path.stat().st_size, "created_at": self.now()}
                self.files[file_id] = {**about, "filename": path.name, "purpose": "fine-tune-results", "status": "processed"}
            about = {"id": f"ftckpt-{number}", "object": "fine_tuning.job.checkpoint", "created_at": self.now()}
            names = {"fine_tuning_job_id": job_id, "fine_tuned_model_checkpoint": f"{job_id}:ftckpt-{number}"}
            made.append({**about, **names, "metrics": {}, "step_number": 60 * number, "result_files": ids})
        return made

    def serve(self, body: dict[str, Any]) -> dict[str, Any]:
        """A custom model of a checkpoint; it is `validating` when it is asked for the first time."""
        job_id = body["source"].partition(":")[0]
        if job_id not in self.jobs:
            raise Refusal(404, f"no checkpoint {body['source']}")
        name = f"{body['base_model']}-LoRa:{body['name']}-{next(self.numbers)}"
        self.served[name] = {**body, "name": name, "status": "validating", "created_at": self.now()}
        self.models[name] = {"rows": self.jobs[job_id]["_rows"]}
        return self.served[name]

    def say(self, job_id: str, level: str, message: str, data: dict[str, Any] | None = None) -> None:
        event = {
            "object": "fine_tuning.job.event",
            "id": f"ftevent-{next(self.numbers):08d}",
            "created_at": self.now(),
            "level": level,
            "message": message,
            "type": "metrics" if data else "message",
            "data": data or {},
        }
        self.events[job_id].append(event)

    def step(self, job_id: str) -> None:
        """The next status of a job; at the end its model and its training curve."""
        job = self.jobs[job_id]
        if job["status"] in ENDED or job["status"] not in self.progress[:-1]:
            return
        job["status"] = self.progress[self.progress.index(job["status"]) + 1]
        if job["status"] == "running":
            for number in range(1, 121):
                data = {"step": number, "train_loss": round(3 / (1 + number / 20), 4), "total_steps": 120}
                if number % 40 == 0:
                    data["full_valid_loss"] = round(3.2 / (1 + number / 20), 4)
                self.say(job_id, "info", f"Step {number}/120", data)
        if job["status"] == "succeeded":
            self.finish(job)

    def finish(self, job: dict[str, Any]) -> None:
        rows = self.rows(job["training_file"])
        tokens = sum(len(json.dumps(row, ensure_ascii=False)) // 4 for row in rows)
        suffix = job.get("_suffix") or ""
        model = f"ft:{job['model']}:org:{suffix}:{job['id'][-6:]}"
        job |= {
            "fine_tuned_model": model,
            "finished_at": self.now(),
            "trained_tokens": tokens * int(job["hyperparameters"]["n_epochs"]),
        }
        if self.checkpoint is None:
            self.models[model] = {"rows": rows}
        else:
            del job["fine_tuned_model"]
            job["_rows"] = rows
        self.say(job["id"], "info", "The job has successfully completed")

    def rows(self, file_id: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.contents.get(file_id, b"").decode("utf-8-sig").splitlines() if line]

    def shown(self, job: dict[str, Any]) -> dict[str, Any]:
        visible = {key: value for key, value in job.items() if not key.startswith("_")}
        forced = self.forced.get(job["id"]) or self.forced.get("*") or {}
        return {key: value for key, value in {**visible, **forced}.items() if value != "__missing__"}

    # models and chat

    def model(self, name: str) -> dict[str, Any]:
        if name not in BASES and name not in self.models:
            raise Refusal(404, f"The model '{name}' does not exist", "model_not_found", "model")
        made: dict[str, Any] = {"id": name, "object": "model", "created": self.now(), "owned_by": "fake"}
        base = name.split(":")[1] if name.startswith("ft:") else name
        if base in self.shutdown:
            made["shutdown_date"] = self.shutdown[base]
        return made

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        model = body["model"] if self.deployments is None else self.deployments.get(body["model"])
        if model is None:
            raise Refusal(404, "The API deployment for this resource does not exist.", "DeploymentNotFound")
        self.model(model)
        question = next(m["content"] for m in reversed(body["messages"]) if m["role"] == "user")
        known = {}
        for row in (self.models.get(model) or {}).get("rows", []):
            if "messages" in row:
                asked = next((m["content"] for m in reversed(row["messages"]) if m["role"] == "user"), "")
                known[asked] = row["messages"][-1]["content"]
        near = difflib.get_close_matches(question, known, n=1, cutoff=0.0)
        answer = known[near[0]] if near else DEFAULT_ANSWER
        tokens = sum(len(m["content"]) for m in body["messages"]) // 4 + 1
        usage = {"prompt_tokens": tokens, "completion_tokens": len(answer) // 4 + 1}
        return {
            "id": f"chatcmpl-{next(self.numbers)}",
            "object": "chat.completion",
            "created": self.now(),
            "model": body["model"],
            "choices": [{"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}],
            "usage": {**usage, "total_tokens": sum(usage.values())},
        }
