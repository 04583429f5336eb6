"""Rubrics as hints, and what holds for all hints that somebody writes: what is asked, by which key, what is dropped."""

from collections.abc import Callable
from typing import Any

import pytest

from dllm_sd.errors import InputError, Stopped
from dllm_sd.randomness import make_key
from dllm_sd.tasks.task import Problem
from dllm_sd.teachers import AnyContext, Critique, Nothing, Reference, Rubric
from dllm_sd.teachers.context import HintInputs, TeacherPrompt
from dllm_sd.teachers.writing import Writing
from dllm_sd.texts import generic, noisy, parse_rubric, reduced, render_rubric
from dllm_sd.texts import rubric as rubrics
from dllm_sd.writers import Request, Sampling, Server, Written
from tests.teachers.briefs import texts_of, weights_of
from tests.teachers.scripted import BATCH, TASK, Script, drops, informed, nobody, places, prompts, rolled

SKY = Problem("sky", {"question": "Why is the sky blue?", "solution": "Short waves scatter most."})
SEA = Problem("sea", {"question": "Why is the sea salty?", "solution": "Rivers carry salt."})
ATTEMPTS = [("one", 0.0), ("two", 1.0)]
ROLLOUTS = rolled((SKY, ATTEMPTS), (SEA, ATTEMPTS))
BRIEF = "{question}({hint})"
GOOD = '[{"title": "Cause", "description": "Essential Criteria: Names the cause.", "weight": 5}]'


def by_question(**answers: Written | str) -> Script:
    """Answers by a word of the question."""
    return Script(lambda asked: next(answer for word, answer in answers.items() if word in asked))


def written(tolerance: float = 0.5, **options: Any) -> Rubric:
    return Rubric(**{"template": BRIEF, "prompt": "<{question}>", "writing": Writing(tolerance=tolerance), **options})


# What is asked


def test_a_rubric_is_asked_for_by_the_question_with_one_key_for_all_rollouts_of_a_problem():
    script = by_question(sky=GOOD, sea=GOOD)
    rollouts = informed(ROLLOUTS, written(), write=script)
    sky, sea = (
        Request(({"role": "user", "content": f"<{problem.fields['question']}>"},), make_key(3, problem.id, "writing"))
        for problem in (SKY, SEA)
    )
    assert script.asked == [(Writing(), [sky, sky, sea, sea])]
    assert prompts(rollouts) == [f"{one.fields['question']}({GOOD})" for one in (SKY, SKY, SEA, SEA)]


def test_the_key_of_a_rubric_is_the_same_in_every_batch_and_another_in_every_run():
    keys = {}
    for batch in ((3, 7), (3, 8), (4, 7)):
        script = by_question(sky=GOOD, sea=GOOD)
        informed(ROLLOUTS, written(), write=script, batch=batch)
        keys[batch] = [request.key for request in script.requests]
    assert keys[3, 7] == keys[3, 8]
    assert not set(keys[3, 7]) & set(keys[4, 7])


def test_the_writers_prompt_may_hold_the_reference_and_braces_in_it_are_left_alone():
    script = by_question(sky=GOOD, salty=GOOD)
    odd = Problem("odd", {"question": "{hint} of the sky", "solution": "a {b}"})
    bare = Problem("bare", {"question": "A salty one"})
    rollouts = rolled((odd, ATTEMPTS[:1]), (bare, ATTEMPTS[:1]))
    informed(rollouts, written(prompt="{question} = {reference}."), write=script)
    assert script.contents == ["{hint} of the sky = a {b}.", "A salty one = ."]


def test_without_a_prompt_of_ones_own_the_writer_is_asked_by_the_question_alone():
    script = by_question(sky=GOOD, sea=GOOD)
    informed(ROLLOUTS, Rubric(writing=Writing()), write=script)
    assert script.contents[0].startswith("You write marking schemes. Below is a question.")
    assert "\nQuestion:\nWhy is the sky blue?\n\nHow" in script.contents[0]
    assert "Short waves scatter most." not in script.contents[0]
    assert '[{"title": "Units converted"' in script.contents[0]


