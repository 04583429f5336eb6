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
        "Healthy: it rises and then stays. Self-distillation often peaks and falls again; the best weights are kept.",
        "%",
        marks=True,
    ),
    Curve(
        "Loss",
        {"loss": "loss", "divergence": "divergence before the clip"},
        "Healthy: it falls and levels off. It also keeps falling while the accuracy falls, so a low loss is no "
        "success.",
    ),
    Curve(
        "Entropy",
        {"student/entropy": "student", "teacher/entropy": "teacher"},
        "Healthy: the student's entropy falls slowly towards the teacher's, which is lower because the teacher sees "
        "more. A fast fall to 0 precedes a collapse; a rise means that the student forgets.",
        "nats",
    ),
    Curve(
        "Agreement of student and teacher",
        {"teacher/agreement": "same first choice"},
        "Healthy: it rises slowly and stays below 100 %. If it is near 100 % from the start, little can be learnt.",
        "%",
    ),
    Curve(
        "Advantage of the drawn token",
        {"teacher/advantage": "teacher minus student"},
        "Healthy: near 0, and closer to it over time. Far below 0 means that the student's tokens are unlikely under "
        "the teacher.",
        "nats",
    ),
    Curve(
        "Lengths",
        {"rollouts/length": "rollouts", "eval/length": "dev split"},
        "Healthy: they stay about the same. If they grow or shrink steadily, the form of the answers changes.",
        "tokens",
    ),
    Curve(
        "Pass rate of the rollouts",
        {"rollouts/pass_rate": "solved in some attempt", "rollouts/first_try": "solved at the first"},
        "Healthy: it rises with the dev accuracy and stays between 0 and 100 %. At 0 no rollout passes a gate for "
        "correct ones, and at 0 or 100 % group advantages are 0.",
        "%",
    ),
    Curve(
        "Gradient norm",
        {"grad_norm": "before it is clipped"},
        "Healthy: steady or falling. If it is always above optim.max_grad_norm, every gradient is clipped; single "
        "peaks are harmless.",
    ),
    Curve(
        "Clip and trust",
        {"clip_share": "share of the divergence that the clip removes", "trust/clipped": "sites where trust is capped"},
        "Healthy: small. A clip that removes most of the divergence removes the signal at the sites where the "
        "teacher knows more.",
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
        "Healthy: steady. Rollouts usually take most of the time, and more as lengths grow.",
        "seconds an update",
    ),
)
