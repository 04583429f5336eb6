"""Compares the memory estimate of `dllm_sd.reports.memory` with measured peaks on randomly initialised models.

    python tools/check_memory.py [--device cpu] [--only WORDS]

Every case runs two micro-batches of one update with its optimizer step (gradients exist during the second, as in a real
run), and the first step of a decoding batch, which has the most active positions. Allocations are counted by
torch.profiler on the CPU and by the allocator on CUDA. The rows of a case compare the permanent bytes (weights,
optimizer state, teacher copies), those of learning and of decoding above them, and the peak.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Glm4MoeConfig, PreTrainedConfig, Qwen3Config

from dllm_sd.config import Config, build_config
from dllm_sd.decoding.denoising import denoise
from dllm_sd.decoding.queue import Listed
from dllm_sd.decoding.settings import Decoding
from dllm_sd.decoding.slots import CanvasLayout
from dllm_sd.network.site_head import run_at_sites
from dllm_sd.objective.batching import micro_batches
from dllm_sd.objective.equation import grade_micro_batch
from dllm_sd.objective.plan import Plan, plan_update
from dllm_sd.policies.loading import AnyPolicy, build_policy, empty_network
from dllm_sd.policies.weights import TeacherModel, trained
from dllm_sd.pretrained.blueprint import read_blueprint
from dllm_sd.randomness import make_key
from dllm_sd.reports.memory import MemoryEstimate, estimate
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.training.optim import build_optimizer

SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 768}
WIDE = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1536}
LORA = {"rank": 16, "alpha": 16}
FEW, MANY = {"vocab_size": 1000}, {"vocab_size": 126_464}
CHECKPOINTS = {"gradient_checkpointing": True}
BFLOAT16 = {"dtype": "bfloat16"}
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 32,
    "vocab_size": 1000,
}
GROUPED: dict[str, Any] = {
    "num_key_value_heads": 2,
    "intermediate_size": 768,
    "is_causal": False,
    "tie_word_embeddings": True,
}
MIXTURE: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "first_k_dense_replace": 1,
}
OTHERS: dict[str, PreTrainedConfig] = {
    "qwen3": Qwen3Config(**SIZES, **GROUPED),
    "glm4_moe": Glm4MoeConfig(**SIZES, **GROUPED, **MIXTURE, n_group=1, topk_group=1),
}
"""Architectures beside LLaDA's; a case names one as its `model.path`."""
CASES: dict[str, dict[str, Any]] = {
    "full float32": {"model": {"shape": SMALL | FEW}},
    "full float32, large vocabulary": {"model": {"shape": SMALL | MANY}},
    "full bfloat16": {"model": {"shape": SMALL | FEW, **BFLOAT16}},
    "full bfloat16, 126k, checkpointing": {"model": {"shape": SMALL | MANY, **BFLOAT16, **CHECKPOINTS}},
    "full float32, checkpointing": {"model": {"shape": WIDE | FEW, **CHECKPOINTS}},
    "lora float32": {"model": {"shape": SMALL | FEW, "lora": LORA}},
    "lora bfloat16": {"model": {"shape": WIDE | FEW, "lora": LORA, **BFLOAT16}},
    "lora bfloat16, 126k": {"model": {"shape": WIDE | MANY, "lora": LORA, **BFLOAT16}},
    "lora bfloat16, checkpointing": {"model": {"shape": WIDE | FEW, "lora": LORA, **BFLOAT16, **CHECKPOINTS}},
    "lora float32, dropout": {"model": {"shape": SMALL | FEW, "lora": {**LORA, "dropout": 0.1}}},
    "full float32, autocast": {"model": {"shape": SMALL | FEW}, "optim": {"autocast": "bfloat16"}},
    "lora float32, autocast": {"model": {"shape": SMALL | FEW, "lora": LORA}, "optim": {"autocast": "bfloat16"}},
    "full bfloat16, EMA teacher, JSD": {
        "model": {"shape": SMALL | MANY, **BFLOAT16},
        "method": {"name": "d_opsd", "teacher": [{"name": "ema"}], "divergence": {"name": "jsd", "beta": 0.5}},
    },
    "lora bfloat16, 126k, JSD": {
        "model": {"shape": SMALL | MANY, "lora": LORA, **BFLOAT16},
        "method": {"name": "d_opsd", "divergence": {"name": "jsd", "beta": 0.5}},
    },
    "lora bfloat16, merged rollouts": {
        "model": {"shape": WIDE | FEW, "lora": {**LORA, "merge_rollouts": True}, **BFLOAT16}
    },
    "lora float32, trained embedding": {
        "model": {"shape": SMALL | MANY, "lora": {**LORA, "modules_to_save": ["embed_tokens"]}}
    },
    "full float32, eager": {"model": {"shape": SMALL | FEW, "attention": "eager"}},
    "qwen3 full bfloat16": {"model": {"path": "qwen3", **BFLOAT16}},
    "qwen3 lora bfloat16": {"model": {"path": "qwen3", "lora": LORA, **BFLOAT16}},
    "glm4_moe full float32": {"model": {"path": "glm4_moe"}},
    "glm4_moe bfloat16, lora on attention": {
        "model": {"path": "glm4_moe", "lora": {**LORA, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}, **BFLOAT16}
    },
    "diffu_grpo, 30k": {
        "model": {"shape": SMALL | {"vocab_size": 30_000}},
        "method": "diffu_grpo",
        "decode": {"length": 64, "block_length": 32},
    },
    "rft, 30k, checkpointing": {
        "model": {"shape": SMALL | {"vocab_size": 30_000}, **CHECKPOINTS},
        "method": "rft",
        "decode": {"length": 64, "block_length": 32},
    },
    "sft, 126k": {"model": {"shape": SMALL | MANY}, "method": "sft"},
    "block-causal, lora bfloat16": {"model": {"shape": SMALL | FEW, "lora": LORA, "block_length": 16, **BFLOAT16}},
    "lora bfloat16, canvases of 512": {
        "model": {"shape": WIDE | FEW, "lora": LORA, **BFLOAT16},
        **{"max_prompt": 256, "decode": {"length": 256, "batch_size": 4}, "optim": {"tokens_per_batch": 2048}},
    },
    "d_opsd_paper, 30k": {"model": {"shape": SMALL | {"vocab_size": 30_000}}, "method": "d_opsd_paper"},
    "d_opsd_reference, 30k": {"model": {"shape": SMALL | {"vocab_size": 30_000}}, "method": "d_opsd_reference"},
}


