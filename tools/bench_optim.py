"""Measures the seconds of an optimizer step: fused, foreach, single-tensor and (if installed) 8-bit AdamW.

    python tools/bench_optim.py [--millions 100] [--device cpu] [--repeats 5]

Weights of 2,048 x 2,048 in float32 with random gradients. Printed: median of the repeats, ratio to the fused step, and
bytes of the state for each weight.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from dllm_sd.settings import Optim
from dllm_sd.training.optim import build_optimizer


def measure(build: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], options: Any) -> tuple[float, float]:
    """Seconds of a step, and bytes of the state for each weight."""
    count = max(1, round(options.millions * 1e6 / 2048**2))
    values = [torch.nn.Parameter(torch.randn(2048, 2048, device=options.device)) for _ in range(count)]
    optimizer, taken = build(values), []
    for value in values:
        value.grad = torch.randn_like(value)
    for _ in range(options.repeats + 1):  # the first one makes the state
        start = time.perf_counter()
        optimizer.step()
        if options.device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    tensors = [entry for state in optimizer.state.values() for entry in state.values() if torch.is_tensor(entry)]
    held = sum(entry.nbytes for entry in {id(entry): entry for entry in tensors}.values())
    return statistics.median(taken[1:]), held / sum(value.numel() for value in values)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    kinds: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
        "adamw (fused)": lambda values: build_optimizer(values, Optim()),
        "PyTorch, foreach": lambda values: torch.optim.AdamW(values, foreach=True),
        "PyTorch, single tensors": lambda values: torch.optim.AdamW(values, foreach=False, fused=False),
    }
    if find_spec("bitsandbytes") is not None:
        kinds["adamw_8bit"] = lambda values: build_optimizer(values, Optim(name="adamw_8bit"))
    fused = 0.0
    for name, build in kinds.items():
        taken, held = measure(build, options)
        fused = fused or taken
        print(f"{name}: {taken:.3f} s, {taken / fused:.2f} x, {held:.2f} bytes a weight")


if __name__ == "__main__":
    main()
