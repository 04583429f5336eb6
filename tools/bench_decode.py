"""Compares decoding with the published procedure: pass@k on prompts of unequal length, with retries until solved.

    python -m tools.bench_decode [--body tiny|100m] [--problems 64] [--naive-problems 8] [--attempts 8] [--early-end]
    python -m tools.bench_decode --problems 4 --length 32 --greedy 2              # seconds
    python -m tools.bench_decode --sweep prompts|length|vocabulary|steps|attempts
    python -m tools.bench_decode --features [--hidden 256 --layers 4 --vocab 32000 --rank 64 --prompts 8]

Ours is PassAtK as the trainer runs it. The naive side (tools/naive.py) decodes one canvas at a time with logits of all
positions at every step. Both get the same grades, so they need the same attempts. Printed: seconds, rollouts (that
a serial loop would have made) per second, ratios, whether greedy tokens are equal, idle slots, and the share of the
matrix-multiply rate measured in the same run that is exact work: the layers on real positions, the head on the masked
positions of the active block, of counted attempts only. ``--features`` compares separate and merged adapters, and the
prefix cache of a block-causal model on and off. Times on shared machines are noisy: compare the ratios.
"""

import argparse
import copy
import math
import random
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from dllm_sd.decoding.settings import Decoding, Meter
from dllm_sd.policies.loading import AnyPolicy, build_policy
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.pretrained.model import Lora, Model, Shape
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.rollout import Rollout
from dllm_sd.rollouts.rules import PassAtK, encode_problem
from dllm_sd.trajectory import Trajectory
from tools import naive

SWEEPS = {
    "prompts": "problems",
    "length": "length",
    "vocabulary": "vocabulary",
    "steps": "tokens_per_step",
    "attempts": "attempts",
}


@dataclass(frozen=True)
class Side:
    """The measurements of one procedure."""

    seconds: float
    rollouts: int
    """Attempts that a serial loop would have made."""
    decoded: int
    cpu: float
    """Processor seconds of this process on all cores, which do not depend on other programs."""
    flops: float = 0.0
    """Necessary FLOPs of the counted attempts."""
    idle: float = 0.0
    """Share of slots without an active row; at the end no rows are left to fill them."""
    wasted: float = 0.0
    """Share of the rows in forward passes that were not active; empty slots are not in them."""
    padding: float = 0.0
    """Share of the positions in forward passes that were padding."""
    early: float = 0.0
    """Share of the steps of active rows that a serial loop would not have made."""

    @property
    def rate(self) -> float:
        """Rollouts per second."""
        return self.rollouts / self.seconds


def ours(policy: MaskedDiffusion, options: argparse.Namespace, count: int) -> Side:
    """Run PassAtK on the first ``count`` problems."""
    task, meter, settings = naive.StandIn(count, options.rate), Meter(), naive.decoding(options)
    items = [encode_problem(policy, task, problem, options.length + 10**6) for problem in task.problems()]
    rule = PassAtK(problems=count, attempts=options.attempts, temperature=options.temperature, ahead=options.ahead)
    decoder: Any = policy.decoder
    decoder.complete = partial(decoder.complete, meter=meter)
    start, busy = naive.clock(policy), time.process_time()
    tried = rule(policy, task, [item for item in items if item is not None], settings, 0, 0, decoder=decoder)
    seconds, busy = naive.clock(policy) - start, time.process_time() - busy
    counted = [rollout for attempts in tried for rollout in attempts if rollout.counted]
    flops = sum(exact_flops(policy, rollout) for rollout in counted)
    every = [rollout.trajectory for attempts in tried for rollout in attempts]
    real = sum(int(x.num_steps) * (int(x.prompt_mask.sum()) + x.tokens.shape[1]) for x in every)
    needed = sum(int(rollout.trajectory.num_steps) for rollout in counted)
    padding = 1 - real / meter.positions if needed == meter.rows else math.nan  # unknown for rows that were dropped
    shares = (1 - meter.occupancy, 1 - meter.rows / meter.read, padding, 1 - needed / meter.rows)
    return Side(seconds, len(counted), len(every), busy, flops, *shares)


