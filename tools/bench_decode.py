"""Decoding side by side: adapters as they are and folded in, and the prefix cache of a block-causal model on and off.

python tools/bench_decode.py [--hidden 256 --layers 4 --vocab 32000 --rank 64 --prompts 8 --length 64 --device cpu]

Prints seconds and ratios; the tokens of both sides are compared.
"""

import argparse
import random
import time
from dataclasses import replace

import torch

from dllm_sd.policies.decoding import Decoding
from dllm_sd.policies.loading import AnyPolicy, build_policy
from dllm_sd.policies.model import Lora, Model, Shape
from dllm_sd.randomness import make_key
from dllm_sd.trajectory import Trajectory


def timed(policy: AnyPolicy, settings: Decoding, prompts: int) -> tuple[float, Trajectory]:
    """Seconds (best of 3) and the result of decoding prompts of 20 to 120 random tokens."""
    draw = random.Random(0)
    ids = [[draw.randrange(5, 25) for _ in range(draw.randrange(20, 120))] for _ in range(prompts)]
    keys = [make_key("bench", i) for i in range(prompts)]
    runs = []
    for _ in range(3):
        start = time.perf_counter()
        trajectory = policy.decode(ids, settings, keys)
        runs.append((time.perf_counter() - start, trajectory))
    return min(runs, key=lambda run: run[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("hidden", 256), ("layers", 4), ("vocab", 32000), ("rank", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("prompts", 8), ("length", 64), ("block", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    heads, mlp = options.hidden // 64, 3 * options.hidden
    shape = Shape(options.hidden, options.layers, heads, mlp, vocab_size=options.vocab)
    model = Model(random_init=True, tokenizer="tiny", shape=shape, dtype=options.dtype)
    settings = Decoding(length=options.length, block_length=options.block, tokens_per_step=2, early_end=False)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options}")

    policy = build_policy(replace(model, lora=Lora(rank=options.rank)), options.device)
    apart, first = timed(policy, settings, options.prompts)
    policy.merge_rollouts = True
    folded, second = timed(policy, settings, options.prompts)
    same = float((first.tokens == second.tokens).float().mean())
    print(f"LoRA r={options.rank}: adapters {apart:.2f} s, folded in {folded:.2f} s, ", end="")
    print(f"ratio {apart / folded:.2f} (equal tokens {same:.1%})")

    policy = build_policy(replace(model, block_length=options.block), options.device)
    cached, first = timed(policy, settings, options.prompts)
    plain, second = timed(policy, replace(settings, prefix_cache=False), options.prompts)
    same = float((first.tokens == second.tokens).float().mean())
    print(f"prefix cache: off {plain:.2f} s, on {cached:.2f} s, ratio {plain / cached:.2f} (equal tokens {same:.1%})")


if __name__ == "__main__":
    main()
