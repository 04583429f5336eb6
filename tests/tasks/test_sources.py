"""What tasks share: the question asked or left out, the final answer alone, and the defaults of both."""

from typing import Any

import pytest

from dllm_sd.errors import InputError
from dllm_sd.tasks import TASKS, Choice, Countdown, Gsm8k, Jsonl, Math, Problem, Sudoku, Task, WordProblems
from dllm_sd.tasks.grids import large_grid
from dllm_sd.tasks.sources import Draws

LARGE = large_grid(Draws(1))
SMALL = {"puzzle": "0204341221034301", "solution": "1234341221434321"}
BOX = "Work towards the answer in short steps. Then"
CASES: dict[str, tuple[Task, dict[str, Any], tuple[str, ...], str, str]] = {
    # name: task, fields, what of them is asked, what of the form stays at the start and at the end
    "sudoku": (Sudoku(), SMALL, (SMALL["puzzle"],), "Here is a 4x4 Sudoku,", "inside <answer></answer>."),
    "sudoku 9x9": (
        Sudoku(size=9),
        {"puzzle": "0" + LARGE[1:], "solution": LARGE},
        ("0" + LARGE[1:],),
        "Here is a 9x9 Sudoku,",
        "inside <answer></answer>.",
    ),
    "countdown": (
        Countdown(),
        {"numbers": [44, 19, 35], "target": 98, "solution": "44 + 19 + 35"},
        ("44, 19, 35", "98"),
        "Numbers: \nTarget: \n\nFind an arithmetic",
        "inside \\boxed{}.",
    ),
    "word_problems": (
        WordProblems(),
        {"question": "What is 3 + 4?", "answer": "7", "solution": "It is 3 + 4 = 7."},
        ("What is 3 + 4?",),
        "Work it out step by step,",
        "in the last line.",
    ),
    "gsm8k": (
        Gsm8k(),
        {"question": "What is 3 + 4?", "answer": "7", "solution": "3 + 4 = 7"},
        ("What is 3 + 4?",),
        f"{BOX} give the final number",
        "inside \\boxed{}.",
    ),
    "math": (
        Math(),
        {"problem": "One half?", "answer": "\\frac{1}{2}", "solution": "It is \\boxed{\\frac{1}{2}}."},
        ("One half?",),
        f"{BOX} give the final answer, in LaTeX",
        "inside \\boxed{}.",
    ),
    "choice": (
        Choice(),
        {"question": "Which?\n\nA: red\nB: green", "letters": "AB", "answer": "B"},
        ("Which?\n\nA: red\nB: green",),
        f"{BOX} put the letter",
        "inside \\boxed{}.",
    ),
    "jsonl": (
        Jsonl(prompt="{topic}: {question}\n\nBe brief. ({hint})\n"),
        {"question": "Why?", "topic": "Life", "hint": "think", "answer": "x"},
        ("Life", "Why?", "think"),
        ":",
        "Be brief. ()",
    ),
}


def test_every_task_is_here() -> None:
    assert {name.split()[0] for name in CASES} == set(TASKS)
    assert all(isinstance(task, Task) for task, *_ in CASES.values())


@pytest.mark.parametrize("name", CASES)
def test_without_the_question_only_its_text_is_missing(name: str) -> None:
    task, fields, asked, start, end = CASES[name]
    problem = Problem("x", fields)
    (whole,) = task.messages(problem)
    (blank,) = task.messages(problem, question=False)
    assert task.messages(problem, question=True) == [whole]
    assert whole["role"] == blank["role"] == "user"
    left = whole["content"]
    for text in asked:
        assert left.count(text) == 1
        assert text not in blank["content"]
        left = left.replace(text, "")
    assert blank["content"] == left.strip()
    assert blank["content"].startswith(start)
    assert blank["content"].endswith(end)


