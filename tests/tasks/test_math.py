"""LaTeX answers are equal when their parts are; the published rules decide in compatible mode."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dllm_sd.errors import InputError
from dllm_sd.tasks import Math, Problem, Task
from dllm_sd.tasks.answers import same_answer as same
from dllm_sd.tasks.equality import _algebra, marked_answer, normalised, same_published

# Rows in the form of MATH, AIME and HMMT files.
ROWS = [
    {"problem": "One half?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "answer": "\\frac{1}{2}"},
    {"problem": "Which set?", "solution": "So \\boxed{\\{1, 2\\}}."},
    {"problem": "How many?", "answer": 204, "id": "0"},
    {"problem": "How much?", "answer": "1/91", "solution": "no box"},
]


def jsonl_file(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_math_is_a_task() -> None:
    assert isinstance(Math(), Task)
    assert Math().chance([]) is None
    assert Math().summary([]) == {}


def test_rows_of_every_form_are_read_and_their_references_are_correct(tmp_path: Path) -> None:
    task = Math(data_test=jsonl_file(tmp_path / "a.jsonl", ROWS))
    problems = task.problems("test")
    assert [problem.fields["answer"] for problem in problems] == ["\\frac{1}{2}", "\\{1, 2\\}", "204", "1/91"]
    assert [task.reference(problem) is None for problem in problems] == [False, False, True, False]
    for mode in ("default", "compatible"):
        for problem in problems:
            reference = task.reference(problem) or f"\\boxed{{{problem.fields['answer']}}}"
            assert Math(mode=mode).grade(problem, reference).correct
    assert "\\boxed{}" in task.messages(problems[0])[0]["content"]


def test_the_dev_split_is_held_out(tmp_path: Path) -> None:
    rows = [{"problem": str(number), "answer": number} for number in range(10)]
    task = Math(data=jsonl_file(tmp_path / "a.jsonl", rows), size_dev=3)
    assert (len(task.problems("train")), len(task.problems("dev"))) == (7, 3)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\\frac12", "\\frac{1}{2}"),
        ("0.5", "\\dfrac{1}{2}"),
        ("3/4", "\\tfrac{3}{4}"),
        ("x=4", "4"),
        ("\\sqrt3", "\\sqrt{3}"),
        ("10\\%", "10"),
        ("90^\\circ", "90"),
        ("5\\text{ cm}", "5"),
        (".5", "0.5"),
        ("\\left( 1, 2 \\right)", "(1,2)"),
        ("a/b", "a/b"),
        ("\\$36", "36"),
        ("11,\\! 111", "11,111"),
    ],
)
def test_the_published_rules_hold_in_both_modes(one: str, other: str) -> None:
    assert same_published(one, other)
    assert same(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("5 \\text{cm}", "5"),
        ("\\text{east}", "east"),
        ("$\\frac{3}{24}$", "\\frac{1}{8}"),
        ("36.00", "36"),
        ("1,000", "1000"),
        ("-\\frac{1}{2}", "-0.5"),
        ("x \\in [-2,7]", "[-2, 7]"),
        ("\\(12\\)", "12."),
        ("x \\leq 3", "x\\le3"),
        ("15\\mbox{ cm}^2", "15"),
    ],
)
def test_the_default_mode_mends_them(one: str, other: str) -> None:
    assert same(one, other)
    assert same(other, one)
    assert not same_published(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("1", "2"), ("12", "1,2"), ("1/0", "2/0"), ("(1,2)", "(2,1)"), ("x", "y"), ("1,20", "120"), ("-1", "1")],
)
def test_what_differs_differs(one: str, other: str) -> None:
    assert same(one, other) == same_published(one, other) == (one == other)


def test_rules_that_give_up_leave_the_raw_text() -> None:
    for text in ("\\sqrt", "\\frac", "a/b", "5\\text{ m}\\text{ s}"):
        assert normalised(text) is None
        assert same_published(text, text)
    assert normalised("") == ""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so \\boxed{4} no \\boxed{5}", "5"),
        ("\\boxed{} <answer>4</answer>", "4"),
        ("<answer> $4$ </answer>", "$4$"),
        ("\\boxed 7$ x", "7"),
        ("4", "4"),
        ("\\boxed{4", None),
        ("a long sentence that ends without any mark at all: 4", None),
        ("", None),
    ],
)
def test_the_marked_answer_is_found(text: str, found: str | None) -> None:
    assert marked_answer(text) == found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "loose"}, r"task\.mode is 'loose'; choose default or compatible"),
        ({"equality": "loose"}, r"task\.equality is 'loose'; choose text or symbolic"),
        ({"size_dev": -1}, r"task\.size_dev is -1; give"),
        ({"prompt": "{question}"}, r"task\.prompt asks for \{question\}"),
    ],
)
def test_wrong_fields_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Math(**fields)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "a"}, r"line 1 has neither an answer nor a solution with a \\boxed"),
        ({"problem": "a", "solution": "\\boxed{}"}, r"line 1 has neither"),
        ({"answer": "1"}, r"line 1 has no field 'problem'"),
        ({"problem": "a", "answer": [1]}, r"line 1: the answer must be text or a number"),
    ],
)
def test_malformed_lines_are_refused(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Math(data=jsonl_file(tmp_path / "a.jsonl", [row])).problems("dev")


def test_without_a_gold_answer_nothing_is_correct() -> None:
    for mode in ("default", "compatible"):
        assert not Math(mode=mode).grade(Problem("x", {"answer": None}), "\\boxed{None}").correct


def test_symbolic_equality_without_math_verify_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _algebra.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(InputError, match=r"^task\.equality symbolic needs math-verify, .*'dllm-sd\[math\]'"):
        Math(equality="symbolic")
    _algebra.cache_clear()


def test_symbolic_equality_comes_after_text_and_stays_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def parse(text: str, **bounds: object) -> str:
        assert bounds["parsing_timeout"] is None  # the bounds are of processor time
        asked.append(text)
        if "broken" in text.replace(" ", ""):
            raise ValueError
        return "".join(sorted(text))

    _algebra.cache_clear()
    stub = SimpleNamespace(parse=parse, verify=lambda one, other, **bounds: one == other and bool(bounds))
    monkeypatch.setitem(sys.modules, "math_verify", stub)
    assert _algebra() is stub
    asked.clear()
    task = Math(equality="symbolic")
    assert task.grade(Problem("x", {"answer": "2"}), "\\boxed{2.0}").correct
    assert not asked
    assert task.grade(Problem("x", {"answer": "a+b"}), "\\boxed{b+a}").correct
    assert asked == ["$a + b$", "$b + a$"]
    assert not task.grade(Problem("x", {"answer": "a"}), "\\boxed{broken}").correct
    for wild in ("9^{9^9}", "9^{999}", "9!!", "(9!)!", "1" * 13, "x" * 400, "9**9**9", "2^{10}^{10}", "1" * 5 + "!"):
        count = len(asked)
        assert not task.grade(Problem("x", {"answer": "7"}), f"\\boxed{{{wild}}}").correct
        assert len(asked) == count, wild
    _algebra.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")
def test_math_verify_finds_what_text_does_not() -> None:
    _algebra.cache_clear()
    task, start = Math(equality="symbolic"), time.process_time()
    for gold, found in (("\\sqrt{8}", "2\\sqrt{2}"), ("1+\\sqrt{2}", "\\sqrt{2}+1"), ("(x+1)^2", "x^2+2x+1")):
        assert not Math().grade(Problem("x", {"answer": gold}), f"\\boxed{{{found}}}").correct
        assert task.grade(Problem("x", {"answer": gold}), f"\\boxed{{{found}}}").correct
        assert not task.grade(Problem("x", {"answer": gold}), "\\boxed{3}").correct
    assert time.process_time() - start < 20