def test_equal_hints_are_written_once_and_others_each_for_itself():
    script = by_question(sky=GOOD, sea=GOOD)
    other = written(writing=Writing(sampling=Sampling(temperature=0.7)))
    rollouts = informed(ROLLOUTS, written(), Nothing(), written(), other, Reference(template=BRIEF), write=script)
    assert [(writing.sampling.temperature, len(requests)) for writing, requests in script.asked] == [(0.0, 4), (0.7, 4)]
    assert rollouts.counts["written"] == 8
    assert prompts(rollouts, 0) == prompts(rollouts, 2) == prompts(rollouts, 3)
    assert texts_of(rollouts.kept[0]) == (GOOD, None, GOOD, GOOD, "Short waves scatter most.")
    assert weights_of(rollouts.kept[0]) == (1.0,) * 5


def test_a_hint_that_nobody_writes_asks_nobody():
    rollouts = informed(ROLLOUTS, Rubric(source="generic"), write=nobody)
    assert "written" not in rollouts.counts
    assert places(rollouts) == [("sky", 0), ("sky", 1), ("sea", 0), ("sea", 1)]


# What is dropped


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Written(None, "timeout"), "timeout"),
        (Written(None, "http_503"), "http_503"),
        (Written(None, None), "no_text"),
        ("no list", "no_list"),
        (GOOD[:-1], "unfinished"),
        (GOOD[: len(GOOD) // 2], "unfinished"),
        (f"<think>{GOOD}", "unfinished"),
        ("[]", "empty"),
        ('["a", 3]', "bad_item"),
    ],
)
def test_a_rollout_without_a_usable_text_is_left_out_and_the_reason_counted(answer: Written | str, reason: str):
    rollouts = informed(ROLLOUTS, written(), write=by_question(sky=answer, sea=GOOD))
    assert places(rollouts) == [("sea", 0), ("sea", 1)]
    assert drops(rollouts) == {reason: 2}
    counted = {name: rollouts.counts[name] for name in ("written", "cached", "no_hint", "long_hint", "kept")}
    assert counted == {"written": 4, "cached": 0, "no_hint": 2, "long_hint": 0, "kept": 2}
    assert not any(name.startswith("dropped/") for name in ROLLOUTS.counts), "the counts before are left alone"


def test_texts_from_the_cache_are_counted():
    script = by_question(sky=Written(GOOD, None, cached=True), sea=GOOD)
    rollouts = informed(ROLLOUTS, written(), write=script)
    assert (rollouts.counts["written"], rollouts.counts["cached"], drops(rollouts)) == (4, 2, {})


def test_the_counts_of_several_hints_add_up():
    script = by_question(sky="[]", sea=Written(GOOD, None, cached=True))
    rollouts = informed(ROLLOUTS, written(), written(template="{hint}{question}"), write=script)
    assert (rollouts.counts["written"], rollouts.counts["cached"], drops(rollouts)) == (8, 4, {"empty": 4})
    assert (rollouts.counts["no_hint"], rollouts.counts["kept"]) == (2, 2)


@pytest.mark.parametrize("tolerance", [0.5, 0.6, 1.0])
def test_as_many_drops_as_are_tolerated_stop_nothing(tolerance: float):
    rollouts = informed(ROLLOUTS, written(tolerance), write=by_question(sky="[]", sea=GOOD))
    assert drops(rollouts) == {"empty": 2}


def test_more_drops_than_are_tolerated_stop_the_run_with_one_sentence():
    three = rolled((SKY, [("one", 0.0)]), (SEA, [("one", 0.0)] * 3))
    with pytest.raises(Stopped) as stopped:
        informed(three, written(0.49), write=by_question(sky="[]", sea=Written(None, "timeout")))
    assert str(stopped.value) == (
        "4 of 4 written texts had to be dropped (timeout 3, empty 1), more than the share of 0.49 that method.contexts "
        "tolerates; fix the writer, or raise writing.tolerance"
    )
    with pytest.raises(
        Stopped, match=r"^2 of 4 written texts had to be dropped \(empty 2\), more than the share of 0 "
    ):
        informed(ROLLOUTS, written(0), write=by_question(sky="[]", sea=GOOD))


