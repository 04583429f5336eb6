"""A real server in a thread, and a client of a few lines."""

import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

from dllm_sd.serving.routes import application
from dllm_sd.serving.server import HttpServer, bind
from dllm_sd.serving.service import Service


class Served:
    """A server that runs, and its address."""

    def __init__(self, service: Service, port: int, key: str | None) -> None:
        self.service, self.port, self.key = service, port, key

    def connect(self) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=60)

    def raw(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes, dict[str, str]]:
        connection = self.connect()
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()

    def post(self, path: str, tree: Any) -> tuple[int, Any]:
        status, content, _ = self.raw("POST", path, json.dumps(tree).encode())
        return status, json.loads(content)

    def get(self, path: str) -> tuple[int, Any]:
        status, content, _ = self.raw("GET", path)
        return status, json.loads(content)

    def events(self, path: str, tree: Any) -> list[Any]:
        """The events of a stream, which must end as OpenAI's do."""
        status, content, headers = self.raw("POST", path, json.dumps({**tree, "stream": True}).encode())
        assert status == 200, content
        assert headers["content-type"].startswith("text/event-stream")
        *events, done, rest = content.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def hang_up(self, path: str, tree: Any, after: Callable[[], bool]) -> None:
        """Ask, and leave without an answer once something is so; ask again where the answer was there first."""
        body = json.dumps(tree).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", self.port)) as line:
                line.sendall(head + body)
                until(lambda: after() or bool(select.select([line], [], [], 0)[0]))
                if after():
                    return
        raise AssertionError("every answer was there first")

    @property
    def idle(self) -> bool:
        scheduler = self.service.scheduler
        return not scheduler.running and not scheduler.waiting


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


@contextmanager
def serving(service: Service, key: str | None = None, allow_loading: bool = False) -> Iterator[Served]:
    """Serve inside, on a free port; afterwards no thread is left."""
    listener = bind("127.0.0.1", 0)
    server = HttpServer(application(service, key, allow_loading), service)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield Served(service, listener.getsockname()[1], key)
    finally:
        server.end()
        thread.join(30)
    assert not thread.is_alive()
    assert not service.scheduler.thread.is_alive()
