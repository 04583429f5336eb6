"""How an update is cut into micro-batches: by length, by a budget of tokens, alike on every process."""

import torch
from torch import Tensor

from dllm_sd.objective.plan import Plan


def micro_batches(plan: Plan, tokens: int, processes: int = 1) -> list[list[Tensor]]:
    """Indices of the canvases of each micro-batch, one int64 ``[k]`` for every process.

    Canvases are taken by length, equal ones side by side, as many at a time as keep what student and each teacher read
    within ``tokens`` padded tokens on every process; one for each process is the least. Processes that have nothing
    left get none, and the first always has one.
    """
    order = by_length(plan)
    first, last = plan.first[order], plan.last[order]
    most = (tokens // (last - first).amax(1).clamp(min=1)).clamp(min=1) * processes  # what can fit from here on
    batches, start = [], 0
    while start < len(order):
        window = slice(start, start + int(most[start]))
        low, high = first[window].cummin(0).values, last[window].cummax(0).values
        width = (high - low).amax(1)
        each = torch.arange(len(width)) // processes + 1  # canvases of the fullest process
        fits = int((width * each <= tokens).sum())  # both grow
        stop = min(start + max(processes, fits), len(order))
        batches.append(list(order[start:stop].tensor_split(processes)))
        start = stop
    return batches


def by_length(plan: Plan) -> Tensor:
    """The canvases from short to long, int64 ``[n]``, with equal ones side by side."""
    group = plan.content.unique(return_inverse=True)[1]
    first = torch.full((len(group),), len(group)).scatter_reduce(0, group, torch.arange(len(group)), "amin")[group]
    order = first.argsort(stable=True)
    return order[plan.length[order].argsort(stable=True)]
