"""Whatever a model writes, its entries are found or the reason is given, quickly, and nothing is run."""

import json
import random
import time
from collections import Counter
from itertools import count
from typing import Any

import pytest

from dllm_sd.skills import Mistake, Skill
from dllm_sd.skills.answers import MAX_ANSWER_TEXT, parse_items

ROW = {"title": "Split cases", "principle": "One at a time.", "when_to_apply": "Many cases."}
ONE = Skill("", "Split cases", "One at a time.", "Many cases.")
LIST = json.dumps([ROW])


def parse(answer: str | None, kind: Any = Skill, longest: int = 1000, alone: bool = True):
    counts = Counter[str]()
    items, reason = parse_items(answer, kind, longest, counts, alone)
    return items, reason, dict(counts)


@pytest.mark.parametrize(
    "answer",
    [
        LIST,
        json.dumps({"general_skills": [ROW], "note": "x"}),
        json.dumps({"title": "My skills", "skills": [ROW]}),
        json.dumps(ROW),
        json.dumps({"data": {"skills": [ROW]}}),
        f"Here they are, with $\\frac{{1}}{{2}}$ and [1, 2] and {{x}}:\n```json\n{LIST}\n```\nDone.",
        f"<think>[{json.dumps(ROW | {'title': 'draft'})}]</think>\n{LIST}",
        f"[{json.dumps(ROW | {'title': 'draft'})}]</think>{LIST}",
        f'{{"note": "none"}} {LIST}',
        f"{LIST} {json.dumps([ROW | {'title': 'later'}])}",
        '[{"title": " Split\\n cases", "principle": "One at\\t a time.", "when_to_apply": "Many cases. ", "id": 7}]',
        f"[ \n{json.dumps(ROW)}, 3, null, []]",
    ],
    ids=count(),
)
def test_entries_are_found_in_the_first_json_that_holds_some(answer: str):
    assert parse(answer) == ((ONE,), None, {})


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "no_answer"),
        ("", "no_json"),
        ("I cannot.", "no_json"),
        ("[1, 2]", "no_json"),
        ("[]", "no_json"),
        (f"<think>{LIST}", "no_json"),
        (LIST[:-9], "no_json"),
        (LIST.replace('"', "'"), "no_json"),
        ('{"a": 1}', "no_entry"),
        ('{"skills": ["Split cases"]}', "no_entry"),
        (f"[{LIST}, 1]", None),
    ],
    ids=count(),
)
def test_what_cannot_be_used_has_a_reason(answer: str | None, reason: str | None):
    items, found, _ = parse(answer)
    assert found == reason
    assert bool(items) == (reason is None)


def test_entries_with_an_empty_missing_or_long_text_are_left_out_and_counted():
    rows = [ROW, ROW | {"title": " "}, ROW | {"principle": None}, ROW | {"principle": ["a"]}, {"title": "t"}]
    rows += [ROW | {"title": "x" * 21}, ROW | {"title": "x" * 20}]
    items, reason, counts = parse(json.dumps(rows), longest=20)
    assert [item.title for item in items] == ["Split cases", "x" * 20]
    assert reason is None
    assert counts == {"left_out/incomplete": 4, "left_out/long": 1}
    mistake = {"description": "d", "why_it_happens": "y", "how_to_avoid": "h"}
    assert parse(json.dumps([mistake, ROW]), Mistake)[0] == (Mistake("", "d", "y", "h"),)
    assert parse(json.dumps([mistake])) == ((), "no_entry", {"left_out/incomplete": 1})


def test_of_a_list_that_breaks_off_the_first_entry_is_taken_only_where_one_may_stand_alone():
    broken = json.dumps([ROW, ROW | {"title": "two"}, ROW | {"title": "three"}])[:-30]
    assert parse(broken) == ((ONE,), None, {})
    assert parse(broken, alone=False) == ((), "no_entry", {})
    assert parse(json.dumps({"skills": [ROW]})[:-1], alone=False) == ((ONE,), None, {})  # only the last brace is gone


def test_formulas_are_read_though_their_backslashes_were_not_escaped():
    written = (
        r'[{"title": "\sqrt{x} \frac{a}{b} \\pi \beta", "principle": "\theta\right) \"q\"", "when_to_apply": "\u00e9"}]'
    )
    (item,) = parse(written)[0]
    assert item == Skill("", r"\sqrt{x} \frac{a}{b} \pi \beta", r'\theta\right) "q"', "\u00e9")
    assert parse(json.dumps([ROW | {"title": r"$\frac{1}{2}$ \\ \n"}]))[0][0].title == r"$\frac{1}{2}$ \\ \n"


def test_half_of_a_surrogate_pair_does_not_pass():
    (item,) = parse('[{"title": "a\\ud800b", "principle": "\\ud83d\\ude00", "when_to_apply": "w"}]')[0]
    assert item.title == "a?b"
    assert item.principle == "\U0001f600"


HOSTILE = {
    "lists": "[" * MAX_ANSWER_TEXT,
    "lists of objects": "[{" * MAX_ANSWER_TEXT,
    "objects": '{"a":' * MAX_ANSWER_TEXT,
    "both": '[{"a":' * MAX_ANSWER_TEXT,
    "an open text": '{"' + "a" * MAX_ANSWER_TEXT,
    "quotes": '{"' + '\\"' * MAX_ANSWER_TEXT,
    "backslashes": '{"' + "\\" * MAX_ANSWER_TEXT,
    "spaces": ("[" + " " * 31) * 4000,
    "an open list behind starts": '{"a":' * 31 + "[" + "1," * MAX_ANSWER_TEXT,
    "a long number": '[{"a": ' + "9" * MAX_ANSWER_TEXT,
    "a number too long": '[{"a": ' + "9" * 5000 + "}]",
    "thoughts": "<think>" * MAX_ANSWER_TEXT,
    "ends of thoughts": "</think>" * MAX_ANSWER_TEXT,
    "code": '[{"title": __import__("os").abort()}]',
    "much of it": "x" * 5_000_000 + LIST,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_refused_in_bounded_time(name: str):
    start = time.perf_counter()
    items, reason, _ = parse(HOSTILE[name])
    assert (items, reason) == ((), "no_json")
    assert time.perf_counter() - start < 2


def test_random_answers_never_raise():
    rng = random.Random(0)
    pieces = [*'[]{}",:\\ \n', '"title"', '"principle"', '"when_to_apply"', '"x"', "1", "null", "<think>", "</think>"]
    for _ in range(2000):
        answer = "".join(rng.choices(pieces, k=rng.randrange(60)))
        items, reason, counts = parse(answer)
        assert (reason is None) == bool(items)
        assert all(number > 0 for number in counts.values())
    for _ in range(2000):
        answer = list(json.dumps([ROW, ROW]))
        for _ in range(rng.randrange(4)):
            answer[rng.randrange(len(answer))] = rng.choice(pieces)
        for item in parse("".join(answer))[0]:
            assert all((item.title, item.principle, item.when_to_apply))
