"""Generated word problems are solved by their solutions, belong to one split, and keep to their alphabet."""

import json
from fractions import Fraction
from pathlib import Path
from string import ascii_letters
from typing import Any, Literal

import pytest

from dllm_sd.errors import InputError
from dllm_sd.tasks import Problem, Split, Task, WordProblems
from dllm_sd.tasks.grading import evaluate_expression
from dllm_sd.tasks.stories import NAMES, STORIES
from dllm_sd.tasks.task import LocatesMistakes

SPLITS: tuple[Split, ...] = ("train", "dev", "test")
LEVELS = (1, 2, 3)
GIVEN = Problem(
    "x",
    {
        "question": "Ada has 3 boxes with 4 pens in each. Ada finds 5 more. How many?",
        "answer": "17",
        "solution": "The boxes hold 3 * 4 = 12 pens.\nThat makes 12 + 5 = 17 pens.",
        "equations": "3 * 4 = 12\n12 + 5 = 17",
    },
)


def many(steps: Any, split: Split = "train", count: int = 150, **fields: Any) -> list[Problem]:
    return list(WordProblems(steps=steps, **fields).problems(split)[:count])


def test_word_problems_are_a_task_that_locates_mistakes() -> None:
    assert isinstance(WordProblems(), Task)
    assert isinstance(WordProblems(), LocatesMistakes)


@pytest.mark.parametrize("steps", LEVELS)
def test_every_solution_is_right_and_uses_the_numbers_of_its_question(steps: int) -> None:
    for problem in many(steps):
        equations = problem.fields["equations"].splitlines()
        told = [int(word) for word in "".join(c if c.isdigit() else " " for c in problem.fields["question"]).split()]
        assert len(equations) == len(problem.fields["solution"].splitlines()) == steps
        value = None
        for equation, line in zip(equations, problem.fields["solution"].splitlines(), strict=True):
            assert equation in line
            left, right = equation.split(" = ")
            evaluated = evaluate_expression(left)
            assert evaluated is not None
            assert evaluated[0] == Fraction(right)
            operands = [int(number) for number in left.split()[::2]]
            assert operands[0] == value if value is not None else operands[0] == told[0]
            assert all(2 <= number <= 144 for number in (*operands, int(right)))
            value = int(right)
        assert sorted(told) == sorted([told[0], *(int(equation.split()[2]) for equation in equations)])
        assert problem.fields["answer"] == str(value)


@pytest.mark.parametrize("steps", LEVELS)
def test_references_are_graded_right_and_other_numbers_wrong(steps: Literal[1, 2, 3]) -> None:
    worked, bare = WordProblems(steps=steps), WordProblems(steps=steps, answer="#### {answer}")
    for problem in worked.problems("dev")[:30]:
        gold = int(problem.fields["answer"])
        reference = worked.reference(problem) or ""
        assert reference == f"{problem.fields['solution']}\n#### {gold}"
        assert bare.reference(problem) == f"#### {gold}"
        assert worked.grade(problem, reference).correct
        assert worked.grade(problem, bare.reference(problem) or "").correct
        assert worked.grade(problem, f"So it is {gold}.").parsed == str(gold)
        assert not worked.grade(problem, reference.replace(f"#### {gold}", f"#### {gold + 1}")).correct
        assert worked.first_mistake(problem, reference) is None


def test_equations_are_another_style_of_reference() -> None:
    assert WordProblems(answer="{equations}\n#### {answer}").reference(GIVEN) == "3 * 4 = 12\n12 + 5 = 17\n#### 17"


def test_no_story_with_its_calculations_is_in_two_splits_even_under_different_seeds() -> None:
    def told(problem: Problem) -> tuple[str, str]:
        words = set(problem.fields["question"].replace(".", "").replace("?", "").split())
        (title,) = (story.title for story in STORIES if words & set(story.things))
        return title, problem.fields["equations"]

    found = [{told(problem) for problem in many(1, split, seed=seed)} for seed, split in enumerate(SPLITS)]
    assert all(len(shapes) > 20 for shapes in found)
    assert sum(map(len, found)) == len(set.union(*found))


