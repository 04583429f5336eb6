"""Teacher prompts from hints to what a teacher reads: tokens, limits, analyses, and the student's ids untouched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from dllm_sd.decoding.settings import Decoding
from dllm_sd.losses import Each, PurifiedPMI, ReverseKL
from dllm_sd.methods.method import Method
from dllm_sd.objective.plan import plan_update
from dllm_sd.policies.loading import AnyPolicy
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.gates import All, Correct
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.rollouts.rules import PassAtK, gather
from dllm_sd.rollouts.stored import load_rollouts, rollout_tensors
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.teachers import AnyContext, LaterStep, NoQuestion, Nothing, Reasoning, Reference, Sibling, Suffix
from dllm_sd.teachers.prompts import build_teacher_prompts
from tests.teachers.briefs import prompts_of

BATCH = (3, 7)
CANVAS = Decoding(length=12, block_length=4, tokens_per_step=2)
BRIEF = "{question}({hint})"


class Sums:
    """A question, a solution and an answer of digits."""

    def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{problem.fields['question']}=" if question else "="}]

    def reference(self, problem: Problem) -> str | None:
        return problem.fields.get("solution")

    def final_answer(self, problem: Problem) -> str | None:
        return problem.fields.get("answer")


TASK: Any = Sums()
PROBLEMS = [
    Problem("a", {"question": "1+2", "solution": "7777", "answer": "3"}),
    Problem("b", {"question": "10+20", "solution": "888888", "answer": "30"}),
]
ATTEMPTS = [[("41", 0.0), ("42*9", 1.0), ("43", 1.0)], [("51", 0.5), ("52", 0.0), ("53", 1.0)]]


@dataclass
class Writer:
    """Writes the number of the prompt, and notes what it was asked."""

    asked: list[tuple[int, list[list[int]], Reasoning, list[int]]] = field(default_factory=list)

    def __call__(
        self, context: int, prompts: Sequence[Sequence[int]], reasoning: Reasoning, keys: Sequence[int]
    ) -> list[str]:
        self.asked.append((context, [list(prompt) for prompt in prompts], reasoning, list(keys)))
        return [f" {context}{i}\n" for i in range(len(prompts))]


def nobody(*_: Any) -> list[str]:
    raise AssertionError("nobody was to write")


@pytest.fixture(scope="module")
def causal(make_policy: Callable[..., Any]) -> AnyPolicy:
    return make_policy(as_="autoregressive")


@pytest.fixture(params=["denoiser", "autoregressive"])
def each(request: pytest.FixtureRequest, policy: AnyPolicy, causal: AnyPolicy) -> AnyPolicy:
    return policy if request.param == "denoiser" else causal


EVERYTHING = All()
RULE = PassAtK(attempts=3, keep="all", until_solved=False)


def rolled(policy: AnyPolicy, gate: Any = EVERYTHING, problems: Sequence[Problem] = PROBLEMS) -> Rollouts:
    """Three attempts at each problem."""
    tried = [
        [
            Rollout(
                problem,
                i,
                text,
                Grade(score == 1, score, None),
                policy.demonstration(policy.encode(TASK.messages(problem)), policy.encode_completion(text), CANVAS),
            )
            for i, (text, score) in enumerate(attempts)
        ]
        for problem, attempts in zip(problems, ATTEMPTS, strict=True)
    ]
    return gather(RULE, gate, tried)


def informed(
    policy: AnyPolicy,
    *contexts: AnyContext,
    write: Any = nobody,
    gate: Any = EVERYTHING,
    **options: Any,
) -> Rollouts:
    return build_teacher_prompts(rolled(policy, gate, **options), contexts, TASK, policy, write, BATCH)


def text_of(policy: AnyPolicy, prompt: Sequence[int] | None) -> str | None:
    return None if prompt is None else policy.text(prompt)


def prompts(policy: AnyPolicy, rollouts: Rollouts, context: int = 0) -> list[str | None]:
    return [text_of(policy, rollout.briefs[context].prompt) for rollout in rollouts.kept]


def test_without_a_hint_nothing_is_asked_and_nothing_changes(policy):
    before = rolled(policy)
    assert build_teacher_prompts(before, (Suffix(), Nothing()), TASK, policy, nobody, BATCH) is before
    assert build_teacher_prompts(before, (), TASK, policy, nobody, BATCH) is before


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (Reference(template=BRIEF), ["1+2=(7777)"] * 3 + ["10+20=(888888)"] * 3),
        (Reference(template="{hint},{question}", source="answer"), ["3,1+2="] * 3 + ["30,10+20="] * 3),
        (Reference(template=BRIEF, question=False), ["=(7777)"] * 3 + ["=(888888)"] * 3),
        (NoQuestion(), ["="] * 6),
        (
            Sibling(template=BRIEF, own=True),
            ["1+2=(42*9)"] * 3 + ["10+20=(53)"] * 3,
        ),
        (Suffix(prompt=Reference(template=BRIEF)), ["1+2=(7777)"] * 3 + ["10+20=(888888)"] * 3),
        (LaterStep(prompt=NoQuestion()), ["="] * 6),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_prompt_is_the_template_with_question_and_hint_as_the_policy_renders_it(each, context, expected):
    rollouts = informed(each, context)
    assert prompts(each, rollouts) == expected
    for rollout, text in zip(rollouts.kept, expected, strict=True):
        content = [{"role": "user", "content": text}]
        assert prompts_of(rollout) == (tuple(each.encode(content)),)
    assert rollouts.counts["no_hint"] == rollouts.counts["long_hint"] == 0
    assert rollouts.counts["kept"] == 6


def test_what_stands_before_the_last_message_stays(policy):
    class LazyLogits(Sums):
        def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
            return [{"role": "system", "content": "0{9}"}, *super().messages(problem, question)]

    task: Any = LazyLogits()
    rollouts = build_teacher_prompts(rolled(policy), (Reference(template=BRIEF),), task, policy, nobody, BATCH)
    messages = [{"role": "system", "content": "0{9}"}, {"role": "user", "content": "1+2=(7777)"}]
    assert prompts_of(rollouts.kept[0]) == (tuple(policy.encode(messages)),)


def test_each_context_has_its_own_prompt_and_those_without_a_hint_none(policy):
    rollouts = informed(policy, Suffix(), Reference(template=BRIEF), Nothing(weight=0.3), NoQuestion())
    assert {tuple(brief.weight for brief in rollout.briefs) for rollout in rollouts.kept} == {(1.0, 1.0, 0.3, 1.0)}
    assert [len(prompts_of(rollout)) for rollout in rollouts.kept] == [4] * 6
    assert prompts(policy, rollouts, 0) == prompts(policy, rollouts, 2) == [None] * 6
    assert prompts(policy, rollouts, 1)[3] == "10+20=(888888)"
    assert prompts(policy, rollouts, 3) == ["="] * 6


def test_rollouts_without_a_hint_are_left_out_and_counted(each):
    rollouts = informed(each, Sibling(template=BRIEF))
    # Of problem b one attempt succeeded, which has no sibling.
    assert [(rollout.problem.id, rollout.attempt) for rollout in rollouts.kept] == [
        *(("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1))
    ]
    assert prompts(each, rollouts) == ["1+2=(42*9)", "1+2=(43)", "1+2=(42*9)", "10+20=(53)", "10+20=(53)"]
    assert (rollouts.counts["no_hint"], rollouts.counts["long_hint"], rollouts.counts["kept"]) == (1, 0, 5)
    assert rolled(each).counts["kept"] == 6
    assert rollouts.counts["tokens"] == rolled(each).counts["tokens"]
    assert len(rollouts.chosen) == 6


def test_siblings_are_looked_for_among_the_rollouts_that_the_gate_rejected_too(policy):
    @dataclass(frozen=True)
    class Wrong:
        count_rejected = False

        def __call__(self, attempts: Sequence[Rollout]) -> list[Rollout]:
            return [rollout for rollout in attempts if not rollout.grade.correct]

    rollouts = informed(policy, Sibling(template=BRIEF), gate=Wrong())
    assert prompts(policy, rollouts) == ["1+2=(42*9)", "10+20=(53)", "10+20=(53)"]


def test_a_rollout_needs_the_hints_of_all_contexts_and_is_lost_once(policy):
    few = [replace(PROBLEMS[0], fields={"question": "1+2"}), PROBLEMS[1]]
    rollouts = informed(policy, Reference(template=BRIEF), Sibling(template=BRIEF), problems=few)
    assert [(rollout.problem.id, rollout.attempt) for rollout in rollouts.kept] == [("b", 0), ("b", 1)]
    assert (rollouts.counts["no_hint"], rollouts.counts["kept"]) == (4, 2)


def test_prompts_that_are_too_long_are_dropped_and_counted(each):
    longest = len("1+2=(7777)")
    rollouts = informed(each, Reference(template=BRIEF, longest=longest))
    assert [rollout.problem.id for rollout in rollouts.kept] == ["a"] * 3
    assert (rollouts.counts["no_hint"], rollouts.counts["long_hint"], rollouts.counts["kept"]) == (0, 3, 3)
    none = informed(each, Reference(template=BRIEF, longest=longest - 1))
    assert (none.size, none.counts["long_hint"], none.counts["kept"]) == (0, 6, 0)


@pytest.mark.parametrize("longest", range(4, 18))
def test_a_hint_is_cut_at_its_end_and_nothing_else_is(each, longest):
    problems = [
        replace(PROBLEMS[0], fields={"question": "1+2", "solution": "1234"}),
        replace(PROBLEMS[1], fields={"question": "10+20", "solution": "123456789"}),
    ]
    rollouts = informed(
        each, Reference(template="{question}({hint}),", longest=longest, overflow="cut"), problems=problems
    )
    expected: list[str] = []
    cut = 0
    for question, solution in (("1+2=", "1234"), ("10+20=", "123456789")):
        room = longest - len(question) - len("(),")
        if room >= 0:
            expected += [f"{question}({solution[:room]}),"] * 3
            cut += 3 * (room < len(solution))
    assert prompts(each, rollouts) == expected
    assert rollouts.counts["long_hint"] == 6 - len(expected)
    assert rollouts.counts["cut_hint"] == cut
    assert all(len(rollout.briefs[0].prompt or ()) <= longest for rollout in rollouts.kept)


# The thinking switch

SWITCH = (
    "{% for message in messages %}{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '*' if enable_thinking else '-' }}{% endif %}"
)


@pytest.mark.parametrize("usual", [True, False])
@pytest.mark.parametrize(("thinking", "mark"), [(True, "*"), (False, "-"), (None, None)])
def test_the_thinking_switch_of_a_teacher_may_differ_from_the_students(make_policy, usual, thinking, mark):
    policy = make_policy(chat_template=SWITCH, thinking=usual)
    student = "*" if usual else "-"
    rollouts = informed(policy, Reference(template=BRIEF, thinking=thinking))
    assert prompts(policy, rollouts)[0] == f"1+2=(7777){mark or student}"
    assert policy.text(rollouts.kept[0].trajectory.prompt_ids[0].tolist()) == f"1+2={student}"


# Reason first

REASONING = Reasoning(instruction="0", transition="+-", length=9, temperature=0.5)


def test_a_teacher_that_reasons_first_is_asked_with_the_instruction_and_reads_what_it_wrote(each):
    write = Writer()
    contexts = (Nothing(), Reference(template=BRIEF, reasoning=REASONING))
    rollouts = informed(each, *contexts, write=write)
    ((context, asked, reasoning, keys),) = write.asked
    assert (context, reasoning) == (1, REASONING)
    assert [each.text(prompt) for prompt in asked[::3]] == ["1+2=(7777)\n\n0", "10+20=(888888)\n\n0"]
    assert keys == [make_key(*BATCH, rollout.problem.id, rollout.attempt, "analysis", 1) for rollout in rollouts.kept]
    assert len(set(keys)) == 6
    for i, rollout in enumerate(rollouts.kept):
        opening = each.encode_completion(f"1{i}+-", ended=False)
        assert prompts_of(rollout) == (None, (*asked[i], *opening))


def test_every_context_that_reasons_writes_for_itself_with_other_keys(policy):
    write = Writer()
    hints = [Reference(template=BRIEF, reasoning=REASONING), Reference(template="{hint}", reasoning=REASONING)]
    rollouts = informed(policy, *hints, write=write)
    assert [context for context, *_ in write.asked] == [0, 1]
    assert not set(write.asked[0][3]) & set(write.asked[1][3])
    assert prompts(policy, rollouts, 0)[4] == "10+20=(888888)\n\n004+-"
    assert prompts(policy, rollouts, 1)[4] == "888888\n\n014+-"


def test_only_rollouts_that_are_kept_are_reasoned_about(policy):
    write = Writer()
    informed(policy, Sibling(template=BRIEF, reasoning=REASONING), write=write)
    assert len(write.asked[0][1]) == 5
    nothing = informed(policy, Reference(template=BRIEF, reasoning=REASONING, longest=3), write=nobody)
    assert nothing.size == 0


def test_the_limit_counts_the_instruction_but_no_analysis(policy):
    longest = len("1+2=(7777)\n\n0")
    rollouts = informed(policy, Reference(template=BRIEF, reasoning=REASONING, longest=longest), write=Writer())
    assert rollouts.size == 3
    assert all(len(rollout.briefs[0].prompt or ()) > longest for rollout in rollouts.kept)
    cut = Reference(template=BRIEF, reasoning=REASONING, longest=longest - 1, overflow="cut")
    assert prompts(policy, informed(policy, cut, write=Writer()))[0] == "1+2=(777)\n\n000+-"


def test_teacher_prompts_survive_a_checkpoint(each):
    rollouts = informed(each, Nothing(), Reference(template=BRIEF))
    tensors, tree = rollout_tensors(rollouts)
    again = load_rollouts(tensors, tree)
    assert [prompts_of(one) for one in again.kept] == [prompts_of(one) for one in rollouts.kept]
    assert again.kept[0].briefs[0].prompt is None
    assert again.counts == rollouts.counts
    for one, other in zip(again.kept, rollouts.kept, strict=True):
        assert one.trajectory.causal == each.causal
        assert torch.equal(one.trajectory.tokens, other.trajectory.tokens)


# What the objective makes of them


def plan_of(policy: AnyPolicy, *contexts: AnyContext, decoded: bool = False, **parts: Any) -> tuple[Any, Rollouts]:
    """All that is read in an update, and the rollouts it is made of."""
    method = Method(rollout=RULE, gate=All(), contexts=contexts, **{"target": Each(), **parts})
    rollouts = informed(policy, *contexts)
    plan = plan_update(method, rollouts, rollouts.keys(0, 0))
    assert plan is not None
    return plan.micro_batch(), rollouts


def by_hand(plan: Any, canvas: int, prompt: str, policy: AnyPolicy) -> list[int]:
    """A prompt and the completion side of one of the student's canvases."""
    return [*policy.encode([{"role": "user", "content": prompt}]), *plan.canvases.ids[canvas, -12:].tolist()]


