"""The grader of the laboratory's Countdown with hints, which is read from files: `task.grader` names `score`."""

from collections.abc import Mapping
from typing import Any

from dllm_sd.tasks.grading import evaluate_expression


def score(problem: Mapping[str, Any], completion: str) -> float:
    """1 for an expression that reaches the target with every number once, else 0."""
    evaluated = evaluate_expression(completion.strip())
    if evaluated is None:
        return 0.0
    value, used = evaluated
    return float(value == problem["target"] and sorted(used) == sorted(problem["numbers"]))
