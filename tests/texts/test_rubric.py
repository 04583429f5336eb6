"""Rubrics: what is read from a model's text and from data, and the degraded variants."""

import json
import os
from pathlib import Path

import pytest

from dllm_sd.errors import InputError
from dllm_sd.tasks.datafile import render
from dllm_sd.texts import rubric as rubrics
from dllm_sd.texts.rubric import (
    Criteria,
    Criterion,
    generic,
    noisy,
    parse_rubric,
    reduced,
    render_rubric,
)
from tests.texts.hostile import hostile_texts, random_texts, seconds

FIXTURE = Path(__file__).parents[1] / "fixtures" / "rubrics" / "made.jsonl"
ROWS = [json.loads(line) for line in FIXTURE.read_text(encoding="utf-8").splitlines()]
PUBLISHED = Path(os.environ.get("DLLM_SD_RUBRICS") or "no folder is named")
ITEM = {"title": "T", "description": "D", "weight": 2}


def made(*names: str) -> Criteria:
    return Criteria(tuple(Criterion(name, f"Essential Criteria: {name}", 5) for name in names))


def names(rubric: Criteria) -> list[str]:
    return [one.title for one in rubric.criteria]


OWN = made("a", "b", "c", "d", "e")
OTHERS = [made("p", "q", "r"), made("s", "t", "u", "v", "w", "x")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["question"][:20])
def test_the_rows_of_the_fixture_are_read_as_they_say(row: dict[str, object]):
    found = parse_rubric(row["generated_rubric"])
    assert (found if isinstance(found, str) else len(found.criteria)) == row["expected"]
    gold = parse_rubric(row["reference_rubric"])
    assert isinstance(gold, Criteria)
    assert all(one.category for one in gold.criteria)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="DLLM_SD_RUBRICS names no folder with the rows of RCSD")
def test_four_of_five_published_rubrics_are_read():
    lines = (PUBLISHED / "rar_science_100_with_generated.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = [parse_rubric(row["generated_rubric"]) for row in rows]
    good = [one for one in found if isinstance(one, Criteria)]
    assert (len(good), sum(len(one.criteria) for one in good)) == (80, 581)  # 401 of 500, 7.3 each, in all of the file
    assert {one for one in found if isinstance(one, str)} == {"no_list"}
    assert all(parse_rubric(render_rubric(one)) == one for one in good)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="DLLM_SD_RUBRICS names no folder with the rows of RCSD")
