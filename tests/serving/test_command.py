"""``dllm-sd serve``: it listens where it is told, says what is wrong in a sentence, and ends when it is asked to."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import pytest

from dllm_sd.cli import serve
from dllm_sd.cli.main import main

served = pytest.importorskip("tests.serving.served", exc_type=ImportError)
server = pytest.importorskip("dllm_sd.serving.server", exc_type=ImportError)
bind = server.bind


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command says before it ends with status 2."""
    try:
        status = main(["serve", *words])
    except SystemExit as exit_:
        status = exit_.code
    said = capsys.readouterr()
    assert (status, said.out) == (2, "")
    (line,) = said.err.splitlines()
    return line


def test_what_is_wrong_is_said_in_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(serve, "load", unexpected)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1 port {port}" in refusal(capsys, "tiny", "--port", port)
    assert "--host 'no.such.host.invalid'" in refusal(capsys, "tiny", "--host", "no.such.host.invalid")
    for port in ("-1", "65536", "eighty", "9" * 5000):
        assert "--port" in refusal(capsys, "tiny", f"--port={port}")
    monkeypatch.delenv("NO_KEY", raising=False)
    monkeypatch.setenv("BAD_KEY", "with space")
    for name in ("NO_KEY", "BAD_KEY"):
        said = refusal(capsys, "tiny", "--port", "0", "--api-key-variable", name)
        assert name in said
        assert "with space" not in said
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert "pip install 'dllm-sd[serve]'" in refusal(capsys, "tiny")


def test_a_signal_ends_the_server_when_what_runs_has_ended(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    ports: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(server, "bind", lambda *where: listening(ports, *where))
    monkeypatch.setenv("KEY", "sesame")

    def client() -> list[tuple[int, Any]]:
        port, found = ports.get(timeout=60), []
        slow = {"prompt_ids": [5], "key": 1, "settings": {"length": 48, "early_end": False}}
        with ThreadPoolExecutor(1) as pool:
            found.append(ask(port, "POST", "/generate", {"prompt_ids": [5] * 33, "key": 1}))
            running = pool.submit(ask, port, "POST", "/generate", slow)
            served.until(lambda: ask(port, "GET", "/health")[1]["running"] == 1)
            os.kill(os.getpid(), signal.SIGINT)
            found.append(running.result())
        return found

    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(client)
        assert main(["serve", "tiny", "--port", "0", "--api-key-variable", "KEY", "max_prompt=32"]) == 0
        (refused, long), (done, tree) = answers.result()
    assert (refused, "has 33 tokens" in long["error"]["message"]) == (413, True)
    assert (done, len(tree["tokens"])) == (200, 48)
    lines = [line for line in capsys.readouterr().err.splitlines() if "Loading weights" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("serving tiny at http://127.0.0.1:")


def listening(ports: "queue.Queue[int]", *where: Any) -> socket.socket:
    listener = bind(*where)
    ports.put(listener.getsockname()[1])
    return listener


def ask(port: int, method: str, path: str, tree: Any = None) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, tree and json.dumps(tree), {"Authorization": "Bearer sesame"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def start(*words: str, **environment: str) -> tuple[subprocess.Popen[str], int]:
    """A server of the shipped model that is ready, and its port."""
    command = [sys.executable, "-W", "error::ResourceWarning", "-m", "dllm_sd", "serve", "tiny", "--port", "0", *words]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("serving tiny at http://127.0.0.1:"):
            return process, int(line.rsplit(":", 1)[1])
    raise AssertionError("the server did not start")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_any_signal_ends_an_idle_or_a_busy_server_with_status_0(number: signal.Signals, times: int):
    process, port = start()
    try:
        with socket.create_connection(("127.0.0.1", port)) as line:
            body = json.dumps({"prompt_ids": [5], "key": 1, "settings": {"length": 2048, "early_end": False}})
            line.sendall(f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            time.sleep(1)
            for _ in range(times):
                process.send_signal(number)
                time.sleep(0.5)
            began = time.monotonic()
            assert process.wait(60) == 0
            assert time.monotonic() - began < (60 if times == 1 else 20)
    finally:
        process.kill()
        process.communicate()
