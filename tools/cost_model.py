"""Models the cost of an update: FLOPs, bytes and seconds of rollouts, learning, communication and evaluation.

    python tools/cost_model.py [--gpu H100] [--task gsm8k] [--problems 16] [--share 0.4]
    python tools/cost_model.py --check

The model is pure arithmetic: no network is loaded, and no GPU was measured. ``--check`` compares the FLOPs with
PyTorch's counter on a tiny network, and the seconds of a decoding step and of an update with measurements on this CPU.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, lgamma

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; weights of norms are not counted."""

    hidden: int
    layers: int
    mlp: int
    """Width of a dense layer's MLP."""
    vocabulary: int
    heads: int
    kv_heads: int
    experts: int = 0
    chosen: int = 0
    """Experts that a token runs through, the shared one included."""
    expert_mlp: int = 0
    dense: int = 0
    """Layers without experts, if there are any experts."""
    block: int = 0
    """Positions of an attention block; 0 for bidirectional attention over the canvas, which allows no KV cache."""

    @property
    def attention(self) -> int:
        """Weights of one layer's attention."""
        return 2 * self.hidden**2 + 2 * self.hidden * (self.hidden // self.heads) * self.kv_heads

    def body(self, experts: int) -> int:
        """Weights of all layers if each has ``experts`` experts."""
        expert, dense = 3 * self.hidden * self.expert_mlp, self.dense if self.experts else self.layers
        mlps = dense * 3 * self.hidden * self.mlp + (self.layers - dense) * experts * expert
        return self.layers * self.attention + mlps

    @property
    def total(self) -> int:
        """All weights, embedding and head included."""
        return self.body(self.experts + bool(self.experts)) + 2 * self.vocabulary * self.hidden

    @property
    def active(self) -> int:
        """Weights of the layers that are used for a token."""
        return self.body(self.chosen)

    def forward(self, tokens: int, seen: int, heads: int) -> float:
        """FLOPs of ``tokens`` that attend to ``seen`` positions; ``heads`` of them pass the output head."""
        layers = tokens * (2 * self.active + 4 * seen * self.hidden * self.layers)
        return layers + 2 * heads * self.vocabulary * self.hidden

    def touched(self, tokens: int) -> float:
        """Weights that a forward pass of ``tokens`` reads, if each token chooses its experts at random."""
        if not self.experts:
            return self.total - self.vocabulary * self.hidden
        share = 1 - (1 - self.chosen / (self.experts + 1)) ** tokens
        return self.body(0) + share * (self.body(self.experts + 1) - self.body(0)) + self.vocabulary * self.hidden

    def adapters(self, rank: int) -> int:
        """Weights of LoRA adapters on attention and dense MLPs; experts have none."""
        key = self.hidden // self.heads * self.kv_heads
        attention = rank * (4 * self.hidden + 2 * (self.hidden + key))
        dense = self.dense if self.experts else self.layers
        return self.layers * attention + dense * rank * 3 * (self.hidden + self.mlp)


LLADA = Shape(4096, 32, 12_288, 126_464, 32, 32)
LARGE = Shape(4096, 32, 9216, 157_184, 32, 4, experts=256, chosen=9, expert_mlp=1024, dense=1, block=32)
"""Assumed sizes of LLaDA2-flash, chosen to match its published 100 B weights, 6.1 B of them active."""
PASSES = {"gsm8k": (0.813, 0.955), "math": (0.368, 0.536), "countdown": (0.182, 0.592)}
"""pass@1 and pass@8 of LLaDA-8B on training questions (d-OPSD, Table 3)."""


@dataclass(frozen=True)
class Gpu:
    """Data-sheet rates in FLOP/s and bytes; ``network`` is the share of one GPU."""

    peak: float = 989e12
    memory: float = 80e9
    hbm: float = 3.35e12
    nvlink: float = 450e9
    network: float = 50e9
    share: float = 0.4
    """Share of the peak that is reached; assumed, not measured."""
    wire: float = 0.8
    """Share of the rate of the links that is reached; assumed, not measured."""

    def link(self, processes: int) -> float:
        """Bytes a second of a ring over all processes, eight to a node."""
        return self.wire * (self.nvlink if processes <= 8 else self.network)


GPUS = {"H100": Gpu(), "H200": Gpu(memory=141e9, hbm=4.8e12)}


def attempts(first: float, eight: float) -> list[float]:
    """Probabilities that a problem takes 1, ..., 8 attempts (at most eight), for Beta-distributed success rates.

    The parameters of the Beta distribution are those that give pass@1 ``first`` and pass@8 ``eight``.
    """

    def missed(alpha: float, count: int) -> float:
        beta = alpha * (1 - first) / first
        return 2.718281828459045 ** (
            lgamma(beta + count) - lgamma(beta) + lgamma(alpha + beta) - lgamma(alpha + beta + count)
        )

    low, high = 1e-4, 1e4
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if missed(middle, 8) > 1 - eight else (low, middle)
    left = [missed(low, j) for j in range(8)]
    return [left[j] - left[j + 1] for j in range(7)] + [left[7]]


def longest(chances: Sequence[float], problems: int) -> float:
    """Expected largest number of attempts among ``problems`` problems."""
    expected, below = 0.0, 0.0
    for chance in chances:
        expected += 1 - below**problems
        below += chance
    return expected


@dataclass(frozen=True)
class Setting:
    """One row of the table: model, method of training, and processes."""

    shape: Shape
    lora: int
    """Rank; 0 trains all weights."""
    sharded: bool
    processes: int
    task: str = "gsm8k"
    problems: int = 16
    prompt: int = 200
    length: int = 256
    per_step: int = 2
    batch: int = 16_384
    """Tokens of a micro-batch."""
    evaluated: int = 256

    @property
    def steps(self) -> int:
        """Forward passes of one attempt, and its number of canvases."""
        return self.length // self.per_step

    @property
    def canvas(self) -> int:
        """Tokens of a canvas."""
        return self.prompt + self.length


@dataclass(frozen=True)
class Cost:
    """The cost of one update on every process, in seconds, bytes and FLOPs."""

    flops: float
    rollouts: float
    idle: float
    """Share of the time in rollouts that processes wait for the problem with most attempts."""
    learning: float
    gathers: float
    reduce: float
    evaluation: float
    memory: float
    host: float
    """Bytes of host memory of a node of eight processes while the model loads."""


def step_flops(row: Setting) -> float:
    """FLOPs of a forward pass of one attempt while decoding; with attention blocks, a KV cache holds finished ones."""
    block = row.shape.block
    tokens = block or row.canvas
    return row.shape.forward(tokens, row.canvas, block or 32)


def cost(row: Setting, gpu: Gpu) -> Cost:
    """Compute the costs as described in `docs/scaling.md`."""
    shape, n, rate = row.shape, row.processes, gpu.peak * gpu.share
    chances = attempts(*PASSES[row.task])
    mean, solved = sum(j * p for j, p in enumerate(chances, start=1)), PASSES[row.task][1]
    step, tokens = step_flops(row), shape.block or row.canvas
    chain = longest(chances, row.problems)  # attempts at one problem are made one after another, on any process
    most = max(row.problems * mean / n, chain)
    read = 2 * shape.touched(tokens * ceil(row.problems / n))

    def decode(rows: float, rounds: float) -> float:
        return row.steps * max(rows * step / rate, rounds * read / gpu.hbm)

    canvases = solved * row.problems * row.steps
    forward = shape.forward(row.canvas, row.canvas, row.per_step)
    passes = 4 if row.lora else 5  # teacher, student, recomputation, backward to inputs, and (without LoRA) to weights
    learning = ceil(canvases / n) * passes * forward / rate
    micro = max(1, ceil(ceil(canvases / n) * row.canvas / row.batch))
    trained = shape.adapters(row.lora) if row.lora else shape.total
    link, ring = gpu.link(n), (n - 1) / n
    weights = 2 * shape.total + 4 * shape.adapters(row.lora) * bool(row.lora)
    gathers = (3 * micro + 1) * 2 * shape.total * ring / link if row.sharded else 0.0
    reduce = 4 * trained * ring * (micro if row.sharded else 2) / link  # FSDP2 reduces after every micro-batch
    state = weights + 12 * trained if row.lora else 16 * shape.total  # float32 weights, gradient and two states
    held = state / n + weights if row.sharded else state  # gathered weights while decoding
    saved = 2 * row.batch * shape.hidden * (shape.layers + 40)
    return Cost(
        flops=row.problems * mean * row.steps * step + canvases * passes * forward,
        rollouts=decode(most, chain),
        idle=1 - row.problems * mean / (n * most),
        learning=learning,
        gathers=gathers,
        reduce=reduce,
        evaluation=decode(ceil(row.evaluated / n), ceil(row.evaluated / n / 32)),
        memory=held + saved,
        host=8 * (2 if row.lora else 4) * shape.total,
    )


COLUMNS = "model, trained, engine", "GPUs", "PFLOP", "rollouts", "idle", "learning", "gathers", "reduce", "eval", "GB"


def short(x: float) -> str:
    """Format a number with two or three significant digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.2g}"


def table(gpu: Gpu, task: str, problems: int) -> list[str]:
    """Markdown rows for 1, 8, 64 and 512 GPUs; seconds."""
    settings = [
        ("8 B, LoRA r=128, DDP", Setting(LLADA, 128, False, 1)),
        ("8 B, all, FSDP2", Setting(LLADA, 0, True, 1)),
        ("100 B MoE, LoRA r=128, FSDP2", Setting(LARGE, 128, True, 1)),
    ]
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, first in settings:
        for n in (1, 8, 64, 512):
            row = replace(first, processes=n, task=task, problems=problems)
            c = cost(row, gpu)
            fits = "" if c.memory <= gpu.memory else " **no**"
            numbers = [short(x) for x in (c.rollouts, c.idle, c.learning, c.gathers, c.reduce, c.evaluation)]
            numbers[1] = f"{c.idle:.0%}"
            cells = [name, str(n), short(c.flops / 1e15), *numbers, f"{c.memory / 1e9:.0f}{fits}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


# Check


def network(shape: Shape) -> LlamaForCausalLM:
    """The dense model of a shape, with random weights."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.mlp,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=False,
    )
    config.is_causal = False
    return LlamaForCausalLM(config)


