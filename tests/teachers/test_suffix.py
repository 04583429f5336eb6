import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dllm_sd.canvases import DecoderSteps
from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.rollout import Rollout
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.teachers import (
    CONTEXTS,
    ContextInputs,
    Critique,
    Feedback,
    LaterStep,
    NoQuestion,
    Nothing,
    Reference,
    Rubric,
    Sibling,
    Skills,
    Suffix,
)
from dllm_sd.teachers.suffix import answer_span
from dllm_sd.trajectory import NEVER, StopAfter, Trajectory
from tests.tiers import later

SCOPES = ["later_blocks", "all_masked", "active_block"]


def scene_of(trajectory: Trajectory, protect: bool = True, answer: Tensor | None = None) -> ContextInputs:
    """All canvases of a trajectory; what the student reveals is graded, and so protected."""
    keys = [make_key("teacher", row) for row in range(trajectory.size)]
    canvases = DecoderSteps()(trajectory, keys, 0, 1)
    protected = canvases.revealed if protect else torch.zeros_like(canvases.revealed)
    return ContextInputs(canvases, trajectory, protected, answer, keys)


def hidden(scene: ContextInputs) -> Tensor:
    """bool ``[n l]``: everything that stands masked on the canvas."""
    return scene.canvases.ids[:, -24:] == 11


def in_scope(scene: ContextInputs, scope: str) -> Tensor:
    """bool ``[n l]``, by loops over canvases."""
    out = torch.zeros_like(scene.protected)
    for i, masked in enumerate(hidden(scene).tolist()):
        prompt = int(scene.trajectory.prompt_mask[scene.canvases.rows[i]].sum())
        start = prompt % 8 if scene.trajectory.blocks_of_prompt else 0
        active = (start + masked.index(True)) // 8
        for j in range(24):
            block = (start + j) // 8
            where = {"later_blocks": block > active, "all_masked": True, "active_block": block == active}[scope]
            out[i, j] = masked[j] and where and not scene.protected[i, j]
    return out


def test_the_table_names_every_context():
    assert {
        "nothing": Nothing,
        "suffix": Suffix,
        "later_step": LaterStep,
        "reference": Reference,
        "sibling": Sibling,
        "no_question": NoQuestion,
        "rubric": Rubric,
        "critique": Critique,
        "feedback": Feedback,
        "skills": Skills,
    } == CONTEXTS


def test_nothing_reads_the_students_own_canvas(noise):
    scene = scene_of(noise())
    reading = Nothing()(scene)
    assert torch.equal(reading.ids, scene.canvases.ids)
    assert torch.equal(reading.mask, scene.canvases.mask)
    assert not reading.shown.any()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0, *later(0.1, 0.5)])
@pytest.mark.parametrize("blocks_of_prompt", [False, True])
def test_the_floor_of_the_ratio_is_revealed_within_the_scope(noise, scope, ratio, blocks_of_prompt):
    scene = scene_of(noise(b=12, tokens_per_step=3, blocks_of_prompt=blocks_of_prompt))
    candidates = in_scope(scene, scope)
    shown = Suffix(scope=scope, ratio=ratio).positions(scene)
    assert not (shown & ~candidates).any()
    assert shown.sum(1).tolist() == [math.floor(ratio * n) for n in candidates.sum(1).tolist()]


def test_the_count_does_not_lose_a_position_to_rounding(noise):
    assert 0.29 * 100 < 29  # in binary
    whole = noise(b=1, length=200, block_length=100, early_end=False)
    assert Suffix(ratio=0.29).positions(scene_of(whole))[0].sum() == 29


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("nested", [False, True])
def test_graded_sites_are_never_revealed(noise, scope, nested):
    scene = scene_of(noise(b=12))
    for ratio in (0.25, 1.0):
        assert not (Suffix(scope=scope, ratio=ratio, nested=nested)(scene).shown & scene.protected).any()
    assert not (LaterStep(ahead=None)(scene).shown & scene.protected).any()


