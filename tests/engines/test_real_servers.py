"""Servers of ``dllm-sd serve`` as processes of their own: several trainers share them, and they may be killed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

pytest.importorskip("dllm_sd.serving.server", exc_type=ImportError)

from tests.parallel.test_fsdp import ROOT
from tests.parallel.test_nodes import free_port

pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/ddp.yaml", "--num_processes", "2"]
MODEL = {"path": "tiny", "dtype": "float64"}


class Server:
    """A process that serves the tiny model at a port of its own; one request at a time, so that digits are equal."""

    def __init__(self) -> None:
        self.port = free_port()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = ["serve", "tiny", "--port", str(self.port), "--allow-loading", "model.dtype=float64"]
        command = [sys.executable, "-m", "dllm_sd", *words, "decode.batch_size=1"]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, **quiet)
        until = time.monotonic() + 120
        while True:
            try:
                with urlopen(f"{self.url}/health", timeout=5):
                    return
            except (URLError, ConnectionError):
                assert self.process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def serving(count: int) -> Iterator[list[Server]]:
    servers: list[Server] = []
    try:
        while len(servers) < count:
            servers.append(Server())
        yield servers
    finally:
        for server in servers:
            server.kill()


def settings(run: Path, servers: Sequence[Server], lag: int) -> list[str]:
    """The arguments of a run: local without servers."""
    engine = {"name": "dllm_sd", "url": [server.url for server in servers], "model": "tiny", "concurrency": 1}
    tree = {
        **{"run": str(run), "seed": 3, "updates": 2, "model": {**MODEL, "lora": {"rank": 4, "alpha": 8}}},
        "task": {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}"},
        "decode": {"length": 16, "block_length": 4, "tokens_per_step": 1, "batch_size": 1},
        "method": {"name": "d_opsd", "gate": "all", "rollout": {"problems": 5, "attempts": 2, "lag": lag}},
        "optim": {"lr": 3e-3, "warmup": 0},
        "eval": {"every": 0, "final_problems": 0},
        "checkpoint": {"every": 2},
        "log": {"progress": False, "trackers": []},
    }
    tree["decode"] |= {"engine": {**engine, "backoff": 0.05, "retries": 6}} if servers else {}
    config = run.with_suffix(".yaml")
    config.write_text(json.dumps(tree))
    return ["-m", "dllm_sd", "train", str(config)]


def train(arguments: Sequence[str], *launcher: str) -> subprocess.CompletedProcess[str]:
    words = arguments[1:] if launcher else arguments
    command = [sys.executable, *launcher, *(["-m"] if launcher else []), *words]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400, cwd=ROOT)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(run: Path, other: Path) -> None:
    """Equal but for the order of sums, the time, and what an engine alone has."""
    for one, two in zip(lines(run), lines(other), strict=True):
        ours, theirs = (
            {key: value for key, value in line.items() if not key.startswith(("time/", "engine/"))}
            for line in (one, two)
        )
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)


@pytest.fixture(scope="module", params=[0, 1])
def lag(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, lag: int) -> Path:
    """The run that decodes by itself."""
    run = tmp_path_factory.mktemp("local") / "run"
    done = train(settings(run, [], lag))
    assert done.returncode == 0, done.stderr
    return run


def test_two_processes_with_two_servers_learn_what_one_learns_alone(tmp_path: Path, local: Path, lag: int):
    run, launcher = tmp_path / "run", [*LAUNCH, "--main_process_port", str(free_port())]
    with serving(2) as servers:
        done = train(settings(run, servers, lag), *launcher)
    assert done.returncode == 0, done.stderr
    assert_same(run, local)
    assert max(line["engine/logp_gap_max"] for line in lines(run)[1:]) < 1e-6
    assert [line.get("rollouts/lag") for line in lines(run)] == ([None, 0, 1] if lag else [None] * 3)


def killed_in_a_batch(run: Path, arguments: Sequence[str], server: Server) -> tuple[int, str, int]:
    """Start a run, and kill a server when some completions are there; its status, its words, and their number then."""
    journal = run / "engine" / "rollouts.0.jsonl"
    streams: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, *arguments], env=ENVIRONMENT, cwd=ROOT, **streams) as process:
        try:
            until = time.monotonic() + 200
            while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < until
                time.sleep(0.002)
            server.kill()
            said = process.communicate(timeout=200)[1]
        finally:
            process.kill()
    return process.returncode, said, journal.read_bytes().count(b"\n") if journal.exists() else 0


def test_a_server_that_is_killed_leaves_its_requests_to_the_other(tmp_path: Path, local: Path, lag: int):
    run = tmp_path / "run"
    with serving(2) as servers:
        status, said, _ = killed_in_a_batch(run, settings(run, servers, lag), servers[1])
    assert status == 0, said
    assert_same(run, local)
    assert lines(run)[-1]["engine/retried"] > 0


def test_a_run_goes_on_when_its_only_server_is_started_again(tmp_path: Path, local: Path, lag: int):
    run = tmp_path / "run"
    with serving(1) as (server,):
        arguments = settings(run, [server], lag)
        status, said, kept = killed_in_a_batch(run, arguments, server)
        assert status == 1, said
        assert said.strip().splitlines()[-1].count("finished rollouts are kept: start the servers") == 1
        server.start()
        done = train(arguments)
    assert done.returncode == 0, done.stderr
    assert f"{kept} completions since the last checkpoint are kept" in done.stderr
    assert_same(run, local)
    assert lines(run)[-1]["engine/found"] <= kept
