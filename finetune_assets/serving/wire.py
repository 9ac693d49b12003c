"""HTTP/1.1 to the upstreams, no more of it than a chat needs: one POST at a time on connections that are kept, httptools' parser.

A general client takes half of the router's time for a chat. No redirects, cookies, proxies or compression: an address of the
settings is asked as it stands.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httptools

IDLE_SECONDS = 4.0
"""A connection that was idle for so long is not used again: servers close theirs after 5 s (uvicorn) or more."""
STALE_SECONDS = 0.1
"""A kept connection that is lost so soon after a request was sent had been given up by its server."""
END_SECONDS = 0.05
"""For the last bytes of a stream whose events have ended."""
MOST_HEAD = 65_536
"""Bytes of an answer's headers."""
MOST_AHEAD = 1 << 18
"""Bytes of a reply that wait for their reader; then nothing more is taken from the connection."""
MOST_LINE = 1 << 20
"""Of a stream's line."""
MOST_BYTES = 1 << 24
"""Of a reply that is read at once."""
MOST_STREAM = 1 << 26
"""Of a streamed one: each token comes with some 200 bytes around it."""


class Broken(Exception):
    """A connection that ended before its reply did, or a reply that is no HTTP."""


class Place(NamedTuple):
    """Where a connection leads."""

    host: str
    port: int
    tls: bool


