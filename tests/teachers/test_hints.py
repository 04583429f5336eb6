"""What a teacher's prompt is made of: the reference, a sibling's success, or a prompt without the question."""

from collections.abc import Sequence
from typing import Any

import pytest

from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.rollout import Rollout
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.teachers import (
    HINTS,
    Critique,
    Feedback,
    LaterStep,
    NoQuestion,
    Nothing,
    Reference,
    Rubric,
    Sibling,
    Skills,
    Suffix,
)
from dllm_sd.teachers.context import HintInputs, TeacherPrompt
from dllm_sd.teachers.hints import OWN_WORDS, REFERENCE, SIBLING

PROBLEM = Problem("p", {"question": "12+3", "solution": "12+3=15", "answer": "15"})
KEY = make_key("hint")


class Sums:
    """Asks with a system text; its data may lack a solution or an answer."""

    def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
        asked = f"{problem.fields['question']}=?" if question else "=?"
        return [{"role": "system", "content": "0"}, {"role": "user", "content": asked}]

    def reference(self, problem: Problem) -> str | None:
        return problem.fields.get("solution")

    def final_answer(self, problem: Problem) -> str | None:
        return problem.fields.get("answer")


TASK: Any = Sums()


@pytest.fixture
def group(policy: Any) -> Any:
    """Attempts at one problem, with these scores and texts."""

    def build(scores: Sequence[float], texts: Sequence[str] | None = None) -> list[Rollout]:
        trajectory = policy.demonstration([4], [5, 1], Decoding(length=4, block_length=4))
        texts = texts or [f"text {i}" for i in range(len(scores))]
        return [
            Rollout(PROBLEM, i, text, Grade(score == 1, score, None), trajectory)
            for i, (score, text) in enumerate(zip(scores, texts, strict=True))
        ]

    return build


def first(ask: TeacherPrompt | None) -> TeacherPrompt:
    assert ask is not None
    return ask


def test_the_table_names_every_hint():
    assert {
        "reference": Reference,
        "sibling": Sibling,
        "no_question": NoQuestion,
        "rubric": Rubric,
        "critique": Critique,
        "feedback": Feedback,
        "skills": Skills,
    } == HINTS


def test_a_reference_is_the_datas_solution_or_its_answer_behind_the_tasks_own_messages(group):
    (one,) = group([0])
    messages = tuple(TASK.messages(PROBLEM))
    assert Reference().prompt_for(HintInputs(one, [one], TASK, KEY)) == TeacherPrompt(messages, REFERENCE, "12+3=15")
    assert Reference(source="answer").prompt_for(HintInputs(one, [one], TASK, KEY)) == TeacherPrompt(
        messages, OWN_WORDS, "15"
    )
    for template in (REFERENCE, OWN_WORDS):
        assert "{question}" in template
        assert "{hint}" in template
        assert Reference(source="answer", template=template).wording == template


def test_a_reference_without_the_question_leaves_all_else_as_it_is(group):
    (one,) = group([0])
    found = first(Reference(question=False).prompt_for(HintInputs(one, [one], TASK, KEY)))
    assert found == TeacherPrompt(tuple(TASK.messages(PROBLEM, False)), REFERENCE, "12+3=15")
    assert not any("12" in message["content"] for message in found.messages)


def test_a_reference_of_another_problem_is_shown_with_the_own_question(group):
    (rollout,) = group([0])
    others = [Problem(f"o{i}", {"question": f"{i}", "solution": f"{i}={i}", "answer": f"{i}"}) for i in range(3)]
    others[1:1] = [PROBLEM, Problem("bare", {"question": "x"})]
    seen = set()
    for number in range(20):
        inputs = HintInputs(rollout, [rollout], TASK, make_key(number), others)
        shown = Reference(problem="another").prompt_for(inputs)
        own = Reference().prompt_for(inputs)
        assert shown is not None
        assert own is not None
        assert shown.messages == own.messages
        seen.add(shown.text)
    assert seen == {"0=0", "1=1", "2=2"}
    assert Reference(problem="another").prompt_for(HintInputs(rollout, [rollout], TASK, KEY, [PROBLEM])) is None


@pytest.mark.parametrize("source", ["solution", "answer"])
def test_where_the_data_has_no_reference_there_is_no_hint(group, source):
    (one,) = group([0])
    bare = Rollout(Problem("p", {"question": "1"}), 0, "", one.grade, one.trajectory)
    assert Reference(source=source).prompt_for(HintInputs(bare, [bare], TASK, KEY)) is None


def test_the_first_success_is_the_sibling_of_all_but_itself(group):
    attempts = group([0, 0.9, 1, 0, 1])
    found = [Sibling().prompt_for(HintInputs(one, attempts, TASK, KEY)) for one in attempts]
    assert [first(ask).text for ask in found] == ["text 2", "text 2", "text 4", "text 2", "text 2"]
    assert all(first(ask).template == SIBLING for ask in found)
    assert all(first(ask).messages == tuple(TASK.messages(PROBLEM)) for ask in found)


