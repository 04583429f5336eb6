"""A server with an OpenAI-compatible interface as a writer; it may be slow, overloaded, broken or gone.

Every try is bounded in time and size, and nothing that a server does is an exception, but for a refusal that a
second try would not change. The secret is read from the environment when it is needed and goes into one header only.
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
"""Bytes of an answer, its head included."""
LONGEST_WAIT = 60.0
"""Seconds between two tries, whatever the server asks for."""
LONGEST_CONNECT = 20.0
"""Seconds until a server has taken a connection, and again until it has taken what is sent."""
LONGEST_TRY = 86400.0
DOWN_AFTER = 5
"""Texts in a row that found no server, or one that fails, at every try; then it is down, and the rest is not asked."""


@dataclass(frozen=True)
class Server(Ranged):
    """A server with an OpenAI-compatible interface, such as vLLM, SGLang or a paid one.

    Proxies are those of the environment (``https_proxy``, ``no_proxy``).
    """

    url: str = ""
    """Base URL, such as ``http://host:8000/v1``."""
    model: str = ""
    """Name of the model, as the server knows it."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the secret; without it no secret is sent."""
    timeout: Annotated[float, Range(above=0, most=LONGEST_TRY)] = 120.0
    """Seconds for one try, from the connection to the last byte."""
    retries: Natural = 4
    """Further tries for a text after one that failed."""
    backoff: Annotated[float, Range(least=0, most=LONGEST_WAIT)] = 1.0
    """Most seconds until the second try; they double from try to try."""
    concurrency: Annotated[int, Range(least=1, most=1024)] = 8
    """Texts that are asked for at the same time."""
    weights = None
    """The run's models are not asked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_url(self.url)
        if not self.model:
            raise InputError("a writer's model is empty; give the name under which the server knows it")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            raise InputError("a writer's key_variable is no name of an environment variable; put the secret into one")

    @property
    def remote(self) -> Self:
        """Itself."""
        return self

    @property
    def identity(self) -> Mapping[str, Any]:
        """Whose texts these are: the address and the model."""
        return {"kind": "server", "url": self.url.rstrip("/"), "model": self.model}

    def write(self, requests: Sequence[Request], sampling: Sampling, cache: Cache | None = None) -> list[Written]:
        """One text, or the reason why there is none, for each request, in the order of the requests.

        Reasons are ``timeout``, ``refused`` (no connection), ``dropped`` (it ended too early), ``tls``, ``bad_http``,
        ``too_large``, ``http_<status>``, ``bad_encoding``, ``bad_json``, ``no_text`` and ``server_down`` (not asked, or
        called off, as the server had failed for `DOWN_AFTER` texts in a row).

        Raises:
            InputError: if the server answers 401, 403 or 404, or the secret cannot be sent.
        """
        return ask_once(self.identity, requests, sampling, cache, partial(self._ask, sampling))

    def pause(self, key: int, tries: int, asked: float = 0.0) -> float:
        """Seconds to wait when `tries` + 1 tries for the text of a `key` have failed; the server `asked` for some."""
        jitter = (1 + make_key("writer's pause", key, tries) / 2**63) / 2  # from 1/2 to 1
        return min(max(asked, self.backoff * 2.0 ** min(tries, 10) * jitter), LONGEST_WAIT)

    def _ask(self, sampling: Sampling, requests: Sequence[Request]) -> Generator[tuple[int, Written]]:
        line = _Line(_opener(urlsplit(self.url).scheme == "https"), self._headers())
        with ThreadPoolExecutor(min(self.concurrency, len(requests)), "writer") as pool:
            places = {pool.submit(self._insist, one, sampling, line): place for place, one in enumerate(requests)}
            try:
                for done in as_completed(places):
                    yield places[done], done.result()
            finally:
                line.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _insist(self, request: Request, sampling: Sampling, line: "_Line") -> Written:
        """Ask, and ask again after what may pass."""
        body = json.dumps(self._body(request, sampling)).encode()
        for tries in count():
            written, pause = self._try(body, line)
            if written.failure is None or not _may_pass(written.failure) or tries == self.retries:
                line.ended(written.failure)
                return written
            if line.stop.wait(self.pause(request.key, tries, pause)):
                return written
        raise AssertionError("count() has no end")

    def _try(self, body: bytes, line: "_Line") -> tuple[Written, float]:
        """What one try brings, and for how many seconds the server asks to be left alone."""
        post = _Post(f"{self.url.rstrip('/')}/chat/completions", body, line.headers)
        post.bounds = _Bounds(monotonic() + self.timeout, line.stop)
        if line.stop.is_set():
            return Written(None, "server_down"), 0.0
        try:
            with line.opener.open(post, timeout=min(self.timeout, LONGEST_CONNECT)) as answer:
                status, pause = answer.status, _retry_after(answer.headers.get("Retry-After", ""))
                if 200 <= status < 300:
                    content = answer.read(LARGEST_ANSWER + 1)
                    return Written(None, "dropped") if answer.length else _read(content), 0.0
        except (OSError, HTTPException, ValueError) as error:
            return Written(None, "server_down" if line.stop.is_set() else _reason(error)), 0.0
        if status in (401, 403, 404):
            line.stop.set()
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
        if sampling.top_k:  # no key of OpenAI's, which refuses unknown ones
            body["top_k"] = sampling.top_k
        if sampling.thinking is not None:  # as vLLM and SGLang hand it to the chat template
            body["chat_template_kwargs"] = {"enable_thinking": sampling.thinking}
        return body

    def _headers(self) -> dict[str, str]:
        secret = os.environ.get(self.key_variable, "").strip()
        if not (secret.isascii() and secret.isprintable()):
            raise InputError(
                f"the environment variable {self.key_variable} (a writer's key_variable) holds what cannot be sent in "
                "a header; set it to the secret alone, in ASCII"
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
    """Refuse what is no base URL; the message does not repeat it, for it may hold a secret."""
    if not url:
        raise InputError("a writer's url is empty; give the base URL, such as http://host:8000/v1")
    if "@" in url:
        raise InputError(
            "a writer's url holds an @; leave out name and password, and put the secret into the environment "
            "variable that key_variable names"
        )
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port  # a wrong port raises
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


def _read(content: bytes) -> Written:
    """The text in the body of an answer."""
    try:
        text = json.loads(content.decode("utf-8"))["choices"][0]["message"]["content"]
        if not isinstance(text, str) or not text.strip():
            return Written(None, "no_text")
        text.encode("utf-8")
    except UnicodeError:  # bytes that are no UTF-8, or half a surrogate
        return Written(None, "bad_encoding")
    except (ValueError, RecursionError):
        return Written(None, "bad_json")
    except (LookupError, TypeError):
        return Written(None, "no_text")
    return Written(text, None)


def _may_pass(failure: str) -> bool:
    """Whether a second try may mend it."""
    return failure in ("http_408", "http_409", "http_429") or not re.fullmatch("http_[1-4]..", failure)


def _reason(error: Exception) -> str:
    """The word for what went wrong between the first byte and the last."""
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
    """Seconds from now; 0 where the header is missing or no time."""
    if text.isascii() and text.strip().isdecimal():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()
    except (ValueError, TypeError, OverflowError):
        return 0.0


@dataclass
class _Line:
    """What the tries of one call share."""

    opener: OpenerDirector
    headers: dict[str, str] = field(repr=False)
    stop: Event = field(default_factory=Event)
    """Calls off what is in flight, what pauses and what waits."""
    lost: int = 0
    """Texts in a row that an outage took."""
    lock: Lock = field(default_factory=Lock)

    def ended(self, failure: str | None) -> None:
        """Note how a text's last try ended; any answer, be it no text, shows that the server is there."""
        outage = re.fullmatch("timeout|refused|dropped|tls|http_5..", failure or "")
        with self.lock:
            self.lost = self.lost + 1 if outage else 0
            if self.lost == DOWN_AFTER:
                self.stop.set()


@dataclass(frozen=True)
class _Bounds:
    """When a try ends: at a moment of the monotonic clock, or as soon as all are called off."""

    deadline: float
    stop: Event


class _Post(Post):
    bounds: _Bounds


class _TooLarge(HTTPException):
    """The answer is larger than any text."""


class _Bounded(RawIOBase):
    """A socket's bytes until a deadline, an end or a size is reached; a socket's own timeout is for each read anew."""

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


class _Answer(HTTPResponse):
    def __init__(self, sock: socket, *args: Any, bounds: _Bounds, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = BufferedReader(_Bounded(sock, self.fp, bounds))


class _Bounding(AbstractHTTPHandler):
    """Opens connections whose answers are bounded; it follows no redirection, which could lead a secret astray."""

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
        cast(Any, connection).response_class = partial(_Answer, bounds=cast(_Post, req).bounds)
        return connection


def _opener(secure: bool) -> OpenerDirector:
    """Posts through the proxies of the environment; an answer of any status is an answer."""
    opener = OpenerDirector()
    opener.add_handler(ProxyHandler())
    opener.add_handler(_Bounding(secure))
    return opener
