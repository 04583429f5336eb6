"""Tasks: where problems come from, how their prompts are written, and how completions are graded."""

from collections.abc import Mapping
from typing import Any

from dllm_sd.errors import InputError
from dllm_sd.tasks.choice import Choice
from dllm_sd.tasks.countdown import Countdown
from dllm_sd.tasks.gsm8k import Gsm8k
from dllm_sd.tasks.jsonl import Jsonl
from dllm_sd.tasks.math import Math
from dllm_sd.tasks.sudoku import Sudoku
from dllm_sd.tasks.task import Grade, Mode, Problem, Split, Task
from dllm_sd.tasks.word_problems import WordProblems

__all__ = [
    "TASKS",
    "Choice",
    "Countdown",
    "Grade",
    "Gsm8k",
    "Jsonl",
    "Math",
    "Mode",
    "Problem",
    "Split",
    "Sudoku",
    "Task",
    "WordProblems",
    "grade",
]

TASKS: dict[str, type[Task]] = {
    "sudoku": Sudoku,
    "countdown": Countdown,
    "word_problems": WordProblems,
    "gsm8k": Gsm8k,
    "math": Math,
    "choice": Choice,
    "jsonl": Jsonl,
}


def grade(task: Task | str, problem: Problem | Mapping[str, Any], text: str) -> Grade:
    """Grade a completion. ``task`` may be a name in ``TASKS``, and ``problem`` may be a mapping of fields.

    >>> grade("countdown", {"numbers": [3, 4], "target": 7}, r"\\boxed{3 + 4}").correct
    True
    """
    if isinstance(task, str):
        if task not in TASKS:
            raise InputError(f"There is no task {task!r}; choose one of {', '.join(TASKS)}.")
        task = TASKS[task]()
    if not isinstance(problem, Problem):
        problem = Problem("given", problem)
    return task.grade(problem, text)
