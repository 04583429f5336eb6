"""Critiques as hints: what the critic is asked, what is used of its copy, and where a rollout first goes wrong."""

from typing import Any

import pytest

from dllm_sd.randomness import make_key
from dllm_sd.tasks.task import Problem
from dllm_sd.teachers import Critique, Suffix
from dllm_sd.teachers.writing import Writing
from dllm_sd.texts.critique import CRITIC_ANSWER, CRITIC_REFERENCE, CRITIQUE_TEACHER, FORMS, Form
from dllm_sd.writers import Request, Written
from tests.teachers.briefs import texts_of
from tests.teachers.scripted import Script, drops, informed, places, prompts, rolled

BAGS = Problem("bags", {"question": "3 bags of 4, and 1?", "solution": "3*4=12, 12+1=13", "answer": "13"})
BARE = Problem("bare", {"question": "How many?"})
WRONG = "<step_1>3 bags</step_1>\n<step_2>3*4=13</step_2>\n<step_3>13+1=14</step_3>\n<answer>14</answer>"
RIGHT = "<step_1>3 bags</step_1>\n<step_2>3*4=12</step_2>\n<step_3>12+1=13</step_3>\n<answer>13</answer>"
BRIEF = "{question}({hint})"


def critic(answer: Written | str) -> Script:
    return Script(lambda asked: answer)


def critique(tolerance: float = 1.0, **options: Any) -> Critique:
    return Critique(**{"template": BRIEF, "writing": Writing(tolerance=tolerance), **options})


def one(text: str = WRONG) -> Any:
    return rolled((BAGS, [(text, 0.0)]))


@pytest.mark.parametrize(("truth", "slot"), [("answer", "13"), ("solution", "3*4=12, 12+1=13")])
def test_a_critic_is_asked_about_each_rollout_with_what_is_right_and_without_its_thinking(truth: Any, slot: str):
    script = critic(RIGHT)
    prompt = "{question}|{truth}|{trace}"
    group = rolled((BAGS, [("<think>well</think> a", 0.0), (" b\n", 1.0)]))
    informed(group, critique(truth=truth, prompt=prompt), write=script)
    asked = [f"3 bags of 4, and 1?|{slot}|{trace}" for trace in ("a", "b")]
    assert script.requests == [
        Request(({"role": "user", "content": content},), make_key(3, 7, "bags", attempt, "writing"))
        for attempt, content in enumerate(asked)
    ]


@pytest.mark.parametrize(
    ("truth", "prompt", "slot"), [("answer", CRITIC_ANSWER, "13"), ("solution", CRITIC_REFERENCE, "3*4=12, 12+1=13")]
)
def test_the_critics_prompt_fits_what_it_knows(truth: Any, prompt: str, slot: str):
    script = critic(RIGHT)
    informed(one(), critique(truth=truth), write=script)
    for name, text in (("question", "3 bags of 4, and 1?"), ("truth", slot), ("trace", WRONG)):
        prompt = prompt.replace(f"{{{name}}}", text)
    assert script.contents == [prompt]


def test_the_key_of_a_critique_is_another_for_every_batch():
    keys = set()
    for batch in ((3, 7), (3, 8), (4, 7)):
        script = critic(RIGHT)
        informed(rolled((BAGS, [(WRONG, 0.0)] * 2)), critique(), write=script, batch=batch)
        keys |= {request.key for request in script.requests}
    assert len(keys) == 6


@pytest.mark.parametrize("truth", ["answer", "solution"])
def test_where_the_data_does_not_say_what_is_right_nothing_is_asked(truth: Any):
    script = critic(RIGHT)
    rollouts = informed(rolled((BAGS, [(WRONG, 0.0)]), (BARE, [(WRONG, 0.0)])), critique(0, truth=truth), write=script)
    assert (len(script.requests), places(rollouts)) == (1, [("bags", 0)])
    assert (rollouts.counts["written"], rollouts.counts["no_hint"], drops(rollouts)) == (1, 1, {})


def test_where_nothing_can_be_asked_no_writer_is_called():
    script = critic(RIGHT)
    rollouts = informed(rolled((BARE, [(WRONG, 0.0)])), critique(0), write=script)
    assert (script.asked, rollouts.size) == ([], 0)
    assert (rollouts.counts["written"], rollouts.counts["cached"]) == (0, 0)


