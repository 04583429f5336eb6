"""FSDP2 on two processes without a GPU: the numbers of one process, and checkpoints that do not know how many wrote."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dllm_sd.cli.main import main
from dllm_sd.config import build_config
from dllm_sd.errors import InputError
from dllm_sd.network.lazy_logits import LOSS_CHUNK_LOGITS
from dllm_sd.parallel import sharding
from dllm_sd.parallel.processes import close_process_group
from dllm_sd.parallel.sharding import gather_tensors
from dllm_sd.training import learner as learner_module
from dllm_sd.training.trainer import Trainer
from tests import exact  # noqa: F401

ROOT = Path(__file__).parents[2]
BASE: dict[str, Any] = {
    "seed": 3,
    "updates": 4,
    "model": {"path": "tiny", "dtype": "float64"},
    "task": {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}"},
    "decode": {"length": 16, "block_length": 4, "tokens_per_step": 2},
    "method": {"name": "d_opsd", "rollout": {"problems": 5, "attempts": 2}, "teacher": {"name": "base"}},
    "optim": {"lr": 3e-4, "weight_decay": 0.01, "max_grad_norm": 0.02, "tokens_per_batch": 96},
    "eval": {"every": 2, "problems": 5, "final_problems": 4},
    "checkpoint": {"every": 2},
    "log": {"progress": False, "trackers": []},
}
LORA = {"path": "tiny", "dtype": "float64", "lora": {"rank": 4, "alpha": 8}}
EMA = {"method": {**BASE["method"], "teacher": {"name": "ema", "decay": 0.5}}}
CASES: dict[str, dict[str, Any]] = {
    "full": {"model": {**BASE["model"], "gradient_checkpointing": True}},  # by the command line
    "full_ema": EMA,
    "lora": {"model": LORA, "optim": {**BASE["optim"], "lr": 3e-3}},
    "lora_ema": {  # five canvases of five rollouts, each a micro-batch: the processes have unequal numbers of them
        "method": {**EMA["method"], "gate": {"name": "all"}, "rollout": {"problems": 5, "attempts": 1}},
        "model": LORA,
        "decode": {"length": 20, "block_length": 4, "tokens_per_step": 4},
        "optim": {**BASE["optim"], "lr": 3e-3, "tokens_per_batch": 36},
    },
    "lora_start": {"model": LORA, "optim": {**BASE["optim"], "lr": 3e-3}},  # from what one process trained as "lora"
}
GOING_ON = ("full_ema", "lora_start")


def start_of(run: Path) -> Path:
    """The adapter that a run of "lora_start" begins with."""
    return run.parents[1] / "one" / "lora" / "checkpoints" / "000004"


def config_of(case: str, run: Path, base: Mapping[str, Any] = BASE, cases: Mapping[str, Any] = CASES) -> Any:
    tree = {**base, **cases[case], "run": str(run)}
    if case == "lora_start":
        tree["model"] = {**tree["model"], "lora": {**tree["model"]["lora"], "start": str(start_of(run))}}
    return build_config(tree)


def check_teacher(trainer: Trainer) -> None:
    """The base of a run that begins with an adapter is that adapter, whatever the student has become."""
    if (lora := trainer.config.model.lora) is None or lora.start is None:
        return
    (teacher,) = trainer.learner.teachers
    expected, found = load_file(start_of(trainer.run) / "model.safetensors"), gather_tensors(teacher.copy)
    assert not trainer.main or found.keys() == expected.keys()
    assert all(torch.equal(value.cpu(), expected[name]) for name, value in found.items())


def stop_after(config: Any, update: int) -> None:
    """Run until the checkpoint of ``update`` and stop there."""
    save = Trainer._save

    def dying(self: Trainer) -> None:
        save(self)
        if self.state.update == update:
            raise RuntimeError("power cut")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save", dying)
        trainer = Trainer(config)
        with pytest.raises(RuntimeError, match="power cut"):
            trainer.train()


def check_pieces(trainer: Trainer) -> None:
    """Every parameter and every teacher's tensor is in two pieces, layer by layer."""
    parameters = dict(trainer.policy.module.named_parameters())
    assert all(isinstance(value, DTensor) for value in parameters.values())
    held = sum(value.to_local().numel() for value in parameters.values() if isinstance(value, DTensor))
    assert held < 0.6 * sum(value.numel() for value in parameters.values())
    assert all(isinstance(value, DTensor) for teacher in trainer.learner.teachers for value in teacher.copy.values())
    parts = [part for part in trainer.module.modules() if isinstance(part, FSDPModule)]
    assert len(parts) > 2
    with trainer.accelerator.no_sync(trainer.module):  # no gradient is ever kept whole
        groups = [part._get_fsdp_state()._fsdp_param_group for part in parts]
        assert all(group.reduce_grads for group in groups if group is not None)


def check_refusal(run: Path) -> None:
    """A non-finite loss on one process stops both before the step."""
    trainer, grade = Trainer(config_of("lora", run)), learner_module.grade_micro_batch

    def poisoned(*arguments: Any) -> Any:
        graded = grade(*arguments)
        return type(graded)(**{**vars(graded), "loss": graded.loss * (torch.nan if trainer.main else 1.0)})

    before = {name: value.full_tensor() for name, value in trainer.policy.module.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner_module, "grade_micro_batch", poisoned)
        with pytest.raises(FloatingPointError, match="update 1"):
            trainer.train()
    assert all(torch.equal(v.full_tensor(), before[name]) for name, v in trainer.policy.module.state_dict().items())


