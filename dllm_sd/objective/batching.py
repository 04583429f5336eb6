"""Cuts an update into micro-batches by length, within a budget of tokens, in the same way on every process."""

import torch
from torch import Tensor

from dllm_sd.objective.plan import Plan


def micro_batches(plan: Plan, tokens: int, processes: int = 1) -> list[list[Tensor]]:
    """Indices of the canvases of each micro-batch, one int64 ``[k]`` for every process.

    Canvases are sorted by length, with equal ones side by side. A micro-batch takes as many as keep the inputs of the
    student and of each teacher within ``tokens`` padded tokens on every process, and at least one canvas. In the last
    micro-batch some processes may get no canvas; the first process always gets one.
    """
    order = by_length(plan)
    first, last = plan.first[order], plan.last[order]
    # an upper bound on the canvases of a micro-batch that starts at this one
    most = (tokens // (last - first).amax(1).clamp(min=1)).clamp(min=1) * processes
    batches, start = [], 0
    while start < len(order):
        window = slice(start, start + int(most[start]))
        low, high = first[window].cummin(0).values, last[window].cummax(0).values
        width = (high - low).amax(1)
        per_process = torch.arange(len(width)) // processes + 1  # canvases of the process that has most
        fits = int((width * per_process <= tokens).sum())  # both factors only grow with the number of canvases
        stop = min(start + max(processes, fits), len(order))
        batches.append(list(order[start:stop].tensor_split(processes)))
        start = stop
    return batches


def by_length(plan: Plan) -> Tensor:
    """Indices of the canvases from short to long, int64 ``[n]``, with equal ones side by side."""
    group = plan.content.unique(return_inverse=True)[1]
    first = torch.full((len(group),), len(group)).scatter_reduce(0, group, torch.arange(len(group)), "amin")[group]
    order = first.argsort(stable=True)
    return order[plan.length[order].argsort(stable=True)]
