"""The connections of the server: how many may be open, and whether a client is still at the other end.

A client that sends a request and hangs up leaves both in the socket, and asyncio reads the request first. So the socket
is asked whether its client is there, at the cost of a system call, before anything is done for the request: when the
connection is accepted, and later before its request is read and before it is decoded.
"""

import asyncio
import json
import select
import socket
from collections.abc import Mapping
from time import monotonic
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from dllm_sd.serving.refusal import Refusal

BACKLOG = 2048
"""Connections that the system holds until they are accepted."""
DROPPING = 0.05
"""Seconds in which connections without a client are closed before something else has its turn."""
SILENT = 60.0
"""Seconds that a new connection may stay open without a request."""
UNREAD = 60.0
"""Seconds that a client may leave unread what the buffers hold; then its connection ends, and its request with it."""
_CLOSED = select.POLLHUP | getattr(select, "POLLRDHUP", 0)  # where there is no POLLRDHUP, asyncio notices it later
_FULL = json.dumps(Refusal(503, "too many connections are open; ask again later").tree).encode()
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_FULL), _FULL)
)


class Listener(socket.socket):
    """A socket that listens, and accepts only connections whose clients have not hung up already."""

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection.

        Raises:
            BlockingIOError: if there is none, or dropping others took so long that something else should have its turn.
        """
        end = monotonic() + DROPPING
        while monotonic() < end:
            connection, address = super().accept()
            if not _has_hung_up(connection):
                return connection, address
            connection.close()
        raise BlockingIOError


def _has_hung_up(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection.fileno(), _CLOSED)
    return bool(poll.poll(0))


class Connection(H11Protocol):
    """One connection, refused if too many are open."""

    def __init__(self, *, most: int, **options: Any) -> None:
        """Make a connection of a server that has at most ``most``; uvicorn gives the ``options``."""
        super().__init__(**options)
        self.most = most
        self.app_state = {**self.app_state, "hung_up": self.hung_up}
        self._silence: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def hung_up(self) -> bool:
        """Whether the client has closed its side."""
        return self.transport.is_closing() or _has_hung_up(self.transport.get_extra_info("socket"))

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Begin, or end at once."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.write(_REFUSAL)
            transport.close()
        else:
            self._silence = self.loop.call_later(SILENT, self._end_silence)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        for timer in (self._silence, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Let the answer wait until the client reads, or until it has not for too long."""
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD, self.transport.abort)  # closing would wait for the client

    def resume_writing(self) -> None:
        """Go on with the answer."""
        if self._unread is not None:
            self._unread.cancel()
        super().resume_writing()

    def _end_silence(self) -> None:
        if self.cycle is None:  # pyright: ignore[reportUnnecessaryComparison]  # not a request yet
            self.transport.close()


def hung_up(scope: Mapping[str, Any]) -> bool:
    """Whether the client of a request has gone, as far as its server can tell (`Connection`)."""
    tell = scope.get("state", {}).get("hung_up")
    return tell is not None and tell()