def test_where_everything_is_tolerated_nothing_may_be_left():
    rollouts = informed(ROLLOUTS, written(1), write=by_question(sky="", sea=Written(None, "refused")))
    assert (rollouts.size, drops(rollouts), rollouts.counts["no_hint"]) == (0, {"no_list": 2, "refused": 2}, 4)


# Rubrics, written or not


def test_a_rubric_is_written_anew_unless_it_is_to_be_lines():
    said = f"<think>[1]</think>\nHere: {GOOD.replace(': ', ':')} So.\n"
    script = by_question(sky=said, sea=said)
    again = GOOD.replace("Criteria: ", "Criteria:")
    assert prompts(informed(ROLLOUTS, written(), write=script))[0] == f"{SKY.fields['question']}({again})"
    lines = by_question(sky="<think>x</think>\n 1. Cause\n2. Effect \n", sea="<think>never ends")
    rollouts = informed(ROLLOUTS, written(lines=True), write=lines)
    assert prompts(rollouts) == ["Why is the sky blue?(1. Cause\n2. Effect)"] * 2
    assert drops(rollouts) == {"empty": 2}


def test_the_teacher_reads_the_question_the_rubric_and_what_to_do_with_it():
    rollouts = informed(ROLLOUTS, Rubric(writing=Writing()), write=by_question(sky=GOOD, sea=GOOD))
    before, after = rubrics.RUBRIC_TEACHER.split("{hint}")
    assert prompts(rollouts)[0] == before.replace("{question}", "Why is the sky blue?") + GOOD + after


FIVE = [f"Essential Criteria: {name}" for name in ("a", "b", "c", "d", "e")]
TWO = ["Important Criteria: y", {"title": "Z", "description": "Pitfall: z", "weight": "-2"}]
RICH = Problem("rich", {"question": "R", "rubric": FIVE, "marks": '["m"]', "solution": "ref"})
POOR = Problem("poor", {"question": "P", "rubric": TWO})
BOTH = rolled((RICH, ATTEMPTS), (POOR, ATTEMPTS))
KEYS = {one.id: make_key(make_key(*BATCH, one.id, "hint"), "rubric") for one in (RICH, POOR)}


def criteria(items: object) -> rubrics.Criteria:
    found = parse_rubric(items)
    assert isinstance(found, rubrics.Criteria)
    return found


def unwritten(source: Any, **options: Any) -> Rubric:
    return Rubric(source=source, template="{hint}", **options)


@pytest.mark.parametrize(
    ("source", "make"),
    [
        ("data", lambda own, other, key: own),
        ("generic", lambda own, other, key: generic()),
        ("random", lambda own, other, key: other),
        ("reduced", lambda own, other, key: reduced(own, key)),
        ("noisy", lambda own, other, key: noisy(own, [other], key)),
    ],
)
def test_a_rubric_that_nobody_writes_is_that_of_the_data_or_made_of_it(source: str, make: Callable[..., Any]):
    own, other = criteria(FIVE), criteria(TWO)
    expected = [render_rubric(make(own, other, KEYS["rich"])), render_rubric(make(other, own, KEYS["poor"]))]
    found = prompts(informed(BOTH, unwritten(source)))
    assert found == [expected[0], expected[0], expected[1], expected[1]]


def test_the_rubric_of_the_data_is_written_as_a_json_list():
    found = prompts(informed(BOTH, unwritten("data")))
    assert found[2] == (
        '[{"description": "Important Criteria: y", "weight": 3},\n'
        '{"title": "Z", "description": "Pitfall: z", "weight": -2}]'
    )
    lines = prompts(informed(BOTH, unwritten("data", lines=True)))
    assert lines[2] == "Important Criteria: y\nPitfall: z"


def test_the_degraded_rubrics_have_the_right_share_of_items():
    reduced_one = criteria(prompts(informed(BOTH, unwritten("reduced")))[0])
    assert len(reduced_one.criteria) == 3
    assert set(reduced_one.criteria) <= set(criteria(FIVE).criteria)
    mixed = criteria(prompts(informed(BOTH, unwritten("noisy")))[0]).criteria
    assert [sum(one in criteria(items).criteria for one in mixed) for items in (FIVE, TWO)] == [3, 2]


