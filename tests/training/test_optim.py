"""The optimizer is AdamW, and the learning rate is a function of the update alone."""

import math
from typing import Any

import pytest
import torch

from dllm_sd.config import Optim
from dllm_sd.training.optim import build_optimizer, learning_rate


def rates(updates: int, **settings: Any) -> list[float]:
    """The learning rates of all updates, for a peak of 1."""
    optim = Optim(**{"lr": 1.0, **settings})
    rate = learning_rate(build_optimizer([torch.nn.Parameter(torch.zeros(1))], optim), optim, updates)
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
    optim = Optim(lr=1.0, schedule="cosine", warmup=3)
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], optim)
    rate = learning_rate(optimizer, optim, 10)
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
