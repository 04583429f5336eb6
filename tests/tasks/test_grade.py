"""One call grades for every task, and no text can make it fail or linger."""

import time

import pytest

from dllm_sd.errors import InputError
from dllm_sd.tasks import TASKS, Countdown, Problem, Task, grade

FIELDS = {
    "puzzle": "0204341221034301",
    "solution": "1234341221434321",
    "numbers": [44, 19, 35],
    "target": 98,
    "answer": "98",
    "generation": "a field that no grader needs",
}
CHOICE = {"question": "Which?\nA: this\nB: that", "answer": "B"}
RIGHT = {
    "sudoku": "<answer>1234341221434321</answer>",
    "countdown": r"\boxed{44 + 19 + 35}",
    "word_problems": "It is 98.\n#### 98",
    "gsm8k": r"\boxed{98}",
    "math": r"\boxed{98}",
    "choice": r"\boxed{B}",
    "jsonl": "<answer>98</answer>",
}
HOSTILE = [
    "",
    "\x00\ud800",
    "(" * 100_000,
    r"\boxed{" * 100_000,
    r"\boxed{" + "(" * 90_000 + "}",
    "<answer>" * 100_000,
    "<answer>" + "1" * 99_000 + "</answer>",
    "<answer>" + "1 " * 45_000 + "</answer>",
    "7" * 1_000_000,
    "x" * 5_000_000,
    "\n" * 1_000_000,
    "\u0661" * 100_000,
    r"\boxed{9**9**9}",
    r"\boxed{1/0}",
    r"\boxed{__import__('os').abort()}",
    "<answer>{0.__class__}</answer>",
]


def fields_of(name: str) -> dict:
    return CHOICE if name == "choice" else FIELDS


def test_every_named_task_is_a_task_with_defaults_alone():
    assert list(TASKS) == ["sudoku", "countdown", "word_problems", "gsm8k", "math", "choice", "jsonl"]
    assert all(isinstance(task(), Task) for task in TASKS.values())


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_graded_by_name_or_object_and_by_fields_or_problem(name: str):
    fields = fields_of(name)
    verdict = grade(name, fields, RIGHT[name])
    assert verdict.correct
    assert verdict.score == 1.0
    assert verdict == grade(TASKS[name](), Problem("x", fields), RIGHT[name])
    assert not grade(name, fields, "no idea").correct


@pytest.mark.parametrize("name", TASKS)
def test_hostile_text_is_wrong_quickly_and_without_exceptions(name: str):
    for text in HOSTILE:
        start = time.process_time()
        verdict = grade(name, fields_of(name), text)
        assert time.process_time() - start < 1
        assert not verdict.correct
        assert verdict.score == 0.0


def test_an_unknown_task_and_a_missing_field_are_refused():
    with pytest.raises(InputError, match=f"no task 'chess'; choose one of {', '.join(TASKS)}"):
        grade("chess", FIELDS, "e4")
    with pytest.raises(InputError, match="no field 'numbers'"):
        grade(Countdown(), {"target": 3}, "1 + 2")