class Connection(asyncio.Protocol):
    """One connection, and the reply that comes over it: `status` and `headers` (lower case) first, then its body."""

    transport: asyncio.Transport

    def __init__(self, place: Place) -> None:
        self.place, self.loop = place, asyncio.get_running_loop()
        self.parser = httptools.HttpResponseParser(self)
        self.waiter: asyncio.Future[None] | None = None
        self.lost: str | None = None
        self.paused = False
        self.idle_since = 0.0
        self._begin()
        self.complete = True

    def _begin(self) -> None:
        self.status, self.headers = 0, dict[str, str]()
        self.pieces, self.waiting, self.taken = deque[bytes](), 0, 0
        self.whole, self.rest = deque[bytes](), b""
        self.begun = self.has_head = self.complete = self.keeps = False

    def send(self, data: bytes) -> None:
        """Sends a request; the reply of the one before has been read."""
        self._begin()
        self.transport.write(data)

    def forget(self) -> None:
        """Lets go of the reply that was read."""
        self.pieces, self.whole, self.rest = deque[bytes](), deque[bytes](), b""

    async def head(self) -> None:
        """Waits for status and headers. Raises Broken."""
        while not self.has_head:
            await self._more()

    async def read(self) -> bytes:
        """The whole body. Raises Broken."""
        while not self.complete:
            if self.taken > MOST_BYTES:
                raise Broken(f"a reply of more than {MOST_BYTES} bytes")
            self.resume()
            await self._more()
        return b"".join(self.pieces)

    async def line(self) -> bytes | None:
        """The body's next line without its end; null after the last. Raises Broken."""
        while not self.whole:
            if self.pieces:
                piece = self.pieces.popleft()
                self.waiting -= len(piece)
                *whole, self.rest = (self.rest + piece).split(b"\n")
                self.whole.extend(whole)
                if len(self.rest) > MOST_LINE:
                    raise Broken("a line without end")
            elif self.taken > MOST_STREAM:
                raise Broken(f"a stream of more than {MOST_STREAM} bytes")
            elif self.complete:
                rest, self.rest = self.rest, b""
                return rest or None
            else:
                self.resume()
                await self._more()
        return self.whole.popleft()

    async def _more(self) -> None:
        if self.lost is not None:
            raise Broken(self.lost)
        self.waiter = self.loop.create_future()
        await self.waiter

    def resume(self) -> None:
        """Takes more from the connection again."""
        if self.paused:
            self.paused = False
            self.waiting = 0
            self.transport.resume_reading()

    # asyncio's

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It leads there."""
        self.transport = transport  # pyright: ignore[reportAttributeAccessIssue]

    def data_received(self, data: bytes) -> None:
        """A piece of the reply."""
        if self.complete:  # nothing was asked
            self._end("the server spoke unasked")
            return
        self.begun = True
        self.taken += len(data)
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._end(f"no HTTP: {error}")
        if not self.has_head and self.taken > MOST_HEAD:
            self._end("headers without end")
        if self.waiting > MOST_AHEAD and not self.paused and not self.complete:
            self.paused = True
            self.transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of a reply that names no length, or of one that is cut off."""
        if self.has_head and not self.complete and self.lost is None and exc is None and not self._is_sized:
            self.complete = True
        self.lost = self.lost or (f"{type(exc).__name__}: {exc}" if exc else "the server closed the connection")
        self._wake()

    @property
    def _is_sized(self) -> bool:
        return "content-length" in self.headers or "transfer-encoding" in self.headers

    def _end(self, why: str) -> None:
        self.lost = self.lost or why
        self.transport.abort()

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    # httptools'

    def on_message_begin(self) -> None:
        """A reply begins; after a whole one nothing more may come."""
        if self.complete:
            raise Broken("the server spoke unasked")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; those behind the body are nobody's."""
        if self.has_head:
            return
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Status and headers are there; those of a 1xx are followed by others."""
        self.status = self.parser.get_status_code()
        if self.status < 200:
            self.headers.clear()
        self.has_head = self.status >= 200

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self.pieces.append(body)
        self.waiting += len(body)

    def on_message_complete(self) -> None:
        """The reply is whole."""
        if self.has_head:
            self.complete, self.keeps = True, bool(self.parser.should_keep_alive())


class Pool:
    """Connections by where they lead."""

    def __init__(self) -> None:
        self.idle: dict[Place, list[Connection]] = {}
        self.tls: ssl.SSLContext | None = None

    async def post(self, url: str, key: str | None, body: bytes) -> Connection:
        """A connection with the head of the answer; give it back with `release`. Raises Broken, OSError, ValueError.

        A server that closes an idle connection may do so in the moment in which it is used again: one that is lost within
        STALE_SECONDS, before its first byte, is taken for such, and the request is sent again on a new connection. Later the
        server may have worked on it (and be paid for it): then, and on a new connection, it is not sent twice.
        """
        place, head = _address(url, key)
        data = head + b"%d\r\n\r\n" % len(body) + body
        kept = self._kept(place)
        if kept is not None:
            sent = kept.loop.time()
            try:
                return await self._ask(kept, data)
            except Broken:
                if kept.begun or kept.loop.time() - sent > STALE_SECONDS:
                    raise
        return await self._ask(await self._connect(place), data)

    def release(self, connection: Connection, ending: bool = False) -> None:
        """Keeps a connection whose reply was read to its end, closes any other; one that is `ending` gets a moment for it."""
        if connection.complete and connection.keeps and connection.lost is None:
            connection.idle_since = connection.loop.time()
            connection.resume()
            connection.forget()
            self._reap(connection.idle_since)
            self.idle.setdefault(connection.place, []).append(connection)
        elif ending and connection.lost is None:
            connection.loop.call_later(END_SECONDS, self.release, connection)
        else:
            connection.transport.abort()

    def _reap(self, at: float) -> None:
        """Lets go of connections that will not be used again, of any place: those at the front have waited longest."""
        for place, kept in list(self.idle.items()):
            while kept and (kept[0].lost is not None or at - kept[0].idle_since >= IDLE_SECONDS):
                kept.pop(0).transport.abort()
            if not kept:
                del self.idle[place]

    async def close(self) -> None:
        """Closes what is idle."""
        for connection in (one for kept in self.idle.values() for one in kept):
            connection.transport.close()
        self.idle.clear()
        await asyncio.sleep(0)  # the loop closes them in its next turn

    async def _ask(self, connection: Connection, data: bytes) -> Connection:
        try:
            connection.send(data)
            await connection.head()
        except BaseException:
            connection.transport.abort()
            raise
        return connection

    def _kept(self, place: Place) -> Connection | None:
        kept = self.idle.get(place, [])
        while kept:
            connection = kept.pop()
            if connection.lost is None and connection.loop.time() - connection.idle_since < IDLE_SECONDS:
                return connection
            connection.transport.abort()
        return None

    async def _connect(self, place: Place) -> Connection:
        if place.tls and self.tls is None:
            self.tls = ssl.create_default_context()
        more: dict[str, Any] = {"ssl": self.tls} if place.tls else {}
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(lambda: Connection(place), place.host, place.port, **more))[1]


@lru_cache(maxsize=1024)
def _address(url: str, key: str | None) -> tuple[Place, bytes]:
    """Where a URL leads, and a request's head up to the value of Content-Length. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of an upstream: http://… or https://…")
    tls = parts.scheme == "https"
    path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    if not all("!" <= letter <= "~" for text in (path, parts.netloc, key or "") for letter in text):
        raise ValueError("the upstream's address or key holds a space, a line break or a character that is not ASCII")
    head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc.rpartition('@')[2]}\r\n"
    head += f"Authorization: Bearer {key}\r\n" if key else ""
    head += "Content-Type: application/json\r\nAccept: */*\r\nUser-Agent: finetune-assets\r\n"
    return Place(parts.hostname, parts.port or (443 if tls else 80), tls), f"{head}Content-Length: ".encode("latin-1")
