"""A minute of many clients, a third of which hang up at once: the others are answered, and nothing is left behind."""

import json
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.serving.crowd import crowd, sampled

served = pytest.importorskip("tests.serving.served", exc_type=ImportError)

CLIENTS = 64
WARM = 5
"""Seconds after which the server has all the memory that it needs."""


def ask(port: int, path: str, tree: Any = None) -> Any:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET" if tree is None else "POST", path, None if tree is None else json.dumps(tree).encode())
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory and descriptors are read from /proc")
@pytest.mark.parametrize(("path", "seconds"), [("tiny", 60), ("tiny_ar", 15)])
def test_many_clients_of_which_a_third_hang_up_leave_nothing_behind(path: str, seconds: float):
    command = [sys.executable, "-m", "dllm_sd", "serve", path, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            port = int(next(line for line in lines if line.startswith("serving")).rsplit(":", 1)[1])
            alone = ask(port, "/generate", {"prompt_ids": [5, 6], "key": 3})
            with sampled(process.pid) as held:
                crowd(port, CLIENTS, WARM)
                begun = len(held()[0])
                seen = crowd(port, CLIENTS, seconds)
                served.until(lambda: ask(port, "/health") == {"status": "ok", "running": 0, "waiting": 0}, 5)
                memory, descriptors = (values[begun:] for values in held())
            assert ask(port, "/generate", {"prompt_ids": [5, 6], "key": 3}) == alone
        finally:
            process.terminate()
            said = process.communicate(timeout=60)[1]
    late = sorted(seen.health)[int(0.95 * len(seen.health))]
    print(f"{path}, {seconds:g} s: {dict(seen.answers)}, slowest {seen.slowest} s, 95 % of health {late:.3f} s")
    print(f"memory {memory[0]} to {memory[-1]}, most {max(memory)} MiB; descriptors at most {max(descriptors)}")
    assert said.strip() == ""
    assert process.returncode == 0
    assert set(seen.answers) <= {"200", "503", "left", "health"}  # no time-out, no connection that was dropped
    assert seen.unsaid == 0
    assert seen.answers["200"] > 2 * seconds
    assert seen.answers["left"] > 20 * seconds
    assert late < 1
    assert seen.slowest["health"] < 4  # a system tries a connection that another one has no room for again after 1 s
    assert max(memory) - memory[0] < 24
    assert max(descriptors) < 2 * CLIENTS + 64
