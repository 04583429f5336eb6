import math

import pytest
import torch

from dllm_sd.errors import InputError
from dllm_sd.losses import (
    DIVERGENCES,
    ForwardKL,
    GatedGap,
    GeneralisedJSD,
    PolicyGradient,
    ReverseKL,
    TokenNLL,
    clip_share,
    clipped_sum,
    jsd_entries,
    kl_entries,
)
from dllm_sd.losses.divergences import Clip
from tests.oracles import divergences as oracle

NO_TOKEN = torch.zeros(0, dtype=torch.int64)
BETAS = [0, 0.25, 0.5, 0.9, 1]
KLS = [ForwardKL(), ReverseKL(), *(GeneralisedJSD(beta=beta) for beta in BETAS)]
CLIPS: list[Clip] = ["none", "token", "entry"]


def logits(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logp(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return logits(*shape, seed=seed, scale=scale).log_softmax(-1)


def of_probs(*p: float) -> torch.Tensor:
    return torch.tensor([p], dtype=torch.float64).log()


def test_the_table_names_every_divergence():
    assert {
        "forward_kl": ForwardKL,
        "reverse_kl": ReverseKL,
        "jsd": GeneralisedJSD,
        "token_nll": TokenNLL,
        "policy_gradient": PolicyGradient,
        "gated_gap": GatedGap,
    } == DIVERGENCES


@pytest.mark.parametrize("divergence", KLS, ids=repr)
def test_equal_distributions_are_at_distance_zero_and_stationary(divergence):
    student = logits(5, 20).requires_grad_()
    value = divergence(student.log_softmax(-1), logp(1, 5, 20), NO_TOKEN)
    value.sum().backward()
    torch.testing.assert_close(value, torch.zeros(1, 5, dtype=torch.float64), atol=1e-15, rtol=0)
    torch.testing.assert_close(student.grad, torch.zeros(5, 20, dtype=torch.float64), atol=1e-15, rtol=0)


@pytest.mark.parametrize("divergence", KLS, ids=repr)
def test_different_distributions_are_at_a_positive_distance(divergence):
    value = divergence(logp(300, 20), logp(2, 300, 20, seed=1), NO_TOKEN)
    assert value.shape == (2, 300)
    assert (value > 0).all()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradients_equal_the_oracle(beta, clip):
    student, target = logits(6, 9).requires_grad_(), logp(2, 6, 9, seed=1)
    clip_at = 0.3 if clip == "token" else 0.05
    value = GeneralisedJSD(beta=beta, clip=clip, clip_at=clip_at)(student.log_softmax(-1), target, NO_TOKEN)
    for t in range(2):
        for m in range(6):
            (grad,) = torch.autograd.grad(value[t, m], student, retain_graph=True)
            expected, expected_grad = oracle.value_and_gradient(
                student[m].tolist(), target[t, m].exp().tolist(), beta, clip, clip_at
            )
            assert value[t, m].item() == pytest.approx(expected, abs=1e-14, rel=1e-12)
            assert grad[m].tolist() == pytest.approx(expected_grad, abs=1e-14, rel=1e-11)


def test_beta_zero_is_forward_kl_and_beta_one_is_reverse_kl():
    given = logp(5, 20), logp(2, 5, 20, seed=1), NO_TOKEN
    for clip in CLIPS:
        assert torch.equal(GeneralisedJSD(0, clip=clip)(*given), ForwardKL(clip=clip)(*given))
        assert torch.equal(GeneralisedJSD(1, clip=clip)(*given), ReverseKL(clip=clip)(*given))


def test_the_scaled_jsd_tends_to_both_kls():
    student, target = logp(5, 20, scale=1), logp(5, 20, seed=1, scale=1)
    for beta, limit in ((1e-6, kl_entries(target, student)), (1 - 1e-6, kl_entries(student, target))):
        scaled = jsd_entries(student, target, beta).sum(-1) / (beta * (1 - beta))
        torch.testing.assert_close(scaled, limit.sum(-1), rtol=1e-4, atol=0)


def test_the_symmetric_jsd_is_symmetric_and_at_most_log_two():
    student, target = logp(50, 20, scale=9), logp(50, 20, seed=1, scale=9)
    value = jsd_entries(student, target, 0.5).sum(-1)
    torch.testing.assert_close(value, jsd_entries(target, student, 0.5).sum(-1))
    assert (value <= math.log(2)).all()


def test_two_tokens_by_hand():
    student, target = of_probs(0.5, 0.5), of_probs(0.75, 0.25)[None]
    forward, reverse = 0.75 * math.log(1.5) - 0.25 * math.log(2), 0.5 * math.log(4 / 3)
    mixed = 0.375 * math.log(1.2) + 0.125 * math.log(2 / 3) + 0.25 * math.log(0.8) + 0.25 * math.log(4 / 3)
    assert ForwardKL()(student, target, NO_TOKEN).item() == pytest.approx(forward, abs=1e-15)
    assert ReverseKL()(student, target, NO_TOKEN).item() == pytest.approx(reverse, abs=1e-15)
    assert GeneralisedJSD()(student, target, NO_TOKEN).item() == pytest.approx(mixed, abs=1e-15)


def test_the_entry_clip_is_not_a_divergence_but_the_token_clip_stays_between_zero_and_its_threshold():
    target = of_probs(0.3, 0.7)[None]
    student = of_probs(0.74, 0.26)
    assert ReverseKL(clip="entry")(student, target, NO_TOKEN).item() == pytest.approx(
        0.05 + 0.26 * math.log(0.26 / 0.7), abs=1e-15
    )
    assert ReverseKL(clip="token")(student, target, NO_TOKEN).item() == 0.05
    near = of_probs(0.31, 0.69)
    assert ReverseKL(clip="token")(near, target, NO_TOKEN).item() == ReverseKL()(near, target, NO_TOKEN).item()
    random = logp(99, 20), logp(1, 99, 20, seed=1), NO_TOKEN
    assert (ReverseKL(clip="entry")(*random) < 0).any()
    assert (ReverseKL(clip="token")(*random) >= 0).all()


def test_every_divergence_shows_its_unclipped_summands_and_its_value_before_the_clip():
    student, target, token = logp(5, 20), logp(2, 5, 20, seed=1), torch.arange(5)
    for part in (ForwardKL, ReverseKL, GeneralisedJSD):
        entries = part(clip="entry").entries(student, target, token)
        assert entries.shape == (2, 5, 20)
        torch.testing.assert_close(entries.sum(-1), part()(student, target, token))
        for clip in ("none", "token", "entry"):
            found = part(clip=clip).measure(student, target, token)
            torch.testing.assert_close(found.value, clipped_sum(entries, clip, 0.05))
            torch.testing.assert_close(found.unclipped, entries.sum(-1))


def test_clips_on_plain_numbers():
    entries = torch.tensor([[1.0, -0.5, 0.25]])
    assert clipped_sum(entries, "none", 0.3).item() == 0.75
    assert clipped_sum(entries, "entry", 0.5).item() == 0.25
    assert clipped_sum(entries, "token", 0.5).item() == 0.5
    assert clip_share(entries, "entry", 0.5).item() == pytest.approx(1 / 3)
    assert clip_share(entries, "token", 0.5).item() == 1
    assert clip_share(entries, "none", 0.5).item() == 0


@pytest.mark.parametrize("divergence", KLS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_entries_give_finite_values_and_gradients(divergence, dtype):
    student = logits(4, 8).to(dtype)
    target = logits(1, 4, 8, seed=1).to(dtype)
    student[0, :3] = -torch.inf  # the student forbids what the target allows
    target[0, 1, :3] = -torch.inf  # the other way round
    student[2, :3] = target[0, 2, :3] = -torch.inf  # both
    student[3], target[0, 3] = 0.0, 0.0
    student[3, 0], target[0, 3, 1] = 900.0, 900.0  # probabilities underflow
    student.requires_grad_()
    value = divergence(student.log_softmax(-1), target.log_softmax(-1), NO_TOKEN)
    value.sum().backward()
    assert value.dtype == dtype
    assert value.isfinite().all()
    assert (value >= 0).all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("divergence", KLS, ids=repr)
def test_entries_that_are_impossible_for_both_change_nothing(divergence):
    student, target = logits(4, 8), logits(1, 4, 8, seed=1)
    wide = [torch.cat([x, torch.full_like(x[..., :2], -torch.inf)], dim=-1) for x in (student, target)]
    narrow_value = divergence(student.log_softmax(-1), target.log_softmax(-1), NO_TOKEN)
    wide_value = divergence(wide[0].log_softmax(-1), wide[1].log_softmax(-1), NO_TOKEN)
    torch.testing.assert_close(wide_value, narrow_value)


def test_a_not_a_number_is_not_hidden():
    assert ReverseKL()(torch.tensor([[torch.nan, 0.0]]), of_probs(0.5, 0.5)[None], NO_TOKEN).isnan().all()


@pytest.mark.parametrize("divergence", [*KLS, TokenNLL()], ids=repr)
def test_bfloat16_is_computed_in_float32_and_stays_finite(divergence):
    student = logits(5, 20, scale=20).to(torch.bfloat16).requires_grad_()
    target = logp(1, 5, 20, seed=1, scale=20).to(torch.bfloat16)
    value = divergence(student.log_softmax(-1), target, torch.arange(5))
    value.sum().backward()
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("t", [0, 1, 2])
def test_token_nll_reads_only_the_student_at_the_token(t):
    student, token = logp(4, 8), torch.tensor([3, 0, 7, 3])
    value = TokenNLL()(student, logp(2, 4, 8, seed=1)[:t], token)
    assert value.tolist() == [[-student[m, v].item() for m, v in enumerate(token.tolist())]]
    entries = TokenNLL().entries(student, student[None], token)
    assert torch.equal(entries.sum(-1), value)


def test_the_gradient_of_token_nll_is_that_of_cross_entropy():
    student, token = logits(4, 8).requires_grad_(), torch.tensor([3, 0, 7, 3])
    (ours,) = torch.autograd.grad(TokenNLL()(student.log_softmax(-1), logp(0, 4, 8), token).sum(), student)
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(student, token, reduction="sum"), student)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("part", [ForwardKL, ReverseKL, GeneralisedJSD])
def test_a_wrong_field_is_named(part):
    with pytest.raises(InputError, match=r"divergence\.clip is 'pointwise': choose"):
        part(clip="pointwise")
    for wrong in (0, -1, math.nan):
        with pytest.raises(InputError, match=r"divergence\.clip_at is .* above 0"):
            part(clip="token", clip_at=wrong)


@pytest.mark.parametrize("beta", [-0.1, 1.5, math.nan])
def test_a_beta_outside_zero_to_one_is_refused(beta):
    with pytest.raises(InputError, match=r"divergence\.beta is"):
        GeneralisedJSD(beta=beta)