def test_a_lone_success_has_no_hint_unless_it_may_be_its_own(group):
    attempts = group([0, 1, 0])
    assert Sibling().prompt_for(HintInputs(attempts[1], attempts, TASK, KEY)) is None
    assert first(Sibling(own=True).prompt_for(HintInputs(attempts[1], attempts, TASK, KEY))).text == "text 1"
    assert first(Sibling().prompt_for(HintInputs(attempts[0], attempts, TASK, KEY))).text == "text 1"
    assert Sibling(own=True).prompt_for(HintInputs(attempts[0], attempts[:1], TASK, KEY)) is None


def test_an_attempt_succeeds_from_the_score_that_is_asked_for(group):
    attempts = group([0.4, 0.5, 0.49, 1])
    assert first(Sibling(at_least=0.5).prompt_for(HintInputs(attempts[0], attempts, TASK, KEY))).text == "text 1"
    assert first(Sibling(at_least=0.45).prompt_for(HintInputs(attempts[1], attempts, TASK, KEY))).text == "text 2"
    assert first(Sibling(at_least=0.4).prompt_for(HintInputs(attempts[1], attempts, TASK, KEY))).text == "text 0"
    assert Sibling(at_least=0.6).prompt_for(HintInputs(attempts[3], attempts, TASK, KEY)) is None


def test_a_random_success_is_one_for_the_whole_problem_and_depends_on_its_key(group):
    attempts = group([1, 0, 1, 1, 0, 1])
    hint, drawn = Sibling(choice="random"), set()
    for seed in range(40):
        key = make_key("problem", seed)
        texts = [first(hint.prompt_for(HintInputs(one, attempts, TASK, key))).text for one in attempts]
        assert texts == [first(hint.prompt_for(HintInputs(one, attempts[::-1], TASK, key))).text for one in attempts]
        favourite = texts[1]
        assert texts[4] == favourite
        other = [text for i, text in enumerate(texts) if text != favourite]
        assert len(other) == 1, "only the favourite itself reads another"
        assert texts.index(other[0]) == int(favourite[-1])
        own = Sibling(choice="random", own=True)
        assert {first(own.prompt_for(HintInputs(one, attempts, TASK, key))).text for one in attempts} == {favourite}
        drawn.add(favourite)
    assert drawn == {"text 0", "text 2", "text 3", "text 5"}


def test_thinking_is_left_out_of_a_siblings_text_unless_it_is_wanted(group):
    text = "<think>1</think>2</think>\n 3 \n"
    attempts = group([0, 1], ["", text])
    assert first(Sibling().prompt_for(HintInputs(attempts[0], attempts, TASK, KEY))).text == "3"
    assert first(Sibling(strip_thinking=False).prompt_for(HintInputs(attempts[0], attempts, TASK, KEY))).text == text
    plain = group([0, 1], ["", " no tag "])
    assert first(Sibling().prompt_for(HintInputs(plain[0], plain, TASK, KEY))).text == " no tag "


def test_a_prompt_without_the_question_is_the_tasks_own_and_hints_at_nothing(group):
    (one,) = group([0])
    assert NoQuestion().prompt_for(HintInputs(one, [one], TASK, KEY)) == TeacherPrompt(
        tuple(TASK.messages(PROBLEM, False)), "{question}", ""
    )


@pytest.mark.parametrize("build", [Reference, Sibling], ids=["reference", "sibling"])
@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{question}", "has no {hint}"),
        ("{question} {{hint}}", "has no {hint}"),
        ("{question} {hint} {answer}", "asks for {answer}"),
        ("{hint!r}", "asks for {hint}"),
        ("{hint.fields}", "asks for {hint.fields}"),
        ("{hint", "is not a template"),
    ],
)
def test_a_template_without_the_hint_or_with_anything_else_is_refused(build, template, says):
    with pytest.raises(InputError) as refusal:
        build(template=template)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_template_may_leave_out_the_question(group):
    (one,) = group([0])
    assert first(Reference(template="{hint}").prompt_for(HintInputs(one, [one], TASK, KEY))).template == "{hint}"


@pytest.mark.parametrize("build", [Reference, Sibling, NoQuestion])
def test_a_longest_prompt_of_nothing_is_refused(build):
    with pytest.raises(InputError, match="longest is 0; give a whole number of at least 1"):
        build(longest=0)


def test_contexts_say_what_they_need():
    assert [part().hint is not None for part in (Nothing, Suffix, LaterStep, Reference, Sibling, NoQuestion)] == [
        *(False, False, False, True, True, True)
    ]
    assert [part().reveals for part in (Nothing, Suffix, LaterStep, Reference, Sibling, NoQuestion)] == [
        *(False, True, True, False, False, False)
    ]
    assert [part.needs_group for part in (Reference, Sibling, NoQuestion)] == [False, True, False]
    assert Suffix(prompt=Sibling()).hint == Sibling()
    assert LaterStep(prompt=Reference()).hint == Reference()
