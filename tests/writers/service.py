"""A real server on this machine that fails as it is told, and the ways in which it can."""

import socket
import sys
from collections import defaultdict
from collections.abc import Callable
from threading import Event, Lock
from typing import Any

from dllm_sd.writers import Request, Sampling, Server, Written
from tools.stub_writer import Handler, StubWriter, completion, running

__all__ = ["BRIEF", "FAULTS", "Fault", "Handler", "Service", "body", "completion", "requests", "running", "write_one"]

SECRET = "sk-c0ffee-5ecret"


class Service(StubWriter):
    """Answers a chat whose last message is ``x`` with ``text of x``, after the faults that are planned for it."""

    def __init__(self) -> None:
        super().__init__("text of {}".format)
        self.faults: dict[str, list[Callable[[Handler], Any]]] = defaultdict(list)
        self.seen: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.released, self.lock = Event(), Lock()
        self.now, self.most = 0, 0
        self.meet: Callable[[], Any] = lambda: None

    def fault(self, text: str, body: Any) -> "Fault | None":
        """What goes wrong with this request."""
        return self.faults[text].pop(0) if self.faults[text] else None

    def count(self, text: str) -> int:
        """How often it was asked for one text."""
        return sum(one == text for one, _, _ in self.seen)

    def respond(self, handler: Handler, body: Any) -> None:
        """Note the request, and answer it unless something goes wrong."""
        text = body["messages"][-1]["content"]
        with self.lock:
            assert handler.path == "/v1/chat/completions"
            self.seen.append((text, body, dict(handler.headers)))
            fault = self.fault(text, body)
            self.now += 1
            self.most = max(self.most, self.now)
        self.meet()
        with self.lock:
            self.now -= 1
        if fault:
            fault(handler)
        else:
            super().respond(handler, body)

    def shutdown(self) -> None:
        """Stop, and let go whoever is kept waiting."""
        self.released.set()
        super().shutdown()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are expected."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


Fault = Callable[[Handler], Any]


def service_of(handler: Handler) -> Service:
    """The server that a request came to."""
    assert isinstance(handler.server, Service)
    return handler.server


def slow(handler: Handler) -> None:
    service_of(handler).released.wait(5)


def drip(handler: Handler) -> None:
    """A byte at a time: no read waits for long, the whole never ends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    while not service_of(handler).released.wait(0.02):
        handler.wfile.write(b" ")


def drop(handler: Handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def cut(handler: Handler) -> None:
    handler.answer(completion("text of x")[:20], Content_Length="60")


def no_http(handler: Handler) -> None:
    handler.wfile.write(b"hello\r\n\r\n")


def wrong_chunk(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"-5\r\nhello\r\n")


def endless(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(80):
        handler.wfile.write(b" " * 2**16)


def status(code: int, **headers: str) -> Fault:
    return lambda handler: handler.answer(b"{}", code, **headers)


def body(content: bytes) -> Fault:
    return lambda handler: handler.answer(content)


FAULTS: dict[str, tuple[str, Fault]] = {
    "slow": ("timeout", slow),
    "drip": ("timeout", drip),
    "dropped": ("dropped", drop),
    "cut": ("dropped", cut),
    "no_http": ("bad_http", no_http),
    "wrong_chunk": ("bad_http", wrong_chunk),
    "endless": ("too_large", endless),
    "500": ("http_500", status(500)),
    "503": ("http_503", status(503)),
    "408": ("http_408", status(408)),
    "409": ("http_409", status(409)),
    "429": ("http_429", status(429, Retry_After="0")),
    "garbage": ("bad_json", body(b"<html>busy</html>")),
    "nothing": ("bad_json", body(b"")),
    "half_a_json": ("bad_json", body(completion("text of x")[:-9])),
    "deep": ("bad_json", body(b"[" * 200_000)),
    "invalid_utf8": ("bad_encoding", body(completion("caf_").replace(b"_", b"\xe9"))),
    "half_a_surrogate": ("bad_encoding", body(completion("\ud800"))),
    "empty": ("no_text", body(completion(""))),
    "blank": ("no_text", body(completion(" \n"))),
    "null": ("no_text", body(completion(None))),
    "no_choices": ("no_text", body(b'{"choices": []}')),
    "error_as_json": ("no_text", body(b'{"error": "busy"}')),
    "list": ("no_text", body(b"[]")),
}
BRIEF: dict[str, dict[str, Any]] = {"slow": {"timeout": 0.2}, "drip": {"timeout": 0.2}}


def requests(*texts: str) -> list[Request]:
    """Each with a key of its own."""
    chats = [({"role": "system", "content": "Write."}, {"role": "user", "content": text}) for text in texts]
    return [Request(chat, int(text.encode().hex(), 16)) for chat, text in zip(chats, texts, strict=True)]


def writer(service: Service, **options: Any) -> Server:
    """Without pauses."""
    return Server(**{"url": service.url, "model": "m", "backoff": 0.0, "timeout": 5.0, **options})


def write_one(service: Service, **options: Any) -> Written:
    """What comes back for the message ``x``."""
    [written] = writer(service, **options).write(requests("x"), Sampling())
    return written
