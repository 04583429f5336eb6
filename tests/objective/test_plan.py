from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_sd import canvases as canvases_module
from dllm_sd.canvases import AllMaskedCanvas, DecoderSteps
from dllm_sd.decoding.settings import Decoding
from dllm_sd.losses import (
    DivergenceDefaults,
    Each,
    GatedGap,
    GeneralisedJSD,
    GroupAdvantage,
    OutcomeValidated,
    PolicyGradient,
    ReverseKL,
    TopK,
)
from dllm_sd.losses.sites import AllMaskedSites
from dllm_sd.methods import METHODS
from dllm_sd.methods.method import Method
from dllm_sd.network.lazy_logits import LOSS_CHUNK_LOGITS
from dllm_sd.network.site_head import SiteReader, run_at_sites
from dllm_sd.network.view import View
from dllm_sd.objective.equation import entropy, grade_micro_batch
from dllm_sd.objective.plan import Plan, plan_update
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.policies.weights import BaseWeights, TeacherModel, trained
from dllm_sd.pretrained.model import Lora
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.gates import Correct
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.rollouts.rules import PassAtK
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.teachers import ContextInputs, LaterStep, Nothing, Suffix
from dllm_sd.trajectory import StopAfter, Trajectory, left_pad
from tests.oracles import d_opsd
from tests.oracles.decoding import full_logits
from tests.oracles.divergences import surrogate
from tests.oracles.whole_sites import graded
from tests.tiers import crossed, later

PROMPTS = [[4, 5, 14, 6], [7], [8, 9, 10], [11, 12]]


def rollouts_of(trajectory: Trajectory, reward: Sequence[float] | None = None, rejected: int = 0) -> Rollouts:
    """Each row is a rollout of a problem of its own, or two in a row of one where they are rewarded."""
    kept = []
    for row in range(trajectory.size):
        problem = Problem(f"p{row // 2 if reward else row}", {})
        one = trajectory.select(torch.tensor([row]))
        score = reward[row] if reward else 1.0
        kept.append(Rollout(problem, row, "", Grade(score == 1, score, None), one))
    return Rollouts(tuple(kept), {"rejected": float(rejected)})


def keys(rollouts: Rollouts) -> list[int]:
    return rollouts.keys(0, 0)


class Pair:
    """A policy that has moved away from its initial weights, and rollouts of it."""

    def __init__(self, policy: MaskedDiffusion) -> None:
        self.policy, self.teacher = policy, TeacherModel(BaseWeights(), policy)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in trained(self.policy).values():
                value.add_(0.02 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
        settings = Decoding(length=12, block_length=4, tokens_per_step=2, temperature=2.0)
        self.trajectory = self.policy.decode(PROMPTS, settings, [make_key("rollout", i) for i in range(4)])

    def student(self, view: View, read: SiteReader) -> Any:
        return run_at_sites(self.policy.module, view, read)

    def gradient(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(trained(self.policy).values()), allow_unused=True))

    def loss(self, method: Method, plan: Plan) -> Tensor:
        return grade_micro_batch(method, plan.micro_batch(), self.student, [self.teacher] * len(method.contexts)).loss


@pytest.fixture(scope="module")
def pair(make_policy) -> Pair:
    return Pair(make_policy())


def planned(method: Method, rollouts: Rollouts) -> Plan:
    plan = plan_update(method, rollouts, keys(rollouts))
    assert plan is not None
    return plan


