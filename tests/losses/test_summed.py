import pytest
import torch

from dllm_sd.losses.divergences import ForwardKL, GeneralisedJSD, ReverseKL, clipped_sum


def distributions(*shape: int, seed: int) -> torch.Tensor:
    """Log-probabilities, some of which are log 0 or lower than any that counts."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    logits[..., 0, 0], logits[..., 1, 1], logits[..., 2, 2] = -torch.inf, -3e4, -800.0
    return logits.log_softmax(-1)


@pytest.mark.parametrize("clip", ["none", "token", "entry"])
@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize(
    "kind", [ForwardKL, ReverseKL, GeneralisedJSD, lambda **x: GeneralisedJSD(beta=0.1, **x)], ids=lambda _: ""
)
def test_value_log_and_gradient_are_those_of_the_summands(kind, t, clip):
    part = kind(clip=clip, clip_at=0.3)
    student, target = distributions(5, 7, seed=1).requires_grad_(), distributions(t, 5, 7, seed=2)
    target[:, 3] = student.detach()[3]
    token, weight = torch.zeros(5, dtype=torch.int64), torch.arange(1.0, 5 * t + 1, dtype=torch.float64).view(t, 5)
    entries = part.entries(student, target, token)
    plain = clipped_sum(entries, clip, 0.3)
    found = part.measure(student, target, token)
    torch.testing.assert_close(found.value, plain, atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(found.unclipped, entries.detach().sum(-1), atol=1e-14, rtol=1e-12)
    assert not found.unclipped.requires_grad
    (expected,) = torch.autograd.grad((plain * weight).sum(), student)
    (gradient,) = torch.autograd.grad((found.value * weight).sum(), student)
    assert expected.isfinite().all()
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-10)


def test_a_target_has_no_gradient():
    student, target = distributions(5, 7, seed=1).requires_grad_(), distributions(1, 5, 7, seed=2).requires_grad_()
    value = ReverseKL()(student, target, torch.zeros(5, dtype=torch.int64))
    assert torch.autograd.grad(value.sum(), target, allow_unused=True) == (None,)