def test_revealed_positions_hold_the_final_tokens_and_the_rest_is_the_students_canvas(noise):
    scene = scene_of(noise())
    reading = Suffix(scope="all_masked", ratio=0.5)(scene)
    completion, own = reading.ids[:, -24:], scene.canvases.ids[:, -24:]
    assert torch.equal(completion[reading.shown], scene.canvases.tokens[reading.shown])
    assert torch.equal(completion[~reading.shown], own[~reading.shown])
    assert torch.equal(reading.ids[:, :-24], scene.canvases.ids[:, :-24])
    assert torch.equal(reading.mask, scene.canvases.mask)


@pytest.mark.parametrize("nested", [False, True])
def test_a_ratio_of_zero_adds_nothing(noise, nested):
    scene = scene_of(noise())
    assert torch.equal(Suffix(ratio=0.0, nested=nested)(scene).ids, Nothing()(scene).ids)


def test_steps_draw_anew(noise):
    scene = scene_of(noise(b=8, early_end=False), protect=False)
    shown = Suffix().positions(scene)
    first_block = scene.canvases.steps < 4
    assert len(shown[first_block].unique(dim=0)) == int(first_block.sum())


def test_a_nested_suffix_only_ever_shrinks(noise):
    scene = scene_of(noise(b=8, early_end=False), protect=False)
    rows, steps = scene.canvases.rows, scene.canvases.steps
    for scope in ("later_blocks", "all_masked"):
        shown = Suffix(scope=scope, nested=True).positions(scene)
        for row in range(8):
            sets = shown[rows == row]
            assert (steps[rows == row].diff() == 1).all()
            assert not (sets[1:] & ~sets[:-1]).any()
        start = shown[steps == 0]
        assert start.any(1).all()
        expected = start[rows] & in_scope(scene, scope)
        assert torch.equal(shown, expected)  # one set, of which each step shows what its scope allows


def test_a_nested_suffix_is_the_ratio_of_the_whole_completion(noise):
    scene = scene_of(noise(b=8, early_end=False), protect=False)
    shown = Suffix(scope="all_masked", ratio=0.25, nested=True).positions(scene)
    assert (shown[scene.canvases.steps == 0].sum(1) == 6).all()


@pytest.mark.parametrize("draws", [150, *later(500)])
def test_every_candidate_is_revealed_equally_often(noise, draws):
    trajectory = noise(b=1, early_end=False)
    scene = scene_of(trajectory, protect=False)
    total = torch.zeros(24)
    for key in range(draws):
        total += Suffix(ratio=0.25).positions(replace(scene, keys=[key]))[0]
    assert not total[:8].any()
    assert ((total[8:] / draws - 0.25).abs() < 5 * (0.25 * 0.75 / draws) ** 0.5).all()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("nested", [False, True])
def test_without_end_padding_nothing_behind_the_end_is_revealed(noise, scope, nested):
    for early_end in (True, False):
        trajectory = noise(b=20, early_end=early_end)
        scene = scene_of(trajectory)
        behind = (torch.arange(24) >= trajectory.length[:, None])[scene.canvases.rows]
        for ratio in (0.5, 1.0):
            assert not (Suffix(scope, ratio, end_padding=False, nested=nested).positions(scene) & behind).any()
        assert (Suffix("all_masked", 1.0, nested=nested).positions(scene) & behind).any()


def test_with_a_shorter_horizon_nothing_unknown_is_revealed(noise):
    cut = noise(early_end=False).within(StopAfter("blocks", 2))
    scene = scene_of(cut)
    unknown = ((cut.reveal_step == NEVER) & (torch.arange(24) < cut.length[:, None]))[scene.canvases.rows]
    assert unknown.any()
    assert not (Suffix(ratio=1.0).positions(scene) & unknown).any()
    assert not (LaterStep(ahead=None)(scene).shown & unknown).any()


