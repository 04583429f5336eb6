"""Whose weights make the rollouts: the initial ones whatever the student has learnt, and those of a subspace."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from dllm_sd.config import Config, build_config
from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError
from dllm_sd.experience.rollout_weights import RolloutWeights, supervised
from dllm_sd.methods import METHODS
from dllm_sd.network.subspace import Subspace, collect, projected
from dllm_sd.policies.loading import AnyPolicy
from dllm_sd.policies.weights import BaseWeights, LiveWeights, TeacherModel, trained
from dllm_sd.pretrained.model import Lora
from dllm_sd.rollouts.rollout import Prompted
from dllm_sd.rollouts.rules import PassAtK
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.training.trainer import Trainer
from tests.tiers import later

DECODE = Decoding(length=16, block_length=4, tokens_per_step=1)
PROMPTS, KEYS = [[4, 5, 6], [7, 8]], [11, 12]
KINDS = {"full": {}, "lora": {"lora": Lora(rank=2, alpha=8)}, "autoregressive": {"as_": "autoregressive"}}


def kinds(*first: str) -> pytest.MarkDecorator:
    """All kinds of policies as the cases of a test, of which some are in the first tier, each in some test."""
    cases = [
        pytest.param(kind, id=name, marks=() if name in first else pytest.mark.slow) for name, kind in KINDS.items()
    ]
    return pytest.mark.parametrize("kind", cases)


class Sums:
    """Sums with a worked way to the answer."""

    def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
        return [{"role": "user", "content": "12+3="}]

    def reference(self, problem: Problem) -> str | None:
        return problem.fields.get("reference")

    def final_answer(self, problem: Problem) -> str | None:
        return "15"


TASK: Any = Sums()
GRADED: Any = SimpleNamespace(grade=lambda problem, text: Grade(False, 0.0, None))
PROBLEMS = [Problem(str(i), {"reference": f"1{i}+15-{i}=15"}) for i in range(4)]


def move(policy: AnyPolicy) -> None:
    """Something like an update."""
    with torch.no_grad():
        for value in trained(policy).values():
            value.add_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=value.dtype))


def tokens(policy: AnyPolicy) -> list[list[int]]:
    return policy.decode(PROMPTS, DECODE, KEYS).tokens.tolist()


def roller(policy: AnyPolicy, part: LiveWeights | BaseWeights | Subspace) -> RolloutWeights:
    return RolloutWeights(
        PassAtK(policy=part), policy, {BaseWeights(): TeacherModel(BaseWeights(), policy)}, Accelerator()
    )


@kinds("lora", "autoregressive")
def test_the_base_rolls_out_with_the_initial_weights_and_the_student_with_its_own(make_policy, kind):
    policy = make_policy(**kind)
    before, base, live = tokens(policy), roller(policy, BaseWeights()), roller(policy, LiveWeights())
    move(policy)
    after = tokens(policy)
    assert after != before
    with base.applied(policy.module):
        assert tokens(policy) == before
    with live.applied(policy.module):
        assert tokens(policy) == after
    assert tokens(policy) == after


@kinds("full")
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
    with held.applied(policy.module):
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


def test_a_task_without_references_is_refused_before_anything_is_held(make_policy):
    policy = make_policy()
    held = roller(policy, Subspace(rank=2, calibration=3))
    with pytest.raises(InputError) as refusal:
        held.calibrate(TASK, [Problem("0", {"reference": "12+3=15"}), Problem("1", {})])
    assert str(refusal.value) == (
        "method.rollout.policy subspace learns from right answers, but problem 1 has no reference with a final answer; "
        "name data that has, or another policy"
    )
    assert not held.projectors


def test_an_answer_is_looked_for_from_the_end_and_one_that_is_not_there_marks_nothing(make_policy):
    policy = make_policy(as_="autoregressive")
    start = len(policy.encode(TASK.messages(PROBLEMS[0])))
    for reference, sites in (("15=15", [3, 4]), ("15+1", [0, 1]), ("115-5", [1, 2]), ("3*5", [])):
        found = supervised(policy, TASK, Problem("x", {"reference": reference}))
        assert (found.sites.nonzero().flatten() - start).tolist() == sites, reference


# In a run.


def config_at(tmp_path: Path, run: str, policy: Any, kind: dict[str, Any], updates: int = 4) -> Config:
    rows = ({"question": f"{i}+3=", "answer": str(i + 3), "way": f"3+{i}={i + 3}"} for i in range(20))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = {"random_init": True, "tokenizer": "tiny", "dtype": "float64", **kind}
    task = {"name": "jsonl", "data": str(tmp_path / "data.jsonl"), "size_dev": 2, "reference_field": "way"}
    return build_config(
        {
            "run": str(tmp_path / run),
            "updates": updates,
            "model": {**model, "shape": {**shape, "initializer_range": 0.3}},
            "task": task,
            "decode": {"length": 8, "block_length": 4},
            "method": {"name": "spd", "rollout": {"problems": 3, "policy": policy}},
            "optim": {"lr": 0.02, "weight_decay": 0.0},
            "eval": {"every": 0, "final_problems": 0},
            "checkpoint": {"every": 2},
            "log": {"progress": False, "trackers": []},
        }
    )


BASIS = {"name": "subspace", "rank": 3, "calibration": 4}
ADAPTED, CAUSAL = {"lora": {"rank": 2, "alpha": 8}}, {"as": "autoregressive"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "kind"),
    [("base", {}), *later((BASIS, ADAPTED), ("base", CAUSAL), ("base", ADAPTED), (BASIS, {}), (BASIS, CAUSAL))],
)
def test_a_run_rolls_out_with_the_initial_weights_to_its_end_and_after_a_stop(tmp_path, kind, part):
    whole = Trainer(config_at(tmp_path, "whole", part, kind))
    initial = {name: value.clone() for name, value in trained(whole.policy).items()}
    texts = [[one.text for one in whole.pipeline.take(i, 3 * i)[0].chosen] for i in range(4)]
    seen: list[list[str]] = []

    def watch(trainer: Trainer) -> Trainer:
        take = trainer.pipeline.take

        def noting(batch: int, cursor: int) -> Any:
            found = take(batch, cursor)
            seen.append([one.text for one in found[0].chosen])
            return found

        trainer.pipeline.take = noting
        return trainer

    watch(whole).train()
    assert seen == texts  # as if nothing had been learnt
    assert not any(torch.equal(value, initial[name]) for name, value in trained(whole.policy).items())
    seen.clear()
    watch(Trainer(config_at(tmp_path, "broken", part, kind))).train(2)
    resumed = watch(Trainer(config_at(tmp_path, "broken", part, kind)))
    assert resumed.state.update == 2
    resumed.train()
    assert seen == texts
    for name, value in trained(resumed.policy).items():
        assert torch.equal(value, dict(trained(whole.policy))[name]), name


def test_a_fixed_draw_gives_a_problem_the_same_text_whenever_it_is_met(make_policy):
    """In any batch, beside whatever else; a fresh draw does not."""
    policy = make_policy(as_="autoregressive")

    def texts(rule: PassAtK, batch: int, *numbers: int) -> list[list[int]]:
        prompted = [Prompted(PROBLEMS[i], tuple(PROMPTS[i % 2]), occurrence=batch % 2) for i in numbers]
        tried = rule(policy, GRADED, prompted, DECODE, 5, batch)
        return [attempts[0].trajectory.tokens[0].tolist() for attempts in tried]

    fixed, fresh = (
        PassAtK(attempts=1, temperature=1.0, policy=BaseWeights(), draw=draw) for draw in ("fixed", "fresh")
    )
    first = texts(fixed, 0, 0, 1, 2)
    assert texts(fixed, 7, 2, 0) == [first[2], first[0]]
    assert first[0] != first[2]  # one prompt, two problems
    assert texts(fresh, 7, 2, 0) != texts(fresh, 0, 2, 0)
    with pytest.raises(InputError, match=r"method\.rollout\.draw fixed"):
        PassAtK(draw="fixed")
    for name in ("spd", "self_distillation", "self_retraining"):
        rule = METHODS[name].method.rollout
        assert isinstance(rule, PassAtK)
        assert rule.draw == "fixed"
