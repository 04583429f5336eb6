"""HTTP requests that are bounded in time and size, and whose failures are words, not exceptions."""

import os
import re
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property, partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from io import BufferedReader, RawIOBase
from socket import socket
from threading import Event
from time import monotonic
from typing import Any, cast
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import AbstractHTTPHandler, OpenerDirector, ProxyHandler
from urllib.request import Request as Post

from dllm_sd.errors import InputError
from dllm_sd.randomness import make_key

LARGEST_ANSWER = 4 * 2**20
"""Most bytes of a response, including its headers."""
LARGEST_REASON = 4096
"""Most bytes that are read of a refusal."""
LONGEST_WAIT = 60.0
"""Most seconds between two attempts, whatever the server asks for."""
LONGEST_CONNECT = 20.0
"""Most seconds until a connection is established, and again until the request is sent."""
LONGEST_TRY = 86400.0
"""Largest time limit of an attempt, in seconds."""


@dataclass(frozen=True)
class Reply:
    """The outcome of one attempt at a request."""

    content: bytes = b""
    """The body of a response, also of one that refuses."""
    failure: str | None = None
    """None for a status of 2xx; else ``timeout``, ``refused`` (no connection), ``dropped`` (the connection ended
    early), ``tls``, ``bad_http``, ``too_large``, ``cancelled`` or ``http_<status>``."""
    retry_after: float = 0.0
    """Seconds that the server asks to wait."""

    @property
    def is_temporary(self) -> bool:
        """Whether a retry may succeed."""
        return is_temporary(self.failure or "")

    @property
    def is_busy(self) -> bool:
        """Whether the server is up and has too much to do now: 503, with the time after which to ask again."""
        return is_busy(self.failure, self.retry_after)


@dataclass(frozen=True)
class HttpClient:
    """Sends requests through the proxies of the environment; redirects are not followed."""

    headers: dict[str, str] = field(repr=False)
    timeout: float
    """Most seconds for one attempt, from the connection to the last byte."""
    stop: Event = field(default_factory=Event)
    """Cancels attempts in flight."""

    @cached_property
    def _plain(self) -> OpenerDirector:
        return _opener(secure=False)

    @cached_property
    def _secure(self) -> OpenerDirector:
        """Made once: the certificates are read from disk."""
        return _opener(secure=True)

    def send(self, url: str, body: bytes | None = None) -> Reply:
        """Make one attempt: POST with a ``body``, else GET."""
        post = _Post(url, body, self.headers)
        post.bounds = _Bounds(monotonic() + self.timeout, self.stop)
        if self.stop.is_set():
            return Reply(failure="cancelled")
        try:
            with (self._secure if urlsplit(url).scheme == "https" else self._plain).open(
                post, timeout=min(self.timeout, LONGEST_CONNECT)
            ) as response:
                pause = _retry_after(response.headers.get("Retry-After", ""))
                if not 200 <= response.status < 300:
                    return Reply(_reason(response), f"http_{response.status}", pause)
                content = response.read(LARGEST_ANSWER + 1)
                return Reply(failure="dropped") if response.length else Reply(content)
        except (OSError, HTTPException, ValueError) as error:
            return Reply(failure="cancelled" if self.stop.is_set() else _failure_of(error))


def _reason(response: HTTPResponse) -> bytes:
    """Return the start of the body of a refusal, as far as it comes."""
    try:
        return response.read(LARGEST_REASON)
    except (OSError, HTTPException, ValueError):
        return b""


def json_headers(key_variable: str, key: str) -> dict[str, str]:
    """Return headers with the secret of an environment variable as the bearer token, if it is set.

    Raises:
        InputError: if it cannot be sent; the message names the variable and the config ``key`` that names it.
    """
    secret = os.environ.get(key_variable, "").strip()
    if not (secret.isascii() and secret.isprintable()):
        raise InputError(
            f"the environment variable {key_variable} ({key}) holds characters that cannot "
            "be sent in a header; set it to the secret alone, in ASCII"
        )
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {secret}"} if secret else {})


