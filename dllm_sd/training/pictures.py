"""Pictures of the first rollout of an update, for trackers: its trajectory, and the teacher's advantage along it."""

import torch
from torch import Tensor

from dllm_sd.rollouts.rollout import Rollouts
from dllm_sd.training.advantage import GradedPlans, advantage_picture
from dllm_sd.training.broken_sites import prompt_columns
from dllm_sd.trajectory import NEVER


def divergence_table(parts: GradedPlans, rollouts: Rollouts) -> tuple[Tensor, Tensor] | None:
    """Of the first rollout: `reveal_step` int64 ``[l]`` and the divergence ``[k l]``.

    The divergence is NaN where this process graded no site. None if it graded none of the rollout.
    """
    trajectory = rollouts.kept[0].trajectory
    table = torch.full((int(trajectory.num_steps), trajectory.tokens.shape[1]), torch.nan)
    for plan, graded in parts:
        canvas, position = (x.cpu() for x in graded.sites.nonzero(as_tuple=True))
        rows, steps = plan.rows[canvas], plan.steps[canvas]
        position = position - prompt_columns(graded, rollouts.kept[0])
        in_first = (rows == 0) & (steps >= 0) & (position >= 0)
        table[steps[in_first], position[in_first]] = graded.value.float().cpu()[in_first]
    return None if bool(table.isnan().all()) else (trajectory.reveal_step[0], table)


def pictures(parts: GradedPlans, regions: Tensor | None, rollouts: Rollouts) -> dict[str, Tensor]:
    """Pictures of the first rollout by name: its trajectory, and the teacher's advantage if ``regions`` are known."""
    table, bars = divergence_table(parts, rollouts), advantage_picture(parts, regions)
    return ({"trajectory": trajectory_picture(*table)} if table else {}) | ({} if bars is None else {"advantage": bars})


def trajectory_picture(reveal_step: Tensor, value: Tensor, cell: int = 8) -> Tensor:
    """Draw one trajectory: decoding steps downwards, positions to the right.

    Args:
        reveal_step: int64 ``[l]``.
        value: float ``[k l]``, the divergence at graded sites, NaN elsewhere.
        cell: pixels of a cell.

    Returns:
        float32 ``[3 k*cell l*cell]`` in [0, 1]: grey where masked, white where revealed earlier, blue where revealed
        at this step. Graded sites are drawn over that in red, which is stronger where the divergence is larger.
    """
    steps = torch.arange(value.shape[0])[:, None]
    masked = (reveal_step == NEVER) | (reveal_step > steps)
    picture = torch.where(masked, 0.75, 1.0).expand(3, -1, -1).clone()
    now = reveal_step == steps
    picture[:, now] = torch.tensor([0.55, 0.7, 1.0])[:, None]
    graded = ~value.isnan()
    if bool(graded.any()):
        strength = (value[graded] / value[graded].max().clamp(min=1e-12)).clamp(0, 1).float()
        red = torch.stack([torch.full_like(strength, 0.9), 0.1 * (1 - strength), 0.1 * (1 - strength)])
        picture[:, graded] = picture[:, graded] * (1 - strength) + red * strength
    return picture.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