def read(reading: Any, canvas: int) -> list[int]:
    """What stands behind the padding of the prompt."""
    return reading.ids[canvas][reading.mask[canvas].cumsum(0) > 0].tolist()


def test_readings_hold_the_right_prompt_before_the_students_canvas(each):
    plan, rollouts = plan_of(each, Reference(template=BRIEF), NoQuestion(), Nothing())
    for canvas in range(plan.size):
        problem = rollouts.kept[int(plan.canvases.rows[canvas])].problem
        question, solution = f"{problem.fields['question']}=", problem.fields["solution"]
        texts = (f"{question}({solution})", "=", question)
        for reading, text in zip(plan.teacher_inputs, texts, strict=True):
            assert read(reading, canvas) == by_hand(plan, canvas, text, each)
            assert torch.equal(reading.mask[canvas, -12:], plan.canvases.mask[canvas, -12:])
            assert not reading.shown.any()
    assert max(seen.ids.shape[1] for seen in plan.teacher_inputs) == 12 + len("10+20=(888888)")


def test_the_hint_is_in_no_column_of_the_student(each):
    plan, rollouts = plan_of(each, Reference(template=BRIEF), Sibling(own=True, template=BRIEF))
    student = plan.canvases
    bracket = each.encode([{"role": "user", "content": "("}])[0]
    assert not (student.ids == bracket).any()
    assert all((reading.ids == bracket).any(1).all() for reading in plan.teacher_inputs)
    for canvas in range(plan.size):
        trajectory = rollouts.kept[int(student.rows[canvas])].trajectory
        assert student.ids[canvas][:-12][student.mask[canvas][:-12]].tolist() == trajectory.prompt_ids[0].tolist()


