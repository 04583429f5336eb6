"""How completions are decoded: the keys of `decode`, what a decoding costs, and how a token is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dllm_sd.errors import InputError

Order = Literal["confidence", "margin", "entropy", "random", "left_to_right"]


@dataclass(frozen=True)
class Decoding:
    """How completions are decoded (the keys of `decode`).

    An autoregressive model writes from left to right, one token a step: for it the keys from `block_length` to `order`
    have no meaning and are not read, and `threshold` and `guidance` are refused.
    """

    length: int = 256
    """``l``, completion positions: a canvas's, or the most that an autoregressive model may write."""
    block_length: int = 32
    """Positions of a block; blocks are denoised from left to right. Equal to `length` for a single block."""
    tokens_per_step: int = 2
    """Tokens committed at each step."""
    steps: int | None = None
    """Total steps instead of `tokens_per_step`, as LLaDA counts: each block takes ``steps // blocks`` of them."""
    temperature: float = 0.0
    """0 is greedy; else tokens are sampled from the exact softmax of logits / temperature."""
    top_k: int = 0
    """Sample from the so many most probable tokens only; 0 from all."""
    top_p: float = 1.0
    """Sample from the most probable tokens that together hold this much probability; 1 from all."""
    order: Order = "confidence"
    """Which positions are committed first: by probability of the token, top-2 margin, negative entropy, at random,
    or from left to right."""
    threshold: float | None = None
    """Commit everything in the active block at least this probable, and at least one token, instead of a fixed
    number (Fast-dLLM, arXiv 2505.22618). Another policy, not a faster equal one."""
    guidance: float = 0.0
    """Classifier-free guidance scale (LLaDA's `cfg_scale`): logits = u + (1 + guidance) (l - u), u without prompt."""
    early_end: bool = True
    """Stop a row once everything up to its first end token is fixed; what is fixed cannot change any more."""
    suppress: tuple[int, ...] = ()
    """Token ids that are never sampled. The mask token never is."""
    prefix_cache: bool = True
    """Reuse the keys and values of finished blocks. Block-causal models only, where it is exact; others have none."""
    batch_size: int = 64
    """Rows decoded together. Memory only: it changes no result."""
    continuous: bool = False
    """Let a waiting row begin as soon as another one ends, by transformers' continuous batching (autoregressive models;
    meant for GPUs). Results are the same up to the rounding of attention kernels."""

    def __post_init__(self) -> None:
        if min(self.length, self.block_length, self.tokens_per_step, self.batch_size) < 1:
            raise InputError("decode.length, block_length, tokens_per_step and batch_size must be at least 1")
        if self.temperature < 0:
            raise InputError("decode.temperature must be 0 (greedy) or larger")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InputError("decode.top_k must be 0 (all) or more, and decode.top_p above 0 and at most 1")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise InputError("decode.threshold is a probability; give a number above 0 and at most 1, or null")
        if self.threshold is not None and self.order != "confidence":
            raise InputError("decode.threshold compares probabilities; set decode.order to confidence")
        if self.threshold is not None and self.steps is not None:
            raise InputError("decode.threshold decides the number of steps; set decode.steps to null")

    @property
    def num_blocks(self) -> int:
        """Blocks on the canvas."""
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
    """What a decoding cost."""

    forwards: int = 0
    """Passes of the network (with guidance, pairs of passes)."""
    rows: int = 0
    """Rows in them, summed."""
    slots: int = 0
    """Rows that there was room for, summed."""

    @property
    def occupancy(self) -> float:
        """Share of the slots that was busy."""
        return self.rows / max(1, self.slots)


def draw(logits: Tensor, settings: Decoding, u: Tensor) -> Tensor:
    """Tokens int64 ``[m]`` from ``logits [m v]``: the largest, or sampled at ``u [m]`` in (0, 1)."""
    return logits.argmax(-1) if settings.temperature == 0 else sample(warp(logits, settings), u)


def warp(logits: Tensor, settings: Decoding) -> Tensor:
    """Logits ``[m v]`` of what is sampled from: over the temperature, then top-k, then top-p, as transformers does."""
    unused: Any = None
    logits = TemperatureLogitsWarper(settings.temperature)(unused, logits)
    if 0 < settings.top_k < logits.shape[-1]:
        logits = TopKLogitsWarper(settings.top_k)(unused, logits)
    return TopPLogitsWarper(settings.top_p)(unused, logits) if settings.top_p < 1 else logits


def drawn_logp(logits: Tensor, settings: Decoding, token: Tensor) -> Tensor:
    """`Trajectory.logp` of the tokens int64 ``[m]`` under ``logits [m v]``, ``-> [m]``."""
    scaled = logits / (settings.temperature or 1.0)
    return scaled.gather(-1, token[:, None])[:, 0] - scaled.logsumexp(-1)


def never_drawn(settings: Decoding, suppress: Sequence[int], device: torch.device) -> Tensor:
    """Token ids int64 that neither the ``settings`` nor ``suppress`` let pass."""
    return torch.tensor(sorted({*suppress, *settings.suppress}), dtype=torch.int64, device=device)


def force(scores: Tensor, settings: Decoding, never: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """What leaves a logits processor's caller one token, drawn at ``u [m]`` from ``scores [m v]`` without ``never``.

    Returns ``[m v]``, 0 at that token and -inf elsewhere, and its `Trajectory.logp` ``[m]``.
    """
    token = draw(scores.index_fill(-1, never, -torch.inf), settings, u)
    return torch.full_like(scores, -torch.inf).scatter(-1, token[:, None], 0.0), drawn_logp(scores, settings, token)


def sample(logits: Tensor, u: Tensor) -> Tensor:
    """Tokens int64 ``[m]`` from softmax(``logits [m v]``) by inverse CDF at ``u [m]`` in (0, 1), float32 throughout."""
    cdf = logits.softmax(-1).cumsum(-1)
    token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None].contiguous())[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)
