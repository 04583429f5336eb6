"""The grader of Countdown with hints, whose problems are read from files; `task.grader` names `score`."""

from collections.abc import Mapping
from typing import Any

from dllm_sd.tasks.countdown import Countdown
from dllm_sd.tasks.task import Problem

TASK = Countdown()


def score(problem: Mapping[str, Any], completion: str) -> float:
    """The score that the task countdown gives."""
    return TASK.grade(Problem("", problem), completion).score
