"""The sampler: semi-autoregressive blocks, any number of tokens per step.

The published reference (LLaDA, `generate`) works one canvas at a time on logits of the whole canvas. Here a batch of
unequal prompts is decoded together, the output head runs only on the masked positions of each row's active block, and
every random number is keyed, so that a row's result depends neither on its batch nor on its place in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dllm_sd.errors import InputError
from dllm_sd.losses.sites import rank_descending
from dllm_sd.policies.policy import View
from dllm_sd.policies.prefix_cache import PrefixCache
from dllm_sd.policies.site_head import SiteHead
from dllm_sd.randomness import fold, key_tensor, make_key, uniform
from dllm_sd.trajectory import NEVER, Trajectory, block_index, completion_length, is_any_of, left_pad

Order = Literal["confidence", "margin", "entropy", "random", "left_to_right"]


@dataclass(frozen=True)
class Denoising:
    """How a canvas is denoised (the keys of `decode`)."""

    length: int = 256
    """``l``, completion positions on the canvas."""
    block_length: int = 32
    """Positions of a block; blocks are denoised from left to right. Equal to `length` for a single block."""
    tokens_per_step: int = 2
    """Tokens committed at each step."""
    steps: int | None = None
    """Total steps instead of `tokens_per_step`, as LLaDA counts: each block takes ``steps // blocks`` of them."""
    temperature: float = 0.0
    """0 is greedy; else tokens are sampled from the exact softmax of logits / temperature."""
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

    def __post_init__(self) -> None:
        if min(self.length, self.block_length, self.tokens_per_step, self.batch_size) < 1:
            raise InputError("decode.length, block_length, tokens_per_step and batch_size must be at least 1")
        if self.length % self.block_length:
            raise InputError(
                f"decode.block_length {self.block_length} does not divide decode.length {self.length}; "
                "choose a divisor, or block_length = length for a single block"
            )
        if self.steps is not None and self.steps < self.num_blocks:
            raise InputError(f"decode.steps must be at least the number of blocks, {self.num_blocks}")
        if self.temperature < 0:
            raise InputError("decode.temperature must be 0 (greedy) or larger")
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


@torch.no_grad()
def denoise(
    site_logits: Callable[[View], Tensor],
    prompts: Sequence[Sequence[int]],
    settings: Denoising,
    keys: Sequence[int],
    *,
    mask_id: int,
    end_ids: tuple[int, ...],
    pad_id: int,
    device: torch.device | str = "cpu",
    watch: Callable[[Tensor], None] | None = None,
    finished: Callable[[Tensor, Trajectory], None] | None = None,
    meter: Meter | None = None,
    blocks_of_prompt: bool = False,
    cached: SiteHead | None = None,
) -> Trajectory:
    """Denoise any number of prompts, `settings.batch_size` of them at a time: the next one takes a slot that is free.

    Args:
        site_logits: the denoiser, from a view to logits ``[m v]``.
        prompts: token ids of ``b`` prompts of any length.
        settings: the schedule.
        keys: one key a row (`randomness.make_key`).
        mask_id: the mask token; never committed.
        end_ids: tokens that end a completion.
        pad_id: what fills positions that an early end leaves open.
        device: where to work.
        watch: called with the completion side int64 ``[b l]`` before every forward and at the end; rows that ended
            early keep their last canvas.
        finished: called with the rows int64 ``[r]`` that have just ended, and their trajectory.
        meter: counts what it costs.
        blocks_of_prompt: count blocks from the first prompt token, as block-causal models do.
        cached: the module of a block-causal model, to reuse the keys and values of finished blocks.

    Returns:
        The trajectory, on `device`.
    """
    prompt_ids, prompt_mask = (x.to(device) for x in left_pad(prompts, pad_id))
    b, length, slots = len(prompts), settings.length, min(len(prompts), settings.batch_size)
    blocks = block_index(prompt_mask, length, settings.block_length, blocks_of_prompt)
    cache = None
    if cached is not None and not cached.shift:  # with a shift, a block's first logits stand in the block before it
        cache = PrefixCache(cached, prompt_ids, prompt_mask, length, settings.block_length, slots)
    schedule = torch.tensor(settings.schedule, device=device)
    final = torch.full((b, length), mask_id, device=device)
    reveal = torch.full((b, length), NEVER, device=device)
    all_keys = key_tensor(keys, device)
    rows = slot = torch.arange(slots, device=device)  # rows being decoded; all below is indexed like `rows`
    begun = slots
    tokens, reveal_step = final[rows], reveal[rows]
    block, within, step = (torch.zeros_like(rows) for _ in range(3))

    def trajectory(some: Tensor) -> Trajectory:
        known = (prompt_ids[some], prompt_mask[some], final[some], reveal[some])
        return _trajectory(*known, settings.block_length, mask_id, end_ids, pad_id, blocks_of_prompt)

    while len(rows):
        if watch is not None:
            final[rows] = tokens
            watch(final.clone())
        if meter is not None:
            meter.forwards, meter.rows, meter.slots = meter.forwards + 1, meter.rows + len(rows), meter.slots + slots
        masked = reveal_step == NEVER
        active = masked & (blocks[rows] == block[:, None])
        if cache is not None and settings.guidance == 0:
            logits = cache(rows, slot, tokens, active, block).float()
        else:
            view = _view(prompt_ids[rows], prompt_mask[rows], tokens, active)
            logits = _guided(site_logits, view, settings.guidance, mask_id, prompt_ids.shape[1]).float()
        chosen, score = _propose(logits, active, settings, fold(all_keys[rows], step), mask_id)
        commit = _commit(active, score, settings, schedule[within])
        tokens = torch.where(commit, chosen, tokens)
        reveal_step = torch.where(commit, step[:, None], reveal_step)
        # Next step; a full block moves on, past the steps of the schedule that would commit nothing.
        full = ~(active & ~commit).any(1)
        counted = settings.threshold is None and not blocks_of_prompt
        step = step + torch.where(full & counted, schedule.numel() - within, 1)
        within = torch.where(full | (settings.threshold is not None), 0, within + 1)
        block = block + full.long()
        done = block > blocks[rows, -1]
        if settings.early_end:
            ends = is_any_of(tokens, end_ids) & (reveal_step != NEVER).cumprod(1).bool()
            done |= ends.any(1)
        if bool(done.any()):
            final[rows], reveal[rows] = tokens, reveal_step
            if finished is not None:
                finished(rows[done].cpu(), trajectory(rows[done]))
            # The next prompts take the slots that are free.
            new = torch.arange(begun, min(b, begun + int(done.sum())), device=device)
            begun += len(new)
            fresh, keep = torch.zeros_like(new), ~done
            slot = torch.cat([slot[keep], slot[done][: len(new)]])
            rows = torch.cat([rows[keep], new])
            tokens, reveal_step = (torch.cat([x[keep], y[new]]) for x, y in ((tokens, final), (reveal_step, reveal)))
            block, within, step = (torch.cat([x[keep], fresh]) for x in (block, within, step))
            if cache is not None:
                cache.begin(slot[len(slot) - len(new) :])
    if watch is not None:
        watch(final.clone())
    return trajectory(torch.arange(b, device=device))


