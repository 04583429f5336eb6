"""What a critique says of each token of a rollout, and whether the teacher's advantage agrees with it.

The advantage is ``log teacher - log student`` at the drawn token. With step-aligned feedback it should be above 0
before the first wrong step and far below 0 in it (arXiv 2606.11173, Fig. 4).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dllm_sd.objective.equation import Graded
from dllm_sd.objective.plan import Plan
from dllm_sd.policies.policy import Policy, offsets
from dllm_sd.rollouts.rollout import Rollouts
from dllm_sd.teachers.context import Context

REGIONS = ("prefix", "error", "after")
"""Before the first wrong step, in it, and behind it."""
GradedPlans = Sequence[tuple[Plan, Graded]]
RIGHT_ROLLOUTS = "right"
"""Beside the regions: everything in rollouts that were right."""


def region_map(policy: Policy, contexts: Sequence[Context], rollouts: Rollouts) -> Tensor | None:
    """int64 ``[b l]``: the number in `REGIONS` of each token, -1 where nothing is known; None if nothing is at all.

    Of the first context, whose advantage is logged.
    """
    hint = contexts[0].hint if contexts else None
    if hint is None or not hint.marks_regions or not rollouts.size:
        return None
    found = torch.full(rollouts.trajectory.tokens.shape, -1)
    for row, rollout in enumerate(rollouts.kept):
        marks = hint.marks(rollout.text, (rollout.briefs[0].text if rollout.briefs else None) or "")
        if not marks:
            continue
        tokens = rollout.trajectory.tokens[0, : int(rollout.trajectory.length)].tolist()
        starts = offsets(policy, tokens)[:-1]
        for start, end, region in marks:
            for place, at in enumerate(starts):
                if start <= at < end:
                    found[row, place] = REGIONS.index(region)
    return found if bool((found >= 0).any()) else None


def region_sums(parts: GradedPlans, regions: Tensor | None, rollouts: Rollouts, device: torch.device) -> Tensor:
    """Sums to be added over processes, float64 ``[3, 4]``: advantage, its size, and sites; by region, and if right."""
    total = torch.zeros(3, len(REGIONS) + 1, dtype=torch.float64, device=device)
    if regions is None:
        return total
    right = torch.tensor([rollout.grade.correct for rollout in rollouts.kept])
    for plan, graded in parts:
        canvas, position = (x.cpu() for x in graded.sites.nonzero(as_tuple=True))
        rows = plan.rows[canvas]
        value = graded.advantage.double().cpu()
        here = regions[rows, position]
        for place, mask in enumerate([*(here == number for number in range(len(REGIONS))), right[rows]]):
            sums = [value[mask].sum(), value[mask].abs().sum(), mask.double().sum()]
            total[:, place] += torch.stack(sums).to(device)
    return total


def region_metrics(sums: Tensor) -> dict[str, float]:
    """Mean advantage by region, and how much larger it is in the first wrong step than elsewhere, where known."""
    values, sizes, counts = sums.tolist()
    names = [*REGIONS, RIGHT_ROLLOUTS]
    found = {
        f"advantage/{name}": value / count for name, value, count in zip(names, values, counts, strict=True) if count
    }
    error = REGIONS.index("error")
    elsewhere = [place for place in range(len(REGIONS)) if place != error]
    other, size = sum(counts[place] for place in elsewhere), sum(sizes[place] for place in elsewhere)
    if counts[error] and other and size:
        found["advantage/localisation"] = (sizes[error] / counts[error]) / (size / other)
    return found


def advantage_picture(parts: GradedPlans, regions: Tensor | None, height: int = 48, cell: int = 6) -> Tensor | None:
    """The first rollout's advantage as bars, RGB ``[3 height l*cell]``: blue above 0, red below, grey its wrong step.

    None where nothing of it was graded here.
    """
    if regions is None:
        return None
    length = regions.shape[1]
    value = torch.full((length,), torch.nan)
    for plan, graded in parts:
        canvas, position = (x.cpu() for x in graded.sites.nonzero(as_tuple=True))
        mine = plan.rows[canvas] == 0
        value[position[mine]] = graded.advantage.float().cpu()[mine]
    known = ~value.isnan()
    if not bool(known.any()):
        return None
    picture = torch.ones(3, height, length)
    picture[:, :, regions[0] == REGIONS.index("error")] = 0.85
    half, top = height // 2, float(value[known].abs().max().clamp(min=1e-12))
    for place in known.nonzero()[:, 0].tolist():
        size = max(1, round(half * abs(float(value[place])) / top))
        colour = torch.tensor([0.2, 0.4, 0.9] if value[place] > 0 else [0.9, 0.2, 0.2])
        rows = slice(half - size, half) if value[place] > 0 else slice(half, half + size)
        picture[:, rows, place] = colour[:, None]
    return picture.repeat_interleave(cell, 2)
