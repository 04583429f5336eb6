"""A writer that is a server with an OpenAI-compatible API, which may be slow, overloaded, broken or down.

Every attempt is bounded in time and size. Failures of the server are not exceptions, except for errors that a retry
cannot fix. The API key is read from its environment variable on every call, and sent in one header only.
"""

import json
import os
import re
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from threading import Event, Lock
from time import monotonic
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from dllm_sd.errors import InputError
from dllm_sd.http_client import (
    LONGEST_TRY,
    LONGEST_WAIT,
    HttpClient,
    check_key_variable,
    check_url,
    is_busy,
    is_temporary,
    json_headers,
    pause,
)
from dllm_sd.randomness import make_key
from dllm_sd.ranges import Natural, Range, Ranged
from dllm_sd.writers.cache import Cache, ask_once
from dllm_sd.writers.request import Request, Sampling, Written

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
            raise InputError("a writer's model is empty; give the name that the server uses for it")
        check_key_variable(self.key_variable, "a writer's key_variable")

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

    def _ask(self, sampling: Sampling, requests: Sequence[Request]) -> Generator[tuple[int, Written]]:
        session = _Session(HttpClient(json_headers(self.key_variable, "a writer's key_variable"), self.timeout))
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
        """Send a request, and repeat it after temporary failures.

        A server that has too much to do is no failed attempt, for as long as one attempt may take (`timeout`).
        """
        body = json.dumps(self._body(request, sampling)).encode()
        failed, patience = 0, monotonic() + self.timeout
        while True:
            written, asked = self._try(body, session)
            waits = is_busy(written.failure, asked) and monotonic() < patience
            if written.failure is None or not is_temporary(written.failure) or (failed == self.retries and not waits):
                session.ended(written.failure)
                return written
            seconds = pause(self.backoff, request.key, failed, asked)
            failed += not waits
            if session.stop.wait(seconds):
                return written

    def _try(self, body: bytes, session: "_Session") -> tuple[Written, float]:
        """Return the result of one attempt, and the seconds that the server asks to wait."""
        reply = session.client.send(f"{self.url.rstrip('/')}/chat/completions", body)
        if reply.failure in ("http_401", "http_403", "http_404"):
            session.stop.set()
            raise InputError(self._refusal(int(reply.failure[5:])))
        if reply.failure is None:
            return _parse_response(reply.content), 0.0
        return Written(None, "server_down" if reply.failure == "cancelled" else reply.failure), reply.retry_after

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
    check_url(url, "a writer's url", "http://host:8000/v1")
    if urlsplit(url).path.rstrip("/").endswith("/chat/completions"):
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


@dataclass
class _Session:
    """The state that all attempts of one call share."""

    client: HttpClient
    lost: int = 0
    """Number of texts in a row that failed by an outage."""
    lock: Lock = field(default_factory=Lock)

    @property
    def stop(self) -> Event:
        """Cancels attempts in flight, pauses and queued requests."""
        return self.client.stop

    def ended(self, failure: str | None) -> None:
        """Record the outcome of a text's last attempt; any response, even without text, shows that the server is up."""
        outage = re.fullmatch("timeout|refused|dropped|tls|http_5..", failure or "")
        with self.lock:
            self.lost = self.lost + 1 if outage else 0
            if self.lost == DOWN_AFTER:
                self.stop.set()
