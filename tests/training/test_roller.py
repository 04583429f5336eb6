"""Whose weights make the rollouts: the initial ones whatever the student has learnt, and those of a subspace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dllm_sd.errors import InputError
from dllm_sd.policies.decoding import Decoding
from dllm_sd.policies.loading import AnyPolicy
from dllm_sd.policies.model import Lora
from dllm_sd.policies.subspace import Subspace, collect, projected
from dllm_sd.policies.weights import Base, Live, Teacher, trained
from dllm_sd.rollouts import PassAtK
from dllm_sd.tasks.task import Problem
from dllm_sd.training.roller import Roller, supervised
from dllm_sd.training.sharding import start_accelerator

DECODE = Decoding(length=16, block_length=4, tokens_per_step=1)
PROMPTS, KEYS = [[4, 5, 6], [7, 8]], [11, 12]
KINDS = [{}, {"lora": Lora(rank=2, alpha=8)}, {"as_": "autoregressive"}]


class Sums:
    """Sums with a worked way to the answer."""

    def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
        return [{"role": "user", "content": "12+3="}]

    def reference(self, problem: Problem) -> str | None:
        return problem.fields.get("reference")

    def final_answer(self, problem: Problem) -> str | None:
        return "15"


TASK: Any = Sums()
PROBLEMS = [Problem(str(i), {"reference": f"1{i}+15-{i}=15"}) for i in range(4)]


def move(policy: AnyPolicy) -> None:
    """Something like an update."""
    with torch.no_grad():
        for value in trained(policy).values():
            value.add_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=value.dtype))


def tokens(policy: AnyPolicy) -> list[list[int]]:
    return policy.decode(PROMPTS, DECODE, KEYS).tokens.tolist()


def roller(policy: AnyPolicy, part: Live | Base | Subspace) -> Roller:
    return Roller(PassAtK(policy=part), policy, {Base(): Teacher(Base(), policy)}, start_accelerator(False))


@pytest.mark.parametrize("kind", KINDS, ids=["full", "lora", "autoregressive"])
def test_the_base_rolls_out_with_the_initial_weights_and_the_student_with_its_own(make_policy, kind):
    policy = make_policy(**kind)
    before, base, live = tokens(policy), roller(policy, Base()), roller(policy, Live())
    move(policy)
    after = tokens(policy)
    assert after != before
    with base.present(policy.module):
        assert tokens(policy) == before
    with live.present(policy.module):
        assert tokens(policy) == after
    assert tokens(policy) == after


@pytest.mark.parametrize("kind", KINDS, ids=["full", "lora", "autoregressive"])
def test_a_subspace_is_that_of_the_initial_weights_and_is_left_without_a_trace(make_policy, kind):
    policy, other = make_policy(**kind), make_policy(**kind)
    settings = Subspace(rank=2, calibration=3)
    held = roller(policy, settings)
    move(policy)
    after = tokens(policy)
    held.calibrate(TASK, PROBLEMS)
    layers = settings.chosen(2, 32)
    found = settings(collect(other.module, [supervised(other, TASK, one) for one in PROBLEMS[:3]], layers, 256))
    assert held.projectors.keys() == found.keys()
    with projected(other.module.network, found):
        expected = tokens(other)
    assert expected != tokens(other)
    with held.present(policy.module):
        assert tokens(policy) == expected
    assert tokens(policy) == after


@pytest.mark.parametrize("kind", [{}, {"as_": "autoregressive"}], ids=["denoiser", "autoregressive"])
def test_the_tokens_of_the_last_answer_are_what_is_to_be_right(make_policy: Callable[..., Any], kind):
    policy = make_policy(**kind)
    found = supervised(policy, TASK, PROBLEMS[2])
    prompt = policy.encode(TASK.messages(PROBLEMS[2]))
    assert found.targets.tolist() == [*prompt, *policy.encode_completion("12+15-2=15", ended=False)]
    assert found.sites.tolist() == [False] * (len(prompt) + 8) + [True, True]
    expected = found.targets if policy.causal else found.targets.masked_fill(found.sites, policy.mask_id)
    assert torch.equal(found.ids, expected)


def test_what_has_no_subspace_is_refused_in_one_sentence(make_policy):
    policy = make_policy()
    with pytest.raises(InputError, match="problem x has no reference with a final answer"):
        supervised(policy, TASK, Problem("x", {}))
    with pytest.raises(InputError, match=r"method.rollout.policy.rank is 99, .* give at most 32"):
        roller(policy, Subspace(rank=99)).calibrate(TASK, PROBLEMS)
