from dataclasses import replace

import pytest
import torch

from dllm_sd.methods import METHODS
from dllm_sd.methods.method import Method
from dllm_sd.objective.plan import Plan, plan_update
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.training.batching import by_length, extents, micro_batches
from dllm_sd.trajectory import Trajectory

METHOD: Method = METHODS["d_opsd"].method


def planned(trajectory: Trajectory) -> Plan:
    kept = tuple(
        Rollout(Problem(str(row), {}), 0, "", Grade(True, 1.0, None), trajectory.select(torch.tensor([row])))
        for row in range(trajectory.size)
    )
    plan = plan_update(METHOD, Rollouts(kept, {"rejected": 0.0}), list(range(trajectory.size)))
    assert plan is not None
    return plan


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 100, 300, 10**6])
def test_every_canvas_is_read_once_within_the_budget_and_alike_on_all_processes(noise, processes, tokens):
    plan = planned(noise(b=6))
    batches = micro_batches(plan, tokens, processes)
    assert all(len(shares) == processes and len(shares[0]) > 0 for shares in batches)
    every = torch.cat([index for shares in batches for index in shares])
    assert sorted(every.tolist()) == list(range(plan.size))
    for shares in batches:
        sizes = [len(index) for index in shares]
        assert max(sizes) - min(sizes) <= 1
        for index in shares:
            piece = plan.select(index)
            if len(index) > 1:
                first, last = extents(piece)
                assert len(index) * int((last.amax(0) - first.amin(0)).max()) <= tokens
    if tokens == 10**6:
        assert len(batches) == 1


def test_short_canvases_come_in_larger_micro_batches(noise):
    plan = planned(noise(b=6))
    first, last = extents(plan)
    width = int((last - first).amax())
    by_widest = -(-plan.size // (150 // width))
    assert len(micro_batches(plan, 150)) <= by_widest


def test_equal_canvases_stand_side_by_side(noise):
    trajectory = noise(b=4)
    plan = planned(trajectory.select(torch.tensor([0, 1, 2, 3, 0, 2])))
    mixed = plan.select(torch.randperm(plan.size, generator=torch.Generator().manual_seed(0)))
    ids = torch.where(mixed.canvases.mask, mixed.canvases.ids, -1)[by_length(mixed)]
    group = ids.unique(dim=0, return_inverse=True)[1]
    assert len(group.unique_consecutive()) == len(group.unique()) < len(group)
    length = (ids >= 0).sum(1)
    assert torch.equal(length, length.sort().values)


def test_what_a_teacher_reads_counts_too(noise):
    plan = planned(noise(b=2))
    reading = plan.readings[0]
    wide = torch.cat([torch.ones(plan.size, 50, dtype=torch.int64), reading.ids], 1)
    seen = torch.cat([torch.ones(plan.size, 50, dtype=torch.bool), reading.mask], 1)
    other = replace(plan, readings=(replace(reading, ids=wide, mask=seen),))
    assert len(micro_batches(other, 300)) > len(micro_batches(plan, 300))
