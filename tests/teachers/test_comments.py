"""A peer's feedback as a hint, beside a success or alone."""

from typing import Any

import pytest

from dllm_sd.errors import InputError, Stopped
from dllm_sd.randomness import make_key
from dllm_sd.tasks.task import Problem
from dllm_sd.teachers import Feedback, Sibling
from dllm_sd.teachers.writing import Writing
from dllm_sd.texts.feedback import FEEDBACK
from dllm_sd.writers import Request, Written
from tests.teachers.briefs import texts_of
from tests.teachers.scripted import Script, drops, informed, nobody, places, prompts, rolled

WIRE = Problem("wire", {"question": "What is the modulus of the wire?\nA: 100\nB: 200", "answer": "B"})
ROD = Problem("rod", {"question": "How long is the rod?", "answer": "12"})
ASKED = WIRE.fields["question"]
TAG = "<concept>modulus</concept>"
SHORT: dict[str, Any] = {
    "template": "{question}{hint}.",
    "solution": "[{hint}]",
    "comment": "({hint})",
    "prompt": "{question}|{response}|{tutor_domain}|{student_domain}",
}


def feedback(tolerance: float = 1.0, **options: Any) -> Feedback:
    return Feedback(**{**SHORT, "writing": Writing(tolerance=tolerance), **options})


def peer(**answers: Written | str) -> Script:
    """Answers by a word of the rollout."""
    return Script(lambda asked: next(answer for word, answer in answers.items() if f"|{word}|" in asked))


def test_a_peer_is_asked_about_each_rollout_by_both_domains_and_without_its_thinking():
    script = Script(lambda asked: f"{TAG} Yes.")
    group = rolled((WIRE, [("<think>hm</think> a {b}", 0.0), ("c", 0.0)]))
    informed(group, feedback(tutor="physics", student="chemistry"), write=script)
    assert script.requests == [
        Request(
            ({"role": "user", "content": f"{ASKED}|{text}|physics|chemistry"},),
            make_key(3, 7, "wire", attempt, "writing"),
        )
        for attempt, text in enumerate(["a {b}", "c"])
    ]


def test_without_a_prompt_of_ones_own_the_peer_is_asked_for_a_term_and_a_few_sentences():
    script = Script(lambda asked: f"{TAG} Yes.")
    informed(rolled((WIRE, [("a", 0.0)])), Feedback(tutor="physics", student="chemistry"), write=script)
    expected = FEEDBACK
    slots = {"question": ASKED, "response": "a", "tutor_domain": "physics", "student_domain": "chemistry"}
    for name, text in slots.items():
        expected = expected.replace(f"{{{name}}}", text)
    assert script.contents == [expected]


def test_every_rollout_reads_the_first_other_success_and_its_own_feedback():
    group = rolled((WIRE, [("a", 0.0), ("<think>x</think>b", 1.0), ("c", 1.0)]))
    script = peer(a=f"{TAG} On a.", b=f"{TAG} On b.", c=f"<think>{TAG} B</think>{TAG}\nOn c.\n")
    rollouts = informed(group, feedback(), write=script)
    assert prompts(rollouts) == [f"{ASKED}[b](On a.).", f"{ASKED}[c](On b.).", f"{ASKED}[b](On c.)."]
    assert [texts_of(rollout) for rollout in rollouts.kept] == [("[b](On a.)",), ("[c](On b.)",), ("[b](On c.)",)]
    assert (rollouts.counts["written"], drops(rollouts)) == (3, {})


def test_either_part_may_be_missing_and_a_rollout_with_neither_is_left_out():
    group = rolled((WIRE, [("a", 0.0), ("b", 1.0), ("c", 0.0)]), (ROD, [("d", 0.0), ("e", 0.0)]))
    said = {"a": f"{TAG} On a.", "b": f"{TAG} On b.", "c": "no tag", "d": "<concept>rod</concept> On d.", "e": "no tag"}
    rollouts = informed(group, feedback(), write=peer(**said))
    assert places(rollouts) == [("wire", 0), ("wire", 1), ("wire", 2), ("rod", 0)]
    assert prompts(rollouts) == [
        f"{ASKED}[b](On a.).",
        f"{ASKED}(On b.).",  # a lone success
        f"{ASKED}[b].",  # dropped feedback
        "How long is the rod?(On d.).",  # no success
    ]
    assert drops(rollouts) == {"no_concept_tag": 2}
    assert (rollouts.counts["no_hint"], rollouts.counts["kept"]) == (1, 4)


