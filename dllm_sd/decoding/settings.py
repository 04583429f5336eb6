"""How completions are decoded: the keys of `decode`, and what a decoding costs."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from dllm_sd.engines import ENGINES, Engine, Local
from dllm_sd.errors import InputError
from dllm_sd.ranges import Natural, PositiveShare, Range, Ranged, Size, Temperature
from dllm_sd.trajectory import StopAfter

Order = Literal["confidence", "margin", "entropy", "random", "left_to_right"]


@dataclass(frozen=True)
class Decoding(Ranged, key="decode"):
    """How completions are decoded (the keys of `decode`).

    An autoregressive model writes from left to right, one token a step: for it the keys from `block_length` to `order`
    have no meaning and are not read, and `threshold` and `guidance` are refused.
    """

    length: Size = 256
    """``l``, the number of completion positions: the length of the canvas, or the limit of an autoregressive
    completion."""
    block_length: Size = 32
    """Positions of a block; blocks are denoised from left to right. Equal to `length` for a single block."""
    tokens_per_step: Size = 2
    """Tokens committed at each step."""
    steps: Size | None = None
    """Total steps instead of `tokens_per_step`, as LLaDA counts: each block takes ``steps // blocks`` of them."""
    temperature: Temperature = 0.0
    """0 is greedy; else tokens are sampled from the exact softmax of logits / temperature."""
    top_k: Natural = 0
    """Sample from this many most probable tokens only; 0 samples from all."""
    top_p: PositiveShare = 1.0
    """Sample from the most probable tokens that together hold this much probability; 1 samples from all."""
    order: Order = "confidence"
    """Which positions are committed first: by probability of the token, top-2 margin, negative entropy, at random,
    or from left to right."""
    threshold: PositiveShare | None = None
    """Commit everything in the active block at least this probable, and at least one token, instead of a fixed number
    (Fast-dLLM, arXiv 2505.22618). This changes the policy; it is not a faster way to the same samples."""
    guidance: Annotated[float, Range(least=0, most=1000)] = 0.0
    """Classifier-free guidance scale (LLaDA's `cfg_scale`): logits = u + (1 + guidance) (l - u), u without prompt."""
    early_end: bool = True
    """Stop a row once all tokens up to its first end token are committed; committed tokens never change."""
    suppress: tuple[Natural, ...] = ()
    """Token ids that are never sampled. The mask token is never sampled anyway."""
    prefix_cache: bool = True
    """Reuse the keys and values (KV cache) of finished blocks. For block-causal models, where this is exact; other
    models have no such cache."""
    batch_size: Size = 64
    """Rows decoded together. It affects memory and speed, never results."""
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None = None
    """The mode of `torch.compile` for the layers (`reduce-overhead` records CUDA graphs). Rows are then read in powers
    of two and at one width, so that there are few shapes. Denoising without the prefix cache only; worth it where
    launching kernels takes longer than running them."""
    continuous: bool = False
    """Let a waiting row begin as soon as another one ends, by transformers' continuous batching (autoregressive models;
    meant for GPUs). Results are the same up to the rounding of attention kernels."""
    engine: Engine = field(default_factory=Local, metadata={"parts": ENGINES})
    """What decodes the rollouts and evaluations of a training run: the trainer itself (`local`), or servers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and self.order != "confidence":
            raise InputError("decode.threshold compares probabilities; set decode.order to confidence")
        if self.threshold is not None and self.steps is not None:
            raise InputError("decode.threshold decides the number of steps; set decode.steps to null")

    def tokens(self, stop_after: StopAfter | None) -> int:
        """Return the most tokens of an autoregressive completion that is decoded so far."""
        return self.length if stop_after is None else min(stop_after.count, self.length)

    def check_suppressed(self, vocabulary: int, key: str = "decode") -> None:
        """Refuse suppressed ids that a model with a ``vocabulary`` of ``v`` tokens does not have.

        Raises:
            InputError: naming the ``key`` under which these settings stand.
        """
        if beyond := [token for token in self.suppress if token >= vocabulary]:
            raise InputError(
                f"{key}.suppress names token {beyond[0]}, but the last one is {vocabulary - 1}; leave it out"
            )

    @property
    def num_blocks(self) -> int:
        """Blocks on the canvas.

        Raises:
            InputError: if the canvas is shorter than one block.
        """
        if self.block_length > self.length:
            raise InputError(
                f"decode.block_length is {self.block_length}, more than decode.length, {self.length}; make it a divisor"
            )
        return self.length // self.block_length

    @property
    def schedule(self) -> list[int]:
        """Tokens committed at each step of a block; zeros are steps that would commit nothing."""
        if self.steps is None:
            full, rest = divmod(self.block_length, self.tokens_per_step)
            return [self.tokens_per_step] * full + [rest] * bool(rest)
        steps = self.steps // self.num_blocks
        full, rest = divmod(self.block_length, steps)
        return [full + (step < rest) for step in range(steps)]


@dataclass
class Meter:
    """Counts the cost of decoding."""

    forwards: int = 0
    """Steps of the batch; with guidance, or rows of very unequal length, each takes several passes of the network."""
    rows: int = 0
    """Active rows, summed over these steps."""
    slots: int = 0
    """Slots, summed over these steps; their number is the most rows that were active at once."""
    read: int = 0
    """Rows that the network read, summed; empty slots need not be read."""
    positions: int = 0
    """Positions that the network read, padding included."""

    @property
    def occupancy(self) -> float:
        """Share of the slots that held an active row."""
        return self.rows / max(1, self.slots)