def check_key_variable(name: str, key: str) -> None:
    """Refuse what is not the name of an environment variable, since it may be the secret itself; ``key`` is named."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise InputError(f"{key} is not the name of an environment variable; put the secret into one")


def check_url(url: str, key: str, example: str) -> None:
    """Refuse an invalid base URL, naming its ``key``; the message does not repeat it, since it may contain a secret."""
    if not url:
        raise InputError(f"{key} is empty; give the base URL, such as {example}")
    if "@" in url:
        raise InputError(
            f"{key} holds an @; leave out name and password, and put the secret into the environment "
            "variable that key_variable names"
        )
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port  # an invalid port raises
        host.encode("idna")
    except ValueError:
        host, parts = "", urlsplit("")
    plain = url.isascii() and url.isprintable() and not re.search(r"[\s?#]", url)
    if parts.scheme not in ("http", "https") or not host or not plain:
        raise InputError(
            f"{key} must be an http or https address in ASCII without query and fragment; give the base URL, "
            f"such as {example}"
        )


def pause(backoff: float, key: int, attempt: int, retry_after: float = 0.0) -> float:
    """Return the seconds to wait after ``attempt + 1`` failed attempts at a request.

    Args:
        backoff: most seconds after the first; they double with every attempt.
        key: of the request, so that requests that failed together do not come back together.
        attempt: attempts before the last one.
        retry_after: what the server asks for.
    """
    jitter = (1 + make_key("pause", key, attempt) / 2**63) / 2  # from 1/2 to 1
    return min(max(retry_after, backoff * 2.0 ** min(attempt, 10) * jitter), LONGEST_WAIT)


def is_busy(failure: str | None, retry_after: float) -> bool:
    """Whether a failure is that of a server which is up and has too much to do now (`Reply.is_busy`)."""
    return failure == "http_503" and retry_after > 0


def is_temporary(failure: str) -> bool:
    """Return whether a retry may succeed."""
    return failure in ("http_408", "http_409", "http_429") or not re.fullmatch("http_[1-4]..", failure)


def _failure_of(error: Exception) -> str:
    """Return the name of a failure of a connection."""
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, TimeoutError):
        return "timeout"
    if isinstance(cause, ssl.SSLError):
        return "tls"
    if isinstance(cause, _TooLarge):
        return "too_large"
    if isinstance(cause, IncompleteRead) or (
        isinstance(cause, ConnectionError) and not isinstance(cause, ConnectionRefusedError)
    ):
        return "dropped"
    return "refused" if isinstance(cause, OSError) else "bad_http"


def _retry_after(text: str) -> float:
    """Return the seconds of a Retry-After header; 0 if it is missing or invalid."""
    if text.isascii() and text.strip().isdecimal():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()
    except (ValueError, TypeError, OverflowError):
        return 0.0


@dataclass(frozen=True)
class _Bounds:
    """The end of an attempt: a time of the monotonic clock, or the cancellation of all attempts."""

    deadline: float
    stop: Event


class _Post(Post):
    bounds: _Bounds


class _TooLarge(HTTPException):
    """The response exceeds the size limit."""


class _BoundedReader(RawIOBase):
    """A socket's bytes up to a deadline, cancellation or a size; a socket's own timeout restarts with every read."""

    def __init__(self, sock: socket, file: Any, bounds: _Bounds) -> None:
        self.sock, self.file, self.bounds, self.taken = sock, file, bounds, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while (left := self.bounds.deadline - monotonic()) > 0 and not self.bounds.stop.is_set():
            self.sock.settimeout(min(left, 0.2))
            try:
                size = self.sock.recv_into(buffer)
            except TimeoutError:
                continue
            self.taken += size
            if self.taken > LARGEST_ANSWER:
                raise _TooLarge
            return size
        raise TimeoutError

    def close(self) -> None:
        self.file.close()
        super().close()


class _BoundedResponse(HTTPResponse):
    def __init__(self, sock: socket, *args: Any, bounds: _Bounds, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = BufferedReader(_BoundedReader(sock, self.fp, bounds))


class _BoundedHandler(AbstractHTTPHandler):
    """Opens connections with bounded responses; redirects, which could send the API key elsewhere, are not followed."""

    def __init__(self, secure: bool) -> None:
        super().__init__(debuglevel=0)
        self.context = ssl.create_default_context() if secure else None

    http_request = https_request = AbstractHTTPHandler.do_request_

    def http_open(self, req: Post) -> HTTPResponse:
        return self.do_open(partial(self._connect, HTTPConnection, req), req)

    def https_open(self, req: Post) -> HTTPResponse:
        return self.do_open(partial(self._connect, HTTPSConnection, req), req, context=self.context)

    def _connect(self, kind: type[HTTPConnection], req: Post, host: str, **options: Any) -> HTTPConnection:
        connection = kind(host, **options)
        cast(Any, connection).response_class = partial(_BoundedResponse, bounds=cast(_Post, req).bounds)
        return connection


def _opener(secure: bool) -> OpenerDirector:
    """Return an opener that uses the proxies of the environment and returns responses of any status."""
    opener = OpenerDirector()
    opener.add_handler(ProxyHandler())
    opener.add_handler(_BoundedHandler(secure))
    return opener
