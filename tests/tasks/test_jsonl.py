"""Any file of questions and answers can be a task."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dllm_sd.errors import InputError
from dllm_sd.tasks import Jsonl, Problem, Task

ROWS = [
    {"question": f"{n} + 1", "hint": f"count on from {n}", "answer": n + 1, "worked": f"it is {n + 1}"}
    for n in range(20)
]


def jsonl_file(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_jsonl_is_a_task():
    assert isinstance(Jsonl(), Task)


def test_rows_become_problems_with_all_their_fields(tmp_path: Path):
    task = Jsonl(
        data=jsonl_file(tmp_path / "a.jsonl", ROWS),
        data_test=jsonl_file(tmp_path / "b.jsonl", ROWS[:2]),
        prompt="{question}? ({hint})",
        system="s",
        reference_field="worked",
        size_dev=4,
    )
    assert [len(task.problems(split)) for split in ("train", "dev", "test")] == [14, 4, 2]
    problem = task.problems("test")[0]
    assert problem.id == "jsonl/test/0"
    assert task.messages(problem)[1]["content"] == "0 + 1? (count on from 0)"
    assert task.reference(problem) == "it is 1"
    assert Jsonl().reference(problem) is None


def test_a_csv_file_will_do(tmp_path: Path):
    (tmp_path / "a.csv").write_text("question,answer\nup,down\n")
    assert Jsonl(data=str(tmp_path / "a.csv")).problems("dev")[0].fields == {"question": "up", "answer": "down"}


@pytest.mark.parametrize(
    ("grader", "answer", "text", "correct"),
    [
        ("exact", "in  Paris", " in\nParis ", True),
        ("exact", "Paris", "I say <answer> Paris </answer>.", True),
        ("exact", "Paris", "I say Paris", False),
        ("exact", "Paris", "paris", False),
        ("exact", 5, "5", True),
        ("exact", "", "", True),
        ("number", "1,200", r"\boxed{1200}", True),
        ("number", 0.5, r"\boxed{\frac12}", True),
        ("number", 5, "about 5", True),
        ("number", 5, "about 6", False),
        ("number", 5, "9**9**9", False),
        ("expression", "2 + 3", r"\boxed{10/2}", True),
        ("expression", 5, "<answer>2+3</answer>", True),
        ("expression", 5, "2+4", False),
        ("expression", 5, "five", False),
        ("expression", 5, "5/0", False),
    ],
)
def test_verdicts(grader, answer: object, text: str, correct: bool):
    grade = Jsonl(grader=grader).grade(Problem("x", {"answer": answer}), text)
    assert (grade.correct, grade.score) == (correct, float(correct))


@pytest.mark.parametrize(
    ("fields", "row", "message"),
    [
        ({}, {"question": "a"}, r"line 1 has no field 'answer'"),
        ({}, {"question": "a", "answer": None}, r"line 1: the answer must be a string or a number"),
        ({}, {"answer": "a"}, r"^task\.prompt \(for .*line 1\) asks for \{question\}.*there are: \{answer\}"),
        ({"grader": "number"}, {"question": "a", "answer": "b"}, r"line 1: the answer 'b' is not a number"),
        ({"grader": "expression"}, {"question": "a", "answer": "b"}, r"line 1: answer 'b' is no arithmetic expression"),
        ({"reference_field": "r"}, {"question": "a", "answer": "b"}, r"line 1 has no field 'r'"),
    ],
)
def test_malformed_rows_are_refused(tmp_path: Path, fields: dict, row: dict, message: str):
    with pytest.raises(InputError, match=message):
        Jsonl(data=jsonl_file(tmp_path / "a.jsonl", [row]), **fields).problems("dev")


def test_wrong_fields_and_missing_splits_are_refused(tmp_path: Path):
    with pytest.raises(
        InputError, match=r"task\.grader is 'loose'; choose exact, number, expression, math, choice or rubric"
    ):
        Jsonl(grader="loose")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"task\.size_dev is -1; give"):
        Jsonl(size_dev=-1)
    with pytest.raises(InputError, match=r"set task\.data to a file"):
        Jsonl().problems("train")
    with pytest.raises(InputError, match=r"set task\.data_test to a file"):
        Jsonl(data=jsonl_file(tmp_path / "a.jsonl", ROWS)).problems("test")
    with pytest.raises(InputError, match=r"task\.data: none\.jsonl cannot be read"):
        Jsonl(data="none.jsonl").problems("train")


def test_a_name_with_an_owner_is_a_hub_dataset(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict]:
        asked.append((name, config, split))
        return ROWS[:10] if split == "train" else ROWS[10:]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    task = Jsonl(data="owner/name:easy", data_test="owner/name", size_dev=2)
    assert len(task.problems("train")) == 8
    assert len(task.problems("test")) == 10
    assert asked == [("owner/name", "easy", "train"), ("owner/name", None, "test")]