def test_only_answer_tokens_are_revealed_where_that_is_asked_for(noise):
    trajectory = noise(b=12, early_end=False)
    answer = torch.zeros((12, 24), dtype=torch.bool)
    answer[:, 18:22] = True
    scene = scene_of(trajectory, answer=answer)
    part = Suffix(answer_only=True, ratio=1.0)
    assert part.needs_answer_span
    assert not Suffix().needs_answer_span
    assert torch.equal(part.positions(scene), in_scope(scene, "later_blocks") & answer[scene.canvases.rows])
    half = Suffix(answer_only=True, ratio=0.5).positions(scene)
    assert (half[scene.canvases.steps == 0].sum(1) == 2).all()


def test_stop_at_end_reveals_nothing_once_the_scope_starts_at_or_behind_the_end(noise):
    trajectory = noise(b=40, early_end=False)
    scene = scene_of(trajectory)
    shown = Suffix(ratio=0.5, stop_at_end=True).positions(scene)
    usual = Suffix(ratio=0.5).positions(scene)
    stopped = 0
    for i in range(scene.canvases.size):
        row = int(scene.canvases.rows[i])
        start = (hidden(scene)[i].tolist().index(True) // 8 + 1) * 8
        end = int(trajectory.length[row]) - 1 if trajectory.ended[row] else 24
        stopped += start >= end
        assert torch.equal(shown[i], usual[i] & (start < end))
    assert 0 < stopped < scene.canvases.size


@pytest.mark.parametrize("context", [Suffix(), Suffix("all_masked", nested=True), LaterStep(3)], ids=repr)
def test_the_same_rollout_in_another_batch_gets_the_same_reading(noise, context):
    scene = scene_of(noise(b=6))
    together = context(scene)
    for row in (4, 1):
        one = scene.trajectory.select(torch.tensor([row]))
        keys = [scene.keys[row]]
        canvases = DecoderSteps()(one, keys, 0, 1)
        alone = context(ContextInputs(canvases, one, canvases.revealed, None, keys))
        assert torch.equal(alone.shown, together.shown[scene.canvases.rows == row])
        assert torch.equal(alone.ids, together.ids[scene.canvases.rows == row][:, -alone.ids.shape[1] :])


def test_looking_no_step_ahead_is_nothing(noise):
    scene = scene_of(noise())
    assert torch.equal(LaterStep(ahead=0)(scene).ids, Nothing()(scene).ids)


def test_looking_to_the_end_shows_everything_but_the_graded_sites(noise):
    scene = scene_of(noise())
    shown = LaterStep(ahead=None)(scene).shown
    assert torch.equal(shown, scene.canvases.masked & ~scene.protected)


@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_a_later_step_shows_what_was_committed_until_then(noise, ahead):
    scene = scene_of(noise())
    reveal_step = scene.trajectory.reveal_step[scene.canvases.rows]
    steps = scene.canvases.steps[:, None]
    expected = (reveal_step >= steps) & (reveal_step < steps + ahead) & ~scene.protected
    assert torch.equal(LaterStep(ahead)(scene).shown, expected)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Suffix(ratio=1.1), "ratio is .*; give a number from 0 to 1"),
        (lambda: Suffix(ratio=-0.1), "ratio is .*; give a number from 0 to 1"),
        (lambda: Suffix(scope="all_masked", stop_at_end=True), "later_blocks"),
        (lambda: LaterStep(ahead=-1), "ahead is -1; give a whole number of at least 0, or null"),
    ],
)
def test_impossible_contexts_are_refused(build, says):
    with pytest.raises(InputError, match=says):
        build()


@pytest.mark.parametrize(
    ("text", "parsed", "spelt"),
    [("12+3=15", "15", [5, 6]), ("15 15", "15", [3, 4]), ("12", "7", []), ("12", None, []), ("1", "", [])],
)
def test_the_answer_span_is_the_last_occurrence_of_the_parsed_answer(policy, text, parsed, spelt):
    trajectory = policy.demonstration([4], policy.encode_completion(text), Decoding(length=12, block_length=12))
    rollout = Rollout(
        Problem("0", {}), 0, policy.text(trajectory.tokens[0].tolist()), Grade(True, 1, parsed), trajectory
    )
    assert answer_span(policy, rollout).nonzero()[:, 0].tolist() == spelt
