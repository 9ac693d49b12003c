"""Servers that a test starts in its own process: an upstream whose faults it chooses, a webhook that takes messages."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Loopback:
    """A server on a free port, until it is closed."""

    def __init__(self, handler: type[BaseHTTPRequestHandler], path: str) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/{path}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)


class Upstream(Loopback):
    """An OpenAI-compatible server, whose streams begin with the role alone; `faults`: model's name to what goes wrong: error,
    hang, late, wait:SECONDS, half, slow, empty, busy, shapeless, tool, toolcut, say:TEXT, status:NUMBER:MESSAGE; of a stream that
    has named its role: begun:half, begun:hang, begun:error. `shapes`: model's name to an answer that is sent as it stands."""

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

        super().__init__(Handler, "v1")

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.seen.append(body)
        fault = next((f for name, f in self.faults.items() if name in body["model"]), "")
        if fault in ("hang", "late"):
            time.sleep(4 if fault == "hang" else 1)
        if fault.startswith("wait:"):
            time.sleep(float(fault[5:]))
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


class Hook(Loopback):
    """A real HTTP server that takes messages, or refuses them."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                outer.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(outer.status)
                self.end_headers()

        super().__init__(Handler, "secret-token")
