"""Generated Countdown problems can be solved, belong to one split, and are graded by exact arithmetic."""

import json
from pathlib import Path

import pytest

from dllm_sd.errors import InputError
from dllm_sd.tasks import Countdown, Problem, Split, Task
from dllm_sd.tasks.countdown import blind_share
from dllm_sd.tasks.grading import evaluate_expression
from dllm_sd.tasks.published import python_value

SPLITS: tuple[Split, ...] = ("train", "dev", "test")
PROBLEM = Problem("x", {"numbers": [44, 19, 35], "target": 98, "solution": None})


def test_countdown_is_a_task():
    assert isinstance(Countdown(), Task)


@pytest.mark.parametrize("split", SPLITS)
def test_every_generated_problem_is_solved_by_its_solution(split: Split):
    task = Countdown()
    for problem in task.problems(split)[:50]:
        numbers, target, solution = (problem.fields[name] for name in ("numbers", "target", "solution"))
        value = evaluate_expression(solution)
        assert value is not None
        assert value[0] == target
        assert sorted(value[1]) == sorted(numbers)
        assert len(numbers) in (3, 4)
        assert all(1 <= number <= 99 for number in numbers)
        assert 10 <= target <= 100
        reference = task.reference(problem)
        assert reference == f"\\boxed{{{solution}}}"
        assert task.grade(problem, reference or "").correct


def test_no_problem_is_in_two_splits_even_under_different_seeds():
    few = [
        {
            (*sorted(problem.fields["numbers"]), problem.fields["target"])
            for problem in Countdown(numbers_min=2, numbers_max=2, number_max=20, seed=seed).problems(split)[:100]
        }
        for seed, split in enumerate(SPLITS)
    ]
    assert sum(map(len, few)) == len(set.union(*few))


def test_problems_are_functions_of_seed_split_and_index():
    first = Countdown(seed=1).problems("train")
    assert len(first) == 1_000_000
    assert first[17] == Countdown(seed=1).problems("train")[17]
    assert first[17].id == "countdown/train/17"
    assert first[17].fields != Countdown(seed=2).problems("train")[17].fields


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        (r"\boxed{44 + 19 + 35}", True),
        (r"\boxed{35+44+19}", True),
        (r"\boxed{(44 + 19) + 35 = 98}", True),
        (r"\boxed{44 - -19 + 35}", True),
        (r"First \boxed{44}. Then \boxed{44 + 19 + 35}", True),
        ("<answer>44 + 19 + 35</answer>", True),
        ("44 + 19 + 35", True),
        ("44 + 19 + 35 = 98", True),
        (r"\boxed{98}", False),
        (r"\boxed{44 + 19 + 35 + 0}", False),
        (r"\boxed{44 + 44 + 19 + 35 - 44}", False),
        (r"\boxed{44 + 19}", False),
        (r"\boxed{4 4 + 19 + 35}", False),
        (r"\boxed{4\,4 + 19 + 35}", False),
        (r"\boxed{44 + 19 * 35}", False),
        (r"\boxed{44 + 19 + 35", False),
        (r"<answer>44 + 19 + 35</answer> \boxed{1}", False),
        (r"\boxed{44.0 + 19 + 35}", False),
        ("\\boxed{\u0664\u0664 + 19 + 35}", False),
        (r"\boxed{9**9**9}", False),
        (r"\boxed{44/(19-19)+35}", False),
        ("the answer is 44 + 19 + 35", False),
        ("", False),
    ],
)
def test_verdicts(text: str, correct: bool):
    grade = Countdown().grade(PROBLEM, text)
    assert (grade.correct, grade.score) == (correct, float(correct))


@pytest.mark.parametrize(
    ("numbers", "target", "text", "correct"),
    [
        ([6, 4, 2], 12, r"\boxed{6 \times 4 \div 2}", True),
        ([6, 4, 2], 12, "\\boxed{6 \u00d7 4 \u00f7 2}", True),
        ([6, 4, 2], 48, r"\boxed{$6 \cdot \left(4 \cdot 2\right)$}", True),
        ([1, 3, 3], 1, r"\boxed{1 / 3 * 3}", True),
        ([9, 7, 3, 7], 30, r"\boxed{7 * (3 + 9/7)}", True),
    ],
)
def test_operators_are_mapped_and_fractions_are_exact(numbers: list[int], target: int, text: str, correct: bool):
    assert Countdown().grade(Problem("x", {"numbers": numbers, "target": target}), text).correct is correct


def test_fractions_are_not_rounded():
    problem = Problem("x", {"numbers": [1, 3, 1], "target": 1})
    assert not Countdown().grade(problem, r"\boxed{1/3*1}").correct


def test_what_was_read_is_reported():
    assert Countdown().grade(PROBLEM, r"\boxed{44 \times 2 = 88}").parsed == "44 * 2"
    assert Countdown().grade(PROBLEM, "words " * 100).parsed is None


@pytest.mark.parametrize(
    "fields",
    [
        {"numbers": "1,2", "target": 3},
        {"numbers": [], "target": 3},
        {"numbers": [1, True], "target": 3},
        {"numbers": [1, 2.0], "target": 3},
        {"numbers": [1, 2], "target": "3"},
        {"numbers": [1, 2]},
    ],
)
def test_a_malformed_problem_is_the_users_mistake(fields: dict):
    with pytest.raises(InputError, match=r"numbers|target"):
        Countdown().grade(Problem("x", fields), "1 + 2")


