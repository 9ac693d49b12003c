"""The upstreams' HTTP, byte by byte, against a server that sends what a test says."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_assets.serving import wire
from finetune_assets.serving.wire import Broken, Pool

TEXT = "data: ¡sí!\n\ndata: [DONE]\n\n".encode()
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(TEXT), TEXT)
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKED = HEAD + b"5\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (TEXT[:5], len(TEXT) - 5, TEXT[5:])
CONTINUED = b"HTTP/1.1 100 Continue\r\nX: 1\r\n\r\n" + SIZED
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + TEXT


async def _ask(
    answers: Sequence[Sequence[bytes]], times: int = 1, close: bool = False, lines: bool = False
) -> tuple[list[bytes], int]:
    """Bodies of some requests, one after the other, and the connections they took; each answer is sent in pieces."""
    connections, queue = [0], list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections[0] += 1
        try:
            while queue:
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"POST /v1/chat?x=1 HTTP/1.1\r\nHost: 127.0.0.1:")
                assert b"Authorization: Bearer k\r\n" in head
                assert await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])) == b"{}"
                for piece in queue.pop(0):
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/chat?x=1"
    pool, bodies = Pool(), list[bytes]()
    try:
        for _ in range(times):
            connection = await pool.post(url, "k", b"{}")
            try:
                if lines:
                    found = list[bytes]()
                    while (line := await connection.line()) is not None:
                        found.append(line)
                    bodies.append(b"\n".join([*found, b""]))
                else:
                    bodies.append(await connection.read())
            finally:
                pool.release(connection)
    finally:
        await pool.close()
        server.close()
        await server.wait_closed()
    return bodies, connections[0]


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from([SIZED, CHUNKED, CONTINUED]), cuts=st.sets(st.integers(1, 140), max_size=6), lines=st.booleans())
def test_a_reply_is_the_same_however_it_is_cut(kind: bytes, cuts: set[int], lines: bool) -> None:
    places = [0, *sorted(cut for cut in cuts if cut < len(kind)), len(kind)]
    pieces = [kind[start:end] for start, end in pairwise(places)]
    bodies, connections = asyncio.run(_ask([pieces, pieces], times=2, lines=lines))
    assert bodies == [TEXT, TEXT]
    assert connections == 1


def test_a_reply_without_a_length_ends_with_its_connection() -> None:
    assert asyncio.run(_ask([[UNTIL_CLOSED]] * 2, times=2, close=True)) == ([TEXT, TEXT], 2)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (SIZED[:-3], "closed the connection"),
        (CHUNKED[:-9], "closed the connection"),
        (SIZED[:20], "closed the connection"),
        (b"", "closed the connection"),
        (b"hello\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 12_000, "headers without end"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n" + b"x" * (17 << 20), "more than"),
    ],
)
def test_what_is_no_whole_reply_is_broken(answer: bytes, why: str) -> None:
    with pytest.raises(Broken, match=why):
        asyncio.run(_ask([[answer]], close=True))


def test_a_line_without_end_is_given_up() -> None:
    with pytest.raises(Broken, match="a line without end"):
        asyncio.run(_ask([[b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"x" * (3 << 20)]], close=True, lines=True))


def test_a_server_that_says_more_than_it_was_asked_is_not_asked_again() -> None:
    bodies, connections = asyncio.run(_ask([[SIZED + SIZED], [SIZED]], times=2))
    assert bodies == [TEXT, TEXT]
    assert connections == 2


def test_a_stream_that_has_said_its_end_gets_a_moment_for_the_last_bytes() -> None:
    async def ask() -> int:
        connections = [0]

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections[0] += 1
            for _ in range(2):
                await reader.readuntil(b"\r\n\r\n{}")
                writer.write(CHUNKED[:-5])
                await asyncio.sleep(0.01)
                writer.write(CHUNKED[-5:])
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url, pool = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", Pool()
        for _ in range(2):
            connection = await pool.post(url, None, b"{}")
            while await connection.line() != b"data: [DONE]":
                pass
            pool.release(connection, ending=True)
            await asyncio.sleep(0.1)
        await pool.close()
        server.close()
        await server.wait_closed()
        return connections[0]

    assert asyncio.run(ask()) == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate")
@pytest.mark.parametrize("trusted", [True, False])
def test_tls_is_spoken_with_those_whose_certificate_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    certificate, key = str(tmp_path / "certificate"), str(tmp_path / "key")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", certificate)

    async def ask() -> tuple[list[bytes], int]:
        connections = [0]

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections[0] += 1
            for _ in range(2):
                await reader.readuntil(b"\r\n\r\n{}")
                writer.write(CHUNKED)
            writer.close()
            await writer.wait_closed()

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server = await asyncio.start_server(serve, "localhost", 0, ssl=context)
        url, pool, bodies = f"https://localhost:{server.sockets[0].getsockname()[1]}/v1", Pool(), list[bytes]()
        try:
            for _ in range(2):
                connection = await pool.post(url, "k", b"{}")
                bodies.append(await connection.read())
                pool.release(connection)
        finally:
            await pool.close()
            await asyncio.sleep(0.05)
            server.close()
            await server.wait_closed()
        return bodies, connections[0]

    if trusted:
        assert asyncio.run(ask()) == ([TEXT, TEXT], 1)
    else:
        with pytest.raises(OSError, match="self-signed certificate"):
            asyncio.run(ask())


@pytest.mark.parametrize("url", ["ftp://host/", "http:///v1", "host:80/v1"])
def test_an_address_that_is_none_is_named(url: str) -> None:
    with pytest.raises(ValueError, match="no address of an upstream"):
        asyncio.run(Pool().post(url, None, b""))


@pytest.mark.parametrize(
    ("path", "key"), [("", "k\r\nX: y"), ("", "k\0"), ("", "ñ"), ("/v 1", "k"), ("/ví", "k"), ("/v\x7f", "k")]
)
def test_a_key_or_a_path_cannot_add_a_header(path: str, key: str) -> None:
    with pytest.raises(ValueError, match="line break"):
        asyncio.run(Pool().post(f"http://127.0.0.1:1{path}", key, b""))


def test_an_address_without_a_path_is_its_root() -> None:
    assert wire._address("http://h", None)[1].startswith(b"POST / HTTP/1.1\r\nHost: h\r\n")
    assert wire._address("http://h?a=1", None)[1].startswith(b"POST /?a=1 HTTP/1.1\r\n")


def test_a_stream_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MOST_STREAM", 100_000)
    with pytest.raises(Broken, match="a stream of more than 100000 bytes"):
        asyncio.run(_ask([[b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"data: x\n" * 100_000]], close=True, lines=True))


def test_trailers_are_nobodys_and_what_is_idle_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old connections are closed when another comes back, wherever it leads; of a reply that was read nothing stays."""

    async def ask() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n{}")
            writer.write(CHUNKED[:-2] + b"Content-Type: x\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()

        servers = [await asyncio.start_server(serve, "127.0.0.1", 0) for _ in range(2)]
        pool, connections = Pool(), list[wire.Connection]()
        for server in servers:
            connections.append(await pool.post(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None, b"{}"))
            assert await connections[-1].read() == TEXT
            assert "content-type" not in connections[-1].headers
            pool.release(connections[-1])
            assert not connections[-1].pieces
            monkeypatch.setattr(wire, "IDLE_SECONDS", 0.0)
        assert [one.transport.is_closing() for one in connections] == [True, False]
        assert [one.place for kept in pool.idle.values() for one in kept] == [connections[1].place]
        await pool.close()
        await asyncio.sleep(0.05)
        for server in servers:
            server.close()
            await server.wait_closed()

    asyncio.run(ask())
