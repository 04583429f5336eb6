"""Monte-Carlo bounds on the log-likelihood of an answer, for lm-eval (`harness`).

LLaDA (arXiv 2502.09992, Eq. 6 and its evaluation code): of an answer's ``L`` tokens hide ``l``, uniform on 1..L, at
random places; the mean of ``L/l`` times the sum of the hidden tokens' log-probabilities bounds the answer's
log-probability from below. It equals the mean over all orders in which the answer can be written token by token.

A block-causal model never sees masks in earlier blocks. So each block is estimated after an unmasked prefix, and the
bounds of the blocks are added (BD3-LM, arXiv 2503.09573, Eq. 4 and 8).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from dllm_sd.network.site_head import evaluating
from dllm_sd.network.view import View
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.randomness import fold, key_tensor, make_key, uniform
from dllm_sd.trajectory import left_pad

T = TypeVar("T")
PromptAnswer = tuple[Sequence[int], Sequence[int]]
"""Prompt and answer tokens."""


@dataclass(frozen=True)
class _Canvas:
    """One row that the model reads: ``tokens``, of which those at ``hidden`` are masked and graded."""

    tokens: Sequence[int]
    prompt: int
    """Number of prompt tokens."""
    hidden: Sequence[int]


def draw_masks(length: int, samples: int, key: int) -> tuple[Tensor, Tensor]:
    """Which tokens of an answer to hide, bool ``[n length]``, and the weight of each mask, float64 ``[n]``.

    The weighted sum of the hidden tokens' log-probabilities estimates the bound without bias. Where ``samples`` are
    enough for all ``2**length - 1`` masks the sum is exact. Otherwise the numbers of hidden tokens are spread evenly
    over 1..length with one random offset, which leaves each of them uniform, and equal masks are evaluated once.
    """
    if length < 32 and 2**length - 1 <= samples:
        hidden = (torch.arange(1, 2**length)[:, None] >> torch.arange(length) & 1).bool()
        sizes = hidden.sum(1).tolist()
        return hidden, torch.tensor([1 / (l * math.comb(length, l)) for l in sizes], dtype=torch.float64)  # noqa: E741
    base, draw = key_tensor([key]), torch.arange(samples)
    place = (uniform(fold(base, -1), 1)[0].double() + draw / samples) % 1
    size = 1 + (place * length).long().clamp(max=length - 1)
    rank = uniform(fold(base, draw), length).argsort(dim=1, stable=True).argsort(1)
    hidden, count = torch.unique(rank < size[:, None], dim=0, return_counts=True)
    return hidden, length * count.double() / (samples * hidden.sum(1))


def spans(prompt: int, answer: int, block_length: int | None) -> list[range]:
    """The parts of an answer, as positions behind a prompt of ``prompt`` tokens, that are estimated one by one."""
    stop = prompt + answer
    if not answer:
        return []
    if block_length is None:
        return [range(prompt, stop)]
    edges = range(prompt // block_length * block_length, stop, block_length)
    return [range(max(edge, prompt), min(edge + block_length, stop)) for edge in edges]


@torch.no_grad()
def log_likelihoods(
    policy: MaskedDiffusion,
    pairs: Sequence[PromptAnswer],
    keys: Sequence[int],
    *,
    samples: int = 128,
    batch_size: int = 32,
    guidance: float = 0.0,
) -> list[float]:
    """Monte-Carlo bounds on log p(answer | prompt); the canvas ends with the answer.

    Args:
        policy: the model.
        pairs: prompts and answers.
        keys: one per pair; they seed the masks, so that batching cannot change a result.
        samples: masks drawn for each answer (block-causal models: for each block); equal ones are read once.
        batch_size: canvases read together.
        guidance: classifier-free guidance scale, as in `Decoding`.
    """
    sums = [0.0] * len(pairs)

    def canvases() -> Iterator[tuple[int, float, _Canvas]]:
        for row, ((prompt, answer), key) in enumerate(zip(pairs, keys, strict=True)):
            for span in spans(len(prompt), len(answer), policy.block_length):
                masks, weights = draw_masks(len(span), samples, make_key(key, span.start - len(prompt)))
                tokens = [*prompt, *answer][: span.stop]
                for mask, weight in zip(masks, weights.tolist(), strict=True):
                    hidden = [span[i] for i in mask.nonzero()[:, 0].tolist()]
                    yield row, weight, _Canvas(tokens, len(prompt), hidden)

    with evaluating(policy.module):
        for batch in batches(canvases(), batch_size):
            logits, truth, owner = _read(policy, [canvas for _, _, canvas in batch], guidance)
            value = logits.gather(-1, truth[:, None])[:, 0] - logits.logsumexp(-1)
            total = torch.zeros(len(batch), dtype=torch.float64).index_add(0, owner, value.cpu().double())
            for (row, weight, _), part in zip(batch, total.tolist(), strict=True):
                sums[row] += weight * part
    return sums


@torch.no_grad()
def written_greedily(
    policy: MaskedDiffusion, pairs: Sequence[PromptAnswer], *, batch_size: int = 32, guidance: float = 0.0
) -> list[bool]:
    """Whether greedy unmasking writes each answer: from all masked, the most probable token first, one per step.

    This is ``suffix_greedy_prediction`` of LLaDA's evaluation code, block by block for block-causal models. A row
    is dropped at its first token that differs, which for most wrong answers is in the first step.
    """
    left = [[list(span) for span in spans(len(p), len(a), policy.block_length)] for p, a in pairs]
    stops = [[span[-1] + 1 for span in parts] for parts in left]
    alive = [row for row, parts in enumerate(left) if parts]
    wrong = set[int]()
    never = torch.tensor([policy.mask_id, *policy.suppress], device=policy.device)
    with evaluating(policy.module):
        while alive:
            for batch in batches(alive, batch_size):
                canvases = [
                    _Canvas([*prompt, *answer][: stops[row][0]], len(prompt), left[row][0])
                    for row in batch
                    for prompt, answer in [pairs[row]]
                ]
                logits, truth, owner = _read(policy, canvases, guidance)
                score, token = logits.index_fill(-1, never, -torch.inf).max(-1)
                score, right, owner = (score - logits.logsumexp(-1)).cpu(), (token == truth).cpu(), owner.cpu()
                for n, row in enumerate(batch):
                    most_probable = int(score[owner == n].argmax())
                    if not bool(right[owner == n][most_probable]):
                        wrong.add(row)
                    del left[row][0][most_probable]
                    if not left[row][0]:
                        del left[row][0], stops[row][0]
            alive = [row for row in alive if left[row] and row not in wrong]
    return [row not in wrong for row in range(len(pairs))]


def _read(policy: MaskedDiffusion, canvases: Sequence[_Canvas], guidance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[m v]`` at the hidden tokens, the tokens ``[m]`` themselves, and the canvas ``[m]`` of each."""
    ids, mask = left_pad([canvas.tokens for canvas in canvases], policy.pad_id)
    sites, prompt = torch.zeros_like(mask), mask.clone()
    for row, canvas in enumerate(canvases):
        start = ids.shape[1] - len(canvas.tokens)
        sites[row, [start + place for place in canvas.hidden]] = True
        prompt[row, start + canvas.prompt :] = False
    truth, ids = ids[sites], ids.masked_fill(sites, policy.mask_id)
    logits = policy.site_logits(View(ids, mask, sites))
    if guidance:
        without = policy.site_logits(View(ids.masked_fill(prompt, policy.mask_id), mask, sites))
        logits = without + (1 + guidance) * (logits - without)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits, truth.to(logits.device), sites.nonzero()[:, 0]


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last one shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