def test_problems_are_functions_of_seed_split_and_index() -> None:
    first = WordProblems(seed=1).problems("train")
    assert len(first) == 1_000_000
    assert first[17] == WordProblems(seed=1).problems("train")[17]
    assert first[17].id == "word_problems/train/17"
    assert first[17].fields != WordProblems(seed=2).problems("train")[17].fields
    assert first[17].fields != WordProblems(seed=1).problems("dev")[17].fields


@pytest.mark.parametrize("steps", LEVELS)
def test_every_story_and_operator_occurs(steps: int) -> None:
    problems = many(steps, count=300)
    text = " ".join(problem.fields["equations"] for problem in problems)
    assert all(f" {operator} " in text for operator in "+-*/")
    for story in STORIES:
        assert any(thing in problem.fields["question"] for problem in problems for thing in story.things)
    assert len({problem.fields["question"] for problem in problems}) > 250


@pytest.mark.parametrize("steps", LEVELS)
def test_all_texts_are_written_in_the_alphabet(steps: Literal[1, 2, 3]) -> None:
    task = WordProblems(steps=steps)
    for problem in task.problems("test")[:150]:
        text = task.messages(problem)[0]["content"] + (task.reference(problem) or "") + problem.fields["equations"]
        assert set(text) <= set(WordProblems.ALPHABET)
        assert "{" not in text
    assert set(ascii_letters) < set(WordProblems.ALPHABET)
    assert len(set(NAMES)) == len(NAMES)


def test_no_thing_belongs_to_two_stories() -> None:
    things = [thing for story in STORIES for thing in story.things]
    assert len(set(things)) == len(things)


def test_larger_numbers_stay_within_their_range() -> None:
    for problem in many(2, number_min=10, number_max=60):
        told = [int(word) for word in "".join(c if c.isdigit() else " " for c in problem.fields["question"]).split()]
        assert all(10 <= number <= 60 for number in told)


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("3 * 4 = 12, 12 + 5 = 17\n#### 17", None),
        ("3 * 4 = 13, 13 + 5 = 18\n#### 18", "3 * 4 = 13"),
        ("3 + 4 = 7 pens\n7 + 5 = 12\n#### 12", "3 + 4 = 7"),
        ("3*4=12\n12-5=7\n#### 7", "12-5=7"),
        ("7 / 0 = 3\n#### 3", "7 / 0 = 3"),
        ("It is 99.", None),
        ("3 * 4 = 12\n#### 12", None),
    ],
)
def test_the_first_mistake_is_a_false_equation_or_a_value_that_the_solution_does_not_have(
    text: str, mistake: str | None
) -> None:
    span = WordProblems().first_mistake(GIVEN, text)
    assert (None if span is None else text[slice(*span)]) == mistake


def test_problems_come_from_files_too(tmp_path: Path) -> None:
    lines = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(4)]
    lines[0]["solution"] = "0 + 1 = 1"
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    task = WordProblems(data=str(file), size_dev=1)
    train, dev = task.problems("train"), task.problems("dev")
    assert [problem.fields["answer"] for problem in [*train, *dev]] == ["1", "2", "3", "4"]
    assert [task.reference(problem) for problem in train] == ["0 + 1 = 1\n#### 1", None, None]
    file.write_text('{"question": "Why?", "answer": "because"}')
    with pytest.raises(InputError, match=r"own\.jsonl, line 1: the answer 'because' is not a number"):
        WordProblems(data=str(file), size_dev=0).problems("train")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 4}, r"task\.steps is 4; choose 1, 2 or 3"),
        ({"number_min": 1}, r"task\.number_min is 1; give"),
        ({"number_min": 50}, r"task\.number_min \(50\) is above task\.number_max \(12\)"),
        ({"prompt": "Solve it."}, r"task\.prompt does not use \{question\}"),
        ({"answer": "{steps}"}, r"task\.answer asks for \{steps\}"),
        ({"size_dev": -1}, r"task\.size_dev is -1; give"),
    ],
)
def test_wrong_settings_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        WordProblems(**fields)


def test_a_range_without_problems_of_a_split_is_refused() -> None:
    task = WordProblems(steps=1, number_min=7, number_max=7)
    with pytest.raises(InputError, match=r"No word problem was found .* widen task\.number_min\.\.task\.number_max"):
        [task.problems(split)[0] for split in SPLITS]