def test_the_whole_prompt_of_a_teacher_with_both_parts():
    group = rolled((ROD, [("a", 0.0), ("b", 1.0)]))
    rollouts = informed(group, Feedback(), write=Script(lambda asked: "<concept>rod</concept> Step 2 fails."))
    assert prompts(rollouts)[0] == (
        "How long is the rod?\n"
        "\n\nA right solution:\nb"
        "\n\nA reviewer's advice:\nStep 2 fails."
        "\n\nNow write your solution."
    )


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Step 2 fails.", "no_concept_tag"),
        ("<concept> </concept> Step 2 fails.", "empty"),
        ("<concept>the answer</concept> Step 2 fails.", "all_generic"),
        ("<concept>entropy</concept> Step 2 fails.", "no_match"),
        (TAG, "fb_none"),
        (f"<think>{TAG} Step 2 fails.", "fb_none"),
        (f"{TAG} The correct option is B.", "fb_none"),
        (Written(None, "timeout"), "timeout"),
    ],
)
def test_feedback_that_is_not_safe_is_dropped_and_counted_by_reason(said: Written | str, reason: str):
    rollouts = informed(rolled((WIRE, [("a", 0.0)])), feedback(), write=peer(a=said))
    assert (rollouts.size, drops(rollouts), rollouts.counts["no_hint"]) == (0, {reason: 1}, 1)


def test_what_gives_the_answer_away_is_deleted_before_the_teacher_reads_it():
    said = rf"{TAG} Step 2 has \boxed{{7}}, not \boxed{{B}}. Option A is too large. Final answer: B"
    rollouts = informed(rolled((WIRE, [("a", 0.0)])), feedback(), write=peer(a=said))
    assert prompts(rollouts) == [rf"{ASKED}(Step 2 has \boxed{{7}}, not . Option A is too large.)."]
    free = informed(
        rolled((ROD, [("a", 0.0)])), feedback(), write=peer(a="<concept>rod</concept> Add. The answer is 12.")
    )
    assert prompts(free) == ["How long is the rod?(Add.)."]


def test_feedback_that_need_not_be_anchored_is_taken_as_it_is_without_its_thinking():
    group = rolled((WIRE, [("a", 0.0), ("b", 0.0)]))
    script = peer(a="<think>x</think>\n**B** is right. \n", b="<think>never ends")
    rollouts = informed(group, feedback(anchored=False), write=script)
    assert prompts(rollouts) == [f"{ASKED}(**B** is right.)."]
    assert drops(rollouts) == {"empty": 1}


@pytest.mark.parametrize("options", [{}, {"own": True}, {"at_least": 0.5}, {"choice": "random"}])
def test_without_a_writer_it_is_the_sibling_up_to_white_space(options: dict[str, Any]):
    group = rolled((WIRE, [("a", 0.0), ("b", 1.0), ("c", 0.5)]), (ROD, [("d", 1.0)]), (ROD, [("e", 0.0)]))
    alone = informed(group, Feedback(writing=None, **options), write=nobody)
    sibling = informed(group, Sibling(**options), write=nobody)
    assert places(alone) == places(sibling) != []
    assert [one.split() for one in prompts(alone)] == [one.split() for one in prompts(sibling)]
    assert alone.counts == sibling.counts


def test_too_much_dropped_feedback_stops_the_run():
    group = rolled((WIRE, [("a", 0.0), ("b", 1.0)]))
    with pytest.raises(Stopped) as stopped:
        informed(group, feedback(0.4), write=peer(a=f"{TAG} On a.", b="no tag"))
    assert str(stopped.value).startswith("1 of 2 written texts had to be dropped (no_concept_tag 1), more than the")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"template": "{question}"}, "the context's template has no {hint}"),
        ({"solution": "text"}, "the context's template has no {hint}"),
        ({"comment": "text"}, "the context's template has no {hint}"),
        ({"comment": "{hint}{response}"}, "asks for {response}"),
        ({"prompt": "{question}"}, "the context's prompt has no {response}; add it where that text belongs"),
        ({"prompt": "{response}{answer}"}, "the context's prompt asks for {answer}"),
        ({"prompt": "{response"}, "the context's prompt is not a template"),
        ({"longest": 0}, ".longest is 0; give a whole number of at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_one_sentence(options: dict[str, Any], says: str):
    with pytest.raises(InputError) as refusal:
        feedback(**options)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