def assert_same_gradients(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> None:
    assert max(float(gradient.abs().max()) for gradient in theirs) > 1e-5
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("name", "rejected", "clip"),
    [("d_opsd", 0, "none"), ("d_opsd_paper", 0, "entry"), ("d_opsd_paper", 5, "entry"), ("d_opsd_paper", 0, "token")],
)
def test_the_objective_is_that_of_plain_loops(pair, make_policy, name, rejected, clip):
    paper = name == "d_opsd_paper"
    method = replace(METHODS[name].method, gate=Correct(count_rejected=paper))
    if clip == "token":
        method = replace(method, divergence=ReverseKL(clip="token"))
    rollouts = rollouts_of(pair.trajectory, rejected=rejected)

    def student(ids: Sequence[int]) -> Tensor:
        everywhere = torch.ones((1, len(ids)), dtype=torch.bool)
        return pair.policy.site_logits(View(torch.tensor([list(ids)]), everywhere, everywhere))

    steps = d_opsd.graded_steps(
        rollouts.trajectory,
        shown_to_teacher(method, rollouts),
        student,
        full_logits(make_policy()),
        by_teacher=paper,
        clip_at=0.05 if paper else None,
        per_entry=clip == "entry",
        end_padding=paper,
    )
    expected = d_opsd.mean_over_steps(steps, 4 + rejected) if paper else d_opsd.mean_over_sites(steps)
    plan = planned(method, rollouts)
    assert plan.num_sites == sum(len(step.values) for step in steps) > 0
    loss = pair.loss(method, plan)
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
    assert_same_gradients(pair.gradient(loss), pair.gradient(expected), 1e-10)


def shown_to_teacher(method: Method, rollouts: Rollouts) -> Callable[[int, int], list[bool]]:
    """What the method's teacher sees revealed at a step of a rollout (tested with the contexts, so given here)."""
    trajectory = rollouts.trajectory
    canvases = method.canvases(trajectory, keys(rollouts), 0, 1)
    sites, _ = method.sites(*(x & canvases.gradable for x in (canvases.masked, canvases.active, canvases.revealed)))
    protected = sites if method.sites.score is None else torch.zeros_like(sites)
    shown = method.contexts[0](ContextInputs(canvases, trajectory, protected, None, keys(rollouts))).shown
    at = {pair: i for i, pair in enumerate(zip(canvases.rows.tolist(), canvases.steps.tolist(), strict=True))}
    return lambda row, step: shown[at[row, step]].tolist()


PARTITIONED = {
    "d_opsd": METHODS["d_opsd"].method,
    "d_opsd_paper": METHODS["d_opsd_paper"].method,
    "d_opsd_reference": replace(METHODS["d_opsd_reference"].method, rollout=PassAtK()),
    "later_step": replace(METHODS["later_step"].method, support=TopK(k=5, rest="bucket"), average="rollouts"),
    "rft": METHODS["rft"].method,
    "diffu_grpo": METHODS["diffu_grpo"].method,
}
BRIEF = ("d_opsd_paper", "diffu_grpo")
"""Those of the first tier: with a teacher, and without one."""


@pytest.mark.parametrize("name", [*BRIEF, *later(*(name for name in PARTITIONED if name not in BRIEF))])
def test_any_partition_of_the_canvases_sums_to_the_same_loss_and_gradient(pair, name):
    method = PARTITIONED[name]
    whole = planned(method, rollouts_of(pair.trajectory, [1.0, 0.0, 0.25, 1.0]))
    n = whole.size
    loss = pair.loss(method, whole)
    gradient = pair.gradient(loss)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    partitions = [list(torch.arange(n).split(1)), [torch.arange(n)], [torch.arange(n)[:3], torch.arange(n)[3:]]]
    for partition in [*partitions, list(shuffled.split(3))]:
        losses = [pair.loss(method, whole.select(part)) for part in partition if len(part)]
        torch.testing.assert_close(torch.stack(losses).sum(), loss, atol=1e-12, rtol=1e-12)
        assert_same_gradients(pair.gradient(torch.stack(losses).sum()), gradient, 1e-12)


def test_the_weight_of_a_context_is_the_weight_of_its_target(pair):
    """OPSD with a penalty: the divergence to the informed teacher, and a share of that to the initial model."""
    method, rollouts = METHODS["d_opsd"].method, rollouts_of(pair.trajectory)
    held = replace(method, contexts=(Suffix(), Nothing(weight=0.3)), target=Each())
    alone = [replace(method, contexts=(context,)) for context in (Suffix(), Nothing())]
    informed, initial = (pair.loss(one, planned(one, rollouts)) for one in alone)
    assert initial.item() > 0  # the student has moved
    expected, loss = informed + 0.3 * initial, pair.loss(held, planned(held, rollouts))
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
    assert_same_gradients(pair.gradient(loss), pair.gradient(expected), 1e-10)