def exact_flops(policy: MaskedDiffusion, rollout: Rollout) -> float:
    """FLOPs that are necessary to decode one rollout."""
    network, trajectory = policy.module.network, rollout.trajectory
    head = network.get_output_embeddings()
    layers = [part for part in network.modules() if isinstance(part, nn.Linear) and part is not head]
    steps = torch.arange(int(trajectory.num_steps))
    rows = torch.zeros_like(steps)
    active = trajectory.masked(rows, steps) & (trajectory.block[rows] == trajectory.active_block(rows, steps)[:, None])
    positions = int(trajectory.prompt_mask.sum()) + trajectory.tokens.shape[1]
    attention = 4 * positions * network.config.hidden_size * network.config.num_hidden_layers
    linear = 2 * sum(part.weight.numel() for part in layers)
    return len(steps) * positions * (linear + attention) + 2.0 * head.weight.numel() * int(active.sum())


def published(policy: MaskedDiffusion, options: argparse.Namespace, count: int) -> Side:
    """Serial retries of the first ``count`` problems, one canvas at a time."""
    task = naive.StandIn(options.problems, options.rate)
    settings = replace(naive.decoding(options), temperature=options.temperature)
    torch.manual_seed(0)
    rollouts, start, busy = 0, naive.clock(policy), time.process_time()
    for problem in task.problems()[:count]:
        for _ in range(options.attempts):
            tokens = naive.generate(policy, policy.encode(task.messages(problem)), settings)
            rollouts += 1
            if task.grade(problem, policy.text(tokens.tolist())).correct:
                break
    return Side(naive.clock(policy) - start, rollouts, rollouts, time.process_time() - busy)


def matmul_rate(policy: MaskedDiffusion, options: argparse.Namespace) -> float:
    """FLOP/s of plain matrix products of the size of a layer's MLP on one batch of canvases (best of 5)."""
    config = policy.module.network.config
    rows = min(options.batch, options.problems) * (options.length + 70)
    x = torch.randn(rows, config.hidden_size, device=policy.device, dtype=next(policy.module.parameters()).dtype)
    weight = torch.randn(config.intermediate_size, config.hidden_size, device=x.device, dtype=x.dtype)
    best = math.inf
    for _ in range(5):
        start = naive.clock(policy)
        for _ in range(4):
            nn.functional.linear(x, weight)
        best = min(best, (naive.clock(policy) - start) / 4)
    return 2 * rows * weight.numel() / best


def compare(options: argparse.Namespace) -> None:
    """The main table."""
    policy = naive.body(options, options.vocabulary)
    sizes = sum(p.numel() for p in policy.module.parameters())
    print(f"{options.body}: {sizes / 1e6:.1f}M parameters, vocabulary {policy.module.network.config.vocab_size}")
    warm = argparse.Namespace(**{**vars(options), "attempts": 1, "length": options.block})
    ours(policy, warm, min(2, options.problems))
    mine, rate = ours(policy, options, options.problems), matmul_rate(policy, options)
    count = options.problems if options.naive_problems is None else min(options.naive_problems, options.problems)
    print(f"{'':>6} {'problems':>8} {'seconds':>9} {'rollouts':>8} {'decoded':>8} {'rollouts/s':>10} {'CPU s':>8}")
    _row("ours", options.problems, mine)
    if count:
        theirs = published(policy, options, count)
        _row("naive", count, theirs)
        cpu = theirs.cpu / theirs.rollouts / (mine.cpu / mine.rollouts)
        print(f"ratio of rollouts per second: {mine.rate / theirs.rate:.2f}; per CPU second {cpu:.2f}")
    if options.greedy:
        task = naive.StandIn(min(options.greedy, options.problems), 1.0)
        prompts = [policy.encode(task.messages(problem)) for problem in task.problems()]
        same, total = naive.equal_greedy(policy, prompts, naive.decoding(options))
        print(f"greedy tokens equal: {same} of {total}")
    print(f"slots without a row {mine.idle:.1%}, rows read in vain {mine.wasted:.1%}, padding {mine.padding:.1%}")
    print(f"steps decoded ahead in vain {mine.early:.1%}")
    print(f"matmul {rate / 1e9:.1f} GFLOP/s; exact work at {mine.flops / mine.seconds / rate:.1%} of it")


