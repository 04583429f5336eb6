"""The curves of a report: which metrics share a chart, and what is healthy."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """One chart."""

    title: str
    metrics: Mapping[str, str]
    """Key of metrics.jsonl: label."""
    healthy: str
    """A sentence or two on what is healthy."""
    unit: str = ""
    """``%`` shows shares as percent; else the unit is shown at the axis."""
    marks: bool = False
    """Whether best weights and a collapse are marked."""


CURVES = (
    Curve(
        "Dev accuracy",
        {"eval/accuracy": "accuracy", "eval/score": "score (partial credit)"},
        "Healthy: it rises and then stays. Self-distillation often peaks and falls again; the best point counts.",
        "%",
        marks=True,
    ),
    Curve(
        "Loss",
        {"loss": "loss", "divergence": "divergence before the clip"},
        "Healthy: it falls and levels off. It keeps falling when accuracy falls again, so it is no sign of success.",
    ),
    Curve(
        "Entropy",
        {"student/entropy": "student", "teacher/entropy": "teacher"},
        "Healthy: the student's falls slowly towards the teacher's, which is lower because the teacher sees more. A "
        "fast fall to 0 comes before a collapse; a rise means that the student loses what it knew.",
        "nats",
    ),
    Curve(
        "Agreement of student and teacher",
        {"teacher/agreement": "same first choice"},
        "Healthy: it rises slowly and stays below 100 %. Near 100 % from the start there is little to learn.",
        "%",
    ),
    Curve(
        "Advantage of the drawn token",
        {"teacher/advantage": "teacher minus student"},
        "Healthy: near 0 and shrinking. Far below 0 the teacher finds unlikely what the student draws.",
        "nats",
    ),
    Curve(
        "Lengths",
        {"rollouts/length": "rollouts", "eval/length": "dev split"},
        "Healthy: they stay about the same. A steady growth or shrinkage means that the style changes, not the skill.",
        "tokens",
    ),
    Curve(
        "Pass rate of the rollouts",
        {"rollouts/pass_rate": "solved in some attempt", "rollouts/first_try": "solved at the first"},
        "Healthy: it rises with the dev accuracy, in between 0 and 100 %. At 0 or 100 % a gate or a group has nothing "
        "to compare.",
        "%",
    ),
    Curve(
        "Gradient norm",
        {"grad_norm": "before it is limited"},
        "Healthy: steady or falling. If it is always above optim.max_grad_norm, every step has the same length; single "
        "peaks are harmless.",
    ),
    Curve(
        "Clip and trust",
        {"clip_share": "share of the divergence that the clip takes", "trust/clipped": "sites where trust is capped"},
        "Healthy: small. A clip that takes most of the divergence silences the sites where the teacher knows more.",
        "%",
    ),
    Curve(
        "Learning rate",
        {"lr": "learning rate"},
        "As configured: warm-up, then the schedule of optim.schedule.",
    ),
    Curve(
        "Time",
        {"time/rollouts": "rollouts", "time/learning": "learning", "time/eval": "evaluation"},
        "Healthy: steady. Rollouts usually take most of it; a growth follows the lengths.",
        "seconds an update",
    ),
)
