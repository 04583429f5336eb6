"""The teacher's advantage inside and outside of the first wrong step that a critique marks in a rollout.

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
"""Before the first wrong step, in it, and after it."""
RIGHT_ROLLOUTS = "right"
"""All tokens of correct rollouts, reported beside the regions."""
GradedPlans = Sequence[tuple[Plan, Graded]]
"""The canvases of each micro-batch with their loss."""


def region_map(policy: Policy, contexts: Sequence[Context], rollouts: Rollouts) -> Tensor | None:
    """The region of each token: its index in `REGIONS` as int64 ``[b l]``, -1 where it is unknown.

    The regions are those of the first context's hint, since that context's advantage is logged. None if no token's
    region is known.
    """
    hint = contexts[0].hint if contexts else None
    if hint is None or not hint.marks_regions or not rollouts.size:
        return None
    region_index = torch.full(rollouts.trajectory.tokens.shape, -1)
    for row, rollout in enumerate(rollouts.kept):
        marks = hint.marks(rollout.text, (rollout.briefs[0].text if rollout.briefs else None) or "")
        if not marks:
            continue
        tokens = rollout.trajectory.tokens[0, : int(rollout.trajectory.length)].tolist()
        starts = offsets(policy, tokens)[:-1]
        for start, end, region in marks:
            for position, token_start in enumerate(starts):
                if start <= token_start < end:
                    region_index[row, position] = REGIONS.index(region)
    return region_index if bool((region_index >= 0).any()) else None


def region_sums(parts: GradedPlans, regions: Tensor | None, rollouts: Rollouts, device: torch.device) -> Tensor:
    """Sums over the sites of this process, float64 ``[3, 4]``, to be added over processes.

    Rows: advantage, its absolute value, number of sites. Columns: `REGIONS`, then all sites of correct rollouts.
    """
    total = torch.zeros(3, len(REGIONS) + 1, dtype=torch.float64, device=device)
    if regions is None:
        return total
    correct = torch.tensor([rollout.grade.correct for rollout in rollouts.kept])
    for plan, graded in parts:
        canvas, position = (x.cpu() for x in graded.sites.nonzero(as_tuple=True))
        rows = plan.rows[canvas]
        value = graded.advantage.double().cpu()
        site_region = regions[rows, position]
        masks = [*(site_region == index for index in range(len(REGIONS))), correct[rows]]
        for column, mask in enumerate(masks):
            sums = [value[mask].sum(), value[mask].abs().sum(), mask.double().sum()]
            total[:, column] += torch.stack(sums).to(device)
    return total


def region_metrics(sums: Tensor) -> dict[str, float]:
    """Mean advantage by region, and `advantage/localisation`.

    Localisation is the mean absolute advantage in the first wrong step, divided by that of all other sites.
    """
    values, magnitudes, counts = sums.tolist()
    names = [*REGIONS, RIGHT_ROLLOUTS]
    metrics = {
        f"advantage/{name}": value / count for name, value, count in zip(names, values, counts, strict=True) if count
    }
    error = REGIONS.index("error")
    elsewhere = [index for index in range(len(REGIONS)) if index != error]
    count, magnitude = sum(counts[index] for index in elsewhere), sum(magnitudes[index] for index in elsewhere)
    if counts[error] and count and magnitude:
        metrics["advantage/localisation"] = (magnitudes[error] / counts[error]) / (magnitude / count)
    return metrics
