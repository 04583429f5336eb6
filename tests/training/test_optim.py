"""The optimizer is AdamW, and the learning rate is a function of the update alone."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm_sd.config import Optim
from dllm_sd.errors import InputError
from dllm_sd.reports.memory import EIGHT_BIT_STATES
from dllm_sd.training import optim
from dllm_sd.training.optim import build_optimizer, check_optimizer, learning_rate, load_state, state_tensors


def rates(updates: int, **settings: Any) -> list[float]:
    """The learning rates of all updates, for a peak of 1."""
    chosen = Optim(**{"lr": 1.0, **settings})
    rate = learning_rate(build_optimizer([torch.nn.Parameter(torch.zeros(1))], chosen), chosen, updates)
    return [rate(update) for update in range(1, updates + 1)]


def cosine(share: float, low: float = 0.0) -> float:
    return low + (1 - low) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize(
    ("updates", "settings", "expected"),
    [
        (3, {}, [1, 1, 1]),
        (4, {"warmup": 2}, [1 / 2, 1, 1, 1]),
        (3, {"warmup": 3}, [1 / 3, 2 / 3, 1]),
        (3, {"final_lr": 0.1}, [1, 1, 1]),  # constant stays at the peak
        (5, {"schedule": "linear", "final_lr": 0.1}, [0.82, 0.64, 0.46, 0.28, 0.1]),
        (5, {"schedule": "linear", "final_lr": 0.1, "warmup": 2}, [0.5, 1, 0.7, 0.4, 0.1]),
        (4, {"schedule": "linear"}, [0.8, 0.6, 0.4, 0.2]),  # the last update still moves
        (5, {"schedule": "linear", "warmup": 2}, [0.5, 1, 0.75, 0.5, 0.25]),
        (4, {"schedule": "cosine", "final_lr": 0.2}, [cosine(i / 4, 0.2) for i in (1, 2, 3, 4)]),
        (4, {"schedule": "cosine", "final_lr": 0.2, "warmup": 2}, [0.5, 1, cosine(1 / 2, 0.2), 0.2]),
        (3, {"schedule": "cosine"}, [cosine(i / 4) for i in (1, 2, 3)]),
        (4, {"schedule": "cosine", "warmup": 1}, [1, *(cosine(i / 4) for i in (1, 2, 3))]),
        (3, {"schedule": "cosine", "final_lr": 1.0}, [1, 1, 1]),
        (1, {"schedule": "cosine", "final_lr": 0.3}, [0.3]),
        (2, {"schedule": "linear", "warmup": 5}, [0.2, 0.4]),  # the run ends before its warm-up
    ],
)
def test_the_learning_rate_is_that_of_the_formula(updates: int, settings: dict[str, Any], expected: list[float]):
    assert rates(updates, **settings) == pytest.approx(expected, abs=1e-9)


def test_a_linear_schedule_may_end_where_it_began():
    assert rates(3, schedule="linear", final_lr=1.0) == [1, 1, 1]


def test_the_learning_rate_scales_with_its_peak():
    peak = [3e-6 * rate for rate in rates(7, schedule="cosine", warmup=2, final_lr=0.1)]
    assert rates(7, lr=3e-6, schedule="cosine", warmup=2, final_lr=0.1) == pytest.approx(peak, rel=1e-12)


def test_the_learning_rate_does_not_depend_on_how_often_it_was_asked():
    chosen = Optim(lr=1.0, schedule="cosine", warmup=3)
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], chosen)
    rate = learning_rate(optimizer, chosen, 10)
    assert [rate(7), rate(2), rate(7)] == [rates(10, schedule="cosine", warmup=3)[i] for i in (6, 1, 6)]


def test_one_step_is_that_of_adamw():
    value = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    gradient = torch.tensor([0.5, -0.25], dtype=torch.float64)
    before = value.detach().clone()
    optimizer = build_optimizer([value], Optim(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2))
    value.grad = gradient.clone()
    optimizer.step()
    first, second = 0.2 * gradient / (1 - 0.8), 0.1 * gradient**2 / (1 - 0.9)  # both corrected for their start at 0
    expected = before * (1 - 0.1 * 0.2) - 0.1 * first / (second.sqrt() + 1e-3)
    assert torch.allclose(value, expected, rtol=1e-12, atol=0)


def trained_by(
    settings: Optim, steps: int, dtype: torch.dtype, **plain: Any
) -> tuple[list[Any], torch.optim.Optimizer]:
    """Parameters after some steps, by `build_optimizer` or, with options, by PyTorch's own AdamW."""
    torch.manual_seed(0)
    values = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((64, 80), (10,))]
    if plain:
        options = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(values, **options, **plain)
    else:
        optimizer = build_optimizer(values, settings)
    step_on(values, optimizer, steps)
    return values, optimizer