def configuration(case: dict[str, Any], folder: Path) -> Config:
    """The config of a case, with defaults small enough for a CPU. Native model configs are written to ``folder``."""
    tree = {
        "task": {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}"},
        "decode": {"length": 64, "block_length": 16, "batch_size": 8},
        "max_prompt": 64,
        **case,
    }
    tree["model"] = {"random_init": True, "tokenizer": "tiny", **tree["model"]}
    if (name := tree["model"].get("path")) is not None:
        tree["model"]["path"] = str(folder / name)
        OTHERS[name].save_pretrained(folder / name)
    tree["optim"] = {"tokens_per_batch": 1024, **tree.get("optim", {})}
    return build_config(tree)


def rollouts(config: Config, rows: int) -> Rollouts:
    """Rollouts of a denoiser with uniform logits; every other prompt is one token shorter than the longest."""
    prompts = [[5] * (config.max_prompt - row % 2) for row in range(rows)]
    settings = Decoding(
        length=config.decode.length,
        block_length=config.decode.block_length,
        tokens_per_step=config.decode.tokens_per_step,
        temperature=1.0,
        order="random",
    )
    keys = [make_key("memory", row) for row in range(rows)]
    queue = Listed(prompts, keys)

    def flat(ids: Tensor, mask: Tensor, sites: Tensor, read: Callable[..., Any]) -> Any:
        return read(torch.zeros(int(sites.sum()), 8), torch.clone)

    denoise(flat, queue, settings, CanvasLayout(mask_id=7, end_ids=(8,), pad_id=9), vocabulary=8)
    trajectory = queue.collected()
    kept = []
    for row in range(rows):
        score = float(row % 2)
        grade = Grade(bool(score), score, None)
        kept.append(Rollout(Problem(f"p{row // 2}", {}), row, "", grade, trajectory.select(torch.tensor([row]))))
    return Rollouts(tuple(kept), {"rejected": 0.0})


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def peak(run: Callable[[], object], device: str) -> int:
    """Peak of the allocated bytes above their level at the start."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    kineto: Any = profiler.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


class Measured:
    """Runs one configuration as the trainer does, and measures its bytes."""

    def __init__(self, config: Config, device: str) -> None:
        self.config, self.device = config, device
        self.policy = build_policy(config.model, device)
        self.policy.suppress = ()  # the tiny tokenizer lacks most rows of the head, which would be banned
        shared = {weights: TeacherModel(weights, self.policy) for weights in config.method.weights()}
        self.teachers = [shared[weights] for weights in config.method.weights()]
        self.parameters = list(trained(self.policy).values())
        self.optimizer = build_optimizer(self.parameters, config.optim)
        self.module = self.policy.module
        if config.optim.autocast:
            self.module = Accelerator(mixed_precision="bf16", cpu=device == "cpu").prepare_model(self.module)
        for parameter in self.parameters:  # the optimizer creates its state at its first step
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state = [x for entry in self.optimizer.state.values() for x in entry.values() if x.numel() > 1]
        self.weights = unique_bytes(self.module.parameters())
        self.optimizer_state = unique_bytes(state)
        self.copies = unique_bytes(x for teacher in shared.values() for x in teacher.copy.values())

    def update(self) -> None:
        """Measure two micro-batches and an optimizer step, as in `Trainer._learn`."""
        config = self.config
        kept = rollouts(config, 2 * config.optim.tokens_per_batch // (config.max_prompt + config.decode.length))
        plan = plan_update(config.method, kept, kept.keys(0, 0))
        assert plan is not None
        shuffled = plan.select(torch.randperm(plan.size, generator=torch.Generator().manual_seed(0)))
        batches = [index for (index,) in micro_batches(shuffled, config.optim.tokens_per_batch)][:2]
        self.peak_of_update = peak(lambda: self._learn(shuffled, batches), self.device)

    def _learn(self, plan: Plan, batches: Iterable[Tensor]) -> None:
        self.module.train()
        student = partial(run_at_sites, self.module)
        parts = []
        for index in batches:
            piece = plan.micro_batch(index).to(self.device)
            graded = grade_micro_batch(self.config.method, piece, student, self.teachers)
            graded.loss.backward()
            parts.append((plan.select(index), graded))
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def decode(self) -> None:
        """Measure the first step of a full decoding batch."""
        decode = self.config.decode
        prompts = [[5] * (self.config.max_prompt - row % 2) for row in range(decode.batch_size)]
        keys = [make_key("memory", row) for row in range(decode.batch_size)]
        self.peak_of_decoding = peak(lambda: first_step(self.policy, prompts, self.config, keys), self.device)


class _Stop(Exception):
    """Ends decoding."""


def first_step(policy: AnyPolicy, prompts: list[list[int]], config: Config, keys: list[int]) -> None:
    """Decode until the second canvas."""
    canvases = []

    def watch(canvas: Tensor) -> None:
        canvases.append(canvas)
        if len(canvases) == 2:
            raise _Stop

    temperature = getattr(config.method.rollout, "temperature", 0.0)
    try:
        policy.decode(prompts, Decoding(**{**vars(config.decode), "temperature": temperature}), keys, watch)
    except _Stop:
        return


def estimated(measured: Measured) -> MemoryEstimate:
    """The estimate, from the model's configuration alone."""
    network = empty_network(read_blueprint(measured.config.model))
    return estimate(network, measured.config, device=measured.device)


