"""Two machines, rehearsed on one: each has its own `accelerate launch` with one process, joined over loopback."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.test_fsdp import BASE, ROOT, assert_same

TREE = {**BASE, "optim": {**BASE["optim"], "lr": 3e-3}, "updates": 2, "checkpoint": {"every": 1}}


def free_port() -> int:
    """A port that nobody has just now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.slow
def test_two_machines_learn_what_one_process_learns(tmp_path: Path) -> None:
    config, port = tmp_path / "config.yaml", free_port()
    config.write_text(json.dumps(TREE))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/ddp.yaml"]
    launcher += ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    command = ["-m", "dllm_sd", "train", str(config)]
    machines = [
        subprocess.Popen(
            [*launcher, "--main_process_port", str(port), "--machine_rank", str(rank), *command, f"run={tmp_path}/two"],
            env={**environment, "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    try:
        alone = [sys.executable, *command, f"run={tmp_path}/one"]
        done = subprocess.run(alone, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        for machine in machines:
            said, _ = machine.communicate(timeout=300)
            assert machine.returncode == 0, said
    finally:
        for machine in machines:
            machine.kill()
    assert_same(tmp_path / "one", tmp_path / "two", update=2)
