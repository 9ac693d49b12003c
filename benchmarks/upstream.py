"""The upstream that the router is measured with: it answers every chat at once. `python -m benchmarks.upstream PORT`."""

from __future__ import annotations

import asyncio
import json
import sys

import uvloop

WORDS = ["Claro", "que", "sí.", "El", "martes", "hay", "hora", "a", "las", "diez", "y", "media;", "¿le", "va", "bien?"]
USAGE = {"prompt_tokens": 40, "completion_tokens": len(WORDS), "total_tokens": 40 + len(WORDS)}
HEAD = {"id": "chatcmpl-1", "created": 1, "model": "m"}


def _whole() -> bytes:
    message = {"role": "assistant", "content": " ".join(WORDS)}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    body = json.dumps({**HEAD, "object": "chat.completion", "choices": [choice], "usage": USAGE}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def _chunk(value: bytes) -> bytes:
    return b"%x\r\n" % len(value) + value + b"\r\n"


def _event(delta: dict[str, str], reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    value = {**HEAD, "object": "chat.completion.chunk", "choices": [choice], **({"usage": USAGE} if reason else {})}
    return _chunk(b"data: " + json.dumps(value).encode() + b"\n\n")


WHOLE = _whole()
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = [
    _event({"role": "assistant", "content": ""}),
    *(_event({"content": word if n == 0 else f" {word}"}) for n, word in enumerate(WORDS)),
]
END = _event({}, "stop") + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Answer(asyncio.Protocol):
    """Reads a request by its Content-Length, and answers at once; a stream's words come one a millisecond."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.data = transport, b""

    def data_received(self, data: bytes) -> None:
        self.data += data
        while (end := self.data.find(b"\r\n\r\n")) >= 0:
            head = self.data[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.data) < end + 4 + length:
                return
            body, self.data = self.data[end + 4 : end + 4 + length], self.data[end + 4 + length :]
            if b'"stream":true' in body.replace(b" ", b""):
                self.transport.write(STREAM)
                self._say(0)
            else:
                self.transport.write(WHOLE)

    def _say(self, n: int) -> None:
        if n == len(EVENTS):
            self.transport.write(END)
            return
        self.transport.write(EVENTS[n])
        asyncio.get_running_loop().call_later(0.001, self._say, n + 1)


async def main(port: int) -> None:
    """Serves until it is killed."""
    server = await asyncio.get_running_loop().create_server(Answer, "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
