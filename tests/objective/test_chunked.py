from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_sd.network.lazy_logits import LOSS_CHUNK_LOGITS, LazyLogits, sites_per_chunk
from dllm_sd.objective.chunked import chunked_loss

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
    monkeypatch.setitem(LOSS_CHUNK_LOGITS, "cpu", sites * V)
    hidden, head = leaves()
    total, columns = chunked_loss(LazyLogits(hidden, lambda x: linear(x, head)), [head], equation)
    expected = equation(lambda: linear(hidden, head), slice(None))["term"]
    assert torch.equal(columns["place"], torch.arange(M))
    torch.testing.assert_close(columns["term"], expected.detach())
    assert not columns["term"].requires_grad
    gradient = torch.autograd.grad(total * 3, (hidden, head))
    for mine, other in zip(gradient, torch.autograd.grad(expected.sum() * 3, (hidden, head)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-13, rtol=1e-12)


def test_what_is_frozen_gets_no_gradient_and_none_is_made_where_none_is_asked_for(monkeypatch):
    monkeypatch.setitem(LOSS_CHUNK_LOGITS, "cpu", 2 * V)
    hidden, head = leaves()
    fixed = head.detach()
    total, _ = chunked_loss(LazyLogits(hidden, lambda x: linear(x, fixed)), [], equation)
    total.backward()
    assert hidden.grad is not None
    total, _ = chunked_loss(LazyLogits(hidden.detach(), lambda x: linear(x, head)), [head], equation)
    total.backward()
    assert head.grad is not None
    with torch.no_grad():
        total, _ = chunked_loss(LazyLogits(hidden, lambda x: linear(x, head)), [head], equation)
    assert not total.requires_grad


def test_no_more_sites_than_fit_have_logits_at_a_time(monkeypatch):
    monkeypatch.setitem(LOSS_CHUNK_LOGITS, "cpu", 2 * V + 1)
    hidden, head = leaves()
    sizes = []

    def watched(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return linear(x, head)

    chunked_loss(LazyLogits(hidden, watched), [head], lambda logits, rows: {"term": logits().sum(-1)})
    assert sizes == [0, 2, 2, 2, 1]


def test_the_head_has_its_gradient_under_autocast_where_a_teacher_used_it_without(monkeypatch):
    monkeypatch.setitem(LOSS_CHUNK_LOGITS, "cpu", 3 * V)
    hidden, head = leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        student = LazyLogits.under_autocast(hidden, lambda x: linear(x, head))
        with torch.no_grad():
            assert student.logits(slice(0, 2)).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            total, _ = chunked_loss(student, [head], equation)
    assert total.dtype == torch.float32
    gradient = torch.autograd.grad(total, (hidden, head))
    expected = torch.autograd.grad(equation(lambda: linear(hidden, head), slice(None))["term"].sum(), (hidden, head))
    for mine, other in zip(gradient, expected, strict=True):
        assert (mine - other).norm() < 0.02 * other.norm()


class Scaled(nn.Module):
    """A head that is more than a linear map, and uses its weight twice."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head, self.scale = head, nn.Parameter(torch.tensor(0.5, dtype=head.weight.dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden) * self.scale + hidden @ self.head.weight.T


def made(kind: str, dtype: torch.dtype) -> tuple[nn.Module, list[nn.Parameter]]:
    """A head ``[h] -> [v]`` and those of its parameters that are trained."""
    torch.manual_seed(0)
    plain: nn.Module = nn.Linear(H, V, bias=kind == "bias", dtype=dtype)
    if kind == "scaled":
        plain = Scaled(nn.Linear(H, V, bias=False, dtype=dtype))
    if kind in ("lora", "saved"):
        adapted, saved = (["0"], None) if kind == "lora" else (["1"], ["0"])
        both: Any = nn.Sequential(plain, nn.Linear(V, V, bias=False, dtype=dtype))
        settings = LoraConfig(r=2, init_lora_weights=False, target_modules=adapted, modules_to_save=saved)
        adapter: Any = get_peft_model(both, settings)
        plain = adapter.base_model.model[0]
    return plain, [x for x in plain.parameters() if x.requires_grad]


class Made(TorchDispatchMode):
    """Counts matrix products that have the shape of a head."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.count += func is torch.ops.aten.mm.default and tuple(found.shape) in ((V, H), (H, V))
        return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "bias", "scaled", "lora", "saved"])
def test_a_trained_head_of_any_kind_gets_the_gradient_of_all_sites_at_once(kind, dtype, monkeypatch):
    head, trained = made(kind, dtype)
    assert trained
    hidden = leaves(dtype)[0].detach().requires_grad_()
    expected = torch.autograd.grad(equation(lambda: head(hidden), slice(None))["term"].sum(), (hidden, *trained))
    monkeypatch.setitem(LOSS_CHUNK_LOGITS, "cpu", 2 * V)
    total, _ = chunked_loss(LazyLogits(hidden, head), trained, equation)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for mine, other in zip(torch.autograd.grad(total, (hidden, *trained)), expected, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("sites", [1, 2, 7])
def test_chunks_add_to_the_gradient_of_a_head_in_place(sites, monkeypatch):
    hidden, head = leaves()
    monkeypatch.setitem(LOSS_CHUNK_LOGITS, "cpu", sites * V)
    with Made() as products:
        chunked_loss(LazyLogits(hidden, lambda x: linear(x, head)), [head], equation)
    assert products.count == (1 if sites == 7 else 0)


def test_one_chunk_has_the_very_bits_of_autograd():
    hidden, head = leaves(torch.float32)
    total, _ = chunked_loss(LazyLogits(hidden, lambda x: linear(x, head)), [head], equation)
    expected = equation(lambda: linear(hidden, head), slice(None))["term"].sum()
    assert torch.equal(total, expected)
    for mine, other in zip(
        torch.autograd.grad(total, (hidden, head)), torch.autograd.grad(expected, (hidden, head)), strict=True
    ):
        assert torch.equal(mine, other)


def test_a_head_that_is_read_without_gradient_makes_no_sum(monkeypatch):
    monkeypatch.setitem(LOSS_CHUNK_LOGITS, "cpu", 2 * V)
    hidden, head = leaves()
    made: list[object] = []
    monkeypatch.setattr(torch, "zeros_like", lambda *x, **_: made.append(x))
    with torch.no_grad():
        chunked_loss(LazyLogits(hidden, lambda x: linear(x, head)), [head], equation)
    assert made == []


@pytest.mark.parametrize("vocabulary", [25, 32_000, 151_936, 262_144])
@pytest.mark.parametrize("width", [64, 1024, 4096, 16_384])
def test_chunks_hold_as_many_sites_as_fit_and_more_of_wide_heads(vocabulary, width):
    sites = sites_per_chunk(vocabulary, width, "cpu")
    assert sites * vocabulary <= max(LOSS_CHUNK_LOGITS["cpu"], vocabulary * width / 32)
    assert sites >= min(width // 32, 128)
    assert (sites + 1) * vocabulary > LOSS_CHUNK_LOGITS["cpu"]
    assert (
        sites_per_chunk(vocabulary, 64, "cuda")
        == sites_per_chunk(vocabulary, 64, "elsewhere")
        == LOSS_CHUNK_LOGITS["cuda"] // vocabulary
    )