@pytest.mark.parametrize("kind", TASKS.values())
def test_the_system_text_stays_as_it_is(kind: type) -> None:
    fields = {"question": "Why?", "problem": "Why?", "puzzle": "Why?", "numbers": [], "target": "Why?"}
    name = {Sudoku: "puzzle", Countdown: "target", Math: "problem"}.get(kind, "question")
    more = "{numbers}" if kind is Countdown else ""
    task = kind(system=" s ", prompt=f" {{{name}}} in  one\n{more}")
    assert task.messages(Problem("x", fields)) == [
        {"role": "system", "content": " s "},
        {"role": "user", "content": " Why? in  one\n"},
    ]
    assert task.messages(Problem("x", fields), question=False) == [
        {"role": "system", "content": " s "},
        {"role": "user", "content": "in  one"},
    ]
    assert kind(prompt=f"{{{name}}}{more}\n").messages(Problem("x", fields), False) == [{"role": "user", "content": ""}]


def test_a_field_that_is_not_there_is_refused_with_and_without_the_question() -> None:
    for question in (True, False):
        with pytest.raises(InputError, match=r"task\.prompt asks for \{question\}; .* there are: \{text\}\.$"):
            Jsonl().messages(Problem("x", {"text": "a"}), question)


@pytest.mark.parametrize(
    ("name", "reference", "final"),
    [
        ("sudoku", f"<answer>{SMALL['solution']}</answer>", SMALL["solution"]),
        ("sudoku 9x9", f"<answer>{LARGE}</answer>", LARGE),
        ("countdown", "\\boxed{44 + 19 + 35}", "44 + 19 + 35"),
        ("word_problems", "It is 3 + 4 = 7.\n#### 7", "7"),
        ("gsm8k", "3 + 4 = 7\n\\boxed{7}", "7"),
        ("math", "It is \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("choice", "\\boxed{B}", "B"),
        ("jsonl", None, "x"),
    ],
)
def test_the_final_answer_is_right_and_stands_apart_from_the_reference(
    name: str, reference: str | None, final: str
) -> None:
    task, fields, *_ = CASES[name]
    problem = Problem("x", fields)
    assert task.reference(problem) == reference
    assert task.final_answer(problem) == final
    assert task.grade(problem, f"<answer>{final}</answer>").correct
    assert task.final_answer(Problem("x", {"question": "Why?", "puzzle": SMALL["puzzle"], "text": "t"})) is None


@pytest.mark.parametrize(
    ("task", "fields", "final"),
    [
        (Countdown(), {"numbers": [1, 2], "target": 3, "solution": None}, None),
        (Gsm8k(), {"answer": -3}, "-3"),
        (Gsm8k(), {"answer": None}, None),
        (Math(), {"answer": 204}, "204"),
        (Choice(), {"answer": 1, "options": ["red", "green"]}, "B"),
        (Choice(), {"answer": "red", "options": ["red", "green"]}, "A"),
        (Jsonl(), {"answer": 0.5}, "0.5"),
        (Jsonl(), {"answer": ""}, ""),
        (Jsonl(answer_field="gold"), {"answer": "a", "gold": "b"}, "b"),
        (Jsonl(answer_field="gold"), {"answer": "a"}, None),
        (Jsonl(grader="choice"), {"question": "A: 1\nB: 2", "answer": 1}, "B"),
    ],
)
def test_the_final_answer_is_text_or_none(task: Task, fields: dict, final: str | None) -> None:
    assert task.final_answer(Problem("x", fields)) == final


def test_an_answer_that_is_none_of_the_options_is_refused() -> None:
    with pytest.raises(InputError, match="the answer 'C' is none of the options A, B"):
        Choice().final_answer(Problem("x", {"answer": "C", "options": ["red", "green"]}))
    with pytest.raises(InputError, match="the answer must be a string or a number"):
        Jsonl().final_answer(Problem("x", {"answer": [1]}))


@pytest.mark.parametrize(
    ("kind", "prompt", "left_out"),
    [
        (Gsm8k, "Solve it.", "question"),
        (Math, "", "problem"),
        (Countdown, "{numbers}", "target"),
        (Countdown, "{target}", "numbers"),
        (WordProblems, "Solve it.", "question"),
        (Sudoku, "{{puzzle}}", "puzzle"),
        (Choice, "{letters}", "question"),
    ],
)
def test_a_prompt_that_leaves_out_the_question_is_refused(kind: Any, prompt: str, left_out: str) -> None:
    with pytest.raises(
        InputError, match=rf"^task\.prompt does not use \{{{left_out}\}}, without which the problem is incomplete"
    ):
        kind(prompt=prompt)