def test_all_published_gold_rubrics_are_read_and_every_item_has_a_category():
    count = 0
    for name, field in (("rar_science_100_with_generated", "reference_rubric"), ("rar_science_200", "rubric")):
        for line in (PUBLISHED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            found = parse_rubric(json.loads(line)[field])
            assert isinstance(found, Criteria)
            assert all(one.category for one in found.criteria)
            count += len(found.criteria)
    assert count == 2264  # 300 rows, 7.5 each


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (json.dumps([ITEM]), [("T", "D", 2)]),
        (f"See [1] ... no: {json.dumps([ITEM])}", "bad_item"),  # the first list counts
        (f"In [the list] and [x, y]: {json.dumps([ITEM])} and [2]", [("T", "D", 2)]),
        (f"<think>[]</think>{json.dumps([ITEM])}", [("T", "D", 2)]),
        (f"[]</think>{json.dumps([ITEM])}", [("T", "D", 2)]),
        (f"<think>{json.dumps([ITEM])}", "no_list"),
        ('[{"description": " D "}]', [("", "D", 1)]),
        ('[{"title": null, "description": "D", "weight": null}]', [("", "D", 1)]),
        ('["Essential Criteria: a", "Pitfall: b"]', [("", "Essential Criteria: a", 5), ("", "Pitfall: b", -1)]),
        ('[{"title": "T", "description": "two\nlines"}]', [("T", "two\nlines", 1)]),
        ("", "no_list"),
        ("nothing", "no_list"),
        ("[", "no_list"),
        ('[{"title": "T", "description": "from [1] to', "no_list"),
        ('[{"title": "T", "description": "D", "weight": [1], ', "no_list"),
        ("[]", "empty"),
        ("[ ]", "empty"),
        ('[{"title": "T"}]', "bad_item"),
        ('[{"title": "T", "description": "  "}]', "bad_item"),
        ('[{"title": 3, "description": "D"}]', "bad_item"),
        ('[{"description": ["D"]}]', "bad_item"),
        ('["a", ""]', "bad_item"),
        ('["a", null]', "bad_item"),
        ('["a", ["b"]]', "bad_item"),
        ('["a", 1]', "bad_item"),
    ],
)
def test_a_text_is_a_rubric_or_there_is_a_reason(text: str, expected: str | list[tuple[str, str, int]]):
    found = parse_rubric(text)
    if isinstance(found, Criteria):
        assert [(one.title, one.description, one.weight) for one in found.criteria] == expected
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("source", "reason"), [(None, "no_list"), ({}, "no_list"), (3, "no_list"), ([], "empty"), ([3], "bad_item")]
)
def test_a_field_of_the_data_may_be_anything(source: object, reason: str):
    assert parse_rubric(source) == reason


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ("3", 3),
        ('"3"', 3),
        ('" +3 "', 3),
        ('"-2"', -2),
        ('"\u22122"', -2),
        ('"4.0"', 4),
        ("4.0", 4),
        ("3.6", 4),
        ("0", 0),
        ("1000", 1000),
        ("null", 5),
        ("1001", None),
        ("1e300", None),
        ("NaN", None),
        ("-Infinity", None),
        ("true", None),
        ('"high"', None),
        ('""', None),
        ('"1e3"', None),
        ("[1]", None),
    ],
)
def test_a_weight_is_a_whole_number_however_it_is_written(weight: str, expected: int | None):
    found = parse_rubric(f'[{{"description": "Essential Criteria: x", "weight": {weight}}}]')
    assert found == ("bad_item" if expected is None else Criteria((Criterion("", "Essential Criteria: x", expected),)))


@pytest.mark.parametrize(
    ("description", "category", "weight"),
    [
        ("Essential Criteria: x", "essential", 5),
        ("important criteria: x", "important", 3),
        ("Optional: x", "optional", 1),
        ("  PITFALL  CRITERIA : x", "pitfall", -1),
        ("Negative Criterion: x", "negative", -1),
        ("Critical Criteria: x", None, 1),
        ("Essential x: y", None, 1),
        ("Not Essential Criteria: x", None, 1),
        ("Essentially: x", None, 1),
    ],
)
def test_the_first_word_of_a_description_tells_its_category(description: str, category: str | None, weight: int):
    found = parse_rubric([description])
    assert isinstance(found, Criteria)
    (one,) = found.criteria
    assert (one.category, one.weight) == (category, weight)


def test_a_rubric_is_written_as_json_one_item_a_line():
    rubric = Criteria(
        (Criterion("Größe", 'Essential Criteria: says "5 µm"', 5), Criterion("", "Pitfall Criteria: 5 m", -1))
    )
    assert render_rubric(rubric) == (
        '[{"title": "Größe", "description": "Essential Criteria: says \\"5 µm\\"", "weight": 5},\n'
        '{"description": "Pitfall Criteria: 5 m", "weight": -1}]'
    )


@pytest.mark.parametrize("rubric", [OWN, generic(), made("x[1]", "{y}", "\\(z\\)"), parse_rubric(["a", "b\nc"])])
def test_what_is_written_is_read_back(rubric: Criteria):
    assert parse_rubric(render_rubric(rubric)) == rubric
    assert parse_rubric(f"So:\n{render_rubric(rubric)}\nDone.") == rubric


def test_the_generic_rubric_has_six_items_that_weigh_the_same():
    assert names(generic()) == ["Understand", "Identify", "Choose", "Execute", "Check", "Answer"]
    assert {one.weight for one in generic().criteria} == {1}


