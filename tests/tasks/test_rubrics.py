"""Rubrics in the task jsonl: a grader that wants a list of criteria, and lists as references."""

import json
from pathlib import Path

import pytest

from dllm_sd.errors import InputError
from dllm_sd.tasks import Grade, Jsonl, Problem
from dllm_sd.texts import parse_rubric
from tests.texts.hostile import hostile_texts, seconds

TASK = Jsonl(grader="rubric", reference_field="rubric")
ASKED = Problem("x", {"question": "Why is the sky blue?"})
ITEM = {"title": "Scattering named", "description": "Essential Criteria: Names scattering.", "weight": 5}


@pytest.mark.parametrize(
    ("completion", "parsed"),
    [
        (
            f"<think>[1]</think>My list:\n{json.dumps([ITEM])}\nDone.",
            '[{"title": "Scattering named", "description": "Essential Criteria: Names scattering.", "weight": 5}]',
        ),
        (
            '["Important Criteria: ends with one claim", "Pitfall Criteria: blames the sea"]',
            '[{"description": "Important Criteria: ends with one claim", "weight": 3},\n'
            '{"description": "Pitfall Criteria: blames the sea", "weight": -1}]',
        ),
        ('[{"description": "Größe", "weight": "\\u22122"}]', '[{"description": "Größe", "weight": -2}]'),
    ],
)
def test_any_list_of_criteria_is_right_and_parsed_as_it_would_be_written(completion: str, parsed: str):
    assert TASK.grade(ASKED, completion) == Grade(True, 1.0, parsed)
    assert TASK.grade(ASKED, parsed) == Grade(True, 1.0, parsed)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "Scattering.",
        "[]",
        "[3]",
        '[{"title": "no description"}]',
        f"<think>{json.dumps([ITEM])}",
        json.dumps([ITEM])[:-1],
        f"[1] {json.dumps([ITEM])}",
    ],
)
def test_what_is_no_list_of_criteria_is_wrong(completion: str):
    assert TASK.grade(ASKED, completion) == Grade(False, 0.0, None)


@pytest.mark.parametrize("unit", ["[", '[{"description": "', "[[1],"])
def test_the_grader_is_bounded_in_time(unit: str):
    for text in hostile_texts(unit):
        assert seconds(lambda text=text: TASK.grade(ASKED, text)) < 0.1


def test_a_list_as_reference_is_written_as_json_and_read_back_as_a_rubric():
    items = ["Essential Criteria: names the colour «red»", ITEM]
    text = TASK.reference(Problem("x", {"rubric": items}))
    assert text == (
        '[\n "Essential Criteria: names the colour «red»",\n {\n  "title": "Scattering named",\n'
        '  "description": "Essential Criteria: Names scattering.",\n  "weight": 5\n }\n]'
    )
    assert parse_rubric(text) == parse_rubric(items)
    assert TASK.reference(Problem("x", {"rubric": '["a"]'})) == '["a"]'


def test_rows_need_no_answer_but_the_reference_that_is_named(tmp_path: Path):
    rows = [{"question": "Why?", "rubric": ["Says why."]}, {"question": "How?", "rubric": [ITEM]}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Jsonl(data=str(path), grader="rubric", reference_field="rubric", size_dev=1)
    (problem,) = task.problems("train")
    assert task.final_answer(problem) is None
    assert task.reference(problem) == json.dumps(problem.fields["rubric"], indent=1)
    with pytest.raises(InputError, match="line 1 has no field 'answer'"):
        Jsonl(data=str(path), reference_field="rubric").problems("train")
    with pytest.raises(InputError, match="line 1 has no field 'scheme'"):
        Jsonl(data=str(path), grader="rubric", reference_field="scheme").problems("train")


def test_a_reference_that_is_neither_text_nor_a_list_is_refused(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "Why?", "rubric": {"a": 1}}) + "\n")
    with pytest.raises(InputError, match=r"line 1.*rubric") as refusal:
        Jsonl(data=str(path), grader="rubric", reference_field="rubric", size_dev=0).problems("train")
    assert "\n" not in str(refusal.value)