def test_a_suffix_behind_a_prompt_of_its_own_reveals_what_it_would_without(policy):
    suffix = Suffix(ratio=0.5)
    contexts = (suffix, replace(suffix, prompt=Reference(template=BRIEF)), replace(suffix, prompt=NoQuestion()))
    plan, rollouts = plan_of(policy, *contexts, target=PurifiedPMI(), divergence=ReverseKL())
    plain, *others = plan.teacher_inputs
    assert plain.shown.any()
    for reading in others:
        assert torch.equal(reading.shown, plain.shown)
        assert torch.equal(reading.ids[:, -12:], plain.ids[:, -12:])
        assert torch.equal(reading.mask[:, -12:], plain.mask[:, -12:])
    revealed = plan.canvases.tokens[plain.shown]
    assert torch.equal(plain.ids[:, -12:][plain.shown], revealed)
    for canvas in range(plan.size):
        problem = rollouts.kept[int(plan.canvases.rows[canvas])].problem
        for reading, text in zip(
            others, (f"{problem.fields['question']}=({problem.fields['solution']})", "="), strict=True
        ):
            prompt = policy.encode([{"role": "user", "content": text}])
            assert read(reading, canvas)[: len(prompt)] == prompt
            assert len(read(reading, canvas)) == len(prompt) + 12
    assert not (plan.candidates & plain.shown).any()


