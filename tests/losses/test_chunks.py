from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from dllm_sd.losses.chunks import CHUNK, Spoken, swept

M, H, V = 7, 5, 11


def leaves(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Hidden states and a head that both want a gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, H, generator=generator, dtype=dtype).requires_grad_() for n in (M, V))
    return hidden, head


def equation(logits: Callable[[], Tensor], rows: slice) -> dict[str, Tensor]:
    logp = logits().float().log_softmax(-1) if logits().dtype == torch.bfloat16 else logits().log_softmax(-1)
    place = torch.arange(M)[rows]
    return {"term": logp[torch.arange(len(place)), place], "place": place}


@pytest.mark.parametrize("sites", [1, 3, 100])
def test_sum_columns_and_gradient_are_those_of_all_sites_at_once(sites, monkeypatch):
    monkeypatch.setitem(CHUNK, "cpu", sites * V)
    hidden, head = leaves()
    total, columns = swept(Spoken(hidden, lambda x: linear(x, head)), [head], equation)
    expected = equation(lambda: linear(hidden, head), slice(None))["term"]
    assert torch.equal(columns["place"], torch.arange(M))
    torch.testing.assert_close(columns["term"], expected.detach())
    assert not columns["term"].requires_grad
    gradient = torch.autograd.grad(total * 3, (hidden, head))
    for mine, other in zip(gradient, torch.autograd.grad(expected.sum() * 3, (hidden, head)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-13, rtol=1e-12)


def test_what_is_frozen_gets_no_gradient_and_none_is_made_where_none_is_asked_for(monkeypatch):
    monkeypatch.setitem(CHUNK, "cpu", 2 * V)
    hidden, head = leaves()
    fixed = head.detach()
    total, _ = swept(Spoken(hidden, lambda x: linear(x, fixed)), [], equation)
    total.backward()
    assert hidden.grad is not None
    total, _ = swept(Spoken(hidden.detach(), lambda x: linear(x, head)), [head], equation)
    total.backward()
    assert head.grad is not None
    with torch.no_grad():
        total, _ = swept(Spoken(hidden, lambda x: linear(x, head)), [head], equation)
    assert not total.requires_grad


def test_no_more_sites_than_fit_have_logits_at_a_time(monkeypatch):
    monkeypatch.setitem(CHUNK, "cpu", 2 * V + 1)
    hidden, head = leaves()
    sizes = []

    def watched(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return linear(x, head)

    swept(Spoken(hidden, watched), [head], lambda logits, rows: {"term": logits().sum(-1)})
    assert sizes == [0, 2, 2, 2, 1]


def test_the_head_has_its_gradient_under_autocast_where_a_teacher_used_it_without(monkeypatch):
    monkeypatch.setitem(CHUNK, "cpu", 3 * V)
    hidden, head = leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        student = Spoken.now(hidden, lambda x: linear(x, head))
        with torch.no_grad():
            assert student.at(slice(0, 2)).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            total, _ = swept(student, [head], equation)
    assert total.dtype == torch.float32
    gradient = torch.autograd.grad(total, (hidden, head))
    expected = torch.autograd.grad(equation(lambda: linear(hidden, head), slice(None))["term"].sum(), (hidden, head))
    for mine, other in zip(gradient, expected, strict=True):
        assert (mine - other).norm() < 0.02 * other.norm()