def test_the_teacher_reads_the_question_and_the_corrected_copy():
    rollouts = informed(one(), Critique(), write=critic(f"<think>{WRONG}</think>Case D.\n{RIGHT}\nDone."))
    assert prompts(rollouts) == [CRITIQUE_TEACHER.replace("{question}", "3 bags of 4, and 1?").replace("{hint}", RIGHT)]
    assert texts_of(rollouts.kept[0]) == (RIGHT,)


@pytest.mark.parametrize(
    ("form", "hint"),
    [
        ("verbatim_prefix", RIGHT),
        (
            "full_quote",
            "<step_1>3 bags</step_1>\n<step_2>3*4=13\nThat was wrong. The right step:\n3*4=12</step_2>\n"
            "<step_3>12+1=13</step_3>\n<answer>13</answer>",
        ),
        (
            "no_trace",
            "<step_1>Step 1 is correct.</step_1>\n<step_2>3*4=12</step_2>\n<step_3>12+1=13</step_3>\n"
            "<answer>13</answer>",
        ),
    ],
)
def test_the_copy_is_shown_in_the_form_that_is_asked_for(form: Any, hint: str):
    rollouts = informed(one(f"<think>{RIGHT}</think>{WRONG}"), critique(form=form), write=critic(RIGHT))
    assert prompts(rollouts) == [f"3 bags of 4, and 1?({hint})"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("It is wrong.", "no_steps"),
        (f"<think>{RIGHT}", "no_steps"),
        (RIGHT.replace("step_2", "step_5"), "bad_order"),
        (RIGHT.replace("</answer>", ""), "no_answer"),
        (RIGHT.replace("3*4=12", "Not 3*4=13 but 3*4=12"), "quotes_error"),
        (Written(None, "timeout"), "timeout"),
    ],
)
def test_a_copy_that_cannot_be_used_is_dropped_and_counted_by_reason(answer: Written | str, reason: str):
    rollouts = informed(one(), critique(), write=critic(answer))
    assert (rollouts.size, drops(rollouts), rollouts.counts["no_hint"]) == (0, {reason: 1}, 1)


def test_a_rollout_that_is_not_in_steps_may_be_corrected_too():
    rollouts = informed(one("fourteen"), critique(form="full_quote"), write=critic(RIGHT))
    assert prompts(rollouts) == [f"3 bags of 4, and 1?({RIGHT})"]


def test_a_critique_says_where_its_rollout_is_right_goes_wrong_and_follows():
    thought = f"<think>{RIGHT}</think>"
    for before in ("", "Well: ", thought):
        (rollout,) = informed(one(before + WRONG), critique(), write=critic(RIGHT)).kept
        (note,) = texts_of(rollout)
        shift = len(before)
        spans = [(0, 24, "prefix"), (24, 47, "error"), (47, 92, "after")]
        expected = [(start + shift, end + shift, kind) for start, end, kind in spans]
        assert critique().marks(rollout.text, note or "") == expected
    assert WRONG[24:47] == "<step_2>3*4=13</step_2>"
    assert len(WRONG) == 92
    assert critique().marks(WRONG, WRONG) == [(0, 92, "prefix")]
    assert critique().marks(WRONG, "") == []


@pytest.mark.parametrize("form", ["full_quote", "no_trace"])
@pytest.mark.parametrize("right", [RIGHT, RIGHT.replace("bags", "sacks"), RIGHT.replace("12", "13", 1), WRONG])
def test_the_other_forms_say_the_same_of_where_a_rollout_goes_wrong(form: Form, right: str):
    plain = critique().marks(WRONG, right)
    assert plain
    assert critique(form=form).marks(WRONG, FORMS[form](WRONG, right)) == plain


def test_a_critique_may_stand_before_a_canvas_with_a_suffix():
    script = critic(RIGHT)
    rollouts = informed(one(), Suffix(prompt=critique()), critique(), write=script)
    assert prompts(rollouts, 0) == prompts(rollouts, 1) == [f"3 bags of 4, and 1?({RIGHT})"]
    assert len(script.requests) == 1
