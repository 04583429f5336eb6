"""Two processes in brief, without the launcher: they learn, evaluate, share weights and refuse as one process does.

At length, as `accelerate launch` starts them, the same is tested in test_fsdp, test_nodes, test_refusing, test_zero and
test_contract. Run as a script this file is both processes.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import FSDPModule

from dllm_sd.cli.main import main
from dllm_sd.config import Config
from dllm_sd.errors import InputError
from dllm_sd.evaluation.evaluate import evaluate_into
from dllm_sd.parallel.processes import close_process_group, on_main, processes, together
from dllm_sd.policies.loading import build_policy
from dllm_sd.training import trainer as trainer_module
from dllm_sd.training.trainer import Trainer
from tests import exact  # noqa: F401
from tests.parallel.test_fsdp import BASE, EMA, ROOT, assert_same, config_of
from tests.parallel.test_nodes import free_port

pytestmark = pytest.mark.slow
UPDATES = 2
SHORT = {
    "decode": {"length": 16, "block_length": 8, "tokens_per_step": 4},
    "eval": {"every": 2, "problems": 3, "final_problems": 2},
}
TREE = {**BASE, **SHORT, "updates": UPDATES, "checkpoint": {"every": UPDATES}}
CASES: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp": {**EMA, "updates": 1, "checkpoint": {"every": 1}}}


def config_at(case: str, run: Path) -> Config:
    return config_of(case, run, TREE, CASES)


def evaluated(config: Config, out: Path) -> dict[str, Any]:
    """The report of an evaluation of the untrained model."""
    return evaluate_into(out, build_policy(config.model), config, {"task": {"name": "sudoku"}})


def refusals(folder: Path) -> dict[str, Any]:
    """What this process says where one of the two cannot go on."""
    said: dict[str, Any] = {}
    rank = processes().process_index

    def failing(*_: Any, **__: Any) -> None:
        raise InputError(f"refused by {rank}")

    for way in ("on_main", "together"):
        try:
            if way == "on_main":
                on_main(failing)
            with together():
                if rank == 1:
                    failing()
        except InputError as caught:
            said[way] = str(caught)
    with patch.object(trainer_module, "check_data", failing if rank == 1 else lambda *_: None):
        (folder / f"{rank}.yaml").write_text(json.dumps(TREE))
        said["command"] = main(["train", str(folder / f"{rank}.yaml"), f"run={folder / 'refused'}"])
    return said


def work(folder: Path) -> None:
    """What the two do together."""
    torch.set_num_threads(1)
    Trainer(config_at("ddp", folder / "two" / "ddp")).train()
    evaluated(config_at("ddp", folder), folder / "two" / "eval")
    (folder / f"{processes().process_index}.json").write_text(json.dumps(refusals(folder)))
    settings = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    os.environ.update({name.upper(): str(value) for name, value in settings.items()}, ACCELERATE_USE_FSDP="true")
    AcceleratorState._reset_state(reset_partial_state=True)  # as a launch of its own would begin
    trainer = Trainer(config_at("fsdp", folder / "two" / "fsdp"))
    assert any(isinstance(part, FSDPModule) for part in trainer.module.modules())
    trainer.train()
    close_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes did, and of what one did."""
    folder = tmp_path_factory.mktemp("pair")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    pair = subprocess.Popen(
        [sys.executable, str(Path(__file__)), str(folder)],
        env={**os.environ, **shared},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        for case in CASES:
            Trainer(config_at(case, folder / "one" / case)).train()
        evaluated(config_at("ddp", folder), folder / "one" / "eval")
        said, _ = pair.communicate(timeout=300)
        assert pair.returncode == 0, said
    finally:
        with suppress(ProcessLookupError):
            os.killpg(pair.pid, signal.SIGKILL)
        pair.communicate()
    return folder


@pytest.mark.parametrize(("case", "update"), [("ddp", UPDATES), ("fsdp", 1)])
def test_two_processes_learn_what_one_learns(both: Path, case: str, update: int) -> None:
    assert_same(both / "one" / case, both / "two" / case, update)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_trace_what_one_traces(both: Path, case: str) -> None:
    one, two = (
        [json.loads(line) for line in (both / name / case / "traces.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert sum(len(entry["sites"]) for entry in one) > 0
    for a, b in zip(one, two, strict=True):
        assert {**a, "sites": len(a["sites"]), "pieces": 0} == {**b, "sites": len(b["sites"]), "pieces": 0}
        for first, second in zip(a["sites"], b["sites"], strict=True):
            assert first["divergence"] == pytest.approx(second["divergence"], rel=1e-6, abs=1e-12)
            assert [first[key] for key in ("step", "position")] == [second[key] for key in ("step", "position")]


def test_two_processes_report_what_one_reports(both: Path) -> None:
    one, two = ((both / name / "eval" / "generations.jsonl").read_text() for name in ("one", "two"))
    assert one == two
    reports = [json.loads((both / name / "eval" / "report.json").read_text()) for name in ("one", "two")]
    assert all(reports[0][key] == reports[1][key] for key in ("n", "accuracy", "score", "length"))


def test_what_one_process_refuses_both_refuse(both: Path) -> None:
    said = [json.loads((both / f"{rank}.json").read_text()) for rank in range(2)]
    assert said[0] == said[1] == {"on_main": "refused by 0", "together": "refused by 1", "command": 2}
    assert not (both / "refused").exists()


def fork_both(folder: Path) -> int:
    """Let two forks of this process work together, so that libraries are imported once; the worse exit status."""
    children = []
    for rank in ("0", "1"):
        if (child := os.fork()) == 0:
            os.environ.update(RANK=rank, LOCAL_RANK=rank)
            work(folder)
            os._exit(0)
        children.append(child)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


if __name__ == "__main__":
    sys.exit(fork_both(Path(sys.argv[1])))
