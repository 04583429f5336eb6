"""Runs on an accelerator: every tensor is where it is needed, numbers are those of the CPU, steps do not wait."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from dllm_sd.config import build_config
from dllm_sd.decoding import denoising
from dllm_sd.decoding.denoising import denoise
from dllm_sd.decoding.queue import Listed
from dllm_sd.decoding.settings import Decoding
from dllm_sd.decoding.slots import CanvasLayout
from dllm_sd.network.merging import inference
from dllm_sd.policies.loading import build_policy
from dllm_sd.pretrained.model import Model
from dllm_sd.randomness import make_key
from dllm_sd.training.trainer import Trainer
from tests.accelerator import Accelerator, Misplaced
from tests.tiers import later


@pytest.fixture
def accelerator() -> Any:
    """``cuda`` is an accelerator that refuses what a real one refuses."""
    found = Accelerator()
    with found.here():
        yield found


def test_the_accelerator_refuses_to_mix_and_moves(accelerator: Accelerator):
    host = torch.arange(3)
    there = host.to("cuda")
    assert (host.device.type, there.device.type, there.cpu().device.type) == ("cpu", "cuda", "cpu")
    made = torch.zeros(3, device="cuda"), there * 2, there[:2], torch.empty_like(there), there.new_tensor([1, 2])
    assert {x.device.type for x in (*made, host.to(there), torch.tensor([1], device=there.device))} == {"cuda"}
    assert {x.device.type for x in (torch.tensor([1]), host * 2, there.new_zeros(3, device="cpu"))} == {"cpu"}
    assert (there + torch.tensor(1)).tolist() == [1, 2, 3]  # a number may be on the CPU
    for mix in (
        lambda: there + host,
        lambda: torch.cat([there, host]),
        lambda: there[torch.tensor([0])],
        lambda: host[there],
        lambda: host.add_(there),
        lambda: host.add_(there[0]),
        lambda: there.numpy(),
    ):
        with pytest.raises(Misplaced):
            mix()
    host.copy_(there)
    assert host.device.type == "cpu"


def test_the_accelerator_knows_what_waits(accelerator: Accelerator):
    host = torch.arange(3)
    there = host.to("cuda")
    with accelerator.without_waits():
        assert host.tolist() == [0, 1, 2]
        assert int(host[1]) == 1
        there = torch.where(there > 1, there, 0) + torch.tensor([1, 1, 1], device="cuda")
        for wait in (
            lambda: int(there[0]),
            lambda: bool(there.any()),
            lambda: there.tolist(),
            lambda: there.cpu(),
            lambda: there.to("cpu", torch.float32),
            lambda: there.nonzero(),
            lambda: there[there > 1],
            lambda: torch.equal(there, there),
        ):
            with pytest.raises(Misplaced, match="waits for the device"):
                wait()
    assert there.cpu().tolist() == [1, 1, 3]


def test_gradients_are_where_their_weights_are(accelerator: Accelerator):
    layer = torch.nn.Linear(3, 2).to("cuda")
    layer(torch.ones(4, 3, device="cuda")).sum().backward()
    assert {x.device.type for x in layer.parameters()} == {"cuda"}
    assert {x.grad.device.type for x in layer.parameters() if x.grad is not None} == {"cuda"}
    with pytest.raises(Misplaced):
        layer(torch.ones(4, 3))


def test_a_step_of_fixed_shapes_copies_and_reads_nothing(accelerator: Accelerator, monkeypatch: Any):
    policy: Any = build_policy(Model("tiny"), "cuda")
    settings = Decoding(length=8, block_length=4, tokens_per_step=2, temperature=1.0, suppress=policy.suppress)
    step, steps = denoising._Stepper.__call__, []

    def watched(self: Any, group: Any) -> None:
        steps.append(group)
        with accelerator.without_waits():
            step(self, group)

    monkeypatch.setattr(denoising._Stepper, "__call__", watched)
    queue = Listed([[5, 6], [7]], [make_key("accelerator", i) for i in range(2)])
    layout = CanvasLayout(policy.mask_id, policy.end_ids, policy.pad_id, False)
    with inference(policy.module):
        denoise(policy.module, queue, settings, layout, vocabulary=25, static_shapes=True, device="cuda")
    assert len(steps) == 4
    assert queue.collected().tokens.device.type == "cpu"


def test_an_autoregressive_model_decodes_on_an_accelerator_as_on_the_cpu(accelerator: Accelerator):
    settings = Decoding(length=4, temperature=1.0)
    prompts, keys = [[5, 6], [7]], [make_key("accelerator", i) for i in range(2)]
    host, device = (build_policy(Model("tiny_ar"), name).decode(prompts, settings, keys) for name in ("cpu", "cuda"))
    assert accelerator.operations > 100
    assert device.tokens.tolist() == host.tokens.tolist()
    torch.testing.assert_close(device.logp, host.logp, equal_nan=True, rtol=1e-4, atol=1e-5)


LORA = {"rank": 4, "targets": ["q_proj"]}
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
FEW = {"problems": 2, "attempts": 2}
TREE: dict[str, Any] = {
    "seed": 3,
    "updates": 2,
    "model": {"path": "tiny"},
    "task": {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}"},
    "decode": {"length": 8, "block_length": 4, "tokens_per_step": 4},
    "optim": {"lr": 3e-4, "tokens_per_batch": 2048},
    "eval": {"every": 2, "problems": 2, "final_problems": 0},
    "checkpoint": {"every": 1},
    "log": {"progress": False, "trackers": []},
}
CAUSAL: dict[str, Any] = {"model": {"path": "tiny_ar"}, "task": {"name": "sudoku"}, "decode": {"length": 4}}
RUNS: dict[str, dict[str, Any]] = {
    "suffix teacher": {"method": {"name": "d_opsd", "gate": "all", "rollout": FEW}},
    "autoregressive, hint teacher, LoRA, EMA": {
        **CAUSAL,
        "model": {"path": "tiny_ar", "lora": LORA},
        "method": {"name": "opsd", "rollout": {"problems": 2}, "teacher": {"name": "ema", "decay": 0.5}},
    },
    "suffix teacher, LoRA, EMA": {
        "model": {"random_init": True, "tokenizer": "tiny", "shape": SHAPE, "lora": LORA},
        "method": {"name": "d_opsd", "gate": "all", "rollout": FEW, "teacher": {"name": "ema", "decay": 0.5}},
    },
    "autoregressive, hint teacher": {**CAUSAL, "method": {"name": "opsd", "rollout": {"problems": 2}}},
    "hint teacher of a denoiser": {
        "method": {"name": "d_opsd", "gate": "all", "rollout": FEW, "contexts": [{"name": "reference"}]}
    },
    "policy gradient": {"method": {"name": "diffu_grpo", "rollout": {"problems": 1, "attempts": 2}}},
}
FIRST = "suffix teacher, LoRA, EMA"
"""The run of the first tier."""


def run_to(folder: Path, name: str, until: int | None = None) -> list[dict[str, Any]]:
    """Train up to an update; the metrics of the run, times left out."""
    Trainer(build_config({**TREE, **RUNS[name], "run": str(folder)})).train(until)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def assert_like(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["update"] for line in found] == [0, 1, 2]
    assert any(line["loss"] is not None for line in found[1:])
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", [FIRST, *later(*(name for name in RUNS if name != FIRST))])
def test_a_run_on_an_accelerator_is_that_on_the_cpu(name: str, tmp_path: Path):
    expected = run_to(tmp_path / "host", name)
    accelerator = Accelerator()
    with accelerator.here():
        run_to(tmp_path / "device", name, until=1)
        assert accelerator.operations > 1000
        found = run_to(tmp_path / "device", name)  # goes on from the checkpoint
    assert_like(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_a_gpu_is_that_on_the_cpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = []
    for device in ("cpu", "cuda"):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", device)
        run_to(tmp_path / device, name, until=1)
        runs.append(run_to(tmp_path / device, name))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert_like(runs[1], runs[0])