def counted(shape: Shape, rows: int, tokens: int) -> tuple[int, int]:
    """FLOPs of a forward and of forward with backward, by PyTorch's counter."""
    with torch.device("meta"):
        model, ids = network(shape), torch.zeros(rows, tokens, dtype=torch.long)
    counts = []
    for learns in (False, True):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(learns):
            logits = model(input_ids=ids, use_cache=False).logits
            if learns:
                logits.sum().backward()
        counts.append(counter.get_total_flops())
    return counts[0], counts[1]


def seconds(action: Callable[[], object], repeats: int = 4) -> float:
    """Seconds of the fastest run."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - start)
    return best


def check(shape: Shape, rows: int, tokens: int) -> None:
    """Print predicted, counted and measured costs."""
    forward, both = counted(shape, rows, tokens)
    mine = rows * shape.forward(tokens, tokens, tokens)
    print(f"{shape.total / 1e6:.0f} M weights, {rows} x {tokens} tokens, float32, {torch.get_num_threads()} threads")
    print(f"FLOPs of a forward: {mine:.4g}, counted {forward:.4g}, ratio {mine / forward:.4f}")
    print(f"FLOPs with backward: {3 * mine:.4g}, counted {both:.4g}, ratio {3 * mine / both:.4f}")
    left, right = torch.randn(rows * tokens, shape.hidden), torch.randn(shape.hidden, shape.mlp)
    rate = 2 * left.numel() * shape.mlp / seconds(lambda: left @ right, 20)
    model = network(shape)
    ids = torch.randint(shape.vocabulary, (rows, tokens))

    def step() -> None:
        with torch.no_grad():
            model.base_model(input_ids=ids, use_cache=False)

    def update() -> None:
        model(input_ids=ids, use_cache=False).logits.sum().backward()

    for name, action, flops in (
        ("decoding step", step, rows * shape.forward(tokens, tokens, 0)),
        ("forward and backward", update, 3 * mine),
    ):
        taken = seconds(action)
        expected = flops / rate
        print(f"{name}: {expected:.3f} s at {rate / 1e9:.0f} GFLOP/s, measured {taken:.3f} s, {expected / taken:.2f}")


def main() -> None:
    """Print the table, or the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--task", choices=PASSES, default="gsm8k")
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.4)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.check:
        check(Shape(768, 8, 2304, 8192, 12, 12), 4, 256)
        return
    print("\n".join(table(replace(GPUS[options.gpu], share=options.share), options.task, options.problems)))


if __name__ == "__main__":
    main()
