"""The teacher's advantage by what a critique says of each token: against sums by hand."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dllm_sd.decoding.settings import Decoding
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.rollouts.rollout import Rollout, Rollouts, TeacherBrief
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.teachers import Nothing, Reference
from dllm_sd.training.advantage import region_map, region_metrics, region_sums
from dllm_sd.training.pictures import advantage_of_first
from dllm_sd.training.traces import Pieces, UpdateTrace

CANVAS = Decoding(length=12, block_length=4, tokens_per_step=2)


class Marked(Reference):
    """Takes the note for the spans themselves."""

    marks_regions: bool = True

    def marks(self, text: str, note: str) -> Any:
        return [(0, 3, "prefix"), (3, 5, "error"), (5, len(text), "after")] if note == "wrong" else []


def rollouts_of(policy: MaskedDiffusion, *notes: str) -> Rollouts:
    kept = []
    for i, note in enumerate(notes):
        trajectory = policy.demonstration([4, 5], policy.encode_completion("1234567"), CANVAS)
        problem, grade = Problem(str(i), {}), Grade(note == "right", 0.0, None)
        kept.append(Rollout(problem, 0, "1234567", grade, trajectory, briefs=(TeacherBrief(text=note),)))
    return Rollouts(tuple(kept), {})


def part(rows: list[int], sites: list[list[int]], advantage: list[float]) -> tuple[Any, Any]:
    """Canvases of these rollouts, graded at these positions."""
    mask = torch.zeros(len(rows), 12, dtype=torch.bool)
    for canvas, positions in enumerate(sites):
        mask[canvas, positions] = True
    plan = SimpleNamespace(rows=torch.tensor(rows))
    return plan, SimpleNamespace(sites=mask, advantage=torch.tensor(advantage))


def test_tokens_are_told_apart_by_the_characters_that_they_begin_at(policy):
    found = region_map(policy, (Marked(),), rollouts_of(policy, "wrong", "unknown"))
    assert found is not None
    assert found[0].tolist() == [0, 0, 0, 1, 1, 2, 2] + [-1] * 5
    assert found[1].tolist() == [-1] * 12


def test_a_trace_names_the_positions_that_a_critique_blames(policy):
    rollouts = rollouts_of(policy, "wrong", "unknown")
    rollouts = replace(rollouts, chosen=rollouts.kept)
    trace, regions = UpdateTrace(None, rollouts, 2, 8), region_map(policy, (Marked(),), rollouts)
    assert [line["blamed"] for line in trace.entries(1, [], Pieces(policy), regions)] == [[3, 5], []]
    assert [line["blamed"] for line in trace.entries(1, [], Pieces(policy))] == [[], []]


def test_where_nothing_is_marked_there_is_no_map(policy):
    assert region_map(policy, (Marked(),), rollouts_of(policy, "unknown")) is None
    assert region_map(policy, (Nothing(),), rollouts_of(policy, "wrong")) is None
    assert region_map(policy, (), rollouts_of(policy, "wrong")) is None


def test_a_hint_that_marks_nothing_costs_nothing():
    untouched: Any = None
    assert region_map(untouched, (Reference(),), untouched) is None


def test_means_by_region_and_localisation_equal_sums_by_hand(policy):
    rollouts = rollouts_of(policy, "wrong", "right", "wrong")
    regions = region_map(policy, (Marked(),), rollouts)
    # Rollout 0: positions 0 and 3 (prefix .5, error -6); 1: position 2 (right 1.0); 2: 4 and 6 (error -2, after -1).
    parts = [part([0, 1], [[0, 3], [2]], [0.5, -6.0, 1.0]), part([2], [[4, 6]], [-2.0, -1.0])]
    found = region_metrics(region_sums(parts, regions, rollouts, torch.device("cpu")))
    assert found == pytest.approx(
        {
            "advantage/prefix": 0.5,
            "advantage/error": -4.0,
            "advantage/after": -1.0,
            "advantage/right": 1.0,
            "advantage/localisation": 4.0 / 0.75,
        }
    )
    one = region_sums([parts[0]], regions, rollouts, torch.device("cpu"))
    other = region_sums([parts[1]], regions, rollouts, torch.device("cpu"))
    assert region_metrics(one + other) == pytest.approx(found)


def test_the_advantage_of_the_first_rollout_is_taken_from_all_canvases():
    value = advantage_of_first([part([0, 1], [[0, 3], [1]], [1.0, -2.0, 9.0])], 12)
    assert value is not None
    assert value.nan_to_num(0.0).tolist() == [1.0, 0.0, 0.0, -2.0, *[0.0] * 8]
    assert advantage_of_first([part([1], [[1]], [9.0])], 12) is None
