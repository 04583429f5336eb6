"""When equal attempts at a problem show that servers ignore the seed, and when a peaked policy makes them."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dllm_sd.errors import Stopped
from dllm_sd.experience.rollout_engine import _refuse_equal


def attempt(text: int, probability: float) -> Any:
    """An attempt of one token."""
    trajectory = SimpleNamespace(tokens=torch.tensor([[text]]), logp=torch.tensor([[math.log(probability)]]))
    return SimpleNamespace(trajectory=trajectory)


@pytest.mark.parametrize(
    ("problems", "attempts", "law"),
    [
        (8, 8, [0.4, 0.3, 0.2, 0.1]),
        (8, 8, [0.5, 0.5]),
        (32, 16, [0.9, 0.1]),
        (16, 8, [0.01] * 100),
        (32, 16, [0.01] * 100),
        (64, 8, [0.5] + [0.0005] * 1000),
    ],
)
def test_independent_draws_are_accepted(problems: int, attempts: int, law: list[float]):
    law = [p / math.fsum(law) for p in law]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(torch.tensor(law), problems * attempts, True, generator=generator)
        texts = drawn.view(problems, attempts).tolist()
        _refuse_equal([[attempt(text, law[text]) for text in row] for row in texts], 1.0)


@pytest.mark.parametrize(("problems", "attempts", "probability"), [(2, 4, 1e-9), (4, 8, 0.01), (32, 2, 0.05)])
def test_attempts_of_a_server_that_ignores_seeds_are_refused(problems: int, attempts: int, probability: float):
    tried = [[attempt(row, probability)] * attempts for row in range(problems)]
    with pytest.raises(Stopped, match=rf"^{problems * (attempts - 1)} attempts of a batch are equal"):
        _refuse_equal(tried, 1.0)
    _refuse_equal(tried, 0.0)  # greedy attempts are equal
