"""Log-probabilities of given text under an autoregressive model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_sd.network.site_head import Head, evaluating, run_at_sites
from dllm_sd.network.view import View
from dllm_sd.policies.loading import AnyPolicy
from dllm_sd.trajectory import left_pad

POSITIONS = 2**14
"""Positions read together."""
ROWS = 64
"""Rows of logits computed together."""


@dataclass(frozen=True)
class TokenScores:
    """Of one text; the first token has no log-probability, since nothing stands before it."""

    logp: list[float]
    """Of each token but the first."""
    top: list[dict[int, float]]
    """The most probable tokens at each of these places."""


@torch.no_grad()
def score(policy: AnyPolicy, texts: Sequence[Sequence[int]], top: int) -> list[TokenScores]:
    """Return how probable the tokens of some texts are, at temperature 1, with the ``top`` most probable ones."""
    scores: list[TokenScores] = []
    for batch in _batches(texts):
        ids, mask = (x.to(policy.device) for x in left_pad(batch, policy.pad_id))
        first = mask & (mask.cumsum(1) == 1)
        sites = mask & ~first
        targets = ids[sites]

        def read(hidden: Tensor, head: Head, targets: Tensor = targets) -> tuple[Tensor, Tensor, Tensor]:
            parts: list[tuple[Tensor, Tensor, Tensor]] = []
            for start in range(0, len(hidden), ROWS):
                logp = head(hidden[start : start + ROWS]).float().log_softmax(-1)
                best = logp.topk(min(top, logp.shape[-1]), -1)
                own = logp.gather(-1, targets[start : start + ROWS, None])[:, 0]
                parts.append((own, best.values, best.indices))
            own, values, indices = (torch.cat(list(column)) for column in zip(*parts, strict=True))
            return own, values, indices

        if not bool(sites.any()):
            scores += [TokenScores([], []) for _ in batch]
            continue
        with evaluating(policy.module):
            own, values, indices = run_at_sites(policy.module, View(ids, mask, sites), read)
        rows = zip(own.tolist(), values.tolist(), indices.tolist(), strict=True)
        every = [(x, dict(zip(place, best, strict=True))) for x, best, place in rows]
        for text in batch:
            mine, every = every[: len(text) - 1], every[len(text) - 1 :]
            scores.append(TokenScores([x for x, _ in mine], [best for _, best in mine]))
    return scores


def _batches(texts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    batch: list[Sequence[int]] = []
    for text in texts:
        if batch and (len(batch) + 1) * max(map(len, [*batch, text])) > POSITIONS:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch
