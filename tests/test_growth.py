"""What an update is laid out with grows with its rollouts, canvases and sites, and no faster: elements, not seconds."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_sd import canvases
from dllm_sd.canvases import DecoderSteps, RandomMasks, drawn_share
from dllm_sd.losses import GroupAdvantage, OutcomeValidated, group_advantage
from dllm_sd.losses.sites import choose_sites
from dllm_sd.methods import METHODS
from dllm_sd.objective.batching import micro_batches
from dllm_sd.objective.plan import plan_update
from dllm_sd.randomness import fold, make_key, uniform
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.trajectory import Trajectory


class Elements(TorchDispatchMode):
    """Counts the elements of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, Tensor):
                self.total, self.largest = self.total + one.numel(), max(self.largest, one.numel())
        return found


def rollouts_of(trajectory: Trajectory, b: int) -> Rollouts:
    """``b`` rollouts, eight of each problem."""
    unstack = trajectory.unstack()
    kept = [
        Rollout(Problem(str(i // 8), {}), i % 8, "", Grade(i % 2 == 0, i % 3 / 2, None), unstack[i % len(unstack)])
        for i in range(b)
    ]
    return Rollouts(tuple(kept), {"rejected": 0.0})


def plan(name: str, **parts: Any) -> Callable[[Trajectory, int], Callable[[], object]]:
    def prepared(trajectory: Trajectory, size: int) -> Callable[[], object]:
        method, rollouts = replace(METHODS[name].method, **parts), rollouts_of(trajectory, size)
        return lambda: plan_update(method, rollouts, list(range(size)))

    return prepared


def batches(trajectory: Trajectory, size: int) -> Callable[[], object]:
    rollouts = rollouts_of(trajectory, size)
    planned = plan_update(METHODS["d_opsd"].method, rollouts, list(range(size)))
    assert planned is not None
    return lambda: micro_batches(planned, 100)


GROWING: dict[str, Callable[[Trajectory, int], Callable[[], object]]] = {
    "the plan of d_opsd": plan("d_opsd"),
    "the plan of a subset of steps": plan("d_opsd", canvases=DecoderSteps(subset=2)),
    "the plan of the paper's average": plan("d_opsd_paper"),
    "the plan of random masks": plan("rft", canvases=RandomMasks(draws=4)),
    "the plan of group advantages": plan("grpo"),
    "micro-batches": batches,
    "a subset's share": lambda _, n: lambda: drawn_share(torch.arange(n) // 64, torch.arange(n) % 64, 8, [0] * n, 0),
    "group advantages": lambda _, n: lambda: group_advantage(torch.rand(n), torch.arange(n) // 8, True, 1e-4),
    "pooled evidence": lambda _, n: lambda: OutcomeValidated().pooled(torch.rand(2, n), torch.arange(n), torch.ones(n)),
    "chosen sites": lambda _, n: lambda: choose_sites(torch.ones(n, 8).bool(), torch.ones(n).long(), torch.rand(8 * n)),
}


@pytest.mark.parametrize("name", GROWING)
def test_four_times_as_much_takes_about_four_times_as_many_elements(noise, name):
    trajectory, found = noise(b=8), {}
    for size in (32, 128):
        act = GROWING[name](trajectory, size)
        with Elements() as count:
            act()
        found[size] = count
    assert found[128].total < 5 * found[32].total
    assert found[128].largest < 5 * found[32].largest


def test_what_is_drawn_is_what_pairwise_comparison_draws(monkeypatch):
    """Of a rollout's canvases those with the lowest lots, and of equal lots the earlier step."""
    generator = torch.Generator().manual_seed(0)
    for draw in range(20):
        rows = torch.randint(0, 7, (60,), generator=generator)
        steps = torch.randperm(60, generator=generator)
        keys, subset = [make_key("row", row) for row in range(7)], draw % 5 + 1
        base = torch.tensor([make_key(key, "subset", draw) for key in keys], dtype=torch.int64)
        lot = uniform(fold(base[rows], steps), 1)[:, 0]
        if draw % 2:
            lot = (lot * 3).round()  # many are equal
            monkeypatch.setattr(canvases, "uniform", lambda *_, lot=lot: lot[:, None])
        same = rows[:, None] == rows
        ahead = (lot[:, None] > lot) | ((lot[:, None] == lot) & (steps[:, None] > steps))
        rank, count = (same & ahead).sum(1), same.sum(1)
        expected = torch.where(rank < subset, count / count.clamp(max=subset), 0).double()
        assert torch.equal(drawn_share(rows, steps, subset, keys, draw), expected)
        monkeypatch.undo()


def test_equal_rewards_have_no_advantage_at_all():
    reward = torch.tensor([0.1, 0.1, 0.1, 0.3, 0.7, 0.7, 0.7], dtype=torch.float64)
    group = torch.tensor([4, 4, 4, 9, 2, 2, 2])
    for normalise in (True, False):
        assert not GroupAdvantage(normalise=normalise).rollout_weight(reward, group).any()
