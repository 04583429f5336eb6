"""What a server does that has too much to do, and for clients that have gone: nothing, as fast as it can."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from dllm_sd.policies.loading import build_policy
from dllm_sd.pretrained.model import Model
from dllm_sd.serving.scheduler import Scheduler
from dllm_sd.serving.service import Limits, Service
from tests.serving.conftest import service_of
from tests.serving.crowd import crowd

served = pytest.importorskip("tests.serving.served", exc_type=ImportError)
connections = pytest.importorskip("dllm_sd.serving.connections", exc_type=ImportError)
routes = pytest.importorskip("dllm_sd.serving.routes", exc_type=ImportError)
bind = pytest.importorskip("dllm_sd.serving.server", exc_type=ImportError).bind

BODIES: dict[str, Any] = {
    "/generate": {"prompt_ids": [5, 6], "key": 3},
    "/v1/completions": {"prompt": "12"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "12"}], "stream": True},
}


@pytest.fixture(scope="module")
def policy() -> Any:
    return build_policy(Model(path="tiny"))


def small(policy: Any, requests: int) -> Service:
    return service_of(policy, Model(path="tiny"), limits=Limits(prompt=64, requests=requests))


@contextmanager
def standing_still(server: Any) -> Iterator[None]:
    """The decoding thread decodes nothing inside."""
    with server.service.scheduler.pause() as still:
        still.result(20)
        yield


def test_more_requests_than_the_server_works_on_are_refused_at_once_and_it_says_that_it_is_well(policy: Any):
    with served.serving(small(policy, 2)) as server, ThreadPoolExecutor(2) as pool:
        with standing_still(server):
            working = [pool.submit(server.post, "/generate", BODIES["/generate"]) for _ in range(2)]
            served.until(lambda: len(server.service.scheduler.waiting) == 2)
            for path, body in BODIES.items():
                begun = time.monotonic()
                status, content, headers = server.raw("POST", path, json.dumps(body).encode())
                assert (status, headers["retry-after"]) == (503, "1")
                assert (
                    json.loads(content)["error"]["message"] == "the server works on 2 requests already; ask again later"
                )
                assert server.get("/health") == (200, {"status": "ok", "running": 0, "waiting": 2})
                assert server.get("/v1/models")[0] == 200
                assert time.monotonic() - begun < 1
        assert [one.result()[0] for one in working] == [200, 200]
        assert server.post("/generate", BODIES["/generate"])[0] == 200


def test_the_rest_of_a_refused_request_is_read_so_that_the_refusal_arrives(policy: Any):
    with served.serving(small(policy, 1)) as server, ThreadPoolExecutor(1) as pool:
        with standing_still(server):
            working = pool.submit(server.post, "/generate", BODIES["/generate"])
            served.until(lambda: len(server.service.scheduler.waiting) == 1)
            for _ in range(5):
                assert server.raw("POST", "/generate", b" " * 2**20)[0] == 503
        assert working.result()[0] == 200


def test_more_connections_than_the_server_holds_are_refused_until_one_ends(policy: Any):
    with served.serving(small(policy, 1)) as server:
        most = server.service.limits.connections
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(most)]
        for line in held:  # the server has accepted it once it answers
            line.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert line.recv(4096).startswith(b"HTTP/1.1 200")
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as line:
            said = line.recv(4096)
        assert said.startswith(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n")
        assert b"too many connections are open; ask again later" in said
        held.pop().close()
        served.until(lambda: server.get("/health")[0] == 200)
        for line in held:
            line.close()


def test_a_connection_without_a_request_is_closed(policy: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "SILENT", 1.0)
    with served.serving(small(policy, 1)) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as silent:
            assert silent.recv(1) == b""
        asking = server.connect()
        for _ in range(3):  # on one connection, which is older than that at the end
            asking.request("GET", "/health")
            answer = asking.getresponse()
            assert (answer.status, bool(answer.read())) == (200, True)
            assert asking.sock is not None
            time.sleep(0.6)
        asking.close()


def test_a_client_that_does_not_read_its_stream_loses_its_place(policy: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "UNREAD", 1.0)

    async def endless(answer: Any, send: Any) -> None:
        while True:
            await asyncio.sleep(0.001)
            await send({"words": "x" * 2**16})

    monkeypatch.setattr(routes.ApiResponse, "stream", endless)
    body = json.dumps({**BODIES["/v1/completions"], "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with (
        served.serving(small(policy, 1)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as unread,
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as slow,
    ):
        unread.sendall(head + body)
        served.until(lambda: server.post("/generate", BODIES["/generate"])[0] == 503)
        served.until(lambda: server.post("/generate", BODIES["/generate"])[0] == 200)
        slow.sendall(head + body)
        begun = time.monotonic()
        while time.monotonic() - begun < 2.5:  # one that reads keeps it
            assert slow.recv(2**20)
            time.sleep(0.05)
        assert server.post("/generate", BODIES["/generate"])[0] == 503


def test_connections_whose_clients_have_gone_are_not_accepted():
    listener = bind("127.0.0.1", 0)
    listener.setblocking(False)
    with listener:
        for _ in range(50):
            with socket.create_connection(listener.getsockname()) as gone:
                gone.sendall(b"POST /generate HTTP/1.1\r\n\r\n")
        with socket.create_connection(listener.getsockname()) as present:
            accepted, address = listener.accept()
            with accepted:
                assert address == present.getsockname()
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_dropping_connections_does_not_keep_the_server_from_everything_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "DROPPING", 0.0)
    with bind("127.0.0.1", 0) as listener:
        where = listener.getsockname()
        with socket.create_connection(where), pytest.raises(BlockingIOError):
            listener.accept()


async def answered(service: Service, path: str, looks: int) -> int:
    """The status of a request whose client has gone when it is looked at for the second, third, ... time."""
    statuses: list[int] = []
    body = {"type": "http.request", "body": json.dumps(BODIES[path]).encode(), "more_body": False}
    messages = [body]
    left = iter([False] * looks)

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "root_path": ""}
    state = {"hung_up": lambda: next(left, True)}
    await routes.application(service)({**scope, "state": state}, receive, send)
    return statuses[0]


@pytest.mark.parametrize("path", BODIES)
def test_nothing_is_submitted_for_a_client_that_has_gone_before_or_while_its_request_is_read(policy: Any, path: str):
    service, looks = small(policy, 2), 0
    try:
        while (status := asyncio.run(answered(service, path, looks))) == routes.GONE:
            assert service.scheduler.count == 0
            looks += 1
        assert (status, service.scheduler.count) == (200, 1)
        assert looks >= 3  # before the body, before it is parsed, and before it is submitted
    finally:
        service.stop(10)


def test_a_client_that_hangs_up_in_the_middle_of_a_body_is_no_failure(policy: Any, capfd: pytest.CaptureFixture[str]):
    with served.serving(small(policy, 1)) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            time.sleep(0.1)
        served.until(lambda: server.post("/generate", BODIES["/generate"])[0] == 200)
    assert "Traceback" not in capfd.readouterr().err


def test_requests_that_pause_the_decoder_cannot_keep_it_from_its_next_step():
    scheduler: Any = SimpleNamespace(pauses=[])

    def pause(_: Any = None) -> None:
        still, resume = Future[None](), threading.Event()
        resume.set()
        if scheduler.count < 100:
            scheduler.count += 1
            still.add_done_callback(pause)  # another one as soon as this one has begun
        scheduler.pauses.append((still, resume))

    scheduler.count = 0
    pause()
    Scheduler.stand_still(scheduler)
    assert (scheduler.count, len(scheduler.pauses)) == (2, 1)


def test_a_small_crowd_of_which_a_third_hang_up_leaves_nothing_behind(policy: Any):
    with served.serving(small(policy, 64)) as server:
        seen = crowd(server.port, 12, 1.5)
        served.until(lambda: server.idle)
        assert server.post("/generate", BODIES["/generate"])[0] == 200
    assert set(seen.answers) <= {"200", "503", "left", "health"}
    assert seen.answers["200"] > 4
    assert seen.answers["left"] > 20
