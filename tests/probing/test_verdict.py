"""What each rule of the verdict says, in cases whose numbers are chosen by hand."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from dllm_sd.probing import verdict as rules
from dllm_sd.probing.accuracy import Gap, Rate, gap
from dllm_sd.probing.signal import Shares
from dllm_sd.probing.verdict import RULES, Control, Findings, Teacher, verdict


def rate(right: int, n: int = 100) -> Rate:
    return Rate(n, right / n, (0.0, 1.0))


def teacher(right: int, student: int, low: float, high: float, n: int = 100, context: int = 0) -> Teacher:
    ahead = Gap(rate(right, n), rate(student, n), (right - student) / n, (low, high))
    return Teacher(context, "reference", True, ahead, None)


def premise(student: float | None, other: float | None, reader: str = "teacher 0") -> dict[str, Any]:
    known: dict[str, float | None] = dict.fromkeys(("before", "at", "mistake", "doubts"))
    return {"student": {**known, "mistake": student}, reader: {**known, "mistake": other}}


GOOD = Findings(
    problems=100,
    student=rate(40),
    rollouts={"made": 100, "right": 40, "passing": 100, "hinted": 100},
    teachers=(teacher(90, 40, 0.4, 0.6),),
    controls={"another": Control(rate(5), rate(90), 1.0, 0.3), "no_question": Control(rate(30), rate(90), 1.0, 0.3)},
    shares=Shares(support=0.1, purification=0.2, clip=0.3),
    premise=premise(0.4, 0.9),
    premise_sites=dict.fromkeys(("before", "at", "mistake", "doubts"), 60),
)
"""A teacher that is better, uses its hint and the question, and knows where the student goes wrong."""


def spoilt(kind: str, **changes: Any) -> Mapping[str, Control]:
    return {**GOOD.controls, kind: replace(GOOD.controls[kind], **changes)}


UNTAUGHT: dict[str, Any] = {"has_teacher": False, "teachers": (), "controls": {}, "premise": {}, "shares": None}
CASES: dict[str, tuple[dict[str, Any], str, bool | None]] = {
    "no teacher": (UNTAUGHT, "no_teacher", None),
    "worse writer": ({**UNTAUGHT, "imitated": teacher(10, 40, -0.4, -0.2).gap}, "writer_against_student", False),
    "equal writer": ({**UNTAUGHT, "imitated": teacher(41, 40, -0.1, 0.12).gap}, "writer_against_student", None),
    "better writer": ({**UNTAUGHT, "imitated": teacher(100, 40, 0.5, 0.7).gap}, "writer_against_student", True),
    "few of a writer": ({**UNTAUGHT, "imitated": teacher(7, 1, 0.5, 1.0, n=7).gap}, "writer_against_student", None),
    "nothing passes": (
        {"rollouts": {"made": 64, "right": 0, "passing": 0, "hinted": 0}, "teachers": (), "controls": {}},
        "nothing_passes",
        False,
    ),
    "no hint": (
        {"rollouts": {"made": 64, "right": 9, "passing": 9, "hinted": 0}, "teachers": (), "controls": {}},
        "nothing_passes",
        False,
    ),
    "few": ({"teachers": (teacher(7, 1, 0.5, 1.0, n=7),), "controls": {}}, "too_few", None),
    "worse": ({"teachers": (teacher(10, 40, -0.4, -0.2),), "controls": {}}, "teacher_against_student", False),
    "equal": ({"teachers": (teacher(41, 40, -0.1, 0.12),), "controls": {}}, "teacher_against_student", False),
    "not shown": ({"teachers": (teacher(45, 40, -0.01, 0.11),), "controls": {}}, "teacher_against_student", None),
    "hint unused": ({"controls": spoilt("another", accuracy=rate(89))}, "hint_unused", False),
    "hint copied": ({"controls": spoilt("no_question", accuracy=rate(88))}, "hint_copied", True),
    "form": ({"controls": spoilt("another", form=0.67)}, "about_form", True),
    "away": ({"premise": premise(0.421, 0.079, "target")}, "target_against_student", False),
    "hardly": ({"premise": premise(0.421, 0.440)}, "target_against_student", True),
    "away, at few sites": (
        {"premise": premise(0.421, 0.079), "premise_sites": {"mistake": rules.FEW - 1}},
        "target_against_student",
        True,
    ),
    "clipped": ({"shares": Shares(0.0, 0.0, 0.5)}, "taken_away", True),
    "truncated": ({"shares": Shares(0.8, 0.0, 0.0)}, "taken_away", True),
    "purified": ({"shares": Shares(0.0, 0.6, 0.0)}, "taken_away", True),
    "judged": ({"judged_by_outcome": True}, "judged_by_outcome", True),
    "solved": ({"student": rate(95)}, "little_left", True),
}
"""What differs from `GOOD`; the rule that speaks, beside that of the gap; and what the verdict is."""


def test_of_a_good_teacher_only_the_gap_is_said() -> None:
    promising, sentences = verdict(GOOD)
    assert promising is True
    assert [sentence.rule for sentence in sentences] == ["teacher_against_student"]
    assert sentences[0].says == (
        "the teacher is more accurate than the student (90.0 % against 40.0 % of 100 problems; difference +50.0 "
        "points, 95 % interval +40.0 to +60.0)"
    )


@pytest.mark.parametrize("case", CASES)
def test_a_rule_speaks_where_its_threshold_is_reached(case: str) -> None:
    changes, rule, settled = CASES[case]
    promising, sentences = verdict(replace(GOOD, **changes))
    assert promising is settled
    spoken = [sentence.rule for sentence in sentences]
    assert rule in spoken
    assert {*spoken} <= {rule, "teacher_against_student"}


@pytest.mark.parametrize(
    "changes",
    [
        {"teachers": (teacher(8, 1, 0.5, 1.0, n=8),)},
        {"controls": spoilt("another", accuracy=rate(87))},
        {"controls": spoilt("no_question", accuracy=rate(87))},
        {"controls": spoilt("another", form=0.66)},
        {"premise": premise(0.421, 0.442)},
        {"premise": premise(None, None)},
        {"shares": Shares(0.49, 0.49, 0.01)},
        {"student": rate(94)},
    ],
)
def test_a_rule_is_silent_below_its_threshold(changes: dict[str, Any]) -> None:
    assert [sentence.rule for sentence in verdict(replace(GOOD, **changes))[1]] == ["teacher_against_student"]


def test_every_rule_has_a_case() -> None:
    assert {rule for _, rule, _ in CASES.values()} == {rule.__name__ for rule in RULES}


def test_the_best_of_several_teachers_counts_and_those_that_only_make_the_target_do_not() -> None:
    known = {**GOOD.premise, **premise(0.4, 0.9, "teacher 1")}
    both = (teacher(30, 40, -0.2, 0.0), teacher(60, 40, 0.1, 0.3, context=1))
    assert verdict(replace(GOOD, teachers=both, premise=known))[0] is True
    assert verdict(replace(GOOD, teachers=(both[0], replace(both[1], taught=False)), premise=known))[0] is False


def test_where_no_rollout_is_mistaken_the_doubts_count() -> None:
    known = premise(None, None)
    known["student"]["doubts"], known["teacher 0"]["doubts"] = 0.3, 0.2
    promising, sentences = verdict(replace(GOOD, premise=known))
    assert promising is False
    assert "gives the reference's token less than one half" in sentences[-1].says


def test_the_findings_are_written_with_what_is_left_and_why() -> None:
    tree = replace(GOOD, shares=Shares(0.1, 0.2, 0.9)).tree()
    assert tree["shares"]["left"] == pytest.approx(-0.2)
    assert tree["verdict"]["promising"] is True
    assert tree["verdict"]["because"][1]["rule"] == "taken_away"
    assert tree["teachers"][0]["gap"]["teacher"]["accuracy"] == 0.9


def test_a_gap_is_that_of_the_shared_problems() -> None:
    found = gap({"a": True, "b": False, "c": False, "x": True}, {"a": True, "b": True, "c": True, "y": False})
    assert found is not None
    assert (found.student.n, found.student.accuracy, found.teacher.accuracy) == (3, 1 / 3, 1.0)
    assert found.gap == pytest.approx(2 / 3)
    assert found.ci95[0] < found.gap <= found.ci95[1]
    assert gap({"a": True}, {"b": True}) is None
    assert rules.MIN_GAP > 0


def test_where_the_outcome_judges_each_teacher_a_bad_one_settles_nothing() -> None:
    bad = replace(
        GOOD,
        teachers=(teacher(10, 40, -0.4, -0.2),),
        controls=spoilt("another", accuracy=rate(90)),
        premise=premise(0.4, 0.1),
    )
    settling = {"teacher_against_student", "hint_unused", "target_against_student"}
    promising, sentences = verdict(bad)
    assert promising is False
    assert {one.rule for one in sentences if one.promising is False} == settling
    promising, sentences = verdict(replace(bad, judged_by_outcome=True))
    assert promising is None
    assert {one.rule for one in sentences} == {*settling, "judged_by_outcome"}
    skipped = replace(bad, judged_by_outcome=True, rollouts={"made": 9, "right": 0, "passing": 0, "hinted": 0})
    assert verdict(skipped)[0] is False  # nothing passes the gate
