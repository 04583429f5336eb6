"""DeepSpeed's ZeRO-2 and ZeRO-3 on two processes without a GPU: the numbers of one process, to rounding in float32."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dllm_sd.cli.main import main
from dllm_sd.errors import InputError
from dllm_sd.parallel.processes import close_process_group
from dllm_sd.parallel.zero import ZeroOptimizer, read_stage
from dllm_sd.training import learner as learner_module
from dllm_sd.training.trainer import Trainer
from tests.parallel import test_fsdp
from tests.parallel.test_fsdp import check_teacher, stop_after

ROOT = Path(__file__).parents[2]
BASE: dict[str, Any] = {
    "seed": 3,
    "updates": 4,
    "model": {"path": "tiny", "dtype": "float32"},
    "task": {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}"},
    "decode": {"length": 16, "block_length": 4, "tokens_per_step": 2},
    "method": {"name": "d_opsd", "rollout": {"problems": 5, "attempts": 2}, "teacher": {"name": "live"}},
    "optim": {"lr": 3e-4, "weight_decay": 0.01, "max_grad_norm": 0.02, "tokens_per_batch": 96},
    "eval": {"every": 2, "problems": 5, "final_problems": 4},
    "checkpoint": {"every": 2},
    "log": {"progress": False, "trackers": []},
}
LORA = {"path": "tiny", "dtype": "float32", "lora": {"rank": 4, "alpha": 8, "merge_rollouts": True}}
CASES: dict[str, dict[str, Any]] = {
    "full": {"model": {**BASE["model"], "gradient_checkpointing": True}},  # by the command line
    "full_ema": {"method": {**BASE["method"], "teacher": {"name": "ema", "decay": 0.5}}},  # not in stage 3
    "lora": {  # five canvases of five rollouts, each a micro-batch: the processes have unequal numbers of them
        "method": {
            "name": "d_opsd",
            "teacher": {"name": "base"},
            "gate": {"name": "all"},
            "rollout": {"problems": 5, "attempts": 1},
        },
        "model": LORA,
        "decode": {"length": 20, "block_length": 4, "tokens_per_step": 4},
        "optim": {**BASE["optim"], "lr": 3e-3, "tokens_per_batch": 36},
    },
    "lora_start": {  # not in stage 3
        "method": {**BASE["method"], "teacher": {"name": "base"}},
        "model": LORA,
        "optim": {**BASE["optim"], "lr": 3e-3},
    },
}
OF_STAGE = {2: ("full", "full_ema", "lora", "lora_start"), 3: ("full", "lora")}
EVERY = [(stage, case) for stage, cases in OF_STAGE.items() for case in cases]


def config_of(case: str, run: Path) -> Any:
    return test_fsdp.config_of(case, run, BASE, CASES)


def check_pieces(trainer: Trainer, stage: int) -> None:
    """In stage 3 the weights are in pieces; in both, each process has half of the optimizer's state."""
    parameters = [value for value in trainer.policy.module.parameters() if value.requires_grad]
    count = sum(getattr(value, "ds_numel", value.numel()) for value in parameters)
    whole = all(value.numel() for value in parameters)
    assert whole == (stage == 2) or trainer.config.model.lora is not None  # small ones stay whole between steps
    assert isinstance(trainer.optimizer, ZeroOptimizer)
    held = sum(state["exp_avg"].numel() for state in trainer.optimizer.zero.optimizer.state.values())
    assert held < 0.6 * count