def rows_of(name: str, case: dict[str, Any], device: str, folder: Path) -> list[tuple[str, str, int, int]]:
    """The rows of a case: name, quantity, estimated and measured bytes."""
    measured = Measured(configuration(case, folder), device)
    memory = estimated(measured)
    measured.update()
    measured.decode()
    resident = measured.weights + measured.optimizer_state + measured.copies
    return [
        (name, "resident", memory.resident, resident),
        ("", "learning", memory.learning, measured.peak_of_update),
        ("", "decoding", memory.decoding, measured.peak_of_decoding),
        ("", "peak", memory.peak, resident + max(measured.peak_of_update, measured.peak_of_decoding)),
    ]


def main() -> int:
    """Print the table; the exit status is 1 if an estimate is off by more than 20 %."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="only cases whose name contains these words")
    options = parser.parse_args()
    table = Table(title=f"memory on {options.device}, MB")
    for column in ("case", "what", "estimated", "measured", "ratio"):
        table.add_column(column, justify="left" if column in ("case", "what") else "right")
    worst = 0.0
    for name, case in CASES.items():
        if options.only not in name:
            continue
        with TemporaryDirectory() as folder:
            rows = rows_of(name, case, options.device, Path(folder))
        for case_name, what, guess, truth in rows:
            ratio = guess / truth
            worst = max(worst, abs(ratio - 1))
            style = "red" if abs(ratio - 1) > 0.2 else None
            cells = (f"{guess / 1e6:.1f}", f"{truth / 1e6:.1f}", f"{ratio:.3f}")
            table.add_row(case_name, what, *cells, style=style, end_section=what == "peak")
    Console(width=100).print(table)
    print(f"largest deviation {100 * worst:.1f} %")
    return int(worst > 0.2)


if __name__ == "__main__":
    sys.exit(main())
