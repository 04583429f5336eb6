"""Cross-entropy on prompt and text (`method.sites.prompt`), compared with that of the plain network."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from dllm_sd import METHODS, InputError, load_policy
from dllm_sd.config import load_config
from dllm_sd.decoding.settings import Decoding
from dllm_sd.losses.sites import Revealed
from dllm_sd.methods.method import Method
from dllm_sd.network.site_head import run_at_sites
from dllm_sd.objective.equation import grade_micro_batch
from dllm_sd.objective.plan import plan_update
from dllm_sd.pairing import check_model
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.training.broken_sites import broken_sites
from dllm_sd.training.pictures import divergence_table

TEXTS = (("12:", "3+4"), ("4321+1:", "2"), ("1", "44"))


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny_ar", dtype="float64")


@pytest.fixture(scope="module")
def rollouts(policy):
    kept = []
    for i, (prompt, text) in enumerate(TEXTS):
        tokens = policy.encode_completion(text)
        trajectory = policy.demonstration(policy.chat.tokenizer.encode(prompt), tokens, Decoding(length=6))
        kept.append(Rollout(Problem(str(i), {}), 0, text, Grade(True, 1.0, None), trajectory))
    return Rollouts(tuple(kept), {"rejected": 0})


def method(prompt: bool) -> Method:
    return replace(METHODS["spd"].method, sites=Revealed(prompt=prompt))


def graded(policy, rollouts, prompt: bool):
    plan = plan_update(method(prompt), rollouts, range(len(TEXTS)))
    assert plan is not None
    return plan, grade_micro_batch(method(prompt), plan.micro_batch(), partial(run_at_sites, policy.module), [])


@pytest.mark.parametrize("prompt", [False, True])
def test_the_loss_is_that_of_the_network_on_the_whole_text_or_on_the_completion(policy, rollouts, prompt):
    losses = []
    for one in rollouts.kept:
        trajectory = one.trajectory
        asked = trajectory.prompt_ids[trajectory.prompt_mask]
        ids = torch.cat([asked, trajectory.tokens[0, : int(trajectory.length)]])
        first = 1 if prompt else len(asked)
        logits = policy.module.network(input_ids=ids[None]).logits[0, first - 1 : -1]
        losses.append(cross_entropy(logits.double(), ids[first:], reduction="none"))
    expected = torch.cat(losses)
    plan, found = graded(policy, rollouts, prompt)
    assert plan.num_sites == len(expected)
    torch.testing.assert_close(found.loss.double(), expected.mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.value.double().sort().values, expected.sort().values, rtol=1e-4, atol=1e-6)


def test_what_is_logged_of_the_completion_stands_where_it_stood(policy, rollouts):
    (_, alone), both = graded(policy, rollouts, False), graded(policy, rollouts, True)
    tables = [divergence_table([one], rollouts) for one in (graded(policy, rollouts, False), both)]
    assert tables[0] is not None
    assert tables[1] is not None
    torch.testing.assert_close(tables[0][1], tables[1][1], equal_nan=True)
    plan, found = both
    broken = replace(found, term=torch.full_like(found.term, torch.nan))
    places = [site["position"] for site in broken_sites(plan, broken, rollouts)]
    assert sum(place >= 0 for place in places) == len(alone.term)
    assert min(places) == -(max(len(one.trajectory.prompt_ids[0]) for one in rollouts.kept) - 1)


@pytest.mark.parametrize(
    "change", [["method=opsd"], ["method=spd", "method.canvases=random_masks"], ["method=grpo"]], ids=" ".join
)
def test_anything_but_cross_entropy_on_texts_is_refused(change):
    with pytest.raises(InputError, match=r"method\.sites\.prompt trains on the prompt"):
        load_config("quickstart_ar", [*change, "method.sites={name: revealed, prompt: true}"])


def test_a_denoiser_whose_prompt_is_never_masked_is_refused():
    config = load_config("quickstart", ["method=spd", "method.sites.prompt=true"])
    with pytest.raises(InputError, match=r"method\.sites\.prompt grades the prompt, which a denoiser never masks"):
        check_model(config)