@pytest.mark.parametrize(("count", "kept"), [(0, 0), (1, 1), (2, 1), (5, 3), (8, 4)])
def test_a_reduced_rubric_keeps_half_of_the_items_in_their_order(count: int, kept: int):
    own = made(*map(str, range(count)))
    for key in range(20):
        found = names(reduced(own, key))
        assert len(found) == kept
        assert found == sorted(found)
        assert len(set(found)) == kept


@pytest.mark.parametrize(("count", "own_part", "foreign"), [(1, 1, 1), (2, 1, 1), (5, 3, 2), (8, 4, 3)])
def test_a_noisy_rubric_is_half_its_own_and_half_of_one_other(count: int, own_part: int, foreign: int):
    own = made(*(f"own {place}" for place in range(count)))
    for key in range(20):
        found = names(noisy(own, OTHERS[:1], key))
        assert sum(name.startswith("own") for name in found) == own_part
        assert sum(name in "pqr" for name in found) == foreign  # 3 where it has no more
        assert len(set(found)) == own_part + foreign


def test_a_noisy_rubric_takes_from_one_other_only_and_mixes():
    found = [names(noisy(OWN, OTHERS, key)) for key in range(60)]
    sources = [{next(i for i, other in enumerate([OWN, *OTHERS]) if n in names(other)) for n in one} for one in found]
    assert {frozenset(one) for one in sources} == {frozenset({0, 1}), frozenset({0, 2})}
    assert any(one[0] not in names(OWN) for one in found)
    assert any(one[-1] not in names(OWN) for one in found)


def test_the_variants_depend_on_their_key_alone():
    def all_of(key: int) -> tuple[Criteria, Criteria]:
        return reduced(OWN, key), noisy(OWN, OTHERS, key)

    first = [all_of(key) for key in range(30)]
    assert first == [all_of(key) for key in reversed(range(30))][::-1]
    for variant in zip(*first, strict=True):
        assert len(set(variant)) > 1


def test_a_variant_without_another_question_is_refused():
    with pytest.raises(InputError, match="more than one question"):
        noisy(OWN, [], 1)


SLOTS = {"question": "Q?", "reference": "R.", "hint": "H {x}"}


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("RUBRIC_WRITER_PLAIN", ["question"]),
        ("RUBRIC_WRITER", ["question", "reference"]),
        ("RUBRIC_GOLD", ["question", "hint"]),
        ("RUBRIC_TEACHER", ["question", "hint"]),
        ("RUBRIC_TEACHER_REFERENCE", ["question", "hint", "reference"]),
    ],
)
def test_a_prompt_has_exactly_its_slots(name: str, slots: list[str]):
    template = getattr(rubrics, name)
    text = render(template, {slot: SLOTS[slot] for slot in slots}, name)
    for slot in slots:
        assert template.count(f"{{{slot}}}") == 1
        assert SLOTS[slot] in text


def test_the_example_in_the_writers_prompt_is_itself_a_rubric():
    for template in (rubrics.RUBRIC_WRITER, rubrics.RUBRIC_WRITER_PLAIN):
        found = parse_rubric(render(template, SLOTS, "prompt"))
        assert isinstance(found, Criteria)
        assert [one.category for one in found.criteria] == ["essential", "pitfall"]


@pytest.mark.parametrize(
    "unit",
    ["[", "[1,", '["', "[{", '[{"a":', "[x", "[[]", '["a",', "{", "\\", "[1e", "[-", "]", "\n[", "[\n", "<think>", "9"],
)
def test_hostile_texts_take_little_time(unit: str):
    for text in hostile_texts(unit):
        assert seconds(lambda text=text: parse_rubric(text)) < 0.05


def test_random_texts_are_rubrics_or_there_is_a_reason():
    for text in random_texts('[]{}",:\\ \n1-eE.abtfn', "description", "<think>", "</think>"):
        assert isinstance(parse_rubric(text), Criteria) or parse_rubric(text) in {"no_list", "empty", "bad_item"}