def work(folder: Path) -> None:
    """What two processes do together; the test process looks at the runs that they leave in ``folder``."""
    torch.set_num_threads(1)
    LOSS_CHUNK_LOGITS["cpu"] = 64  # logits of one or two sites at a time, which one process does not do
    file, run = folder / "full.yaml", folder / "two" / "full"
    file.write_text(json.dumps({**BASE, **CASES["full"]}))
    assert main(["train", str(file), f"run={run}"]) == 0
    for case in sorted(CASES.keys() - {"full"}):
        trainer = Trainer(config_of(case, folder / "two" / case))
        check_pieces(trainer)
        check_teacher(trainer)
        trainer.train()
        check_pieces(trainer)
        check_teacher(trainer)
    for case in GOING_ON:
        Trainer(config_of(case, folder / "one_then_two" / case)).train()
        stop_after(config_of(case, folder / "two_then_one" / case), 2)
    check_refusal(folder / "refused")
    close_process_group()


def launch(*arguments: str) -> None:
    """Two processes as the shipped configuration starts them."""
    config = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    done = subprocess.run(
        [*launcher, "--num_processes", "2", "--main_process_port", "0", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process and of two, and those that were begun by one and ended by the other."""
    folder = tmp_path_factory.mktemp("fsdp")
    for case in CASES:
        Trainer(config_of(case, folder / "one" / case)).train()
    for case in GOING_ON:
        stop_after(config_of(case, folder / "one_then_two" / case), 2)
    launch(str(Path(__file__)), str(folder))
    for case in GOING_ON:
        Trainer(config_of(case, folder / "two_then_one" / case)).train()
    return folder


def lines_of(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def assert_same(one: Path, other: Path, update: int = 4) -> None:
    """Metrics, accuracies and everything in the last checkpoint agree to 1e-9."""
    first, second = lines_of(one), lines_of(other)
    assert len(first) == len(second) == update + 1
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            close = value == b[key] or value == pytest.approx(b[key], rel=1e-9, abs=1e-9)
            assert close, f"{key} of update {a['update']}"
    reports: list[Mapping[str, Any]] = [json.loads((run / "report.json").read_text()) for run in (one, other)]
    assert reports[0]["accuracy"] == reports[1]["accuracy"]
    assert reports[0]["best_update"] == reports[1]["best_update"]
    checkpoints = [run / "checkpoints" / f"{update:06d}" for run in (one, other)]
    names = {file.name for file in checkpoints[0].iterdir()}
    assert names == {file.name for file in checkpoints[1].iterdir()}
    for name in names - {"state.json"}:
        x, y = (load_file(folder / name) for folder in checkpoints)
        assert x.keys() == y.keys()
        for key in x:
            torch.testing.assert_close(x[key], y[key], rtol=0, atol=1e-9, msg=f"{name}: {key}")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_pieces_on_two_processes_learn_what_one_process_learns(runs: Path, case: str) -> None:
    assert_same(runs / "one" / case, runs / "two" / case)
    lines = [line for line in lines_of(runs / "one" / case) if line.get("loss")]
    assert len(lines) >= 4
    assert any(line["grad_norm"] > 0.02 for line in lines)  # so that the gradient is clipped
    assert any(line["canvases"] % 2 for line in lines) == (case == "lora_ema")


@pytest.mark.slow
@pytest.mark.parametrize("order", ["one_then_two", "two_then_one"])
@pytest.mark.parametrize("case", GOING_ON)
def test_a_run_goes_on_with_another_number_of_processes(runs: Path, case: str, order: str) -> None:
    assert_same(runs / "one" / case, runs / order / case)


@pytest.mark.slow
def test_a_non_finite_loss_on_one_process_is_written_down(runs: Path) -> None:
    assert json.loads((runs / "refused" / "nonfinite.json").read_text())["update"] == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"FSDP_VERSION": "1"}, "fsdp_version"), ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "ram_efficient")],
)
def test_other_kinds_of_sharding_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: Mapping[str, str], words: str
) -> None:
    class Stub:
        """What accelerate gives to one of two CPU processes."""

        def __init__(self, mixed_precision: str) -> None:
            self.state = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, mixed_precision=mixed_precision)
            self.device = torch.device("cpu")

    for key, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **changes}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(sharding, "InPieces", Stub)
    monkeypatch.setattr(sharding, "PartialState", SimpleNamespace)
    with pytest.raises(InputError, match=words):
        sharding.start_accelerator(config_of("full", tmp_path))


@pytest.mark.parametrize(
    ("launched", "autocast", "refused"),
    [
        *(("fp16", None, True), ("fp16", "bfloat16", True), ("bf16", None, True), ("FP8", "bfloat16", True)),
        *(("no", None, False), ("no", "bfloat16", False), ("bf16", "bfloat16", False)),
    ],
)
def test_a_launch_in_a_precision_that_the_config_does_not_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launched: str, autocast: str | None, refused: bool
) -> None:
    class Started(Exception):
        pass

    def start(mixed_precision: str) -> None:
        raise Started(mixed_precision)

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr(sharding, "Accelerator", start)
    config = config_of("full", tmp_path)
    config = replace(config, optim=replace(config.optim, autocast=autocast))
    expected = (InputError, "mixed_precision to no") if refused else (Started, "bf16" if autocast else "no")
    with pytest.raises(expected[0], match=expected[1]):
        sharding.start_accelerator(config)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
