"""Any file of questions and answers can be a task."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dllm_sd.errors import InputError
from dllm_sd.tasks import Gsm8k, Jsonl, Problem, Task
from dllm_sd.tasks.sources import about_dev, about_tests, final_split

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
        (
            {"grader": "expression"},
            {"question": "a", "answer": "b"},
            r"line 1: answer 'b' is not an arithmetic expression",
        ),
        ({"reference_field": "r"}, {"question": "a", "answer": "b"}, r"line 1 has no field 'r'"),
    ],
)
def test_malformed_rows_are_refused(tmp_path: Path, fields: dict, row: dict, message: str):
    with pytest.raises(InputError, match=message):
        Jsonl(data=jsonl_file(tmp_path / "a.jsonl", [row]), **fields).problems("dev")


def test_wrong_fields_and_missing_splits_are_refused(tmp_path: Path):
    with pytest.raises(
        InputError, match=r"task\.grader is 'loose'; choose exact, number, expression, math, choice, rubric or regex"
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


TURNS = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "+1?"}]
SYSTEM = {"role": "system", "content": "Be brief."}


def test_a_list_of_messages_is_the_conversation_itself(tmp_path: Path):
    parts = [{"role": "user", "content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]}]
    rows = [{"messages": [*opening, *TURNS], "answer": "3"} for opening in ([], [SYSTEM])]
    rows.append({"messages": [{**parts[0], "name": None}], "answer": "x"})
    task = Jsonl(data_test=jsonl_file(tmp_path / "a.jsonl", rows), prompt=" {messages}\n")
    plain, with_system, in_parts = task.problems("test")
    assert task.messages(plain) == TURNS
    assert task.messages(with_system) == [SYSTEM, *TURNS]
    assert task.messages(in_parts) == [{"role": "user", "content": "in parts"}]
    assert task.messages(with_system, question=False) == [SYSTEM, {"role": "user", "content": ""}]
    asked = Jsonl(prompt="{messages}", system="s")
    assert asked.messages(plain) == [{"role": "system", "content": "s"}, *TURNS]
    assert asked.messages(plain, question=False) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": ""},
    ]


def test_a_conversation_that_occurs_in_the_test_split_is_no_training_row(tmp_path: Path):
    rows = [{"prompt": [{"role": "user", "content": f"{n}"}], "answer": "1"} for n in range(4)]
    files = [jsonl_file(tmp_path / "a.jsonl", rows), jsonl_file(tmp_path / "b.jsonl", rows[:1])]
    task = Jsonl(data=files[0], data_test=files[1], prompt="{prompt}", size_dev=0)
    assert [problem.id for problem in task.problems("train")] == ["jsonl/train/1", "jsonl/train/2", "jsonl/train/3"]


def test_a_reference_may_be_a_list_of_one_message(tmp_path: Path):
    rows = [{"question": "1", "answer": "1", "completion": [TURNS[1]]}]
    task = Jsonl(data_test=jsonl_file(tmp_path / "a.jsonl", rows), reference_field="completion")
    assert task.reference(task.problems("test")[0]) == "2"
    rows[0]["completion"] = TURNS
    with pytest.raises(InputError, match=r"line 1: field 'completion' must be text, or a list of one message"):
        Jsonl(data_test=jsonl_file(tmp_path / "a.jsonl", rows), reference_field="completion").problems("test")


@pytest.mark.parametrize(
    ("prompt", "messages", "words"),
    [
        ("{messages}", TURNS[:2], "ends with the answer of the assistant"),
        ("{messages}", [TURNS[0], SYSTEM, TURNS[0]], "message 1 is a system message; put it first"),
        ("{messages}", [{"from": "human", "value": "x"}], "message 0 has no 'role'; rename from and value to role"),
        ("{messages}", [{"role": "tool", "content": "x"}], "message 0 has the role 'tool'; give it system, user or"),
        ("{messages}", [{"role": ["user"], "content": "x"}], "message 0 has the role ['user']"),
        (
            "{messages}",
            [{"role": "user", "content": None}],
            "message 0: the content of a message ('user') must be text",
        ),
        (
            "{messages}",
            [{"role": "user", "content": "x", "images": ["i"]}],
            "message 0 has 'images', which is not read",
        ),
        ("{messages}", [{"text": "x"}], "task.prompt (for "),
        ("Q: {messages}", TURNS, "asks for {messages}, which holds a list of messages; leave all but {messages} out"),
        ("{messages}", {"role": "user", "content": "x"}, "asks for {messages}, which holds {"),
        ("{messages}", None, "asks for {messages}, which holds null"),
    ],
)
def test_what_is_no_conversation_to_go_on_with_is_refused_with_its_line(
    tmp_path: Path, prompt: str, messages: object, words: str
):
    data = jsonl_file(tmp_path / "a.jsonl", [{"messages": "x", "answer": "1"}, {"messages": messages, "answer": "1"}])
    with pytest.raises(InputError, match="line 2") as caught:
        Jsonl(data=data, prompt=prompt).problems("dev")
    assert words in str(caught.value)


def test_a_system_text_stands_once(tmp_path: Path):
    data = jsonl_file(tmp_path / "a.jsonl", [{"messages": [SYSTEM, *TURNS], "answer": "1"}])
    with pytest.raises(InputError, match=r"line 1: field 'messages' has a system message of its own; set task\.system"):
        Jsonl(data=data, prompt="{messages}", system="s").problems("dev")


@pytest.mark.parametrize(
    ("fields", "row", "words"),
    [
        ({}, {"question": " ", "answer": "1"}, ": task.prompt gives an empty prompt"),
        ({"prompt": "{messages}"}, {"messages": [], "answer": "1"}, ": task.prompt gives an empty prompt"),
        ({}, {"question": "a", "answer": " "}, "the answer is empty"),
        ({"grader": "choice"}, {"question": "A: x\nB: y", "answer": ""}, "the answer is empty"),
        ({"reference_field": "r"}, {"question": "a", "answer": "1", "r": " "}, "field 'r' is empty"),
        ({"reference_field": "r"}, {"question": "a", "answer": "1", "r": []}, "must be text, or a list of texts or"),
        ({"reference_field": "r"}, {"question": "a", "answer": "1", "r": [1, None]}, "not [1, None]"),
        (
            {"reference_field": "r"},
            {"question": "a", "answer": "1", "r": ["x", ""]},
            "must be text, or a list of texts",
        ),
        (
            {"reference_field": "r"},
            {"question": "a", "answer": "1", "r": [["x"]]},
            "must be text, or a list of texts or",
        ),
        (
            {"prompt": "{messages}"},
            {"messages": [SYSTEM], "answer": "1"},
            "holds nothing but a system message; add the",
        ),
        (
            {"prompt": "{messages}"},
            {"messages": [{"role": "user", "content": " "}], "answer": "1"},
            "message 0 is empty; fill it, or leave it out",
        ),
        (
            {"grader": "choice"},
            {"question": "?", "options": ["x", " x"], "answer": "A"},
            "the option 'x' occurs twice",
        ),
        ({"grader": "choice"}, {"question": "?", "options": ["x", ""], "answer": "A"}, "an option is empty"),
    ],
)
def test_a_row_that_says_nothing_in_one_place_is_refused_with_its_line(
    tmp_path: Path, fields: dict, row: dict, words: str
):
    with pytest.raises(InputError, match=r"line 1\b") as caught:
        Jsonl(data=jsonl_file(tmp_path / "a.jsonl", [row]), **fields).problems("dev")
    assert words in str(caught.value)


def test_a_prompt_without_any_field_is_refused():
    with pytest.raises(InputError, match=r"^task\.prompt uses no field of the rows, .* such as \{question\}$"):
        Jsonl(prompt="Solve it.")


def test_rows_that_all_ask_the_same_do_not_blame_the_size_of_the_dev_split(tmp_path: Path):
    rows = [{"topic": "x", "question": str(n), "answer": "1"} for n in range(9)]
    task = Jsonl(data=jsonl_file(tmp_path / "a.jsonl", rows), prompt="About {topic}", size_dev=2)
    with pytest.raises(
        InputError, match=r"the dev split takes 2 of the 9 rows .* the 7 others repeat problems .*task\.prompt"
    ):
        task.problems("train")


def numbered(count: int) -> list[dict]:
    return [{"question": f"{n}?", "answer": str(n)} for n in range(count)]


@pytest.mark.parametrize(("count", "dev"), [(1, 1), (2, 1), (9, 1), (50, 5), (999, 99), (5000, 500), (6000, 500)])
def test_the_dev_split_fits_the_data(tmp_path: Path, count: int, dev: int):
    task = Jsonl(data=jsonl_file(tmp_path / "a.jsonl", numbered(count)))
    assert len(task.problems("dev")) == dev
    assert task.splits().size_dev == dev
    if count > 1:
        assert len(task.problems("train")) == count - dev


def test_a_dev_split_of_a_chosen_size_is_announced(tmp_path: Path):
    data = jsonl_file(tmp_path / "a.jsonl", numbered(50))
    said = "task.size_dev is not set: 5 of the 50 rows of task.data are the dev split, 45 are left to train on"
    assert about_dev(Jsonl(data=data)) == said
    assert about_dev(Jsonl(data=data, size_dev=5)) is None
    assert about_dev(Jsonl(data=jsonl_file(tmp_path / "b.jsonl", numbered(5000)))) is None


def test_a_size_of_the_dev_split_that_does_not_fit_is_refused_with_both_numbers(tmp_path: Path):
    files = [jsonl_file(tmp_path / "a.jsonl", numbered(50)), jsonl_file(tmp_path / "b.jsonl", numbered(2))]
    for split in ("train", "dev"):
        with pytest.raises(InputError, match=r"^task\.size_dev is 51, but task\.data has 50 rows; lower it, or leave"):
            Jsonl(data=files[0], size_dev=51).problems(split)
    with pytest.raises(InputError, match=r"size_dev is 49, but task\.data has 48 rows \(2 more occur in the test"):
        Jsonl(data=files[0], data_test=files[1], size_dev=49).problems("dev")
    assert len(Jsonl(data=files[0], data_test=files[1], size_dev=49).problems("test")) == 2
    with pytest.raises(InputError, match=r"all 2 rows of task\.data occur in the test split too; set task\.data_test"):
        Jsonl(data=files[1], data_test=files[0], size_dev=1).problems("train")
    with pytest.raises(InputError, match=r"task\.size_dev, which is 50, .*the file has 50 rows"):
        Jsonl(data=files[0], size_dev=50).problems("train")


def test_without_test_rows_models_are_tested_on_the_dev_split_and_that_is_said(tmp_path: Path):
    data = jsonl_file(tmp_path / "a.jsonl", numbered(20))
    task = Jsonl(data=data)
    assert final_split(task) == "dev"
    assert (about_tests(task) or "").startswith("task.data_test is not set, so models are tested on the dev split")
    for other in (Jsonl(data=data, data_test=data), Jsonl(data_test=data), Jsonl(), Gsm8k()):
        assert final_split(other) == "test"
        assert about_tests(other) is None


def test_the_default_prompt_is_the_first_field_that_asks(tmp_path: Path):
    for row, text in [
        ({"prompt": "p", "messages": [TURNS[0]], "question": "q"}, "q"),
        ({"prompt": "p", "messages": [TURNS[0]]}, "1+1?"),
        ({"prompt": "p"}, "p"),
    ]:
        task = Jsonl(data_test=jsonl_file(tmp_path / "a.jsonl", [{**row, "answer": "1"}]))
        assert task.messages(task.problems("test")[0]) == [{"role": "user", "content": text}]


def test_a_conversation_that_ends_with_its_answer_gives_prompt_reference_and_answer(tmp_path: Path):
    data = jsonl_file(tmp_path / "a.jsonl", [{"messages": [SYSTEM, *TURNS[:2]]}])
    task = Jsonl(data_test=data, reference_field="messages", answer_field="messages", grader="number")
    (problem,) = task.problems("test")
    assert task.messages(problem) == [SYSTEM, TURNS[0]]
    assert task.reference(problem) == task.final_answer(problem) == "2"
    assert task.grade(problem, "it is 2").correct
    assert not task.grade(problem, "it is 3").correct
    with pytest.raises(InputError, match=r"line 1: field 'messages' ends with .* set task\.reference_field=messages"):
        Jsonl(data_test=data, grader="rubric", prompt="{messages}").problems("test")
    for messages in (TURNS, [TURNS[1]]):
        asked = jsonl_file(tmp_path / "b.jsonl", [{"messages": messages, "answer": "1"}])
        with pytest.raises(InputError, match=r"must end with a message of the assistant after one of the user, since"):
            Jsonl(data_test=asked, reference_field="messages").problems("test")


def test_a_reference_may_be_a_number(tmp_path: Path):
    data = jsonl_file(tmp_path / "a.jsonl", [{"question": "1+1?", "answer": 2}])
    task = Jsonl(data_test=data, reference_field="answer")
    assert task.reference(task.problems("test")[0]) == "2"


def test_missing_references_are_named_among_the_columns_of_the_data(tmp_path: Path):
    rows = [{"question": f"{n}", "answer": "1", "worked": "it is one", "tags": ["x"], "id": n} for n in range(9)]
    task = Jsonl(data=jsonl_file(tmp_path / "a.jsonl", rows))
    advice = "set task.reference_field to the field that holds them, such as"
    assert task.reference_remedy == f"{advice} task.reference_field=answer"
    task.problems("train")
    remedy = "task.reference_field=worked or task.reference_field=answer or task.reference_field=id"
    assert task.reference_remedy == f"{advice} {remedy}"
    with pytest.raises(InputError, match=r"has no field 'r' \(.*worked.*\); add it or set task\.reference_fi"):
        Jsonl(data=jsonl_file(tmp_path / "a.jsonl", rows), reference_field="r").problems("train")


@pytest.mark.parametrize("suffix", ["", ":default:train"])
def test_a_folder_that_the_library_datasets_reads_is_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
):
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    jsonl_file(folder / "train.jsonl", numbered(12))
    jsonl_file(folder / "test.jsonl", numbered(20)[12:])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task = Jsonl(data=f"{folder}{suffix}", data_test=str(folder), size_dev=2)
    assert [len(task.problems(split)) for split in ("train", "dev", "test")] == [10, 2, 8]
    with pytest.raises(InputError, match=r"^task\.data_test: dataset .*, split valid cannot be loaded \(ValueError"):
        Jsonl(data_test=f"{folder}::valid").problems("test")
