"""A control exchanges one thing: the hint or the revealed tokens of another problem, or the question."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from dllm_sd.decoding.queue import Listed
from dllm_sd.decoding.settings import Decoding
from dllm_sd.methods.method import Method
from dllm_sd.objective.plan import plan_update
from dllm_sd.probing.accuracy import revealed
from dllm_sd.probing.controls import ControlKind, control, find_donors, kinds_for
from dllm_sd.probing.probe import controlled
from dllm_sd.rollouts.gates import All
from dllm_sd.rollouts.horizons import Truncated
from dllm_sd.rollouts.rollout import Prompted, Rollouts
from dllm_sd.rollouts.rules import Demonstrations, PassAtK, gather
from dllm_sd.tasks.task import Problem
from dllm_sd.teachers import Nothing, Reference, Rubric, Suffix
from dllm_sd.teachers.prompts import build_teacher_prompts
from dllm_sd.trajectory import NEVER
from tests.stub_task import StubTask

PROMPTED = [Prompted(Problem(f"p{i}", {"rubric": [f"{i}+", f"{i}{i}"]}), tuple(range(4, 6 + i))) for i in range(3)]
DECODE = Decoding(length=16, block_length=4, tokens_per_step=1)
KINDS: tuple[ControlKind, ...] = ("own", "another", "no_question")


class Own(StubTask):
    """Every problem has a reference of its own."""

    def reference(self, problem: Problem) -> str:
        return f"{problem.id[1:]}*{problem.id[1:]}"


def hinted(context: Any, policy: Any) -> tuple[Rollouts, Method]:
    """Rollouts of three problems with the briefs of a teacher and its controls, and the method of these."""
    task, rule = cast(Any, Own()), PassAtK(attempts=1, temperature=1.0)
    rollouts = gather(rule, All(), rule(policy, task, PROMPTED, DECODE, 3, 0))
    own = build_teacher_prompts(rollouts, (context,), task, policy, lambda *_: [], (0, 0))
    donors = find_donors(own, own.keys(0, 0), 0)
    contexts = tuple(control(context, kind, donors) for kind in KINDS)
    method = controlled(Method(rollout=rule, gate=All(), contexts=(context,)), contexts, 0)
    return build_teacher_prompts(rollouts, contexts, task, policy, lambda *_: [], (0, 0)), method


def test_a_hint_is_exchanged_and_the_question_stays_or_the_other_way_round(policy: Any) -> None:
    rollouts, _ = hinted(Reference(template="{question}({hint})"), policy)
    found = [[policy.text(brief.prompt or ()) for brief in rollout.briefs] for rollout in rollouts.kept]
    assert found == [
        ["0+1=(0*0)", "0+1=(1*1)", "=(0*0)"],
        ["1+1=(1*1)", "1+1=(2*2)", "=(1*1)"],
        ["2+1=(2*2)", "2+1=(0*0)", "=(2*2)"],
    ]


def test_other_slots_of_a_template_are_exchanged_with_the_hint(policy: Any) -> None:
    rubric = Rubric(source="data", reference=True, lines=True, template="{question}{reference}({hint})")
    rollouts, _ = hinted(rubric, policy)
    found = [policy.text(brief.prompt or ()) for brief in rollouts.kept[0].briefs]
    assert found == ["0+1=0*0(0+\n00)", "0+1=1*1(1+\n11)", "=0*0(0+\n00)"]


def test_revealed_tokens_are_those_of_another_rollout_in_the_same_places(policy: Any) -> None:
    rollouts, method = hinted(Suffix(ratio=1.0), policy)
    plan = plan_update(method, rollouts, rollouts.keys(0, 0))
    assert plan is not None
    own, another, alone = (revealed(plan, i) for i in range(3))
    tokens = rollouts.trajectory.tokens
    for row in range(3):
        shown = own[row] != NEVER
        assert 0 < int(shown.sum()) <= 12  # three of four blocks, if the completion is long enough
        assert torch.equal(own[row][shown], tokens[row][shown])
        assert torch.equal(another[row][shown], tokens[(row + 1) % 3][shown])
        assert torch.equal(another[row] != NEVER, shown)
        assert torch.equal(alone[row], own[row])
        assert policy.text(rollouts.kept[row].briefs[2].prompt or ()) == "="


def test_a_teacher_that_is_shown_nothing_and_one_problem_have_no_controls(policy: Any) -> None:
    rollouts, _ = hinted(Reference(template="{question}({hint})"), policy)
    donors = find_donors(rollouts, rollouts.keys(0, 0), 0)
    alone = find_donors(replace(rollouts, kept=rollouts.kept[:1]), rollouts.keys(0, 0), 0)
    assert kinds_for(Nothing(), donors, True) == ("own",)
    assert kinds_for(Suffix(), donors, False) == ("own", "another")
    assert kinds_for(Reference(), alone, True) == ("own", "no_question")
    assert kinds_for(Reference(), donors, True) == KINDS


def test_rollouts_that_are_looked_at_are_complete_and_not_chosen_by_their_outcome() -> None:
    rule = PassAtK(attempts=8, horizon=Truncated(0.1)).unselected()
    assert (rule.attempts, rule.cuts, rule.needs_outcome) == (1, False, False)  # type: ignore[attr-defined]
    group = PassAtK(attempts=8, keep="all", until_solved=False)
    assert group.unselected() == group
    assert Demonstrations().unselected() == Demonstrations()


@pytest.mark.parametrize("length", [1, 4])
def test_tokens_that_are_given_stay_and_the_others_are_decoded(make_policy: Callable[..., Any], length: int) -> None:
    policy = make_policy()
    settings = Decoding(length=16, block_length=4, tokens_per_step=length, temperature=1.0, early_end=False)
    given = torch.full((2, 16), NEVER)
    given[0, 4:], given[1, [1, 6]] = 7, 8
    queue = Listed([(4, 5), (4, 6, 7)], [1, 2], given=list(given))
    policy.decoder.complete(queue, settings)
    done = queue.collected()
    assert torch.equal(done.tokens[given != NEVER], given[given != NEVER])
    assert bool((done.reveal_step != NEVER).all())
    assert not bool((done.tokens == policy.mask_id).any())
    whole = torch.full((1, 16), NEVER)
    queue = Listed([(4, 5)], [1], given=list(whole))
    policy.decoder.complete(queue, settings)
    assert torch.equal(queue.collected().tokens, policy.decode([(4, 5)], settings, [1]).tokens)
