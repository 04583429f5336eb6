"""The sites whose loss is not finite, written down before the run stops."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dllm_sd.files.writing import write_file
from dllm_sd.objective.equation import Graded
from dllm_sd.objective.plan import Plan
from dllm_sd.rollouts.rollout import Rollout, Rollouts


def broken_sites(plan: Plan, graded: Graded, rollouts: Rollouts) -> list[dict[str, Any]]:
    """The sites whose loss is not finite, each with its rollout; positions below 0 are in the prompt."""
    canvas, position = (x.cpu() for x in graded.sites.nonzero(as_tuple=True))
    sites = []
    for i in (~torch.isfinite(graded.term)).nonzero()[:, 0].tolist():
        rollout = rollouts.kept[int(plan.rows[canvas[i]])]
        sites.append(
            {
                "problem": rollout.problem.id,
                "occurrence": rollout.occurrence,
                "attempt": rollout.attempt,
                "step": int(plan.steps[canvas[i]]),
                "position": int(position[i]) - prompt_columns(graded, rollout),
                "loss": str(float(graded.term[i])),
            }
        )
    return sites


def write_broken_sites(file: Path, update: int, sites: Sequence[Mapping[str, Any]], rollouts: Rollouts) -> None:
    """Write the `broken_sites` of all processes, and all rollouts of the update, as JSON."""
    kept = [{"problem": one.problem.id, "occurrence": one.occurrence, "attempt": one.attempt} for one in rollouts.kept]
    write_file(file, json.dumps({"update": update, "sites": sites, "rollouts": kept}, indent=1))


def problems_of(sites: Sequence[Mapping[str, Any]], rollouts: Rollouts) -> str:
    """The first problems of broken sites, or of all rollouts if there are none, as words."""
    names = sorted({site["problem"] for site in sites} or {rollout.problem.id for rollout in rollouts.kept})
    return f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"


def prompt_columns(graded: Graded, rollout: Rollout) -> int:
    """How many columns of `Graded.sites` belong to the prompt: 0 unless the prompt is graded too."""
    return graded.sites.shape[1] - rollout.trajectory.tokens.shape[1]
