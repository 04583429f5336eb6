"""The equation, one site at a time: every divergence, target, trust and number of contexts that a method may have."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_sd.canvases import DecoderSteps
from dllm_sd.errors import InputError
from dllm_sd.losses import (
    DIVERGENCES,
    TARGETS,
    TRUSTS,
    Barycenter,
    Each,
    Equal,
    ForwardKL,
    FullVocabulary,
    GatedGap,
    GeneralisedJSD,
    GroupAdvantage,
    ImportanceCap,
    OutcomeValidated,
    Plain,
    PolicyGradient,
    PurifiedPMI,
    ReverseKL,
    Sampled,
    TokenNLL,
    TopK,
)
from dllm_sd.methods import METHODS
from dllm_sd.methods.method import Method
from dllm_sd.network.lazy_logits import LOSS_CHUNK_LOGITS, LazyLogits
from dllm_sd.network.site_head import Head
from dllm_sd.network.view import View
from dllm_sd.objective import equation as objective
from dllm_sd.objective.equation import grade_micro_batch
from dllm_sd.objective.plan import Plan, plan_update
from dllm_sd.policies.weights import BaseWeights, LiveWeights, SnapshotWeights
from dllm_sd.rollouts.gates import All
from dllm_sd.rollouts.rollout import Rollout, Rollouts, TeacherBrief
from dllm_sd.rollouts.rules import PassAtK
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.teachers import Nothing
from dllm_sd.trajectory import Trajectory
from tests.oracles import divergences, policy_gradient, targets
from tests.tiers import newest

V, LENGTH = 12, 8
ROLLOUT = PassAtK(keep="all", until_solved=False, attempts=2, temperature=1.0)


def methods() -> dict[str, Method]:
    """Every combination that is accepted, with as few fields as possible."""
    parts = product(
        (
            *(ForwardKL(), ReverseKL(clip="token", clip_at=0.3), GeneralisedJSD(clip="entry"), GatedGap(), TokenNLL()),
            *(PolicyGradient(), PolicyGradient(tokens="sampled", ratio_clip=0.1), PolicyGradient(surrogate="log")),
        ),
        (Plain(), Each(), Sampled(), PurifiedPMI(), Barycenter()),
        (Equal(), ImportanceCap(cap=1.2), GroupAdvantage(), GroupAdvantage(kl=0.3), OutcomeValidated(threshold=0.01)),
        range(4),
        (1, 3),
    )
    found = {}
    for divergence, target, trust, contexts, passes in parts:
        others = contexts == 2 or (contexts == 1 and passes > 1 and isinstance(trust, GroupAdvantage))
        weights = (BaseWeights(),) * (contexts - others) + (SnapshotWeights(passes),) * others or (BaseWeights(),)
        try:
            method = Method(
                rollout=replace(ROLLOUT, passes=passes),
                gate=All(),
                contexts=(Nothing(),) * contexts,
                teacher=weights,
                target=target,
                divergence=divergence,
                trust=trust,
            )
        except InputError:
            continue
        found[f"{divergence} {target} {trust} {contexts} {passes}"] = method
    return found


METHODS_ACCEPTED = methods()


@pytest.fixture(scope="module")
def trajectory(noise) -> Trajectory:
    return noise(b=4, length=LENGTH, block_length=4, tokens_per_step=2)


def rollouts_of(trajectory: Trajectory, contexts: int) -> Rollouts:
    """Two rollouts of each problem, right and wrong, whose teachers are not all believed alike."""
    logp = torch.rand(trajectory.tokens.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).log()
    unstack = replace(trajectory, logp=logp).unstack()
    kept = [
        Rollout(
            Problem(f"p{i // 2}", {}),
            i % 2,
            "",
            Grade(i % 3 == 0, float(i % 3 == 0), None),
            one,
            briefs=tuple(TeacherBrief(weight=0.5 + 0.25 * i + c) for c in range(contexts)),
        )
        for i, one in enumerate(unstack)
    ]
    return Rollouts(tuple(kept), {"rejected": 0.0})


class Tables:
    """Student and teachers that say the same random logits ``[n l v]`` whenever they are asked about a canvas."""

    def __init__(self, plan: Plan, contexts: int) -> None:
        generator = torch.Generator().manual_seed(plan.size)
        self.student, *self.teachers = torch.randn(
            1 + contexts, plan.size, LENGTH, V, generator=generator, dtype=torch.float64
        )
        self.student.requires_grad_()

    def logp(self) -> list[Any]:
        """Log-probabilities as numbers, student first, ``[1+c n l v]``."""
        return [table.detach().log_softmax(-1).tolist() for table in (self.student, *self.teachers)]

    def loss(self, method: Method, plan: Plan) -> objective.Graded:
        def said(table: Tensor) -> Any:
            return lambda view: LazyLogits(table[view.sites[:, -LENGTH:]])

        def reads(view: View, read: Any) -> Any:
            spoken = said(self.student)(view)
            return read(spoken.hidden, Head(spoken.head))

        return grade_micro_batch(method, plan.micro_batch(), reads, [said(table) for table in self.teachers])


def site_values(method: Method, own: list[float], logp: Sequence[list[float]], token: int) -> list[float]:
    """The divergence of a site from each of its targets, from log-probabilities."""
    p, q = [math.exp(x) for x in own], [[math.exp(x) for x in one] for one in logp]
    part = method.divergence
    if isinstance(part, TokenNLL):
        return [-own[token]]
    if isinstance(part, PolicyGradient):
        rollout = logp[1] if len(logp) == 2 else own
        ids = [token] if part.tokens == "sampled" else list(range(V))
        if part.surrogate == "log":
            weights = policy_gradient.entry_weights(rollout, logp[0], part.weight)
            return [-sum(w * (logp[0][v] - rollout[v]) * own[v] for v, w in enumerate(weights))]
        clips = part.weight, part.ratio_clip, part.dual_clip
        return [policy_gradient.value_and_gradient(own, rollout, logp[0], ids, *clips)[0]]
    if isinstance(method.target, PurifiedPMI):
        q = [targets.pmi(q[0], q[1], q[2], 1.0, 10.0, "uniform")]
    if isinstance(method.target, Barycenter):
        q = [targets.barycenter(q[0], q[1], 50.0, 0.15, 1e-8)[1]]
    if isinstance(part, GatedGap):
        return [math.log(2) - math.log1p(math.exp(-((one[token] - own[token]) ** 2) / 2)) for one in logp]
    assert isinstance(part, ForwardKL | ReverseKL | GeneralisedJSD)
    beta = {ForwardKL: 0.0, ReverseKL: 1.0, GeneralisedJSD: 0.5}[type(part)]
    return [divergences.clipped(divergences.generalised_jsd(p, one, beta), part.clip, part.clip_at) for one in q]


def rollout_weights(method: Method, rollouts: Rollouts) -> list[float]:
    """How far each rollout is believed."""
    reward = rollouts.reward.tolist()
    if isinstance(method.trust, GroupAdvantage):
        return divergences.advantages(reward, rollouts.group.tolist(), True, 1e-4)
    return (
        [1.0 if right >= 1 else -1.0 for right in reward] if isinstance(method.trust, OutcomeValidated) else [1.0] * 9
    )


def naive(method: Method, plan: Plan, rollouts: Rollouts, tables: Tables) -> float:
    """The loss, one site at a time, the mean over all of them."""
    weights, total, sites = rollout_weights(method, rollouts), 0.0, 0
    student, *teachers = tables.logp()
    batch = plan.micro_batch()
    for n in range(plan.size):
        row, places = int(plan.rows[n]), batch.candidates[n].nonzero()[:, 0].tolist()
        tokens = batch.canvases.tokens[n].tolist()
        gaps = [[one[n][i][tokens[i]] - student[n][i][tokens[i]] for i in places] for one in teachers]
        for i in places:
            own, others = student[n][i], [one[n][i] for one in teachers]
            values, now = site_values(method, own, others, tokens[i]), own[tokens[i]]
            sites += 1
            for t, value in enumerate(values):
                factor = weights[row]
                if isinstance(method.trust, ImportanceCap):
                    factor *= min(math.exp(now - float(batch.canvases.old_logp[n, i])), method.trust.cap)
                if isinstance(method.trust, OutcomeValidated):
                    support = sum(max(-3.0, min(3.0, gap)) for gap in gaps[t]) / len(gaps[t])
                    factor *= (support > 0.01) - (support < -0.01)
                if isinstance(method.trust, GroupAdvantage):
                    factor = surrogate_factor(method, [x[tokens[i]] for x in others], now, factor)
                if isinstance(method.target, Plain | Each):
                    factor *= float(plan.context_weight[n, t])
                total += value * factor
    return total / sites


def surrogate_factor(method: Method, others: list[float], now: float, advantage: float) -> float:
    """Of the negative log-likelihood, so that the gradient is that of PPO's loss with a penalty."""
    assert isinstance(method.trust, GroupAdvantage)
    ratio = math.exp(now - others[-1]) if method.rollout.passes > 1 else 1.0
    factor = advantage * ratio if (ratio <= 1.5 if advantage > 0 else ratio >= 0.5) else 0.0
    return factor + method.trust.kl * (math.exp(others[0] - now) - 1) if method.trust.kl else factor


