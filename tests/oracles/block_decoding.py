"""A plain greedy sampler of block-causal models after SDAR's `block_diffusion_generate`.

One prompt at a time, no padding, no cache: the whole sequence up to the active block is read at every step under a mask
that is made by loops. Blocks lie at absolute positions, so the prompt's remainder stands in the first active block.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.oracles.decoding import priority


def naive_block_mask(length: int, block_length: int) -> list[list[bool]]:
    """Row by row, which positions a position sees."""
    return [[key // block_length <= query // block_length for key in range(length)] for query in range(length)]


def network_logits(network: Any, block_length: int) -> Callable[[Sequence[int]], Tensor]:
    """A function from ids to logits ``[s v]`` of a bare transformers model under a block-causal mask."""

    def logits(ids: Sequence[int]) -> Tensor:
        seen = torch.tensor(naive_block_mask(len(ids), block_length))
        added = torch.zeros(seen.shape, dtype=network.dtype).masked_fill(~seen, -torch.inf)
        position = torch.arange(len(ids))
        with torch.no_grad():
            return network(
                input_ids=torch.tensor([list(ids)]),
                attention_mask=added[None, None],
                position_ids=position[None],
                use_cache=False,
            ).logits[0]

    return logits


def decode_blocks(
    logits: Callable[[Sequence[int]], Tensor],
    prompt: Sequence[int],
    *,
    length: int,
    block_length: int,
    mask_id: int,
    end_ids: Sequence[int] = (),
    banned: Sequence[int] = (),
    tokens_per_step: int = 1,
    threshold: float | None = None,
) -> tuple[list[int | None], list[int | None]]:
    """Tokens and the step that committed each, None where the decoder stopped before."""
    ids = [*prompt, *[mask_id] * length]
    reveal: list[int | None] = [None] * len(ids)
    known = len(prompt)
    step = 0
    for block in range(known // block_length, -(-len(ids) // block_length)):
        start, stop = block * block_length, min((block + 1) * block_length, len(ids))
        while missing := [i for i in range(max(start, known), stop) if reveal[i] is None]:
            rows = logits(ids[:stop])
            proposals = []
            for i in missing:
                row = rows[i].tolist()
                token = max((v for v in range(len(row)) if v != mask_id and v not in banned), key=lambda v: row[v])
                proposals.append((priority(row, token, "confidence", i), i, token))
            proposals.sort(key=lambda item: (-item[0], item[1]))
            if threshold is None:
                accepted = proposals[:tokens_per_step]
            else:
                accepted = [item for n, item in enumerate(proposals) if n == 0 or item[0] >= threshold]
            for _, i, token in accepted:
                ids[i], reveal[i] = token, step
            step += 1
            for i in range(known, len(ids)):
                if reveal[i] is None:
                    break
                if ids[i] in end_ids:
                    return finished(ids, reveal, known)
    return finished(ids, reveal, known)


def finished(ids: Sequence[int], reveal: Sequence[int | None], known: int) -> tuple[list[int | None], list[int | None]]:
    """The completion side, without the prompt."""
    tokens = [None if step is None else token for token, step in zip(ids, reveal, strict=True)]
    return tokens[known:], list(reveal[known:])
