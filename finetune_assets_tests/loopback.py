"""A server of one's own on a loopback socket, for as long as a test needs it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Reads JSON and lets `answer` say something to it; nothing on the terminal."""

    def do_POST(self) -> None:
        """Any path."""
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: dict[str, Any]) -> None:
        """What a test's server does."""
        raise NotImplementedError

    def say(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Answers; a client that has gone is no error."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for answers under way, and no socket outlives the server


@contextlib.contextmanager
def served(handler: type[Handler]) -> Iterator[str]:
    """The server's address with `/v1`; it ends with the block."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