def step_on(values: list[Any], optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        for value in values:
            value.grad = torch.randn_like(value)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["foreach", "single"])
def test_the_fused_step_is_the_plain_one_to_rounding(dtype: torch.dtype, kind: str):
    ours, optimizer = trained_by(Optim(lr=1e-2), 30, dtype)
    plain, _ = trained_by(Optim(lr=1e-2), 30, dtype, foreach=kind == "foreach", fused=False)
    assert optimizer.param_groups[0]["fused"]
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).abs().max() <= 8 * torch.finfo(dtype).eps * b.abs().max()


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_state_by_name_goes_on_bit_for_bit(name: str, tmp_path: Path):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    settings = Optim(name=name, lr=1e-2)  # pyright: ignore[reportArgumentType]
    values, optimizer = trained_by(settings, 3, torch.float32)
    parameters = {f"w{i}": value for i, value in enumerate(values)}
    copies = {key: torch.nn.Parameter(value.detach().clone()) for key, value in parameters.items()}
    save_file(state_tensors(optimizer, parameters), tmp_path / "state.safetensors")
    other = build_optimizer(copies.values(), settings)
    load_state(other, copies, load_file(tmp_path / "state.safetensors"))
    for some, one in ((values, optimizer), ([*copies.values()], other)):
        torch.manual_seed(5)
        step_on(some, one, 3)
    for a, b in zip(values, copies.values(), strict=True):
        assert torch.equal(a, b)
    held = {key: value for key, value in state_tensors(optimizer, parameters).items() if key[:2] == "w0"}
    assert any(value.dtype == torch.uint8 for value in held.values()) == (name == "adamw_8bit")
    size = sum(value.nbytes for key, value in held.items() if not key.endswith("step"))
    assert size == values[0].numel() * (EIGHT_BIT_STATES if name == "adamw_8bit" else 8)


def test_a_state_of_another_kind_is_refused():
    pytest.importorskip("bitsandbytes")
    values, optimizer = trained_by(Optim(), 1, torch.float32)
    parameters = {f"w{i}": value for i, value in enumerate(values)}
    saved = state_tensors(optimizer, parameters)
    with pytest.raises(InputError, match=r"another optim\.name"):
        load_state(build_optimizer(values, Optim(name="adamw_8bit")), parameters, saved)


def test_8_bits_without_their_library_or_over_pieces_are_refused(monkeypatch: pytest.MonkeyPatch):
    settings, cpu = Optim(name="adamw_8bit"), torch.device("cpu")
    check_optimizer(Optim(), cpu, True)
    with monkeypatch.context() as patch:
        patch.setattr(optim, "find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"dllm-sd\[quant\]"):
            check_optimizer(settings, cpu, False)
    monkeypatch.setattr(optim, "find_spec", lambda name: name)
    check_optimizer(settings, cpu, False)
    with pytest.raises(InputError, match="FSDP2"):
        check_optimizer(settings, cpu, True)
    with pytest.raises(InputError, match="mps"):
        check_optimizer(settings, torch.device("mps"), False)
