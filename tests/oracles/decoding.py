"""A plain greedy sampler after LLaDA's `generate`: one prompt at a time, logits of the whole canvas, Python loops."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dllm_sd.network.view import View
from dllm_sd.policies.masked_diffusion import MaskedDiffusion


def full_logits(policy: MaskedDiffusion) -> Callable[[Sequence[int]], Tensor]:
    """A function from the ids of one canvas to its logits ``[s v]``, without padding and without a choice of sites."""

    def logits(ids: Sequence[int]) -> Tensor:
        everywhere = torch.ones((1, len(ids)), dtype=torch.bool)
        with torch.no_grad():
            return policy.site_logits(View(torch.tensor([list(ids)]), everywhere, everywhere))

    return logits


def transfer_counts(block_length: int, steps: int) -> list[int]:
    """LLaDA's `get_num_transfer_tokens` for a block that is all masked."""
    counts = [block_length // steps] * steps
    for i in range(block_length % steps):
        counts[i] += 1
    return counts


def priority(logits: Sequence[float], token: int, order: str, position: int) -> float:
    """How early a position wants to be committed."""
    top = max(logits)
    total = sum(math.exp(x - top) for x in logits)
    probabilities = [math.exp(x - top) / total for x in logits]
    if order == "confidence":
        return probabilities[token]
    if order == "margin":
        first, second = sorted(probabilities, reverse=True)[:2]
        return first - second
    if order == "entropy":
        return sum(p * math.log(p) for p in probabilities if p > 0)
    assert order == "left_to_right"
    return -position


def decode_one(
    logits: Callable[[Sequence[int]], Tensor],
    prompt: Sequence[int],
    *,
    length: int,
    block_length: int,
    mask_id: int,
    end_ids: Sequence[int] = (),
    banned: Sequence[int] = (),
    counts: Sequence[int] = (),
    threshold: float | None = None,
    order: str = "confidence",
) -> tuple[list[int | None], list[int | None]]:
    """Tokens and the step that committed each, None where the decoder stopped before.

    Args:
        logits: the model.
        prompt: token ids.
        length: completion positions.
        block_length: positions of a block.
        mask_id: the mask token.
        end_ids: decoding stops once everything up to the first of them stands.
        banned: tokens never taken, besides the mask.
        counts: tokens committed at each step of a block.
        threshold: commit what is at least so probable (and the best) instead of `counts`.
        order: which positions come first.
    """
    tokens: list[int | None] = [None] * length
    reveal: list[int | None] = [None] * length
    step = 0
    for start in range(0, length, block_length):
        within = 0
        while any(tokens[i] is None for i in range(start, start + block_length)) or within < len(counts):
            canvas = [mask_id if token is None else token for token in tokens]
            rows = logits([*prompt, *canvas])[len(prompt) :]
            proposals = []
            for i in range(start, start + block_length):
                if tokens[i] is None:
                    row = rows[i].tolist()
                    token = max((v for v in range(len(row)) if v != mask_id and v not in banned), key=lambda v: row[v])
                    proposals.append((priority(row, token, order, i), i, token))
            proposals.sort(key=lambda item: (-item[0], item[1]))
            if threshold is None:
                accepted = proposals[: counts[within]]
            else:
                accepted = [item for n, item in enumerate(proposals) if n == 0 or item[0] >= threshold]
            for _, i, token in accepted:
                tokens[i], reveal[i] = token, step
            step, within = step + 1, within + 1
            for token in tokens:
                if token is None:
                    break
                if token in end_ids:
                    return tokens, reveal
    return tokens, reveal
