"""The metrics of an update: means over its graded sites, and shares and counts of its rollouts."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dllm_sd.losses.measured import clipped_share
from dllm_sd.objective.equation import Graded
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.trajectory import NEVER

SITE_MEANS = {
    "divergence": "value",
    "student/entropy": "student_entropy",
    "teacher/entropy": "teacher_entropy",
    "teacher/agreement": "agreement",
    "teacher/advantage": "advantage",
}
"""Logged name: field of `Graded`, averaged over all sites of an update."""


def site_sums(graded: Sequence[Graded], measured: Sequence[str], device: torch.device) -> Tensor:
    """Sums over the sites of this process, float64, to be added over processes.

    In order: loss, number of sites, `Graded.clipped`, the fields of `SITE_MEANS`, the ``measured`` quantities.
    """
    total = torch.zeros(3 + len(SITE_MEANS) + len(measured), dtype=torch.float64, device=device)
    for part in graded:
        values = [part.clipped, *(getattr(part, name) for name in SITE_MEANS.values())]
        fields = [value.double().sum() for value in (*values, *(part.measures[name] for name in measured))]
        total += torch.stack([part.loss.detach().double(), part.value.new_tensor(part.value.numel()).double(), *fields])
    return total


def site_metrics(sums: Tensor, measured: Sequence[str]) -> dict[str, float]:
    """Metrics from the sums over all processes; a mean that is not defined (no teacher) is left out."""
    loss, sites, clipped, *rest = sums.tolist()
    totals = dict(zip([*SITE_MEANS, *measured], rest, strict=True))
    means = {name: total / sites for name, total in totals.items()}
    means["clip_share"] = clipped_share(totals["divergence"], clipped)
    return {"loss": loss, "sites": int(sites), **{name: mean for name, mean in means.items() if not math.isnan(mean)}}


WRITING = ("written", "cached", "damaged")
"""Counts of the texts of hint writers that become metrics."""


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Metrics of the rollouts of an update; rates are shares of problems, and references have none."""
    counts = rollouts.counts
    problems, attempts = max(1.0, counts["problems"]), max(1.0, counts["attempts"])
    solved = {"rollouts/pass_rate": counts["solved"], "rollouts/first_try": counts["first_try"]}
    return {
        "rollouts/problems": int(counts["problems"]),
        "rollouts/attempts": int(counts["attempts"]),
        "rollouts/decoded": int(counts["decoded"]),
        **{name: count / problems for name, count in solved.items() if not rollouts.are_references},
        "rollouts/kept": int(counts["kept"]),
        "rollouts/rejected": int(counts["rejected"]),
        "rollouts/no_hint": int(counts["no_hint"]),
        "rollouts/long_hint": int(counts["long_hint"]),
        "rollouts/cut_hint": int(counts.get("cut_hint", 0)),
        "rollouts/generated": int(counts["generated"]),
        "rollouts/length": counts["tokens"] / attempts,
        "rollouts/steps": counts["steps"] / attempts,
        **_behind_end(rollouts),
        **{f"rollouts/{name}": int(counts[name]) for name in ("long_reference", "grader_failed") if name in counts},
        **{f"writers/{name}": int(n) for name, n in counts.items() if name in WRITING or name.startswith("dropped/")},
    }


def _behind_end(rollouts: Rollouts) -> dict[str, float]:
    """The share of the revealed tokens of kept rollouts that follow the end token; empty if none was kept."""
    if not rollouts.size:
        return {}
    trajectory = rollouts.trajectory
    revealed = trajectory.reveal_step != NEVER
    after_end = revealed & trajectory.is_behind_end
    return {"rollouts/behind_end": float(after_end.sum() / revealed.sum().clamp(min=1))}


def graded_entry(rollout: Rollout) -> dict[str, Any]:
    """Which rollout this is, and its grade, as logs say it."""
    grade = rollout.grade
    return {
        "problem": rollout.problem.id,
        "occurrence": rollout.occurrence,
        "attempt": rollout.attempt,
        "correct": grade.correct,
        "score": grade.score,
        "parsed": grade.parsed,
    }


def sample_entry(update: int, rollout: Rollout) -> dict[str, Any]:
    """One line of samples.jsonl: the problem's fields, the generation and its grade."""
    return {**rollout.problem.fields, "update": update, **graded_entry(rollout), "generation": rollout.text}