def _row(name: str, problems: int, side: Side) -> None:
    print(
        f"{name:>6} {problems:>8} {side.seconds:>9.3f} {side.rollouts:>8} {side.decoded:>8} {side.rate:>10.2f} "
        f"{side.cpu:>8.3f}",
        flush=True,
    )


def sweep(options: argparse.Namespace) -> None:
    """Cost against size: an eighth to all of what the options say, ours beside two naive problems."""
    name, before = SWEEPS[options.sweep], None
    vocabulary = options.vocabulary or naive.BODIES[options.body].vocab_size or 32_000
    whole = {**vars(options), "vocabulary": vocabulary}
    sizes = sorted({max(1, whole[name] // part) for part in (8, 4, 2, 1)})
    if name == "length":
        sizes = sorted({max(options.block, size // options.block * options.block) for size in sizes})
    if name == "tokens_per_step":  # what is swept is the number of steps
        sizes = [size for size in (16, 8, 4, 2, 1) if size <= options.block]
    print(f"{options.sweep:>12} {'seconds':>9} {'rollouts/s':>10} {'exponent':>8} {'naive r/s':>9} {'ratio':>6}")
    for value in sizes:
        sized = argparse.Namespace(**{**vars(options), name: value})
        size = options.length // value if options.sweep == "steps" else value
        policy = naive.body(options, sized.vocabulary)
        ours(policy, argparse.Namespace(**{**vars(sized), "attempts": 1, "length": options.block}), 1)
        mine = ours(policy, sized, sized.problems)
        exponent = "" if before is None else f"{math.log(mine.seconds / before[1]) / math.log(size / before[0]):.2f}"
        line = f"{size:>12} {mine.seconds:>9.3f} {mine.rate:>10.2f} {exponent:>8}"
        if options.naive_problems != 0:
            theirs = published(policy, sized, min(2, sized.problems))
            line += f" {theirs.rate:>9.2f} {mine.rate / theirs.rate:>6.2f}"
        print(line, flush=True)
        before = (size, mine.seconds)


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


def features(options: argparse.Namespace) -> None:
    """Compare separate and merged adapters, and the prefix cache on and off."""
    heads, mlp = options.hidden // 64, 3 * options.hidden
    shape = Shape("llama", options.hidden, options.layers, heads, mlp, options.vocab)
    model = Model(random_init=True, tokenizer="tiny", shape=shape, dtype=options.dtype)
    settings = Decoding(length=options.length, block_length=options.block, tokens_per_step=2, early_end=False)

    policy = build_policy(replace(model, lora=Lora(rank=options.rank)), options.device)
    policy.suppress = ()
    apart, first = timed(policy, settings, options.prompts)
    policy.merge_rollouts = True
    folded, second = timed(policy, settings, options.prompts)
    same = float((first.tokens == second.tokens).float().mean())
    print(f"LoRA r={options.rank}: adapters {apart:.2f} s, folded in {folded:.2f} s, ", end="")
    print(f"ratio {apart / folded:.2f} (equal tokens {same:.1%})")

    policy = build_policy(replace(model, block_length=options.block), options.device)
    policy.suppress = ()
    cached, first = timed(policy, settings, options.prompts)
    plain, second = timed(policy, replace(settings, prefix_cache=False), options.prompts)
    same = float((first.tokens == second.tokens).float().mean())
    print(f"prefix cache: off {plain:.2f} s, on {cached:.2f} s, ratio {plain / cached:.2f} (equal tokens {same:.1%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    naive.add_options(parser)
    parser.add_argument("--attempts", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--ahead", type=int, default=0, help="as method.rollout.ahead")
    parser.add_argument("--sweep", choices=tuple(SWEEPS))
    parser.add_argument("--features", action="store_true", help="compare merged adapters and the prefix cache instead")
    for name, default in (("hidden", 256), ("layers", 4), ("vocab", 32000), ("rank", 64), ("prompts", 8)):
        parser.add_argument(f"--{name}", type=int, default=default, help="of --features")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options}")
    (features if options.features else sweep if options.sweep else compare)(copy.copy(options))


if __name__ == "__main__":
    main()
