"""Measurements of `tools/accelerator_day.sh` that no other tool has; each result is printed as soon as it is there.

    python -m tools.accelerator_steps matmul|forwards|graphs|loss|4bit|collectives [--body 8b --device cuda ...]

``matmul``: the rate of a matrix product. ``forwards``: seconds of decoding by positions in a forward and by numbers in
a chunk of logits. ``graphs``: the same without and with compiled layers and CUDA graphs. ``loss``: seconds of the loss
with its gradient by numbers in a chunk. ``4bit``: the shipped tiny model in NF4 under LoRA, decoded. ``collectives``:
a sum over all processes.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed

from dllm_sd.decoding import denoising, slots
from dllm_sd.decoding.settings import Decoding
from dllm_sd.network import lazy_logits
from dllm_sd.policies.loading import build_policy
from dllm_sd.pretrained.model import Lora, Model
from dllm_sd.randomness import make_key
from tools import bench_loss, naive


def seconds(action: Callable[[], Any], device: str, repeats: int = 2) -> float:
    """Seconds of an action, the best of the repeats after one that is not counted."""
    best = float("inf")
    for repeat in range(repeats + 1):
        naive.sync(torch.device(device))
        start = time.perf_counter()
        action()
        naive.sync(torch.device(device))
        best = min(best, time.perf_counter() - start) if repeat else best
    return best


def decoding(options: argparse.Namespace) -> tuple[Any, Callable[..., float]]:
    """The model, and seconds of decoding ``options.rows`` prompts of 64 tokens with given settings."""
    policy = naive.body(options, options.vocabulary)
    prompts = [[5 + (i + j) % 20 for j in range(64)] for i in range(options.rows)]
    keys = [make_key("accelerator", i) for i in range(options.rows)]
    plain = Decoding(
        length=options.length, block_length=options.length // 2, tokens_per_step=2, early_end=False, batch_size=64
    )

    def decode(**changes: Any) -> float:
        return seconds(lambda: policy.decode(prompts, replace(plain, **changes), keys), options.device, repeats=1)

    return policy, decode


def matmul(options: argparse.Namespace) -> None:
    """Print the rate of a matrix product."""
    size = 8192 if options.device == "cuda" else 128
    left, right = (torch.randn(size, size, device=options.device).to(getattr(torch, options.dtype)) for _ in range(2))
    rate = 2 * size**3 / seconds(lambda: left @ right, options.device, repeats=10)
    print(f"{size} x {size} in {options.dtype}: {rate / 1e12:.2f} TFLOP/s", flush=True)


def forwards(options: argparse.Namespace) -> None:
    """Print seconds of decoding by the positions of a forward and the numbers in a chunk of logits."""
    _, decode = decoding(options)
    for positions in options.forwards:
        slots.POSITIONS_PER_FORWARD[options.device] = positions
        print(f"{positions} positions in a forward: {decode():.3f} s", flush=True)
    slots.POSITIONS_PER_FORWARD.pop(options.device)
    for power in options.chunks:
        denoising.DECODE_CHUNK_LOGITS[options.device] = 2**power
        print(f"2^{power} numbers in a chunk of logits: {decode():.3f} s", flush=True)


def graphs(options: argparse.Namespace) -> None:
    """Print seconds of decoding without and with compiled layers."""
    _, decode = decoding(options)
    for mode in (None, "default", "reduce-overhead") if options.device == "cuda" else (None,):
        print(f"decode.compile {mode}: {decode(compile=mode):.3f} s", flush=True)


def loss(options: argparse.Namespace) -> None:
    """Print seconds of the loss and its gradient by the numbers in a chunk."""
    case = bench_loss.case(argparse.Namespace(**{**vars(options), "rows": options.loss_rows, "loss": "reverse_kl"}))
    for power in options.loss_chunks:
        lazy_logits.LOSS_CHUNK_LOGITS[options.device] = 2**power
        taken = seconds(lambda: bench_loss.ours(case).backward(), options.device)
        print(f"2^{power} numbers in a chunk of the loss: {taken:.3f} s", flush=True)


def four_bits(options: argparse.Namespace) -> None:
    """Decode with the shipped tiny model in NF4."""
    model = Model("tiny", quantization="4bit", lora=Lora(rank=4), dtype=options.dtype)
    policy: Any = build_policy(model, options.device)
    tokens = policy.decode([[5, 6, 7]], Decoding(length=16, block_length=4), [1]).tokens
    kinds = sorted({type(part).__name__ for part in policy.module.modules() if "4bit" in type(part).__name__})
    print(f"{', '.join(kinds)}: decoded {tokens.numel()} tokens", flush=True)


def collectives(options: argparse.Namespace) -> None:
    """Sum a tensor over all processes, and gather it."""
    torch.distributed.init_process_group(options.backend)
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    value = torch.ones(2**24 if options.device == "cuda" else 2**10, device=options.device)
    taken = seconds(lambda: torch.distributed.all_reduce(value), options.device)
    world = torch.distributed.get_world_size()
    assert bool((value == world**3).all())
    print(f"{options.backend}, {world} process: {value.nbytes} bytes summed in {taken * 1e3:.2f} ms", flush=True)
    torch.distributed.destroy_process_group()


STEPS: dict[str, Callable[[argparse.Namespace], None]] = {
    "matmul": matmul,
    "forwards": forwards,
    "graphs": graphs,
    "loss": loss,
    "4bit": four_bits,
    "collectives": collectives,
}


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=tuple(STEPS))
    parser.add_argument("--body", choices=tuple(naive.BODIES), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--backend", default="gloo")
    for name, default in (("rows", 8), ("length", 64), ("loss-rows", 2), ("prompt", 8), ("tokens", 8), ("width", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("forwards", "chunks", "loss-chunks"):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=[])
    options = parser.parse_args()
    STEPS[options.step](options)


if __name__ == "__main__":
    main()
