"""A writer that is a server with an OpenAI-compatible API, which may be slow, overloaded, broken or down.

Every attempt is bounded in time and size. Failures of the server are not exceptions, except for errors that a retry
cannot fix. The API key is read from its environment variable on every call, and sent in one header only.
"""

import json
import os
import re
import ssl
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from io import BufferedReader, RawIOBase
from itertools import count
from socket import socket
from threading import Event, Lock
from time import monotonic
from typing import Annotated, Any, Self, cast
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import AbstractHTTPHandler, OpenerDirector, ProxyHandler
from urllib.request import Request as Post

from dllm_sd.errors import InputError
from dllm_sd.randomness import make_key
from dllm_sd.ranges import Natural, Range, Ranged
from dllm_sd.writers.cache import Cache, ask_once
from dllm_sd.writers.request import Request, Sampling, Written

LARGEST_ANSWER = 4 * 2**20
"""Most bytes of a response, including its headers."""
LONGEST_WAIT = 60.0
"""Most seconds between two attempts, whatever the server asks for."""
LONGEST_CONNECT = 20.0
"""Most seconds until a connection is established, and again until the request is sent."""
LONGEST_TRY = 86400.0
"""Largest `timeout` of an attempt, in seconds."""
DOWN_AFTER = 5
"""After so many texts in a row for which all attempts failed, the server counts as down, and the rest is not sent."""


