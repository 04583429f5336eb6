import itertools
import math

import pytest
import torch

from dllm_sd.errors import InputError
from dllm_sd.losses import TRUSTS, Drawn, Equal, GroupAdvantage, ImportanceCap, OutcomeValidated, TokenNLL
from tests.oracles import divergences as oracle

V = 9
TOKEN = torch.tensor([3, 0, 7, 3, 5, 1, 2, 8])
M = len(TOKEN)
ADVANTAGE = torch.tensor([1.3, 1.3, 0.4, 0.4, -0.7, -0.7, -2.0, 0.0], dtype=torch.float64)


def logits(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_as(token: torch.Tensor) -> Drawn:
    """Tokens of which no log-probability is known."""
    unknown = torch.full(token.shape, torch.nan, dtype=torch.float64)
    return Drawn(token=token, logp=unknown, old_logp=unknown, canvas=torch.arange(len(token)))


DRAWN = drawn_as(TOKEN)


def at_token(logp: torch.Tensor) -> torch.Tensor:
    return torch.stack([logp[m, v] for m, v in enumerate(TOKEN.tolist())])


def test_the_table_names_every_trust():
    assert {
        "equal": Equal,
        "importance_cap": ImportanceCap,
        "group_advantage": GroupAdvantage,
        "outcome_validated": OutcomeValidated,
    } == TRUSTS


@pytest.mark.parametrize(("t", "rows"), [(0, 1), (1, 1), (3, 3)])
def test_equal_gives_every_target_the_weight_of_its_rollout(t, rows):
    weight = torch.rand(M, dtype=torch.float64)
    factor = Equal()(logits(M, V, seed=0), logits(t, M, V, seed=1), DRAWN, weight)
    assert torch.equal(factor, weight.expand(rows, M))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
def test_equal_weighs_every_rollout_one(dtype):
    weight = Equal().rollout_weight(torch.tensor([1, 0, 1]).to(dtype), torch.tensor([4, 4, 9]))
    assert weight.tolist() == [1, 1, 1]
    assert weight.is_floating_point()


@pytest.mark.parametrize("normalise", [True, False])
def test_advantages_equal_the_oracle(normalise):
    reward = torch.tensor([0.1, 1.0, 0.3, 0.0, 1.0, 1.0, 0.2], dtype=torch.float64)
    group = torch.tensor([7, 3, 7, 3, 7, 3, 50])
    trust = GroupAdvantage(normalise=normalise)
    expected = oracle.advantages(reward.tolist(), group.tolist(), normalise, trust.epsilon)
    assert trust.rollout_weight(reward, group).tolist() == pytest.approx(expected, abs=1e-14, rel=1e-12)


def test_advantages_by_hand():
    reward, group = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 0, 0])
    assert GroupAdvantage(normalise=False).rollout_weight(reward, group).tolist() == [0.75, -0.25, -0.25, -0.25]
    assert GroupAdvantage().rollout_weight(reward, group)[0].item() == pytest.approx(0.75 / 0.5001)