def check_refusal(run: Path) -> None:
    """A non-finite loss on one process stops both before the step."""
    trainer, grade = Trainer(config_of("lora", run)), learner_module.grade_micro_batch

    def poisoned(*arguments: Any) -> Any:
        graded = grade(*arguments)
        return type(graded)(**{**vars(graded), "loss": graded.loss * (torch.nan if trainer.main else 1.0)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner_module, "grade_micro_batch", poisoned)
        with pytest.raises(FloatingPointError, match="update 1"):
            trainer.train()


def work(folder: Path, stage: int) -> None:
    """What two processes do together; the test process looks at the runs that they leave in ``folder``."""
    torch.set_num_threads(1)
    file, run = folder / f"full{stage}.yaml", folder / f"two{stage}" / "full"
    file.write_text(json.dumps({**BASE, **CASES["full"]}))
    assert main(["train", str(file), f"run={run}"]) == 0
    for case in OF_STAGE[stage]:
        if case != "full":
            trainer = Trainer(config_of(case, folder / f"two{stage}" / case))
            check_teacher(trainer)
            trainer.train()
            check_teacher(trainer)
            check_pieces(trainer, stage)
        Trainer(config_of(case, folder / f"one_then_two{stage}" / case)).train()
        stop_after(config_of(case, folder / f"two_then_one{stage}" / case), 2)
    check_refusal(folder / f"refused{stage}")
    close_process_group()


def launch(stage: int, *arguments: str) -> None:
    """Two processes as the shipped configuration starts them."""
    config = ROOT / "configs" / "accelerate" / f"deepspeed_zero{stage}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, "--num_processes", "2", "--main_process_port", "0", *arguments],
        env={**os.environ, **paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=OF_STAGE)
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, int]:
    """The runs of one process and of two, and those that were begun by one and ended by the other."""
    pytest.importorskip("deepspeed")
    folder, stage = tmp_path_factory.mktemp("zero"), request.param
    for case in OF_STAGE[stage]:
        Trainer(config_of(case, folder / "one" / case)).train()
        stop_after(config_of(case, folder / f"one_then_two{stage}" / case), 2)
    launch(stage, str(Path(__file__)), str(folder), str(stage))
    for case in OF_STAGE[stage]:
        Trainer(config_of(case, folder / f"two_then_one{stage}" / case)).train()
    return folder, stage


def lines_of(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def assert_same(one: Path, other: Path) -> None:
    """Metrics, accuracies and everything in the last checkpoint agree to the rounding of float32."""
    first, second = lines_of(one), lines_of(other)
    assert len(first) == len(second) == 5
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            close = value == b[key] or value == pytest.approx(b[key], rel=1e-3, abs=1e-5)
            assert close, f"{key} of update {a['update']}: {value} and {b[key]}"
    reports: list[Mapping[str, Any]] = [json.loads((run / "report.json").read_text()) for run in (one, other)]
    assert reports[0]["accuracy"] == reports[1]["accuracy"]
    folders = [run / "checkpoints" / "000004" for run in (one, other)]
    names = {file.name for file in folders[0].iterdir()}
    assert names == {file.name for file in folders[1].iterdir()}
    for name in names - {"state.json"}:
        x, y = (load_file(folder / name) for folder in folders)
        assert x.keys() == y.keys()
        for key in x:
            gap = (x[key].double() - y[key].double()).norm()
            assert gap <= 1e-3 * x[key].double().norm() + 1e-7, f"{name}: {key}"
            if name == "model.safetensors":
                torch.testing.assert_close(x[key], y[key], rtol=0, atol=2e-5, msg=f"{name}: {key}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["two", "one_then_two", "two_then_one"])
def test_zero_on_two_processes_learns_what_one_process_learns(runs: tuple[Path, int], kind: str) -> None:
    folder, stage = runs
    for case in OF_STAGE[stage]:
        assert_same(folder / "one" / case, folder / f"{kind}{stage}" / case)
        lines = [line for line in lines_of(folder / "one" / case) if line.get("loss")]
        assert len(lines) >= 4
        assert any(line["grad_norm"] > 0.02 for line in lines)  # so that the gradient is clipped
        assert any(line["canvases"] % 2 for line in lines) == (case == "lora")


@pytest.mark.slow
def test_a_non_finite_loss_on_one_process_is_written_down(runs: tuple[Path, int]) -> None:
    folder, stage = runs
    assert json.loads((folder / f"refused{stage}" / "nonfinite.json").read_text())["update"] == 1


@pytest.mark.parametrize(
    ("environment", "case", "changes", "words"),
    [
        ({"ZERO_STAGE": "1"}, "full", {}, "zero_stage 1"),
        ({"CONFIG_FILE": "ds.json"}, "full", {}, "config file"),
        ({"OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "full", {}, "offloading"),
        ({"ZERO_STAGE": "2"}, "full", {"model": {"path": "tiny", "dtype": "bfloat16"}}, "model.dtype"),
        ({"ZERO_STAGE": "3"}, "full_ema", {}, "method.teacher"),
        ({"ZERO_STAGE": "3"}, "lora_start", {}, "method.teacher"),
        ({"ZERO_STAGE": "3"}, "full", {"optim": {"name": "adamw_8bit"}}, "optim.name"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    environment: Mapping[str, str],
    case: str,
    changes: Mapping[str, Any],
    words: str,
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{key}", value)
    with pytest.raises(InputError, match=words):
        read_stage(test_fsdp.config_of(case, tmp_path / "runs" / case, BASE, {case: {**CASES[case], **changes}}))


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
