import math

import pytest
import torch

from dllm_sd.errors import InputError
from dllm_sd.losses import GatedGap, drawn_gap, gate, local_support

V, M = 7, 6
TOKEN = torch.tensor([3, 0, 6, 3, 5, 1])


def logp(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.5])
def test_the_gate_is_nothing_without_a_gap_and_log_2_far_out(tau):
    assert float(gate(torch.zeros(()), tau)) == pytest.approx(0, abs=1e-7)
    assert gate(torch.tensor([-80.0, 80.0]), tau).tolist() == pytest.approx([math.log(2)] * 2)
    for gap in (-2.0, -0.1, 0.7, 3.0):
        expected = math.log(2) - math.log(1 + math.exp(-(gap**2) / (2 * tau)))
        assert float(gate(torch.tensor(gap, dtype=torch.float64), tau)) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.5])
def test_the_gradient_pulls_the_drawn_token_towards_the_teacher_by_a_bounded_weight(tau):
    student, teacher = logp(M, V, seed=0).requires_grad_(), logp(2, M, V, seed=1)
    GatedGap(tau=tau)(student, teacher, TOKEN).sum().backward()
    assert student.grad is not None
    expected = torch.zeros(M, V, dtype=torch.float64)
    for m in range(M):
        for t in range(2):
            gap = float(teacher[t, m, TOKEN[m]] - student.detach()[m, TOKEN[m]])
            expected[m, TOKEN[m]] -= gap / (tau * (1 + math.exp(gap**2 / (2 * tau))))
    torch.testing.assert_close(student.grad, expected, atol=1e-13, rtol=1e-11)
    gap = torch.linspace(-9, 9, 2001, dtype=torch.float64, requires_grad=True)
    gate(gap, tau).sum().backward()
    assert gap.grad is not None
    assert float(gap.grad.max()) <= 1 / math.sqrt(math.e * tau)
    if tau == 1:
        peak = float(gap.detach()[gap.grad.argmax()])
        assert (peak, float(gap.grad.max())) == pytest.approx((1.216, 0.393), abs=5e-3)


def test_no_gradient_reaches_the_teacher():
    teacher = logp(2, M, V, seed=1).requires_grad_()
    student = logp(M, V, seed=0).requires_grad_()
    for local in (None, 2):
        GatedGap(local=local)(student, teacher, TOKEN).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("k", [1, 3, V])
def test_the_local_support_is_the_teachers_top_and_the_drawn_token_renormalised(k):
    student, teacher = logp(M, V, seed=2), logp(2, M, V, seed=3)
    ours, theirs, drawn = local_support(student, teacher, TOKEN, k)
    for t in range(2):
        for m in range(M):
            token = int(TOKEN[m])
            top = teacher[t, m].argsort(descending=True)[:k].tolist()
            kept = top if token in top else [*top, token]
            for found, whole in ((ours[t, m], student[m]), (theirs[t, m], teacher[t, m])):
                expected = whole[kept].log_softmax(-1)
                torch.testing.assert_close(found[found > -torch.inf], expected, atol=1e-13, rtol=0)
            assert int(drawn[t, m].sum()) == 1
            gap = teacher[t, m][kept].log_softmax(-1) - student[m][kept].log_softmax(-1)
            assert float(drawn_gap(student, teacher, TOKEN, k)[t, m]) == pytest.approx(float(gap[kept.index(token)]))


def test_the_whole_vocabulary_as_local_support_changes_no_gap():
    student, teacher = logp(M, V, seed=2), logp(2, M, V, seed=3)
    torch.testing.assert_close(drawn_gap(student, teacher, TOKEN, V), drawn_gap(student, teacher, TOKEN))


@pytest.mark.parametrize(("fields", "says"), [({"tau": 0.0}, "divergence.tau"), ({"local": 0}, "divergence.local")])
def test_numbers_without_meaning_are_refused(fields, says):
    with pytest.raises(InputError, match=says):
        GatedGap(**fields)