def test_every_divergence_target_and_trust_is_in_some_method():
    for slot, table in (("divergence", DIVERGENCES), ("target", TARGETS), ("trust", TRUSTS)):
        assert {type(getattr(method, slot)) for method in METHODS_ACCEPTED.values()} == set(table.values())
    both = [m for m in METHODS_ACCEPTED.values() if isinstance(m.divergence, PolicyGradient) and len(m.contexts) == 2]
    assert {type(method.trust) for method in both} == {Equal, ImportanceCap, OutcomeValidated}


def pairs_of(method: Method) -> set[tuple[str, ...]]:
    """Any two of what methods differ in here."""
    parts = map(repr, (method.divergence, method.target, method.trust))
    numbers = (f"{len(method.contexts)} contexts", f"{method.rollout.passes} passes")
    return set(combinations((*parts, *numbers), 2))


@pytest.mark.parametrize("name", newest({name: pairs_of(method) for name, method in METHODS_ACCEPTED.items()}))
def test_each_value_has_one_factor_and_the_loss_is_that_of_plain_loops(trajectory, name, monkeypatch):
    monkeypatch.setitem(LOSS_CHUNK_LOGITS, "cpu", 7 * V)
    method = METHODS_ACCEPTED[name]
    rollouts = rollouts_of(trajectory, len(method.contexts))
    plan = plan_update(method, rollouts, [1, 2, 3, 4])
    assert plan is not None
    tables = Tables(plan, len(method.contexts))
    shapes = []

    class Watched(objective._Equation):
        def _trust(self, trust_inputs: Any, rows: slice) -> Tensor:
            value = method.divergence(trust_inputs[0], trust_inputs[1], self.token[rows])
            trust = super()._trust(trust_inputs, rows)
            shapes.append((tuple(value.shape), tuple(trust[: len(value)].shape)))
            return trust

    monkeypatch.setattr(objective, "_Equation", Watched)
    found = tables.loss(method, plan)
    assert shapes
    assert all(value == trust for value, trust in shapes)
    assert float(found.loss.detach()) == pytest.approx(naive(method, plan, rollouts, tables), rel=1e-9)


