"""GSM8K answers are graded exactly, with commas and signs, and the dev split stays apart."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dllm_sd.errors import InputError
from dllm_sd.tasks import Gsm8k, Problem, Task

ROWS = [
    {"question": f"What is {n} + 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(40)
]


def jsonl_file(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def task(tmp_path: Path) -> Gsm8k:
    return Gsm8k(
        data=jsonl_file(tmp_path / "train.jsonl", ROWS[:30]),
        data_test=jsonl_file(tmp_path / "test.jsonl", ROWS[28:]),
        size_dev=5,
    )


def test_gsm8k_is_a_task():
    assert isinstance(Gsm8k(), Task)


def test_splits_have_their_sizes_and_share_no_question(task: Gsm8k):
    questions = [{p.fields["question"] for p in task.problems(split)} for split in ("train", "dev", "test")]
    assert [len(split) for split in questions] == [23, 5, 12]
    assert len(set.union(*questions)) == 40


def test_the_dev_split_is_chosen_by_a_permutation_that_never_changes(task: Gsm8k):
    ids = [problem.id for problem in task.problems("dev")]
    assert ids == [
        problem.id for problem in Gsm8k(data=task.data, data_test=task.data_test, size_dev=5).problems("dev")
    ]
    assert ids != [f"gsm8k/dev/{n}" for n in range(23, 28)]
    every = [problem.id for split in ("train", "dev", "test") for problem in task.problems(split)]
    assert len(set(every)) == len(every)


def test_steps_lose_their_marks_and_the_reference_is_correct(task: Gsm8k):
    problem = task.problems("train")[0]
    assert "<<" not in problem.fields["solution"]
    assert "####" not in problem.fields["solution"]
    for problem in task.problems("train"):
        reference = task.reference(problem)
        assert reference is not None
        assert reference.endswith(f"\\boxed{{{problem.fields['answer']}}}")
        assert task.grade(problem, reference).correct


def test_gold_answers_with_commas_and_signs_are_reachable(tmp_path: Path):
    rows = [{"question": "a", "answer": "so\n#### 1,575,000"}, {"question": "b", "answer": "so\n#### -3"}]
    task = Gsm8k(data=jsonl_file(tmp_path / "a.jsonl", rows), size_dev=0)
    many, negative = task.problems("train")
    assert many.fields == {"question": "a", "answer": "1575000", "solution": "so"}
    assert task.grade(many, r"\boxed{1,575,000}").correct
    assert task.grade(many, "It is $1575000.00.").correct
    assert task.grade(negative, r"\boxed{-3}").correct
    assert not task.grade(negative, r"\boxed{3}").correct
    for problem, row in zip((many, negative), rows, strict=True):
        assert task.grade(problem, row["answer"]).correct


@pytest.mark.parametrize(
    ("text", "correct", "parsed"),
    [
        (r"\boxed{72}", True, "72"),
        (r"\boxed{\$72.00}", True, "72"),
        (r"\boxed{72\text{ clips}}", True, "72"),
        (r"\boxed{\frac{144}{2}}", True, "72"),
        (r"\boxed{71} no, \boxed{72}", True, "72"),
        (r"\boxed{72} and \boxed{7", True, "72"),
        ("<answer>She sold 72.</answer> 5", True, "72"),
        ("so\n#### 72", True, "72"),
        ("48 + 24 is 72", True, "72"),
        (r"\boxed{72 or 73}", False, None),
        (r"\boxed{7} 72", False, "7"),
        (r"\boxed{1/0} 72", False, None),
        (r"\boxed{72.5}", False, "145/2"),
        ("\\boxed{\u0667\u0662}", False, None),
        ("9" * 10_000, False, None),
        (r"\boxed{9**9**9}", False, "9"),
        ("", False, None),
    ],
)
def test_verdicts(text: str, correct: bool, parsed: str | None):
    grade = Gsm8k().grade(Problem("x", {"answer": "72"}), text)
    assert (grade.correct, grade.score, grade.parsed) == (correct, float(correct), parsed)


def test_the_prompt_asks_for_a_box():
    messages = Gsm8k(system="s").messages(Problem("x", {"question": "How {many}?"}))
    assert messages[0] == {"role": "system", "content": "s"}
    assert messages[1]["content"].startswith("How {many}?")
    assert r"\boxed{}" in messages[1]["content"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size_dev": -1}, r"task\.size_dev is -1; give"),
        ({"prompt": "{text}"}, r"task\.prompt asks for \{text\}"),
        ({"answer": r"\boxed{answer}}"}, r"task\.answer is not a template"),
    ],
)
def test_wrong_fields_are_refused(fields: dict, message: str):
    with pytest.raises(InputError, match=message):
        Gsm8k(**fields)


def test_missing_files_and_splits_are_refused(tmp_path: Path):
    data = jsonl_file(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(InputError, match=r"set task\.data_test to a file"):
        Gsm8k(data=data).problems("test")
    with pytest.raises(InputError, match=r"more rows than task\.size_dev"):
        Gsm8k(data=data, size_dev=len(ROWS)).problems("train")
    with pytest.raises(InputError, match=r"task\.size_dev above 0"):
        Gsm8k(data=data, size_dev=0).problems("dev")
    with pytest.raises(InputError, match=r"set task\.data to a file"):
        Gsm8k(data_test=data).problems("train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, r"line 1 has no field 'answer'"),
        ({"question": 1, "answer": "#### 1"}, r"line 1: field 'question' must be a string"),
        ({"question": "a", "answer": "1"}, r"line 1: answer has no '#### N'"),
        ({"question": "a", "answer": "#### one"}, r"line 1: the answer 'one' is not a number"),
    ],
)
def test_malformed_lines_are_refused(tmp_path: Path, row: dict, message: str):
    with pytest.raises(InputError, match=message):
        Gsm8k(data=jsonl_file(tmp_path / "a.jsonl", [row])).problems("dev")


def test_the_hub_is_asked_only_without_paths(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, str, str]] = []

    def load_dataset(name: str, config: str, split: str) -> list[dict]:
        asked.append((name, config, split))
        return ROWS[:30] if split == "train" else ROWS[30:]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert len(Gsm8k(size_dev=10).problems("train")) == 20
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]


def test_a_hub_that_cannot_be_reached_points_to_the_local_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dllm_sd.tasks.datafile.why_offline", lambda: None)

    def load_dataset(name: str, config: str, split: str) -> list[dict]:
        raise ConnectionError("offline")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        InputError, match=r"cannot be loaded \(ConnectionError: offline\); set task\.data to the path of a local"
    ):
        Gsm8k().problems("train")


@pytest.mark.parametrize(
    ("answer", "text", "default", "compatible"),
    [
        ("18", r"\boxed{3} then \boxed{18}", True, False),
        ("1200", "<answer>1,200</answer>", True, False),
        ("1200", r"\boxed{1,200}", True, True),
        ("-3", r"\boxed{-3}", True, False),
        (-3, r"\boxed{-3}", True, True),
        (0.5, r"\boxed{\frac{1}{2}}", True, False),
        ("18", r"\boxed{\text{18 eggs}}", True, True),
        ("1000", r"\boxed{1e3}", True, True),
        ("so\n#### 1,200", r"\boxed{1200}", True, True),
        (None, r"\boxed{1}", False, False),
        (None, "", False, False),
        (3, r"\boxed{nan}", False, False),
    ],
)
def test_modes_differ_in_named_ways(answer: object, text: str, default: bool, compatible: bool):
    problem = Problem("x", {"answer": answer})
    assert Gsm8k().grade(problem, text).correct is default
    assert Gsm8k(mode="compatible").grade(problem, text).correct is compatible


def test_an_unknown_mode_is_refused():
    with pytest.raises(InputError, match=r"^task\.mode is 'loose'; choose default or compatible\.$"):
        Gsm8k(mode="loose")  # pyright: ignore[reportArgumentType]