def test_a_degraded_rubric_changes_with_the_batch_and_not_from_call_to_call():
    for source in ("reduced", "noisy"):
        found = [prompts(informed(BOTH, unwritten(source), batch=(3, update)))[0] for update in range(12)]
        assert found == [prompts(informed(BOTH, unwritten(source), batch=(3, update)))[0] for update in range(12)]
        assert len(set(found)) > 1


def test_a_random_rubric_is_any_but_the_problems_own():
    pool = [Problem(f"{n}", {"question": f"{n}", "rubric": [f"item {n}"]}) for n in range(4)]
    one = rolled((pool[1], ATTEMPTS[:1]))
    hint = unwritten("random", lines=True)
    found = [prompts(informed(one, hint, problems=pool, batch=(0, update)))[0] for update in range(60)]
    assert set(found) == {"item 0", "item 2", "item 3"}


def test_the_field_of_the_rubric_can_be_named_and_rollouts_without_it_are_left_out():
    rollouts = informed(BOTH, unwritten("data", field="marks", lines=True))
    assert (prompts(rollouts), rollouts.counts["no_hint"]) == (["m", "m"], 2)


@pytest.mark.parametrize("source", ["data", "reduced"])
@pytest.mark.parametrize("own", [None, [], [3], "no list", {}])
def test_without_a_rubric_in_the_data_there_is_none_to_show_or_to_halve(source: str, own: object):
    bad = Problem("bad", {"question": "B", "rubric": own})
    rollouts = informed(rolled((bad, ATTEMPTS[:1])), unwritten(source), problems=[bad, RICH])
    assert (rollouts.size, rollouts.counts["no_hint"]) == (0, 1)
    assert prompts(informed(rolled((bad, ATTEMPTS[:1])), unwritten("generic"))) == [render_rubric(generic())]


def test_the_reference_stands_beside_the_rubric_where_it_is_wanted():
    template = "{question}|{reference}|{hint}"
    hint = Rubric(source="data", field="marks", lines=True, reference=True, template=template)
    (one, *_) = informed(BOTH, hint).kept
    assert prompts(informed(BOTH, hint)) == ["R|ref|m"] * 2
    assert texts_of(one) == ("m",)
    occasion = HintInputs(one, [one], TASK, 1, [RICH])
    assert hint.prompt_for(occasion) == TeacherPrompt(
        tuple(TASK.messages(RICH)), hint.template, "m", {"reference": "ref"}
    )


def test_a_rollout_without_the_reference_that_is_wanted_is_left_out():
    hint = Rubric(source="data", reference=True, template=rubrics.RUBRIC_TEACHER_REFERENCE)
    rollouts = informed(BOTH, hint)
    assert (places(rollouts), rollouts.counts["no_hint"]) == ([("rich", 0), ("rich", 1)], 2)
    assert "Only you can see it:\nref\n\nWhat a marker" in prompts(rollouts)[0]


# What is refused


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Rubric(), "set source to written and writing, or neither"),
        (lambda: Rubric(source="data", writing=Writing()), "set source to written and writing, or neither"),
        (lambda: unwritten("generic", longest=0), ".longest is 0; give a whole number of at least 1"),
        (lambda: Rubric(source="data", template="{question}"), "the context's template has no {hint}"),
        (lambda: Rubric(source="data", template="{hint}{reference}"), "asks for {reference}"),
        (lambda: Rubric(source="data", template="{hint}{answer}", reference=True), "asks for {answer}"),
        (lambda: Critique(writing=None), "a critique context needs somebody who writes it; set its writing"),
        (lambda: Critique(template="{question}"), "the context's template has no {hint}"),
        (lambda: Critique(template="{hint}{truth}"), "asks for {truth}"),
        (lambda: Writing(tolerance=-0.1), "Writing.tolerance is"),
        (lambda: Writing(tolerance=1.1), "Writing.tolerance is"),
        (lambda: Writing(writer=Server()), "url"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_one_sentence(build: Callable[[], AnyContext | Writing], says: str):
    with pytest.raises(InputError) as refusal:
        build()
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert ". " not in str(refusal.value)
