"""The HTTP server: its socket, its signals, and how it ends."""

import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from dllm_sd.errors import InputError, os_reason
from dllm_sd.serving.connections import BACKLOG, Connection, Listener
from dllm_sd.serving.service import Service

GRACE = 10
"""Seconds that running requests have to end after a signal."""
LAST = 5
"""Seconds that their refusals, and answers, have to be sent."""
IMPATIENT = 1
"""Seconds that a step of the decoder has to end after a second signal."""
KEEP_ALIVE = 75
"""Seconds that a connection stays open between two requests."""


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 takes a free one.

    Raises:
        InputError: if the port is in use, or the host is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(
            f"--host {host!r} is not an address ({os_reason(error)}); give one of this machine's"
        ) from error
    listener = Listener(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = os_reason(error)
        raise InputError(f"cannot listen on {host} port {port} ({reason}); choose another --port or --host") from error
    return listener


class HttpServer(uvicorn.Server):
    """Runs until a signal; then refuses what waits, lets what runs end within `GRACE` seconds, and returns."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        """Serve an application; the ``service`` is closed at a signal, and stopped at the end."""
        connection: Any = partial(Connection, most=service.limits.connections)
        super().__init__(
            uvicorn.Config(
                app,
                http=connection,
                backlog=BACKLOG,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=GRACE + LAST,
            )
        )
        self.service = service
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what went wrong is printed by the routes

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal, or until `end` is called on another thread."""
        try:
            super().run(sockets)
        finally:
            self.service.stop(IMPATIENT if self.force_exit else GRACE)

    def end(self) -> None:
        """Begin to shut down."""
        self.service.close(0 if self.force_exit else GRACE)
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to shut down; a second signal ends what runs."""
        if self.should_exit:
            self.force_exit = True
        self.end()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals that end a server inside; uvicorn would raise them again at the end."""
        former: dict[int, object] = {}
        with suppress(ValueError):  # signals are the main thread's
            for number in (signal.SIGINT, signal.SIGTERM):
                former[number] = signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