def _trajectory(
    prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, reveal_step: Tensor, block_length: int, *layout: Any
) -> Trajectory:
    mask_id, end_ids, pad_id, blocks_of_prompt = layout
    known = reveal_step != NEVER
    tokens = tokens.masked_fill(~known, pad_id)
    length = completion_length(tokens, end_ids, known)
    return Trajectory(
        prompt_ids, prompt_mask, tokens, reveal_step, length, block_length, mask_id, end_ids, pad_id, blocks_of_prompt
    )


def _view(prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, sites: Tensor) -> View:
    return View(
        ids=torch.cat([prompt_ids, tokens], 1),
        mask=torch.cat([prompt_mask, torch.ones_like(sites)], 1),
        sites=torch.cat([torch.zeros_like(prompt_mask), sites], 1),
    )


def _guided(
    site_logits: Callable[[View], Tensor], view: View, guidance: float, mask_id: int, prompt_width: int
) -> Tensor:
    logits = site_logits(view)
    if guidance == 0:
        return logits
    blank = view.ids.clone()
    blank[:, :prompt_width] = mask_id
    without = site_logits(View(blank, view.mask, view.sites))
    return without + (1 + guidance) * (logits - without)


def _propose(logits: Tensor, active: Tensor, settings: Denoising, keys: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """The token that each active position would take ``[b l]`` and how early it wants to be committed ``[b l]``.

    Scores are the model's own (before temperature and suppression), as in LLaDA; inactive positions have -inf.
    """
    normaliser = logits.logsumexp(-1)
    allowed = logits.index_fill(-1, torch.tensor([mask_id, *settings.suppress], device=logits.device), -torch.inf)
    if settings.temperature == 0:
        token = allowed.argmax(-1)
    else:
        u = uniform(keys, active.shape[1])[active]
        token = sample(allowed / settings.temperature, u)
    match settings.order:
        case "confidence":
            score = logits.gather(-1, token[:, None])[:, 0] - normaliser
        case "margin":
            top = (logits.topk(2, -1).values - normaliser[:, None]).exp()
            score = top[:, 0] - top[:, 1]
        case "entropy":
            probability = (logits - normaliser[:, None]).exp()
            score = torch.xlogy(probability, probability).sum(-1)
        case "random":
            score = uniform(fold(keys, make_key("order")), active.shape[1])[active]
        case "left_to_right":
            score = -active.nonzero()[:, 1].float()
    tokens = torch.zeros(active.shape, dtype=torch.int64, device=active.device)
    scores = torch.full(active.shape, -torch.inf, device=active.device)
    tokens[active], scores[active] = token, score
    return tokens, scores


def _commit(active: Tensor, score: Tensor, settings: Denoising, quota: Tensor) -> Tensor:
    """bool ``[b l]``: what this step commits."""
    rank = rank_descending(score)
    if settings.threshold is None:
        return active & (rank < quota[:, None])
    return active & ((rank == 0) | (score.exp() >= settings.threshold))


def sample(logits: Tensor, u: Tensor) -> Tensor:
    """Tokens int64 ``[m]`` from softmax(``logits [m v]``) by inverse CDF at ``u [m]`` in (0, 1), float32 throughout."""
    cdf = logits.softmax(-1).cumsum(-1)
    token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None].contiguous())[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)
