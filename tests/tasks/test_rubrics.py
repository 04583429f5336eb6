"""Rubrics in the task jsonl: a grader that wants a list of criteria, and lists as references."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dllm_sd.config import load_config
from dllm_sd.errors import InputError
from dllm_sd.policies.weights import PeerWeights
from dllm_sd.tasks import Grade, Jsonl, Problem
from dllm_sd.teachers import Rubric
from dllm_sd.teachers.context import HintInputs
from dllm_sd.texts import parse_rubric
from dllm_sd.texts.rubric_score import form
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


def demanded(*subjects: str) -> list[dict[str, Any]]:
    """A rubric in the form that the prompt demands, about these subjects."""
    kinds = [("Essential", 5), ("Important", 3), ("Optional", 2), ("Optional", 1), ("Pitfall", -1)]
    return [
        {"title": f"{word} named", "description": f"{kind} Criteria: Explains {word} {rest}.", "weight": weight}
        for (kind, weight), (word, rest) in zip(kinds, (one.split(" ", 1) for one in subjects), strict=True)
    ]


SKY = demanded("scattering of short waves", "sunlight spectrum", "molecules sizes", "evening colours", "ocean mirrors")
SEA = demanded(
    "rivers bringing minerals", "evaporation leaving residue", "volcanic vents", "currents below", "rainfall above"
)[:4]


def scored(written: object, gold: object) -> Grade:
    return TASK.grade(Problem("x", {"question": "Why?", "rubric": gold}), json.dumps(written))


def test_a_rubric_scores_by_how_many_of_the_datas_criteria_it_has_and_by_its_form():
    assert scored(SKY, SKY).score == 1.0
    assert scored([*SKY[1:], SKY[0]], [one["description"] for one in SKY]).score == 1.0  # order and titles are free
    assert scored(SKY, [*SKY, *SEA]).score == pytest.approx(5 / 9)
    half = scored(SKY[:2], SKY)  # too few, no pitfall; two of five criteria
    assert half.score == pytest.approx(1 / 3 * 2 / 5)
    assert (half.correct, scored(SKY, SKY).correct, scored(SKY, SEA).correct) == (False, True, False)
    assert scored(SKY, SEA).score == 0.0


@pytest.mark.parametrize(
    "change",
    [
        {"weight": 10},
        {"description": "Explains scattering of short waves"},
        {"description": "Essential Criteria: " + "wave " * 40},
    ],
)
def test_a_criterion_that_the_prompt_does_not_allow_costs_form(change: dict[str, Any]):
    rubric = parse_rubric([{**SKY[0], **change}, *SKY[1:]])
    assert not isinstance(rubric, str)
    assert form(rubric) == pytest.approx((1 + 1 + 4 / 5) / 3)


def test_both_stages_of_rcsd_give_the_writer_the_same_tokens(make_policy: Callable[..., Any]):
    """Whatever the question, and by the shipped configs' settings."""
    policy = make_policy(as_="autoregressive")
    fields = {"question": "Why is {this} the sky's colour?", "rubric": SKY, "answer": "4"}
    first, second = (load_config(name, ["task.data=x.jsonl"]) for name in ("qwen3_8b_rcsd_writer", "qwen3_8b_rcsd"))
    problem = Problem("x", fields)
    learnt = policy.encode(first.task.messages(problem), first.model.thinking)
    (hint,) = second.method.contexts
    assert isinstance(hint, Rubric)
    assert hint.writing is not None
    rollout: Any = SimpleNamespace(problem=problem)
    asked = hint.request(HintInputs(rollout, (), second.task, 0))
    assert asked is not None
    assert policy.encode(asked, hint.writing.sampling.thinking) == learnt
    assert first.model.thinking is hint.writing.sampling.thinking is False
    assert hint.writing.writer == PeerWeights(f"{first.run}/checkpoints/{first.updates:06d}")
    assert first.decode.top_k == hint.writing.sampling.top_k == 20