@dataclass(frozen=True)
class Server(Ranged):
    """A server with an OpenAI-compatible API, such as vLLM, SGLang or a commercial service.

    Proxies are those of the environment (``https_proxy``, ``no_proxy``).
    """

    url: str = ""
    """Base URL, such as ``http://host:8000/v1``."""
    model: str = ""
    """Name of the model on the server."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the API key; if it is not set, no key is sent."""
    timeout: Annotated[float, Range(above=0, most=LONGEST_TRY)] = 120.0
    """Most seconds for one attempt, from the connection to the last byte."""
    retries: Natural = 4
    """Number of retries for a text after a failed attempt."""
    backoff: Annotated[float, Range(least=0, most=LONGEST_WAIT)] = 1.0
    """Most seconds until the first retry; they double with every retry."""
    concurrency: Annotated[int, Range(least=1, most=1024)] = 8
    """Number of requests in flight at the same time."""
    weights = None
    """No weights of the run are used."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_url(self.url)
        if not self.model:
            raise InputError("a writer's model is empty; give the name under which the server knows it")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            raise InputError(
                "a writer's key_variable is not the name of an environment variable; put the secret into one"
            )

    @property
    def remote(self) -> Self:
        """Itself."""
        return self

    @property
    def identity(self) -> Mapping[str, Any]:
        """The source of the texts: URL and model."""
        return {"kind": "server", "url": self.url.rstrip("/"), "model": self.model}

    def write(self, requests: Sequence[Request], sampling: Sampling, cache: Cache | None = None) -> list[Written]:
        """Return one text, or the reason why there is none, for each request, in the order of the requests.

        Reasons are ``timeout``, ``refused`` (no connection), ``dropped`` (the connection ended early), ``tls``,
        ``bad_http``, ``too_large``, ``http_<status>``, ``bad_encoding``, ``bad_json``, ``no_text`` and ``server_down``
        (not sent, or cancelled, after the server failed for `DOWN_AFTER` texts in a row).

        Raises:
            InputError: if the server answers 401, 403 or 404, or the API key cannot be sent.
        """
        return ask_once(self.identity, requests, sampling, cache, partial(self._ask, sampling))

    def pause(self, key: int, tries: int, retry_after: float = 0.0) -> float:
        """Return the seconds to wait after `tries` + 1 failed attempts; the server asks for `retry_after`."""
        jitter = (1 + make_key("writer's pause", key, tries) / 2**63) / 2  # from 1/2 to 1
        return min(max(retry_after, self.backoff * 2.0 ** min(tries, 10) * jitter), LONGEST_WAIT)

    def _ask(self, sampling: Sampling, requests: Sequence[Request]) -> Generator[tuple[int, Written]]:
        session = _Session(_opener(urlsplit(self.url).scheme == "https"), self._headers())
        with ThreadPoolExecutor(min(self.concurrency, len(requests)), "writer") as pool:
            indices = {
                pool.submit(self._retry, request, sampling, session): index for index, request in enumerate(requests)
            }
            try:
                for future in as_completed(indices):
                    yield indices[future], future.result()
            finally:
                session.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _retry(self, request: Request, sampling: Sampling, session: "_Session") -> Written:
        """Send a request, and repeat it after temporary failures."""
        body = json.dumps(self._body(request, sampling)).encode()
        for tries in count():
            written, pause = self._try(body, session)
            if written.failure is None or not _is_temporary(written.failure) or tries == self.retries:
                session.ended(written.failure)
                return written
            if session.stop.wait(self.pause(request.key, tries, pause)):
                return written
        raise AssertionError("count() has no end")

    def _try(self, body: bytes, session: "_Session") -> tuple[Written, float]:
        """Return the result of one attempt, and the seconds that the server asks to wait."""
        post = _Post(f"{self.url.rstrip('/')}/chat/completions", body, session.headers)
        post.bounds = _Bounds(monotonic() + self.timeout, session.stop)
        if session.stop.is_set():
            return Written(None, "server_down"), 0.0
        try:
            with session.opener.open(post, timeout=min(self.timeout, LONGEST_CONNECT)) as response:
                status, pause = response.status, _retry_after(response.headers.get("Retry-After", ""))
                if 200 <= status < 300:
                    content = response.read(LARGEST_ANSWER + 1)
                    return Written(None, "dropped") if response.length else _parse_response(content), 0.0
        except (OSError, HTTPException, ValueError) as error:
            return Written(None, "server_down" if session.stop.is_set() else _failure_of(error)), 0.0
        if status in (401, 403, 404):
            session.stop.set()
            raise InputError(self._refusal(status))
        return Written(None, f"http_{status}"), pause

    def _body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in request.messages],
            "max_tokens": sampling.length,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": make_key("server", request.key) >> 32,  # 31 bits
        }
        if sampling.top_k:  # OpenAI's API does not have this key and refuses unknown ones
            body["top_k"] = sampling.top_k
        if sampling.thinking is not None:  # vLLM and SGLang pass it to the chat template
            body["chat_template_kwargs"] = {"enable_thinking": sampling.thinking}
        return body

    def _headers(self) -> dict[str, str]:
        secret = os.environ.get(self.key_variable, "").strip()
        if not (secret.isascii() and secret.isprintable()):
            raise InputError(
                f"the environment variable {self.key_variable} (a writer's key_variable) holds characters that cannot "
                "be sent in a header; set it to the secret alone, in ASCII"
            )
        return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {secret}"} if secret else {})

    def _refusal(self, status: int) -> str:
        if status == 404:
            return (
                f"a writer's url {self.url} answers 404; give the base URL, such as http://host:8000/v1, and a model "
                f"that is served there, not {self.model!r}"
            )
        state = "set" if os.environ.get(self.key_variable, "").strip() else "not set"
        return (
            f"a writer's url {self.url} answers {status}; put a secret that it accepts into the environment variable "
            f"{self.key_variable} (key_variable), which is {state}"
        )


def _check_url(url: str) -> None:
    """Refuse an invalid base URL; the message does not repeat it, since it may contain a secret."""
    if not url:
        raise InputError("a writer's url is empty; give the base URL, such as http://host:8000/v1")
    if "@" in url:
        raise InputError(
            "a writer's url holds an @; leave out name and password, and put the secret into the environment "
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
            "a writer's url must be an http or https address in ASCII without query and fragment; give the base URL, "
            "such as http://host:8000/v1"
        )
    if parts.path.rstrip("/").endswith("/chat/completions"):
        raise InputError("a writer's url is the base URL; leave out /chat/completions, which is added")


def _parse_response(content: bytes) -> Written:
    """Return the text in the body of a response."""
    try:
        text = json.loads(content.decode("utf-8"))["choices"][0]["message"]["content"]
        if not isinstance(text, str) or not text.strip():
            return Written(None, "no_text")
        text.encode("utf-8")
    except UnicodeError:  # bytes that are not UTF-8, or a lone surrogate
        return Written(None, "bad_encoding")
    except (ValueError, RecursionError):
        return Written(None, "bad_json")
    except (LookupError, TypeError):
        return Written(None, "no_text")
    return Written(text, None)


def _is_temporary(failure: str) -> bool:
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


@dataclass
class _Session:
    """The state that all attempts of one call share."""

    opener: OpenerDirector
    headers: dict[str, str] = field(repr=False)
    stop: Event = field(default_factory=Event)
    """Cancels attempts in flight, pauses and queued requests."""
    lost: int = 0
    """Number of texts in a row that failed by an outage."""
    lock: Lock = field(default_factory=Lock)

    def ended(self, failure: str | None) -> None:
        """Record the outcome of a text's last attempt; any response, even without text, shows that the server is up."""
        outage = re.fullmatch("timeout|refused|dropped|tls|http_5..", failure or "")
        with self.lock:
            self.lost = self.lost + 1 if outage else 0
            if self.lost == DOWN_AFTER:
                self.stop.set()


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
