"""The sampler: semi-autoregressive blocks, any number of tokens per step.

The published reference (LLaDA, `generate`) works one canvas at a time on logits of the whole canvas. Here a batch of
unequal prompts is decoded together, the output head runs only on the masked positions of each row's active block, and
every random number is keyed, so that a row's result depends neither on its batch nor on its place in it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dllm_sd.losses.sites import rank_descending
from dllm_sd.policies.decoding import Decoding, Meter, draw, drawn_logp
from dllm_sd.policies.policy import View
from dllm_sd.policies.prefix_cache import PrefixCache
from dllm_sd.policies.site_head import SiteHead
from dllm_sd.randomness import fold, key_tensor, make_key, uniform
from dllm_sd.trajectory import NEVER, Reach, Trajectory, block_index, completion_length, is_any_of, left_pad


@torch.no_grad()
def denoise(
    site_logits: Callable[[View], Tensor],
    prompts: Sequence[Sequence[int]],
    settings: Decoding,
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
    reach: Reach | None = None,
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
        reach: stop there; None goes on to the end.
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
    logp = torch.full((b, length), torch.nan, device=device)
    all_keys = key_tensor(keys, device)
    rows = slot = torch.arange(slots, device=device)  # rows being decoded; all below is indexed like `rows`
    begun = slots
    tokens, reveal_step = final[rows], reveal[rows]
    block, within, step = (torch.zeros_like(rows) for _ in range(3))

    def trajectory(some: Tensor) -> Trajectory:
        known = [x[some] for x in (prompt_ids, prompt_mask, final, reveal, logp)]
        return _trajectory(known, settings.block_length, mask_id, end_ids, pad_id, blocks_of_prompt)

    while len(rows):
        if watch is not None:
            final[rows] = tokens
            watch(final.clone())
        if meter is not None:
            meter.forwards, meter.rows, meter.slots = meter.forwards + 1, meter.rows + len(rows), meter.slots + slots
        active = (reveal_step == NEVER) & (blocks[rows] == block[:, None])
        if cache is not None and settings.guidance == 0:
            logits = cache(rows, slot, tokens, active, block).float()
        else:
            view = _view(prompt_ids[rows], prompt_mask[rows], tokens, active)
            logits = _guided(site_logits, view, settings.guidance, mask_id, prompt_ids.shape[1]).float()
        chosen, score = _propose(logits, active, settings, fold(all_keys[rows], step), mask_id)
        commit = _commit(active, score, settings, schedule[within])
        row, place = commit.nonzero(as_tuple=True)
        logp[rows[row], place] = drawn_logp(logits[commit[active]], settings, chosen[commit])
        tokens = torch.where(commit, chosen, tokens)
        reveal_step = torch.where(commit, step[:, None], reveal_step)
        full = ~(active & ~commit).any(1)  # such a block moves on, past the steps that would commit nothing
        skipped = schedule.numel() - within if settings.threshold is None and not blocks_of_prompt else 1
        step = step + torch.where(full, skipped, 1)
        within = torch.where(full | (settings.threshold is not None), 0, within + 1)
        block = block + full.long()
        done = block > blocks[rows, -1]
        if reach is not None:
            done |= (block if reach.unit == "blocks" else step) >= reach.count
        if settings.early_end:
            done |= _ends_for_sure(tokens, reveal_step, end_ids)
        if bool(done.any()):
            final[rows], reveal[rows] = tokens, reveal_step
            if finished is not None:
                finished(rows[done].cpu(), trajectory(rows[done]))
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


def _ends_for_sure(tokens: Tensor, reveal_step: Tensor, end_ids: tuple[int, ...]) -> Tensor:
    """bool ``[b]``: whether there is an end token with nothing masked before it."""
    return (is_any_of(tokens, end_ids) & (reveal_step != NEVER).cumprod(1).bool()).any(1)


def _trajectory(rows: Sequence[Tensor], block_length: int, *layout: Any) -> Trajectory:
    prompt_ids, prompt_mask, tokens, reveal_step, logp = rows
    mask_id, end_ids, pad_id, blocks_of_prompt = layout
    known = reveal_step != NEVER
    tokens = tokens.masked_fill(~known, pad_id)
    length = completion_length(tokens, end_ids, known)
    return Trajectory(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        tokens=tokens,
        reveal_step=reveal_step,
        length=length,
        block_length=block_length,
        mask_id=mask_id,
        end_ids=end_ids,
        pad_id=pad_id,
        blocks_of_prompt=blocks_of_prompt,
        logp=logp,
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


def _propose(logits: Tensor, active: Tensor, settings: Decoding, keys: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """The token that each active position would take ``[b l]`` and how early it wants to be committed ``[b l]``.

    Scores are the model's own (before temperature and suppression), as in LLaDA; inactive positions have -inf.
    """
    normaliser = logits.logsumexp(-1)
    allowed = logits.index_fill(-1, torch.tensor([mask_id, *settings.suppress], device=logits.device), -torch.inf)
    token = draw(allowed, settings, uniform(keys, active.shape[1])[active])
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


def _commit(active: Tensor, score: Tensor, settings: Decoding, quota: Tensor) -> Tensor:
    """bool ``[b l]``: what this step commits."""
    rank = rank_descending(score)
    if settings.threshold is None:
        return active & (rank < quota[:, None])
    return active & ((rank == 0) | (score.exp() >= settings.threshold))