SUPPORTED = [(PolicyGradient(), FullVocabulary()), (PolicyGradient(tokens="sampled"), FullVocabulary())]
SUPPORTED += [(PolicyGradient(), TopK(k=4, of=of, rest="keep")) for of in ("student", "teacher", "rollout")]


@pytest.mark.parametrize(("divergence", "support"), SUPPORTED, ids=repr)
@pytest.mark.parametrize("trust", [Equal(), ImportanceCap(), OutcomeValidated()], ids=repr)
def test_rollouts_of_the_student_itself_have_the_loss_and_gradient_on_policy(trajectory, divergence, support, trust):
    if isinstance(trust, OutcomeValidated) and not isinstance(support, FullVocabulary):
        return
    rollout = replace(ROLLOUT, passes=1)
    two = Method(
        rollout=rollout,
        gate=All(),
        contexts=(Nothing(), Nothing()),
        teacher=(BaseWeights(), SnapshotWeights(1)),
        target=Each(),
        support=support,
        divergence=divergence,
        trust=trust,
    )
    alone = (
        support if isinstance(support, FullVocabulary) or support.of != "rollout" else replace(support, of="student")
    )
    one = replace(two, contexts=(Nothing(),), teacher=(BaseWeights(),), target=Plain(), support=alone)
    rollouts = rollouts_of(trajectory, 0)
    results = []
    for method in (one, two):
        plan = plan_update(method, rollouts, [1, 2, 3, 4])
        assert plan is not None
        tables = Tables(plan, 1)
        tables.teachers += [tables.student.detach()] * (method is two)
        loss = tables.loss(method, plan).loss
        results.append((loss.detach(), torch.autograd.grad(loss, tables.student)[0]))
    (loss, gradient), (other, others) = results
    assert gradient.abs().max() > 1e-6
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(others, gradient, rtol=1e-10, atol=1e-15)


def test_a_factor_too_few_stops_the_run(trajectory):
    class Wrong(Equal):
        def __call__(self, *given: Any) -> Tensor:
            return super().__call__(*given)[:, :0]

    method = replace(METHODS["rft_trajectory"].method, canvases=DecoderSteps(), trust=Wrong(), teacher=(LiveWeights(),))
    plan = plan_update(method, rollouts_of(trajectory, 0), [1, 2, 3, 4])
    assert plan is not None
    with pytest.raises(AssertionError, match="for values"):
        Tables(plan, 0).loss(method, plan)
