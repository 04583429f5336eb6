from dataclasses import fields, replace

import pytest
import torch

from dllm_sd.methods import METHODS
from dllm_sd.methods.method import Method
from dllm_sd.objective import plan as plan_module
from dllm_sd.objective.batching import by_length, micro_batches
from dllm_sd.objective.plan import Plan, plan_update
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.tasks.task import Grade, Problem
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
                first, last = piece.first, piece.last
                assert len(index) * int((last.amax(0) - first.amin(0)).max()) <= tokens
    if tokens == 10**6:
        assert len(batches) == 1


def test_short_canvases_come_in_larger_micro_batches(noise):
    plan = planned(noise(b=6))
    width = int((plan.last - plan.first).amax())
    by_widest = -(-plan.size // (150 // width))
    assert len(micro_batches(plan, 150)) <= by_widest


def test_equal_canvases_stand_side_by_side(noise):
    trajectory = noise(b=4)
    plan = planned(trajectory.select(torch.tensor([0, 1, 2, 3, 0, 2])))
    mixed = plan.select(torch.randperm(plan.size, generator=torch.Generator().manual_seed(0)))
    canvases = mixed.micro_batch().canvases
    ids = torch.where(canvases.mask, canvases.ids, -1)
    assert torch.equal(
        mixed.content.unique(return_inverse=True)[1][:, None] == mixed.content.unique(return_inverse=True)[1],
        (ids[:, None] == ids).all(-1),
    )
    ids = ids[by_length(mixed)]
    group = ids.unique(dim=0, return_inverse=True)[1]
    assert len(group.unique_consecutive()) == len(group.unique()) < len(group)
    length = (ids >= 0).sum(1)
    assert torch.equal(length, length.sort().values)


def test_what_a_teacher_reads_counts_too(noise):
    plan = planned(noise(b=2))
    other = replace(plan, last=plan.last + torch.tensor([0, 50]))
    assert len(micro_batches(other, 300)) > len(micro_batches(plan, 300))


def test_a_plan_knows_what_its_canvases_would_say(noise):
    plan = planned(noise(b=6))
    whole = plan.micro_batch()
    for place, mask in enumerate([whole.canvases.mask, *(seen.mask for seen in whole.teacher_inputs)]):
        used = [row.nonzero()[:, 0].tolist() for row in mask]
        assert plan.first[:, place].tolist() == [columns[0] for columns in used]
        assert plan.last[:, place].tolist() == [columns[-1] + 1 for columns in used]
    assert torch.equal(plan.length, whole.canvases.mask.sum(1))
    assert torch.equal(plan.quota, whole.quota)


@pytest.mark.parametrize("positions", [1, 100, 10**9])
def test_how_many_canvases_are_laid_out_at_a_time_changes_nothing(noise, positions, monkeypatch):
    expected = planned(noise(b=6))
    monkeypatch.setattr(plan_module, "POSITIONS_AT_ONCE", positions)
    found = planned(noise(b=6))
    for f in fields(Plan):
        if isinstance(value := getattr(found, f.name), torch.Tensor):
            assert torch.equal(value, getattr(expected, f.name)), f.name


def test_a_micro_batch_is_the_same_whatever_is_built_beside_it(noise):
    plan = planned(noise(b=6))
    whole = plan.micro_batch()
    index = torch.randperm(plan.size, generator=torch.Generator().manual_seed(0))[:5]
    part = plan.micro_batch(index)
    for name, value in vars(part.canvases).items():
        assert torch.equal(
            value.nan_to_num() if value.is_floating_point() else value,
            getattr(whole.canvases, name)[index].nan_to_num()
            if value.is_floating_point()
            else getattr(whole.canvases, name)[index],
        ), name
    for seen, every in zip(part.teacher_inputs, whole.teacher_inputs, strict=True):
        assert all(torch.equal(value, getattr(every, name)[index]) for name, value in vars(seen).items())
    assert torch.equal(part.candidates, whole.candidates[index])
