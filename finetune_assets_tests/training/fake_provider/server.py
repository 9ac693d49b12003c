"""The fake's HTTP side: routes, faults, and the check of every request and answer against the published description.

    POST /_fake/faults   {"on": "POST /fine_tuning/jobs", "do": …, "times": 1, …} queues a fault for the next such requests
    POST /_fake/set      attributes of the state (progress, bom, clock, shutdown, pages_for_ever, list_lag, forced, jobs)
    GET  /_fake/state    jobs, files, requests, violations

Faults: `error` {status, code, message, retry_after} answers instead of doing; `drop_before`, `drop_after` close the connection
without an answer, before or after doing; `error_after` does it and answers an error; `hang_before`, `hang_after` never answer;
`garbage`.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from finetune_assets_tests.training.fake_provider import contract
from finetune_assets_tests.training.fake_provider.state import Refusal, State

KEY = "sk-fake-0123456789abcdef"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State
    faults: list[dict[str, Any]]
    seen: list[str]
    violations: list[str]
    hanging: list[str]
    calls: dict[str, int]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_one("GET")

    def do_POST(self) -> None:
        self.handle_one("POST")

    def do_DELETE(self) -> None:
        self.handle_one("DELETE")

    def handle_one(self, method: str) -> None:  # noqa: PLR0911 - one return a fault
        url = urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if not self._chunked() else self._read_chunks()
        if url.path.startswith("/_fake/"):
            self.answer(200, self.control(url.path, raw))
            return
        path = unquote(url.path.removeprefix("/v1"))
        name = f"{method} {re.sub(r'/(ftjob|file)-[0-9]+', '/ID', re.sub('^/models/.*', '/models/ID', path))}"
        self.seen.append(name)
        fault = self.fault(name)
        kind = fault["do"] if fault else ""
        if kind == "hang_before":
            self.hang(name)
        if kind in ("drop_before", "hang_before"):
            self.drop()
            return
        if kind == "error":
            self.refuse(Refusal(fault["status"], fault.get("message", "scripted"), fault.get("code")), fault.get("retry_after"))
            return
        if kind == "garbage":
            self.send_text(200, "<html>busy</html>")
            return
        if self.headers.get("Authorization") != f"Bearer {KEY}" and self.headers.get("api-key") != KEY:
            self.refuse(
                Refusal(401, f"Incorrect API key provided: {self.headers.get('Authorization', '')[7:]}.", "invalid_api_key")
            )
            return
        try:
            with self.state.lock:
                body = self.body(raw)
                asked = body[0] if isinstance(body, tuple) else body
                self.complain(f"request {name}", contract.request_problems(method, path, asked))
                made = self.route(method, path, body, parse_qs(url.query))
        except Refusal as refusal:
            self.refuse(refusal)
            return
        if kind == "hang_after":
            self.hang(name)
        if kind in ("drop_after", "hang_after"):
            self.drop()
            return
        if kind == "error_after":
            self.refuse(Refusal(fault["status"], fault.get("message", "scripted"), fault.get("code")))
            return
        if isinstance(made, bytes):
            self.send_text(200, made)
            return
        likes = self.state.checkpoint is None and not (isinstance(made, dict) and made.get("status") == "paused")
        if not self.state.forced and likes:
            self.complain(f"answer {name}", contract.answer_problems(method, path, made))
        self.answer(200, made)

    def route(self, method: str, path: str, body: Any, query: dict[str, list[str]]) -> Any:  # noqa: PLR0911 - one return a route
        state = self.state
        parts = path.strip("/").split("/")
        if path == "/files" and method == "POST":
            fields, name, content = body
            return state.upload(fields, name, content)
        if path == "/files":
            return self.page(list(state.files.values()), query, file_list=True)
        if parts[0] == "files":
            if parts[1] not in state.files:
                raise Refusal(404, f"No such File object: {parts[1]}")
            if method == "DELETE":
                del state.files[parts[1]]
                return {"id": parts[1], "object": "file", "deleted": True}
            return state.contents[parts[1]] if parts[-1] == "content" else state.files[parts[1]]
        if path == "/fine_tuning/jobs" and method == "POST":
            return state.shown(state.create(body))
        if path == "/fine_tuning/jobs":
            wanted = {key[9:-1]: values[0] for key, values in query.items() if key.startswith("metadata[")}
            shown = [job for job in state.jobs.values() if time.monotonic() - job["_made"] >= state.list_lag]
            jobs = [job for job in shown if wanted.items() <= (job.get("metadata") or {}).items()]
            return self.page([state.shown(job) for job in reversed(jobs)], query)
        if parts[:2] == ["fine_tuning", "jobs"]:
            return self.job_route(method, parts[2], parts[3] if len(parts) > 3 else "", query)
        if parts[:2] == ["v0", "models"]:
            return self.served(method, "/".join(parts[2:]), body)
        if parts[0] == "models":
            return state.model("/".join(parts[1:]))
        if path == "/chat/completions":
            return state.chat(body)
        raise Refusal(404, f"Unknown request URL: {method} {path}")

    def served(self, method: str, name: str, body: Any) -> dict[str, Any]:
        """Nebius' custom models."""
        if method == "POST":
            return self.state.serve(body)
        if not name:
            return {"data": list(self.state.served.values())}
        if name not in self.state.served:
            raise Refusal(404, f"no model {name}")
        told = dict(self.state.served[name])
        self.state.served[name]["status"] = "validating" if self.state.never_active else "active"
        return told

    def job_route(self, method: str, job_id: str, what: str, query: dict[str, list[str]]) -> Any:
        state = self.state
        if job_id not in state.jobs:
            raise Refusal(404, f"Could not find fine tune: {job_id}", "fine_tune_not_found")
        job = state.jobs[job_id]
        if what == "events":
            return self.page(list(reversed(state.events[job_id])), query)
        if what == "checkpoints":
            return {"object": "list", "data": state.checkpoints(job_id), "has_more": False, "first_id": None, "last_id": None}
        if what == "cancel":
            if job["status"] in ("succeeded", "failed", "cancelled"):
                raise Refusal(400, f"Job has already completed: {job_id}", "invalid_request_error")
            job |= {"status": "cancelled", "finished_at": state.now()}
        elif what in ("pause", "resume") and job["status"] in ("succeeded", "failed", "cancelled"):
            raise Refusal(400, f"Job has already completed: {job_id}", "invalid_request_error")
        elif what == "pause":
            job["_before"], job["status"] = job["status"], "paused"
        elif what == "resume":
            job["status"] = job.pop("_before", "running")
        else:
            self.calls["retrieve"] = self.calls.get("retrieve", 0) + 1
            before = state.shown(job)
            state.step(job_id)
            return before
        return state.shown(job)

    def page(self, items: list[dict[str, Any]], query: dict[str, list[str]], file_list: bool = False) -> dict[str, Any]:
        after, limit = query.get("after", [""])[0], int(query.get("limit", ["20"])[0])
        start = next((n + 1 for n, item in enumerate(items) if item["id"] == after), 0) if not self.state.pages_for_ever else 0
        shown = items[start : start + limit]
        more = self.state.pages_for_ever or start + limit < len(items)
        made: dict[str, Any] = {"object": "list", "data": shown, "has_more": more}
        if file_list:
            made |= {"first_id": shown[0]["id"] if shown else "", "last_id": shown[-1]["id"] if shown else ""}
        return made

    # requests

    def body(self, raw: bytes) -> Any:
        kind = self.headers.get("Content-Type") or ""
        if not raw:
            return None
        if not kind.startswith("multipart/form-data"):
            try:
                return json.loads(raw)
            except ValueError:
                raise Refusal(400, "We could not parse the JSON body of your request.") from None
        message = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + raw)
        fields: dict[str, Any] = {}
        name, content = "", b""
        for part in message.iter_parts():  # pyright: ignore[reportAttributeAccessIssue]
            key = part.get_param("name", header="content-disposition")
            value = part.get_payload(decode=True)
            if part.get_filename():
                name, content = part.get_filename(), value
                fields[key] = "(file)"
            elif "[" in key:
                outer, inner = key.rstrip("]").split("[")
                fields.setdefault(outer, {})[inner] = int(value) if value.isdigit() else value.decode()
            else:
                fields[key] = value.decode()
        return fields, name, content

    def _chunked(self) -> bool:
        return "chunked" in (self.headers.get("Transfer-Encoding") or "")

    def _read_chunks(self) -> bytes:
        parts: list[bytes] = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def fault(self, name: str) -> dict[str, Any] | None:
        with self.state.lock:
            for fault in self.faults:
                if fault["on"] == name and fault["times"] > 0:
                    if fault.get("skip", 0) > 0:
                        fault["skip"] -= 1
                        continue
                    fault["times"] -= 1
                    return fault
        return None

    def complain(self, where: str, problems: list[str]) -> None:
        self.violations.extend(f"{where}: {problem}" for problem in problems)

    def hang(self, name: str) -> None:
        """Never answers; whoever waits is going to be killed."""
        self.hanging.append(name)
        time.sleep(600)

    # answers

    def drop(self) -> None:
        self.close_connection = True
        self.connection.close()

    def refuse(self, refusal: Refusal, retry_after: float | None = None) -> None:
        error = {"message": refusal.message, "type": "invalid_request_error", "param": refusal.param, "code": refusal.code}
        self.answer(refusal.status, {"error": error}, {"Retry-After": str(retry_after)} if retry_after is not None else {})

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self.send_text(status, json.dumps(body), headers)

    def send_text(self, status: int, text: str | bytes, headers: dict[str, str] | None = None) -> None:
        data = text if isinstance(text, bytes) else text.encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def control(self, path: str, raw: bytes) -> Any:
        body = json.loads(raw) if raw else {}
        if path == "/_fake/faults":
            self.faults.append({"times": 1, **body})
        elif path == "/_fake/set":
            for job_id, values in body.pop("jobs", {}).items():
                self.state.jobs[job_id] |= values
            for name, value in body.items():
                setattr(self.state, name, value)
        elif path == "/_fake/forget_model":
            self.state.models.pop(body["model"], None)
        elif path == "/_fake/reset":
            reset()
        elif path == "/_fake/clone":
            [job] = list(self.state.jobs.values())[:1]
            for number in range(body["times"]):
                job_id = f"ftjob-{900000 + number}"
                self.state.jobs[job_id] = {**job, "id": job_id}
                self.state.events[job_id] = [dict(event) for event in self.state.events[job["id"]]]
        state = self.state
        jobs = [state.shown(job) | {"suffix": job.get("_suffix")} for job in state.jobs.values()]
        return {
            "jobs": jobs,
            "files": list(state.files.values()),
            "contents": {key: value.decode("utf-8", "replace") for key, value in state.contents.items()}
            if body.get("contents")
            else {},
            "seen": list(self.seen),
            "hanging": list(self.hanging),
            "violations": list(self.violations),
        }


def reset() -> None:
    Handler.state, Handler.faults, Handler.seen, Handler.violations = State(), [], [], []
    Handler.hanging, Handler.calls = [], {}


def main(port: int) -> None:
    reset()
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    server.serve_forever()


def _die_with_parent() -> None:
    sys.stdin.read()  # ends when the test that started this is gone
    import os

    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
