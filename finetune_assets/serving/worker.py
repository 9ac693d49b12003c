"""One router worker on an inherited listening socket: `python -m finetune_assets.serving.worker OPTIONS`. Started by `server`."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
import socket
import sys
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from finetune_assets.environment import Environment
from finetune_assets.serving.intake import Options, drain_seconds
from finetune_assets.serving.router import Router
from finetune_assets.worker.__main__ import die_with_parent

HEAD_SECONDS = 10.0
"""For the head of a request; its body has its own time (`intake`)."""

MOST_HEAD = 65_536
"""Bytes of it."""


class Protocol(HttpToolsProtocol):
    """Closes a connection whose client sends no whole head in time, or one without end: uvicorn would wait for ever."""

    waiting: asyncio.TimerHandle | None = None
    taken = 0

    def connection_made(self, transport: Any) -> None:
        """Begins to wait."""
        super().connection_made(transport)
        self.waiting = self.loop.call_later(HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        """Waits as long as no request has begun: from the first byte of a head to its last."""
        super().data_received(data)
        cycle: Any = self.cycle
        if cycle is not None and not cycle.response_complete:
            self.taken = 0
            if self.waiting is not None:
                self.waiting.cancel()
                self.waiting = None
            return
        self.taken += len(data)
        if self.taken > MOST_HEAD:
            self.transport.close()
        elif self.waiting is None:
            self.waiting = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        super().connection_lost(exc)
        if self.waiting is not None:
            self.waiting.cancel()


class Worker(uvicorn.Server):
    """Ends the chats under way before it stops, however long the settings of now let one take."""

    def __init__(self, config: uvicorn.Config, router: Router) -> None:
        super().__init__(config)
        self.router = router

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes nothing new, and waits for them."""
        self.config.timeout_graceful_shutdown = round(drain_seconds(self.router.directory.assistants.values()))
        await super().shutdown(sockets)


def main(arguments: list[str]) -> None:
    """Serves until SIGTERM; then takes nothing new and ends what it has begun."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--engine", default="")
    parser.add_argument("--open-door", action="store_true")
    parser.add_argument("--simulation", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(arguments)
    die_with_parent()
    sys.setswitchinterval(0.0005)  # a page or a look-up in a thread holds up a chat by so much, not by 5 ms
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    router = Router(Environment.read(), Options(options.engine, options.open_door, options.simulation, options.workers))
    gc.freeze()  # what is loaded stays; looking through it again and again would hold up chats
    gc.set_threshold(20_000, 20, 50)
    config = uvicorn.Config(
        router,
        fd=options.fd,
        http=Protocol,
        log_level="warning",
        access_log=False,  # every chat is a row; paths and keys in a log would be one place more to guard
        server_header=False,
        timeout_keep_alive=20,
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the supervisor says when to end
    Worker(config, router).run()


if __name__ == "__main__":
    main(sys.argv[1:])