def test_the_prompt_lists_numbers_and_target():
    content = Countdown().messages(PROBLEM)[0]["content"]
    assert "44, 19, 35" in content
    assert "98" in content
    assert r"\boxed{}" in content
    assert Countdown().reference(PROBLEM) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"numbers_min": 1}, r"task\.numbers_min is 1; give"),
        ({"numbers_max": 7}, r"task\.numbers_max is 7; give"),
        ({"number_min": 100}, r"task\.number_min \(100\)"),
        ({"target_min": 0}, r"task\.target_min is 0; give"),
        ({"size_test": -1}, r"task\.size_test is -1; give"),
        ({"prompt": "{puzzle}"}, r"task\.prompt asks for \{puzzle\}"),
        ({"answer": "{solution.real}"}, r"task\.answer asks for"),
    ],
)
def test_wrong_fields_are_refused(fields: dict, message: str):
    with pytest.raises(InputError, match=message):
        Countdown(**fields)


def test_ranges_that_allow_no_problem_are_refused_after_a_bounded_search():
    task = Countdown(numbers_min=2, numbers_max=2, number_max=1, target_min=50)
    with pytest.raises(InputError, match=r"No Countdown problem was found in \d+ draws; widen task\.target_min"):
        task.problems("train")[0]


def jsonl_file(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_both_forms_of_data_lines_are_read_and_splits_ignore_the_order_of_numbers(tmp_path: Path):
    data = jsonl_file(
        tmp_path / "train.jsonl",
        [
            {"numbers": [1, 2, 3], "target": 6},
            {"numbers": [4, 5], "target": 9},
            {"input": "7, 8", "output": "15"},
            {"numbers": [3, 2, 1], "target": 6},
        ],
    )
    data_test = jsonl_file(tmp_path / "test.jsonl", [{"input": "5,4", "output": "9"}])
    task = Countdown(data=data, data_test=data_test, size_dev=1)
    assert [problem.fields["numbers"] for problem in task.problems("train")] == [[7, 8]]
    assert [problem.fields["numbers"] for problem in task.problems("dev")] == [[3, 2, 1]]
    assert task.problems("test")[0].fields == {"numbers": [5, 4], "target": 9, "solution": None}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"numbers": [1, 2]}, r"line 1 has no field 'target'"),
        ({"numbers": "1,2", "target": 3}, r"line 1: numbers must be a list of whole numbers"),
        ({"input": "1,x", "output": "3"}, r"line 1: numbers must be a list of whole numbers"),
        ({"input": "1,2", "output": "1+2=3"}, r"line 1: target must be a whole number"),
        ({"input": "1,\u0662", "output": "3"}, r"line 1: numbers must be a list of whole numbers"),
        ({"input": [1, 2], "output": "3"}, r"line 1: field 'input' must be a string"),
    ],
)
def test_malformed_lines_are_refused(tmp_path: Path, row: dict, message: str):
    with pytest.raises(InputError, match=message):
        Countdown(data=jsonl_file(tmp_path / "a.jsonl", [row])).problems("dev")


@pytest.mark.parametrize(
    ("numbers", "target", "text", "default", "compatible"),
    [
        ([44, 19, 35], 98, r"\boxed{44+19+35}", True, True),
        ([44, 19, 35], 98, "<answer>44+19+35</answer>", True, False),
        ([99, 19, 35], 175, r"\boxed{99//19*35}", False, True),
        ([2, 3, 2], 512, r"\boxed{2**3**2}", False, True),
        ([90, 50, 4], 5, r"\boxed{90**50**4}", False, False),
        ([90, 80, 5], 5, r"\boxed{90**80**5}", False, False),
        ([44, 19, 35], 98, r"\boxed{044+19+35}", True, False),
        ([4, 2, 2], 1, r"\boxed{4/(2-2)}", False, False),
        ([1, 3, 3], 1, r"\boxed{1/3*3.}", True, True),
        ([5, 2], 5, r"\boxed{5+0*-2**0}", False, False),
    ],
)
def test_modes_differ_where_the_published_reader_is_lax_or_strict(
    numbers: list[int], target: int, text: str, default: bool, compatible: bool
):
    problem = Problem("x", {"numbers": numbers, "target": target})
    assert Countdown().grade(problem, text).correct is default
    assert Countdown(mode="compatible").grade(problem, text).correct is compatible


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-2**2", -4),
        ("2**-1", 0.5),
        ("2**-3**2", 2**-9),
        ("7//2*2", 6),
        ("-7//2", -4),
        ("(1\n+2)", 3),
        ("1\n+2", None),
        ("1.5.2", None),
        ("01", None),
        ("00", 0),
        (".5+1.", 1.5),
        ("+-+-3", 3),
        ("(-8)**.5*0", 0),
        ("()", None),
        ("3(4)", None),
        ("1 2", None),
        ("2**99999", None),
        ("\u0663", None),
        ("(" * 201 + "1" + ")" * 201, None),
    ],
)
def test_arithmetic_has_the_values_of_python_within_limits(text: str, value: float | None):
    assert python_value(text) == value


def test_blind_expressions_give_the_chance_level():
    assert blind_share([1, 2], 3) == 1 / 4
    assert blind_share([5, 5], 0) == 1 / 4
    assert blind_share([1, 0], 0) == pytest.approx(3 / 8)  # 1 * 0 twice and 0 / 1 once, of 8
    two = Problem("x", {"numbers": [1, 2], "target": 3})
    six = Problem("y", {"numbers": [1, 2, 3, 4, 5, 6], "target": 3})
    task = Countdown()
    assert task.chance([two, six]) == 1 / 4
    assert task.chance([six]) is None
    graded = [(two, task.grade(two, text)) for text in (r"\boxed{1+2}", r"\boxed{1*2}")]
    assert task.summary(graded) == {"solved": 1 / 2, "random_fill": 1 / 4}
    assert task.summary([]) == {}