@dataclass(frozen=True)
class Hellinger(DivergenceDefaults):
    """The divergence of docs/adding_a_part.md: what a fork writes, and no more."""

    def entries(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        return ((student_logp / 2).exp() - (target_logp / 2).exp()).square() / 2

    def __call__(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        return self.entries(student_logp, target_logp, token).sum(-1)


FORKED: Any = Hellinger()
CHUNKED = PARTITIONED | {
    "forked": replace(METHODS["d_opsd"].method, divergence=FORKED),
    "sgsd": METHODS["d_rcsd"].method,
    "pmi": METHODS["d_opsd_pmi"].method,
    "psd": METHODS["d_demo_psd"].method,
    "clip": replace(METHODS["d_opsd"].method, divergence=GeneralisedJSD(clip="entry", clip_at=0.01), temperature=0.7),
    "gap": replace(METHODS["d_opsd"].method, divergence=GatedGap(), trust=OutcomeValidated(), sites=AllMaskedSites()),
    "several": replace(METHODS["d_opsd"].method, contexts=(Suffix(), LaterStep(1)), target=Each(), support=TopK(5)),
    "sampled": replace(METHODS["d_opsd"].method, divergence=PolicyGradient(tokens="sampled")),
    "kept": replace(METHODS["d_opsd"].method, divergence=PolicyGradient(), support=TopK(5, rest="keep")),
}
CHUNKED = {
    name: replace(method, contexts=tuple(LaterStep(i + 1) for i in range(len(method.contexts))))
    if any(context.hint is not None for context in method.contexts)
    else method
    for name, method in CHUNKED.items()
}
"""Many kinds of parts, without hints: their teachers read later canvases here."""


@pytest.mark.parametrize(("name", "chunk"), crossed(CHUNKED, [1, 100, 10**9]))
def test_chunks_give_what_all_sites_give_at_once(pair, name, chunk, monkeypatch):
    monkeypatch.setitem(LOSS_CHUNK_LOGITS, "cpu", chunk)
    method = CHUNKED[name]
    plan = planned(method, rollouts_of(pair.trajectory, [1.0, 0.0, 0.25, 1.0]))
    teachers = [pair.teacher] * len(method.contexts)
    ours = grade_micro_batch(method, plan.micro_batch(), pair.student, teachers)
    plain = [lambda view: pair.teacher(view).logits(slice(None))] * len(teachers)
    monkeypatch.setitem(LOSS_CHUNK_LOGITS, "cpu", 10**9)
    theirs = graded(method, plan.micro_batch(), pair.policy.site_logits, plain)
    expected = pair.gradient(theirs.pop("loss"))
    for key, value in theirs.items():
        mine = ours.measures[key] if "/" in key else getattr(ours, key)
        torch.testing.assert_close(mine, value, atol=1e-12, rtol=1e-10, msg=lambda text, key=key: f"{key}: {text}")
    assert_same_gradients(pair.gradient(ours.loss * 3), [3 * gradient for gradient in expected], 1e-12)


def test_equal_canvases_are_read_once(pair, monkeypatch):
    method = replace(METHODS["diffu_grpo"].method, canvases=AllMaskedCanvas(prompt_mask_ratio=0.0))
    twice = torch.arange(4).repeat_interleave(2)
    plan = planned(method, rollouts_of(pair.trajectory.select(twice), [1.0, 0.0, 0.25, 1.0, 0.0, 1.0, 0.5, 0.7]))
    assert plan.size == 8
    read, results = [], []

    def student(view: View, read_sites: SiteReader) -> Any:
        view = view.distinct()
        read.append(len(view.ids))
        return run_at_sites(pair.policy.module, view, read_sites)

    for distinct in (View.distinct, lambda view: view):
        monkeypatch.setattr(View, "distinct", distinct)
        loss = grade_micro_batch(method, plan.micro_batch(), student, [pair.teacher]).loss
        results.append((loss.detach(), pair.gradient(loss)))
    assert read == [4, 8]
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-12, rtol=1e-12)
    assert_same_gradients(results[0][1], results[1][1], 1e-12)


@pytest.mark.parametrize("average", ["step_sums", *later("rollouts", "sites", "canvases", "steps")])
def test_a_subset_of_the_steps_has_the_expected_loss_and_gradient_of_all(pair, average, monkeypatch):
    rollouts = rollouts_of(two_long(pair.trajectory))
    method = replace(METHODS["d_opsd"].method, average=average)
    whole = planned(method, rollouts)
    loss = pair.loss(method, whole)
    expected = [loss.detach(), *pair.gradient(loss)]
    part = replace(method, canvases=DecoderSteps(subset=2))
    counts = whole.rows.bincount().tolist()
    assert min(counts) > 2
    losses = []
    for drawn in product(*(combinations(range(count), 2) for count in counts)):
        chosen = torch.cat(
            [torch.zeros(n).index_fill(0, torch.tensor(x), -1) for n, x in zip(counts, drawn, strict=True)]
        )
        monkeypatch.setattr(canvases_module, "uniform", lambda *_, chosen=chosen: chosen[:, None])
        plan = planned(part, rollouts)
        assert plan.rows.bincount().tolist() == [2, 2]
        losses.append(plan)
    assert len(losses) == prod(n * (n - 1) // 2 for n in counts)
    mean = torch.zeros(whole.size, dtype=torch.float64)
    at = {pair: i for i, pair in enumerate(zip(*places(whole), strict=True))}
    for plan in losses:
        for place, coefficient in zip(zip(*places(plan), strict=True), plan.coefficient, strict=True):
            mean[at[place]] += coefficient / len(losses)
    torch.testing.assert_close(mean, whole.coefficient, atol=1e-14, rtol=1e-12)  # so every term has its expectation
    few = losses[:: len(losses) // 3]
    for plan in few:  # and a plan's loss is the sum of its coefficients' terms
        index = torch.tensor([at[place] for place in zip(*places(plan), strict=True)])
        same = replace(whole.select(index), coefficient=plan.coefficient)
        assert torch.equal(pair.loss(part, plan), pair.loss(method, same))
    ours = pair.loss(method, replace(whole, coefficient=mean))
    for mine, value in zip([ours.detach(), *pair.gradient(ours)], expected, strict=True):
        torch.testing.assert_close(mine, value, atol=1e-12, rtol=1e-9)


def two_long(trajectory: Trajectory) -> Trajectory:
    """Without its end token every rollout counts to its last step; of two that differ in length."""
    length = torch.tensor([12, 8])
    tokens = trajectory.tokens[:2].masked_fill(trajectory.tokens[:2] == trajectory.end_ids[0], 5)
    steps = torch.arange(12).expand(2, -1) // 2
    picked = trajectory.select(torch.tensor([0, 1]))
    return replace(
        picked, tokens=tokens, length=length, reveal_step=torch.where(steps < length[:, None] // 2, steps, -1)
    )


def places(plan: Plan) -> tuple[list[int], list[int]]:
    return plan.rows.tolist(), plan.steps.tolist()


def test_a_subset_is_drawn_by_the_rollouts_key_alone(pair):
    method = replace(METHODS["d_opsd"].method, canvases=DecoderSteps(subset=3))
    both = rollouts_of(two_long(pair.trajectory))
    one = Rollouts((both.kept[1],), both.counts)
    plan, alone = plan_update(method, both, [5, 7]), plan_update(method, one, [7])
    assert plan is not None
    assert alone is not None
    assert torch.equal(alone.steps, plan.steps[plan.rows == 1])
    drawn = [plan_update(method, one, [key]) for key in range(8)]
    assert len({tuple(plan.steps.tolist()) for plan in drawn if plan is not None}) > 1


def test_with_dropout_equal_canvases_are_read_apart(make_policy):
    ids = torch.tensor([[4, 5, 6], [4, 5, 6]])
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    policy = make_policy(lora=Lora(rank=2, alpha=2, dropout=0.5))
    for training, rows in ((True, 2), (False, 1)):
        policy.module.train(training)
        seen = []
        hook = policy.module.network.base_model.register_forward_pre_hook(
            lambda _, args, given, seen=seen: seen.append(len(given["input_ids"])), with_kwargs=True
        )
        assert len(run_at_sites(policy.module, View(ids, everywhere, everywhere), lambda hidden, head: hidden)) == 6
        hook.remove()
        assert seen == [rows]


def by_hand() -> Trajectory:
    """Rollout 0 commits 2, 1 and 1 tokens in three steps, rollout 1 commits 3 and 1 in two."""
    prompt_ids, prompt_mask = left_pad([[1], [2, 3]], 9)
    return Trajectory(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        tokens=torch.tensor([[4, 5, 6, 7], [7, 6, 5, 4]]),
        reveal_step=torch.tensor([[0, 2, 0, 1], [0, 0, 1, 0]]),
        length=torch.tensor([4, 4]),
        block_length=4,
        mask_id=11,
        end_ids=(10,),
        pad_id=9,
    )


@pytest.mark.parametrize(
    ("average", "coefficients", "with_rejected"),
    [
        ("sites", [1 / 8] * 5, None),
        ("canvases", [1 / 5] * 5, None),
        ("steps", [1 / 12, 1 / 6, 1 / 6, 1 / 12, 1 / 4], [1 / 24, 1 / 12, 1 / 12, 1 / 24, 1 / 8]),
        ("step_sums", [1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4], [1 / 12, 1 / 12, 1 / 12, 1 / 8, 1 / 8]),
        ("rollouts", [1 / 8] * 5, [1 / 16] * 5),
    ],
)
def test_averages_by_hand(average, coefficients, with_rejected):
    cases = [(Correct(), 2, coefficients)]
    if with_rejected is not None:  # only these averages count rollouts
        counting = Correct(count_rejected=True)
        cases += [(counting, 0, coefficients), (counting, 2, with_rejected)]
    for gate, rejected, expected in cases:
        method = Method(contexts=(Nothing(),), average=average, gate=gate)
        plan = planned(method, rollouts_of(by_hand(), rejected=rejected))
        assert plan.quota.tolist() == [2, 1, 1, 3, 1]
        assert plan.rows.tolist() == [0, 0, 0, 1, 1]
        assert plan.coefficient.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("average", ["steps", "step_sums"])
def test_a_step_without_a_site_is_no_step(noise, average):
    """Where the teacher was shown all that could be chosen, nothing is graded and the means are over the rest."""
    rule = METHODS["d_opsd_paper"].method.sites
    method = Method(
        canvases=DecoderSteps(end_padding=True),
        contexts=(Suffix(scope="all_masked", ratio=0.6),),
        sites=rule,
        average=average,
    )
    rollouts = rollouts_of(noise(b=12, tokens_per_step=1, block_length=3))
    plan = planned(method, rollouts)
    assert plan.size < DecoderSteps()(rollouts.trajectory, keys(rollouts), 0, 1).size
    assert (plan.quota > 0).all()
    of_step = plan.coefficient * (plan.quota if average == "steps" else 1)
    per_rollout = torch.zeros(12, dtype=torch.float64).index_add(0, plan.rows, of_step)
    torch.testing.assert_close(per_rollout, torch.full((12,), 1 / 12, dtype=torch.float64))


def test_a_teacher_is_never_asked_about_what_it_was_shown(noise):
    rollouts = rollouts_of(noise(b=6))
    for name in ("d_opsd", "d_opsd_paper", "d_opsd_reference", "later_step"):
        plan = planned(replace(METHODS[name].method, rollout=PassAtK()), rollouts)
        for reading in plan.micro_batch().teacher_inputs:
            assert not (reading.shown & plan.micro_batch().candidates).any()
            assert (reading.ids[:, -24:][plan.micro_batch().candidates] == 11).all()
        assert (plan.micro_batch().canvases.ids[:, -24:][plan.micro_batch().candidates] == 11).all()


def test_nothing_to_learn_from_is_no_plan(noise):
    rollouts = rollouts_of(noise(b=4))
    assert plan_update(Method(), Rollouts((), {"rejected": 4.0}), []) is None
    assert (
        plan_update(Method(), rollouts_of(noise(b=4, early_end=False).within(StopAfter("steps", 0))), keys(rollouts))
        is None
    )
    group = replace(METHODS["diffu_grpo"].method, contexts=(), trust=GroupAdvantage(kl=0.0))
    assert plan_update(group, rollouts_of(noise(b=4), [1.0, 1.0, 0.5, 0.5]), keys(rollouts)) is None


@pytest.mark.parametrize("reward", [[1.0, 0.0, 0.25, 0.75], [1.0, 0.0, 1.0, 1.0]], ids=["mixed", "one equal group"])
def test_diffu_grpo_has_the_gradient_of_d1s_loss(pair, make_policy, reward):
    method = METHODS["diffu_grpo"].method
    rollouts = rollouts_of(pair.trajectory, reward)
    canvases = method.canvases(rollouts.trajectory, keys(rollouts), 0, 1)
    sites = torch.cat([torch.zeros_like(canvases.mask[:, :-12]), canvases.masked], 1)
    view = View(canvases.ids, canvases.mask, sites)
    token, row = canvases.tokens[canvases.masked], canvases.masked.nonzero()[:, 0]

    def logp(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(1, token[:, None])[:, 0]

    now, base = logp(pair.policy.site_logits(view)), logp(make_policy().site_logits(view).detach())
    advantage = torch.tensor(reward, dtype=torch.float64).view(2, 2)
    advantage = (advantage - advantage.mean(1, keepdim=True)).flatten()[row]
    expected = surrogate(now, now.detach(), base, advantage, 0.5, 0.04).mean()
    plan = plan_update(method, rollouts, keys(rollouts))
    assert plan is not None
    ours = grade_micro_batch(method, plan.micro_batch(), pair.student, [pair.teacher]).loss
    assert_same_gradients(pair.gradient(ours), pair.gradient(expected), 1e-10)


def test_what_is_logged_describes_the_sites(pair):
    method = replace(METHODS["d_opsd"].method, contexts=(LaterStep(2),))
    plan = planned(method, rollouts_of(pair.trajectory))
    described = grade_micro_batch(method, plan.micro_batch(), pair.student, [pair.teacher])
    assert len(described.value) == plan.num_sites == int(described.sites.sum())
    torch.testing.assert_close(described.term.sum(), described.loss.detach())
    torch.testing.assert_close(described.value.mean(), described.loss.detach())
    assert torch.equal(described.clipped, described.value)
    assert ((described.agreement == 0) | (described.agreement == 1)).all()
    assert described.teacher_entropy.isfinite().all()
    likelihood = METHODS["rft_trajectory"].method
    alone = grade_micro_batch(
        likelihood, planned(likelihood, rollouts_of(pair.trajectory)).micro_batch(), pair.student, []
    )
    assert alone.teacher_entropy.isnan().all()
    assert alone.agreement.isnan().all()


def test_entropy_is_that_of_the_distribution():
    logp = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64).log()
    expected = torch.tensor([0.5, 1 / 3], dtype=torch.float64).log().neg()
    torch.testing.assert_close(entropy(logp), torch.stack([expected[0], torch.zeros(()).double(), expected[1]]))


def test_all_masked_sites_grade_every_canvas_at_all_its_masks(pair):
    method = replace(METHODS["d_opsd"].method, contexts=(Nothing(),), sites=AllMaskedSites())
    plan = planned(method, rollouts_of(pair.trajectory))
    assert torch.equal(plan.quota, (plan.micro_batch().canvases.masked & plan.micro_batch().canvases.gradable).sum(1))
    assert pair.loss(method, plan) > 0
