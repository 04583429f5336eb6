import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_sd.errors import InputError
from dllm_sd.losses import (
    FullVocabulary,
    PolicyGradient,
    ReverseKL,
    TopK,
    clipped_surrogate,
    kl_entries,
    log_ratio_advantage,
)
from tests.oracles import divergences, policy_gradient
from tests.tiers import later

M, V = 6, 11
TOKEN = torch.tensor([3, 0, 10, 3, 5, 1])
WEIGHTS = ["student", "teacher", "uniform"]
CLIPS = [(0.2, 3.0), (0.2, None), (0.5, 1.5)]


def logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logp(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return logits(*shape, seed=seed, scale=scale).log_softmax(-1)


def of_probs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def gradient(value: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), at, retain_graph=True)[0]


@pytest.mark.parametrize("tokens", ["support", "sampled"])
@pytest.mark.parametrize(("ratio_clip", "dual_clip"), CLIPS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("off_policy", [True, *later(False)])
def test_values_and_gradients_equal_the_oracle(tokens, ratio_clip, dual_clip, weight, off_policy):
    part = PolicyGradient(tokens=tokens, weight=weight, ratio_clip=ratio_clip, dual_clip=dual_clip)
    clips = 0
    for seed in range(0, 30, 3):
        student, teacher = logits(M, V, seed=seed).requires_grad_(), logp(M, V, seed=seed + 1)
        student_logp = student.log_softmax(-1)
        old = (student + 1.5 * logits(M, V, seed=seed + 2, scale=1)).log_softmax(-1).detach()
        rollout = old if off_policy else student_logp.detach()
        given = torch.stack([teacher, old] if off_policy else [teacher])
        support: Any = FullVocabulary() if tokens == "sampled" else TopK(k=4, of="student", rest="keep")
        if tokens == "support" and off_policy:
            support = TopK(k=4, of="rollout", rest="keep")
        value = part(*support(student_logp, given), TOKEN)
        ours = gradient(value, student)
        assert value.shape == (1, M)
        for m in range(M):
            ids = [TOKEN.tolist()[m]] if tokens == "sampled" else divergences.top_k(rollout[m].exp().tolist(), 4)
            site = [x[m].tolist() for x in (student, rollout, teacher)]
            expected, expected_grad, cut = policy_gradient.value_and_gradient(
                *site, ids=ids, weight=weight, ratio_clip=ratio_clip, dual_clip=dual_clip
            )
            clips += cut
            assert value[0, m].item() == pytest.approx(expected, abs=1e-13, rel=1e-11)
            assert ours[m].tolist() == pytest.approx(expected_grad, abs=1e-13, rel=1e-10)
    assert (clips > 10) == off_policy  # the cases do reach the clips


def test_on_policy_over_the_whole_vocabulary_the_gradient_is_that_of_the_reverse_kl():
    student, teacher = logits(M, V).requires_grad_(), logp(1, M, V, seed=1)
    student_logp = student.log_softmax(-1)
    for surrogate in ("ratio", "log"):
        value = PolicyGradient(surrogate=surrogate)(student_logp, teacher, TOKEN)
        expected = ReverseKL()(student_logp, teacher, TOKEN)
        torch.testing.assert_close(gradient(value, student), gradient(expected, student))
        if surrogate == "ratio":
            torch.testing.assert_close(value, expected)


def test_the_mean_over_sampled_tokens_is_the_whole_vocabularys_gradient():
    student, teacher = logits(1, V).requires_grad_(), logp(1, 1, V, seed=1)
    student_logp = student.log_softmax(-1)
    every = torch.arange(V)
    value = PolicyGradient(tokens="sampled")(student_logp.expand(V, V), teacher.expand(1, V, V), every)
    mean = (student_logp.detach().exp()[0] * value[0]).sum()
    expected = PolicyGradient()(student_logp, teacher, every[:1])
    torch.testing.assert_close(mean, expected.sum())
    torch.testing.assert_close(gradient(mean, student), gradient(expected, student))


@pytest.mark.parametrize(("tokens", "weight"), [*itertools.product(["support"], WEIGHTS), ("sampled", "student")])
def test_both_surrogates_have_the_same_gradient_on_policy(tokens, weight):
    student, teacher = logits(M, V).requires_grad_(), logp(1, M, V, seed=1)
    ratio, log = (
        gradient(PolicyGradient(tokens, weight, surrogate=surrogate)(student.log_softmax(-1), teacher, TOKEN), student)
        for surrogate in ("ratio", "log")
    )
    assert ratio.abs().max() > 0.01
    torch.testing.assert_close(ratio, log)


def test_the_log_surrogate_is_minus_advantage_times_log_probability_and_never_clipped():
    student, given = logp(M, V), logp(2, M, V, seed=1)
    part = PolicyGradient(tokens="sampled", surrogate="log")
    value = part(student, given, TOKEN)
    for m, v in enumerate(TOKEN.tolist()):
        assert value[0, m].item() == pytest.approx(-(given[0, m, v] - given[1, m, v]).item() * student[m, v].item())
    torch.testing.assert_close(part.entries(student, given, TOKEN).sum(-1), value)


def test_entries_are_the_summands_before_any_clip():
    student, given = logp(M, V), logp(2, M, V, seed=1)
    part = PolicyGradient()
    entries = part.entries(student, given, TOKEN)
    advantage = given[1].softmax(-1) * (given[0] - given[1])
    torch.testing.assert_close(part.advantage(student, given, TOKEN), advantage)
    torch.testing.assert_close(entries, -(advantage * (student - given[1]).exp())[None])
    assert not torch.allclose(entries.sum(-1), part(student, given, TOKEN))
    on_policy = part.entries(student, given[:1], TOKEN)
    torch.testing.assert_close(on_policy.sum(-1), part(student, given[:1], TOKEN))
    torch.testing.assert_close(on_policy[0], kl_entries(student, given[0]))
    assert PolicyGradient(tokens="sampled").entries(student, given, TOKEN).shape == (1, M, 1)


def test_clips_by_hand():
    ratio = torch.tensor([0.5, 0.9, 1.5, 4.0] * 2, dtype=torch.float64)
    advantage = torch.tensor([2.0] * 4 + [-2.0] * 4, dtype=torch.float64)
    log_ratio = ratio.log().requires_grad_()
    loss = clipped_surrogate(log_ratio, advantage, 0.2, 3.0)
    assert loss.tolist() == pytest.approx([-1.0, -1.8, -2.4, -2.4, 1.6, 1.8, 3.0, 6.0])
    assert gradient(loss, log_ratio).tolist() == pytest.approx([-1.0, -1.8, 0, 0, 0, 1.8, 3.0, 0])
    assert clipped_surrogate(log_ratio, advantage, 0.2, None)[-1].item() == pytest.approx(8.0)


def test_a_site_of_two_tokens_by_hand():
    student, teacher, old = of_probs([0.6, 0.4]), of_probs([0.3, 0.7]), of_probs([0.4, 0.6])
    given = torch.stack([teacher, old])
    up, down = math.log(7 / 6), math.log(3 / 4)  # the teacher's log-ratios to the old policy, second and first token
    weights: dict[Any, tuple[float, float]] = {"student": (0.4, 0.6), "teacher": (0.3, 0.7), "uniform": (0.5, 0.5)}
    for weight, (first, second) in weights.items():
        expected = -first * down * 1.5 - second * up * (2 / 3)
        value = PolicyGradient(weight=weight)(student, given, TOKEN[:1])
        assert value.item() == pytest.approx(expected)
    sampled = PolicyGradient(tokens="sampled", weight="teacher")(student, given, torch.tensor([1]))
    assert sampled.item() == pytest.approx(-up * 2 / 3)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_advantages_are_constants_and_zero_where_both_policies_agree(weight):
    rollout, teacher = logp(M, V).requires_grad_(), logp(M, V, seed=1).requires_grad_()
    assert not log_ratio_advantage(rollout, teacher, weight).requires_grad
    assert torch.equal(log_ratio_advantage(rollout, rollout, weight), torch.zeros(M, V, dtype=torch.float64))


@pytest.mark.parametrize("tokens", ["support", "sampled"])
@pytest.mark.parametrize("surrogate", ["ratio", "log"])
def test_no_gradient_reaches_teacher_or_rollout_policy(tokens, surrogate):
    student, given = logits(M, V).requires_grad_(), logp(2, M, V, seed=1).requires_grad_()
    PolicyGradient(tokens=tokens, surrogate=surrogate)(student.log_softmax(-1), given, TOKEN).sum().backward()
    assert given.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("tokens", ["support", "sampled"])
@pytest.mark.parametrize("surrogate", ["ratio", "log"])
@pytest.mark.parametrize("t", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_entries_give_finite_values_and_gradients(tokens, surrogate, t, dtype):
    student, given = logits(M, V).to(dtype), logits(t, M, V, seed=1).to(dtype)
    student[0, :4] = -torch.inf
    given[0, 1, :4] = -torch.inf
    given[-1, 2, 8:] = -torch.inf
    student[3, :4] = given[:, 3, :4] = -torch.inf
    student[4, 5], given[-1, 4, 6] = 900.0, 900.0
    student.requires_grad_()
    part = PolicyGradient(tokens=tokens, surrogate=surrogate, dual_clip=None)
    value = part(student.log_softmax(-1), given.log_softmax(-1), TOKEN)
    value.sum().backward()
    assert value.dtype == dtype
    assert value.isfinite().all()
    assert part.entries(student.log_softmax(-1), given.log_softmax(-1), TOKEN).isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_bfloat16_is_computed_in_float32():
    student = logits(M, V).to(torch.bfloat16)
    assert PolicyGradient()(student.log_softmax(-1), student[None].log_softmax(-1), TOKEN).dtype == torch.float32


@pytest.mark.parametrize("t", [0, 3])
def test_any_other_number_of_targets_is_refused(t):
    with pytest.raises(InputError, match=rf"one or two targets \(teacher, rollout policy\) and got {t}"):
        PolicyGradient()(logp(M, V), logp(t, M, V), TOKEN)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("tokens", "all"),
        ("weight", "none"),
        ("ratio_clip", 0.0),
        ("ratio_clip", math.nan),
        ("dual_clip", 1.0),
        ("dual_clip", math.nan),
        ("surrogate", "linear"),
    ],
)
def test_a_wrong_field_is_named(field, wrong):
    with pytest.raises(InputError, match=rf"divergence\.{field} is"):
        PolicyGradient(**{field: wrong})