def test_a_group_of_one_or_of_equal_rewards_teaches_nothing():
    reward, group = torch.tensor([0.3, 0.1, 0.1, 0.1]), torch.tensor([0, 1, 1, 1])
    torch.testing.assert_close(GroupAdvantage().rollout_weight(reward, group), torch.zeros(4), atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_keep_the_dtype_of_the_reward(dtype):
    assert GroupAdvantage().rollout_weight(torch.ones(3, dtype=dtype), torch.arange(3)).dtype == dtype


def factor_and_surrogate_gradients(kl: float, with_reference: bool, with_old: bool, seed: int):
    """Gradients at the student's logits of factor x NLL and of the naive surrogate, and the ratios."""
    student = logits(M, V, seed=seed).requires_grad_()
    reference = (student.detach() + 0.5 * logits(M, V, seed=seed + 1)).log_softmax(-1)
    old = (student.detach() + 0.6 * logits(M, V, seed=seed + 2)).log_softmax(-1)
    rows = [reference] * with_reference + [old] * with_old
    targets = torch.stack(rows) if rows else torch.empty(0, M, V, dtype=torch.float64)
    student_logp = student.log_softmax(-1)

    factor = GroupAdvantage(kl=kl, ratio_clip=0.2)(student_logp, targets, DRAWN, ADVANTAGE)
    assert factor.shape == (1, M)
    assert not factor.requires_grad
    nll = TokenNLL()(student_logp, targets, TOKEN)
    (ours,) = torch.autograd.grad((factor * nll).sum(), student, retain_graph=True)

    logp = at_token(student_logp)
    old_at = at_token(old) if with_old else logp.detach()
    loss = oracle.surrogate(logp, old_at, at_token(reference) if with_reference else None, ADVANTAGE, 0.2, kl)
    (naive,) = torch.autograd.grad(loss.sum(), student)
    return ours, naive, (logp - old_at).exp().detach()


@pytest.mark.parametrize(
    ("kl", "with_reference", "with_old"),
    [(0.0, False, False), (0.0, False, True), (0.0, True, True), (0.04, True, False), (0.04, True, True)],
)
def test_the_factor_gives_the_gradient_of_the_clipped_surrogate_and_its_penalty(kl, with_reference, with_old):
    seen = set()
    for seed in range(0, 60, 3):
        ours, naive, ratio = factor_and_surrogate_gradients(kl, with_reference, with_old, seed)
        torch.testing.assert_close(ours, naive, atol=1e-12, rtol=1e-12)
        place = torch.where(ratio > 1.2, 1, torch.where(ratio < 0.8, -1, 0))
        seen |= set(zip(ADVANTAGE.sign().tolist(), place.tolist(), strict=True))
    assert seen == set(itertools.product((-1, 0, 1), (-1, 0, 1) if with_old else (0,)))


def test_on_policy_without_a_penalty_the_factor_is_the_advantage():
    factor = GroupAdvantage()(logits(M, V, seed=0).log_softmax(-1), torch.empty(0, M, V), DRAWN, ADVANTAGE)
    assert torch.equal(factor[0], ADVANTAGE)


def test_the_factor_of_two_tokens_by_hand():
    student, old = torch.tensor([[0.6, 0.4]] * 4).log(), torch.tensor([[0.3, 0.7]] * 4).log()
    token, weight = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    factor = GroupAdvantage(ratio_clip=0.2)(student, old[None], drawn_as(token), weight)
    torch.testing.assert_close(factor, torch.tensor([[0.0, -2.0, 4 / 7, 0.0]]))
    reference_only = GroupAdvantage(kl=0.1)(student, old[None], drawn_as(token), weight)
    torch.testing.assert_close(reference_only, torch.tensor([[0.95, -1.05, 1.075, -0.925]]))


def test_a_penalty_needs_a_reference():
    with pytest.raises(InputError, match=r"trust\.kl is above 0 but there is no reference"):
        GroupAdvantage(kl=0.04)(logits(M, V, seed=0), torch.empty(0, M, V), DRAWN, ADVANTAGE)


def test_a_third_teacher_is_refused():
    with pytest.raises(InputError, match="at most two teachers and got 3"):
        GroupAdvantage()(logits(M, V, seed=0), logits(3, M, V, seed=1), DRAWN, ADVANTAGE)


def with_ratio(*ratio: float) -> Drawn:
    """Tokens whose probability has changed by these ratios."""
    old = torch.full((len(ratio),), math.log(1e-3), dtype=torch.float64)
    logp = old + torch.tensor(ratio, dtype=torch.float64).log()
    return Drawn(token=TOKEN[: len(ratio)], logp=logp, old_logp=old, canvas=torch.arange(len(ratio)))


@pytest.mark.parametrize(("t", "rows"), [(0, 1), (1, 1), (3, 3)])
def test_the_importance_weight_is_the_ratio_up_to_its_cap_times_the_rollouts_weight(t, rows):
    weight = torch.tensor([1.0, 1.0, 3.0, 1.0, 0.0, -1.0])
    drawn = with_ratio(0.25, 1.0, 1.5, 7.0, 7.0, 2.5)
    factor = ImportanceCap()(logits(6, V, seed=0), logits(t, 6, V, seed=1), drawn, weight)
    expected = torch.tensor([0.25, 1.0, 4.5, 2.0, 0.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(factor, expected.expand(rows, 6))


def test_the_importance_weight_equals_a_plain_loop():
    logp, old = 3 * logits(99, seed=0), 3 * logits(99, seed=1)
    drawn = Drawn(token=torch.zeros(99, dtype=torch.int64), logp=logp, old_logp=old, canvas=torch.arange(99))
    weight = logits(99, seed=2)
    factor = ImportanceCap(cap=1.5, clamp=2.0)(logits(99, V, seed=0), logits(1, 99, V, seed=1), drawn, weight)
    for ours, new, before, own in zip(factor[0].tolist(), logp.tolist(), old.tolist(), weight.tolist(), strict=True):
        assert ours == pytest.approx(own * min(math.exp(max(-2.0, min(2.0, new - before))), 1.5), rel=1e-12)


def test_impossible_tokens_have_a_finite_importance_weight():
    drawn = with_ratio(1.0, 1.0, 1.0, 1.0)
    drawn.logp[:2] = -torch.inf
    drawn.old_logp[1:3] = -torch.inf
    factor = ImportanceCap()(logits(4, V, seed=0), logits(1, 4, V, seed=1), drawn, torch.ones(4))
    assert factor[0].tolist() == pytest.approx([math.exp(-20), 1.0, 2.0, 1.0])


def test_one_unknown_log_probability_is_refused():
    drawn = with_ratio(1.0, 1.0)
    drawn.old_logp[1] = torch.nan
    with pytest.raises(InputError, match=r"carry no log-probabilities; set method\.trust to equal"):
        ImportanceCap()(logits(2, V, seed=0), logits(1, 2, V, seed=1), drawn, torch.ones(2))


def test_the_importance_weight_reads_neither_rewards_nor_rollouts_of_weight_zero():
    trust = ImportanceCap()
    assert trust.rollout_weight(torch.tensor([5, -1, 0]), torch.tensor([0, 0, 1])).tolist() == [1, 1, 1]
    assert not trust.always_counts


def test_only_the_importance_weight_needs_what_the_decoder_gave():
    assert {name for name, part in TRUSTS.items() if part.needs_old_logp} == {"importance_cap"}


@pytest.mark.parametrize("trust", [Equal(), GroupAdvantage(), ImportanceCap()], ids=repr)
def test_factors_follow_the_students_precision_and_carry_no_gradient(trust):
    for given, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        student = logits(M, V, seed=0).to(given).requires_grad_()
        old = logits(1, M, V, seed=1).log_softmax(-1).to(given)
        student_logp = student.log_softmax(-1)
        drawn = Drawn(token=TOKEN, logp=at_token(student_logp), old_logp=at_token(old[0]), canvas=torch.arange(M))
        factor = trust(student_logp, old, drawn, ADVANTAGE.clone().requires_grad_())
        assert factor.dtype == expected
        assert factor.isfinite().all()
        assert not factor.requires_grad


@pytest.mark.parametrize(
    ("field", "wrong"), [("epsilon", 0.0), ("ratio_clip", 0.0), ("ratio_clip", math.nan), ("kl", -1.0)]
)
def test_a_wrong_field_is_named(field, wrong):
    with pytest.raises(InputError, match=rf"trust\.{field} is"):
        GroupAdvantage(**{field: wrong})


@pytest.mark.parametrize("field", ["cap", "clamp"])
@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan])
def test_a_wrong_field_of_the_importance_weight_is_named(field, wrong):
    with pytest.raises(InputError, match=rf"trust\.{field} is"):
        ImportanceCap(**{field: wrong})


# Trust by outcome

GAPS = torch.tensor(
    [[0.4, 0.2, -9.0, 1.0, 0.01, -0.02, -0.5, 0.1], [-0.4, -0.2, 9.0, -1.0, 0.3, 0.3, 9.0, -9.0]]
).double()
CANVAS = torch.tensor([5, 5, 5, 2, 7, 7, 2, 2])


def teachers_with(gaps: torch.Tensor, student_logp: torch.Tensor) -> torch.Tensor:
    """Teachers ``[t m v]`` that are this much above the student at the drawn tokens."""
    teachers = student_logp.expand(len(gaps), -1, -1).clone()
    for t in range(len(gaps)):
        for m in range(M):
            teachers[t, m, TOKEN[m]] += gaps[t, m]
    return teachers


@pytest.mark.parametrize("right", [True, False])
def test_the_table_of_polarities(right):
    """Helpful and warning teachers attract, over-suppressive and misleading ones repel, undecided ones do nothing."""
    student = logits(M, V, seed=0).log_softmax(-1)
    drawn = Drawn(token=TOKEN, logp=at_token(student), old_logp=at_token(student), canvas=CANVAS)
    trust = OutcomeValidated(clip=3.0, threshold=0.05)
    weight = trust.rollout_weight(torch.tensor([1.0 if right else 0.9]), torch.tensor([0])).expand(M)
    factor = trust(student, teachers_with(GAPS, student), drawn, weight)
    # Canvas 5: (.4 + .2 - 3) / 3 suppresses, (-.4 -.2 + 3) / 3 supports; 2: .6 / 3 supports, (-1 + 3 - 3) / 3 does not;
    # 7: -.005 is undecided, .3 supports.
    sign = torch.tensor([[-1, -1, -1, 1, 0, 0, 1, 1], [1, 1, 1, -1, 1, 1, -1, -1]]).double()
    assert torch.equal(factor, sign if right else -sign)


def test_support_is_the_mean_of_the_cut_gaps_of_a_canvas():
    student = logits(M, V, seed=3).log_softmax(-1)
    drawn = Drawn(token=TOKEN, logp=at_token(student), old_logp=at_token(student), canvas=CANVAS)
    support = OutcomeValidated(clip=2.0).support(student, teachers_with(GAPS, student), drawn)
    for t in range(2):
        for m in range(M):
            mine = [max(-2.0, min(2.0, float(GAPS[t, i]))) for i in range(M) if CANVAS[i] == CANVAS[m]]
            assert float(support[t, m]) == pytest.approx(sum(mine) / len(mine), abs=1e-12)


@pytest.mark.parametrize(("fields", "says"), [({"clip": 0.0}, "trust.clip"), ({"threshold": -0.1}, "trust.threshold")])
def test_trust_by_outcome_refuses_numbers_without_meaning(fields, says):
    with pytest.raises(InputError, match=says):
        OutcomeValidated(**fields)
