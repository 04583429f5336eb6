"""The published suffix teacher, state by state (``fixtures/golden/suffix_teacher``)."""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dllm_sd.canvases import Canvases, DecoderSteps
from dllm_sd.randomness import make_key
from dllm_sd.teachers import ContextInputs, Suffix
from dllm_sd.teachers.context import show
from dllm_sd.trajectory import reveal_steps
from tests.oracles.fixtures import golden
from tests.oracles.toy_denoiser import from_states, no_keys

pytestmark = pytest.mark.fixture


class Case(NamedTuple):
    """One stored trajectory, its canvases here, and the stored teachers by ratio."""

    name: str
    prompt_length: int
    states: Tensor
    canvases: Canvases
    scene: ContextInputs
    ratios: dict[float, dict[str, Tensor]]


@cache
def cases() -> list[Case]:
    tensors, settings = golden("suffix_teacher")
    return [one(case, tensors, settings) for case in settings["cases"]]


def one(case: dict[str, Any], tensors: dict[str, Tensor], settings: dict[str, Any]) -> Case:
    name, p = case["id"], case["prompt_length"]
    states, final = tensors[f"{name}/student_states"].long(), tensors[f"{name}/final_ids"].long()
    trajectory = from_states(
        states[:, p:], final[p:], final[:p], case["block_length"], settings["mask_id"], settings["eos_id"]
    )
    canvases = DecoderSteps(last_block=False)(trajectory, no_keys(1), 0, 1)
    scene = ContextInputs(canvases, trajectory, torch.zeros_like(canvases.masked), None, [make_key(name)])
    stored = ("reveal_positions", "reveal_count", "candidate_start", "teacher_states")
    ratios = {
        (ratio := entry["retain_ratio"]): {key: tensors[f"{name}/r{ratio}/{key}"].long() for key in stored}
        for entry in case["ratios"]
    }
    return Case(name, p, states, canvases, scene, ratios)


def every_ratio() -> Iterator[tuple[Case, float, dict[str, Tensor]]]:
    for case in cases():
        for ratio, stored in case.ratios.items():
            yield case, ratio, stored


def ours(case: Case, ratio: float) -> Tensor:
    """bool ``[N l]``: what our suffix teacher with the reference's rules reveals."""
    return Suffix(scope="later_blocks", ratio=ratio, stop_at_end=True).positions(case.scene)


def test_our_student_canvases_are_the_recorded_states():
    for case in cases():
        assert torch.equal(case.canvases.ids, case.states), case.name


def test_reveal_steps_of_recorded_states_agree_with_first_appearance():
    for case in cases():
        trajectory = case.scene.trajectory
        sides = torch.stack([*case.states[:, case.prompt_length :], trajectory.tokens[0]])[:, None]
        expected = trajectory.reveal_step.clamp(max=len(case.states) - 1)  # the last known canvas stands for all later
        assert torch.equal(reveal_steps(sides, trajectory.mask_id), expected), case.name


def test_replaying_the_stored_reveals_gives_the_stored_teachers():
    for case, ratio, stored in every_ratio():
        revealed = torch.zeros_like(case.canvases.masked)
        for state, positions in enumerate(stored["reveal_positions"]):
            revealed[state, positions[positions >= 0] - case.prompt_length] = True
        reading = show(case.scene, revealed)
        assert torch.equal(reading.ids, stored["teacher_states"]), (case.name, ratio)
        assert torch.equal(reading.shown, revealed)


def test_our_reveals_have_the_stored_counts_and_ranges():
    """Upstream reveals nothing in the last recorded state, which it never trains; we leave it out."""
    for case, ratio, stored in every_ratio():
        revealed = ours(case, ratio)[:-1]
        assert torch.equal(revealed.sum(1), stored["reveal_count"][:-1]), (case.name, ratio)
        position = torch.arange(revealed.shape[1]) + case.prompt_length
        start = stored["candidate_start"][:-1, None]
        assert not (revealed & ((start < 0) | (position < start))).any(), (case.name, ratio)


def test_our_teacher_with_everything_revealed_is_the_stored_one():
    checked = 0
    for case, ratio, stored in every_ratio():
        if ratio == 1:
            reading = show(case.scene, ours(case, ratio))
            assert torch.equal(reading.ids[:-1], stored["teacher_states"][:-1]), case.name
            checked += 1
    assert checked == len(cases())


def test_our_reveals_differ_from_state_to_state():
    for case, ratio, stored in every_ratio():
        revealed = ours(case, ratio)
        same_range = stored["candidate_start"][:-1] == stored["candidate_start"][0]
        drawn = revealed[:-1][same_range & (stored["reveal_count"][:-1] > 2)]
        if 0 < ratio < 1 and len(drawn) > 4:
            assert len(drawn.unique(dim=0)) > len(drawn) // 2, (case.name, ratio)
