"""Letters are read where they are marked, out of the options that a row has."""

import json
from pathlib import Path

import pytest

from dllm_sd.errors import InputError
from dllm_sd.tasks import Choice, Jsonl, Problem, Task
from dllm_sd.tasks.choice import listed_letters, read_letter

LETTERED = {"prompt": "A. who?\n\nA: one\nB: two\nC: three\nD: four\nPlease reason step by step.", "answer": "C"}
LISTED = [
    {"question": "Which?", "options": ["red", "green", "blue"], "answer": answer} for answer in ("B", 1, "green", "(b)")
]


def jsonl_file(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_both_forms_of_rows_are_read(tmp_path: Path) -> None:
    task = Choice(data_test=jsonl_file(tmp_path / "a.jsonl", [LETTERED, *LISTED]))
    assert isinstance(task, Task)
    first, *rest = task.problems("test")
    assert first.fields == {"question": LETTERED["prompt"], "letters": "ABCD", "answer": "C"}
    for problem in rest:
        assert problem.fields == {
            "question": "Which?\n\nA: red\nB: green\nC: blue",
            "letters": "ABC",
            "answer": "B",
        }
        assert task.grade(problem, task.reference(problem) or "").correct
    assert task.messages(first)[0]["content"].startswith(LETTERED["prompt"])
    assert task.chance([first, *rest]) == pytest.approx((1 / 4 + 4 / 3) / 5)
    assert task.chance([]) is None


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("Q\nA: 1\nB: 2", "AB"),
        ("Q\nA. 1\nB. 2\nC. 3", "ABC"),
        ("Q\n(A) 1\n(B) 2", "AB"),
        ("Q (A) 1 (B) 2 (C) 3", "ABC"),
        ("A: see\n\nA: 1\n\nB: 2\n\nC: 3\n\nD: 4", "ABCD"),
        ("A: 1\nC: 2", ""),
        ("A: 1", ""),
        ("", ""),
    ],
)
def test_the_letters_of_a_text_are_found(text: str, letters: str) -> None:
    assert listed_letters(text) == letters


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("\\boxed{B}", "B"),
        ("\\boxed{A} no, \\boxed{\\text{B}}", "B"),
        ("\\boxed{\\textbf{(B)}}", "B"),
        ("\\boxed{b}", "B"),
        ("\\boxed{B: two}", "B"),
        ("\\boxed{B. two}", "B"),
        ("\\boxed{Option B}", "B"),
        ("\\boxed{two}", "B"),
        ("\\boxed{A or B}", None),
        ("\\boxed{A mass}", None),
        ("\\boxed{Z} The answer is B.", None),
        ("\\boxed{} <answer> B </answer>", "B"),
        ("<answer>B: two</answer>", "B"),
        ("<answer>none</answer> B", None),
        ("The answer is A. No: the answer is (B).", "B"),
        ("Answer: B", "B"),
        ("**Answer: B**", "B"),
        ("The answer is $B$", "B"),
        ("the correct option is B", "B"),
        ("The answer is Because", None),
        ("B", "B"),
        ("(B)", "B"),
        ("first\nB.", "B"),
        ("B is nice", None),
        ("\\boxed{\u0392}", None),
        ("", None),
    ],
)
def test_the_letter_is_found(text: str, letter: str | None) -> None:
    assert read_letter(text, "ABC", ["one", "two", "three"]) == letter


def test_verdicts_by_fields_alone() -> None:
    assert Choice().grade(Problem("x", {"answer": "B"}), "\\boxed{B}").correct
    assert not Choice().grade(Problem("x", {"answer": "B"}), "\\boxed{A}").correct
    assert Choice().grade(Problem("x", {"answer": 0, "options": ["p", "q"]}), "<answer>p</answer>").correct


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "no options", "answer": "A"}, r"line 1 lists no options such as A: and B:"),
        ({"prompt": "A: 1\nB: 2", "answer": "AB"}, r"line 1: the answer 'AB' is none of the options A, B"),
        ({"question": "q", "options": ["a"], "answer": "A"}, r"line 1: options must be a list of 2 to 26 texts"),
        ({"question": "q", "options": ["a", "b"], "answer": 2}, r"line 1: the answer 2 is none of the options A, B"),
        ({"question": "q", "options": ["a", "b"]}, r"line 1 has no field 'answer'"),
        ({"answer": "A"}, r"line 1 has no field 'question'"),
    ],
)
def test_malformed_lines_are_refused(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Choice(data=jsonl_file(tmp_path / "a.jsonl", [row])).problems("dev")


def test_jsonl_grades_letters_and_latex_too(tmp_path: Path) -> None:
    rows = [{"question": "A: 1\nB: 2", "answer": "B"}]
    task = Jsonl(data_test=jsonl_file(tmp_path / "a.jsonl", rows), grader="choice")
    assert task.grade(task.problems("test")[0], "The answer is B").correct
    assert Jsonl(grader="math").grade(Problem("x", {"answer": "\\frac12"}), "\\boxed{0.5}").correct
    with pytest.raises(InputError, match="none of the options A, B"):
        Jsonl(data=jsonl_file(tmp_path / "b.jsonl", [{**rows[0], "answer": "C?"}]), grader="choice").problems("dev")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["x", "x", "y"], "the option 'x' occurs twice"),
        (["x ", "x"], "the option 'x' occurs twice"),
        ([1, "1"], "the option '1' occurs twice"),
        (["x", ""], "an option is empty"),
        (["x", " "], "an option is empty"),
        (["x", None], "an option must be text or a number"),
    ],
)
def test_options_between_which_nobody_can_choose_are_refused(tmp_path: Path, options: list, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "Which?", "options": options, "answer": "A"}) + "\n")
    with pytest.raises(InputError, match=r"line 1: ") as caught:
        Choice(data=str(path)).problems("dev")
    assert words in str(caught.value)
