"""Several hundred answers in the words of models, each with the verdict that it deserves, by kind."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.tasks import Choice, Countdown, Gsm8k, Jsonl, Math, Problem, Sudoku, Task, WordProblems

CORPUS = Path(__file__).parent / "corpus"
TASKS: dict[str, list[Task]] = {
    "numbers": [Gsm8k(), WordProblems(), Jsonl(grader="number")],
    "mathematics": [Math(), Jsonl(grader="math")],
    "choices": [Choice(), Jsonl(grader="choice")],
    "countdown": [Countdown()],
    "sudoku": [Sudoku()],
}
"""Tasks that share a grader, by the file of answers to it."""


def lines(kind: str) -> Iterator[dict[str, Any]]:
    """The answers of a kind: ``fields`` of the problem, ``completion``, whether it is ``right``, and ``why``."""
    for line in (CORPUS / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


@pytest.mark.parametrize("kind", TASKS)
def test_every_verdict_is_right(kind: str) -> None:
    wrong = [
        (line["fields"], line["completion"], grade.parsed, f"{line['why']}: graded {grade.correct}")
        for line in lines(kind)
        for task in TASKS[kind]
        if (grade := task.grade(Problem("x", line["fields"]), line["completion"])).correct is not line["right"]
    ]
    assert not wrong


def test_the_corpus_is_large_and_balanced() -> None:
    verdicts = [line["right"] for kind in TASKS for line in lines(kind)]
    assert len(verdicts) >= 300
    assert 0.35 < sum(verdicts) / len(verdicts) < 0.65