def test_sites_of_student_and_teacher_are_the_same_tokens(causal):
    """The logits of a teacher with a longer prompt speak of the student's tokens, column by column from the right."""
    plan, _ = plan_of(causal, Reference(template=BRIEF))
    (reading,) = plan.teacher_inputs
    width = reading.ids.shape[1] - plan.canvases.ids.shape[1]
    assert width > 0
    assert torch.equal(reading.ids[:, -12:], plan.canvases.ids[:, -12:])
    assert torch.equal(plan.candidates, plan.canvases.masked)


def test_an_analysis_stands_between_the_prompt_and_the_canvas(causal):
    contexts = (Reference(template=BRIEF, reasoning=REASONING),)
    rollouts = informed(causal, *contexts, write=Writer())
    method = Method(rollout=RULE, gate=All(), contexts=contexts)
    planned = plan_update(method, rollouts, rollouts.keys(0, 0))
    assert planned is not None
    plan = planned.micro_batch()
    for canvas in range(plan.size):
        row = int(plan.canvases.rows[canvas])
        problem = rollouts.kept[row].problem
        text = f"{problem.fields['question']}=({problem.fields['solution']})\n\n00{row}+-"
        assert read(plan.teacher_inputs[0], canvas) == by_hand(plan, canvas, text, causal)


def test_a_gate_that_lets_nothing_pass_leaves_nothing_to_inform(policy):
    wrong = [[("1", 0.0)] * 3] * 2
    tried = [
        [replace(rollout, grade=Grade(False, 0.0, None)) for rollout in rolled(policy).kept[3 * i : 3 * i + 3]]
        for i in range(len(wrong))
    ]
    rollouts = build_teacher_prompts(gather(RULE, Correct(), tried), (Reference(),), TASK, policy, nobody, BATCH)
    assert (rollouts.size, rollouts.counts["kept"], rollouts.counts["rejected"]) == (0, 0, 6)
