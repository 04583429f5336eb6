"""Every published decoding, token by token (``fixtures/golden/diffusion_decode``)."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_sd.canvases import DecoderSteps
from dllm_sd.decoding.settings import Decoding
from dllm_sd.trajectory import Trajectory
from tests.oracles.toy_denoiser import ToyDenoiser, decoding_cases, denoised, no_keys

pytestmark = pytest.mark.fixture


def decode(case: dict[str, Any], stored: dict[str, Tensor], early_end: bool) -> tuple[Trajectory, list[Tensor]]:
    """Our trajectory of a case and the canvases that were watched."""
    seen: list[Tensor] = []
    settings = Decoding(
        length=case["gen_length"],
        block_length=case["block_length"],
        steps=case["steps"],
        guidance=case["cfg_scale"],
        early_end=early_end,
    )
    trajectory = denoised(
        ToyDenoiser(stored["A"], stored["B"]),
        stored["prompt_ids"].tolist(),
        settings,
        no_keys(case["batch"]),
        mask_id=case["mask_id"],
        end_ids=(case["eos_id"],),
        pad_id=case["eos_id"],
        watch=seen.append,
    )
    return trajectory, seen


@cache
def decoded() -> list[tuple[dict[str, Any], dict[str, Tensor], Trajectory, list[Tensor]]]:
    """Every case with its stored completion sides and our decoding without an early end."""
    out = []
    for case, stored in decoding_cases():
        trajectory, seen = decode(case, stored, early_end=False)
        p = case["prompt_length"]
        sides = {"canvas": stored["canvas"][:, :, p:].long(), "final": stored["final_ids"][:, p:].long()}
        out.append((case, stored | sides, trajectory, seen))
    return out


def distinct(canvases: Tensor) -> Tensor:
    """Canvases ``[k ...]`` without immediate repetitions: an idle step (more steps than tokens) changes nothing."""
    new = (canvases[1:] != canvases[:-1]).flatten(1).any(1)
    return canvases[torch.cat([torch.tensor([True]), new])]


def test_final_tokens_equal_the_published_ones():
    for case, stored, trajectory, _ in decoded():
        assert torch.equal(trajectory.tokens, stored["final"]), case["id"]


def test_every_token_is_committed_at_the_published_step():
    for case, stored, trajectory, _ in decoded():
        assert torch.equal(trajectory.reveal_step, stored["commit_step"].long()), case["id"]


def test_the_trajectory_gives_every_published_canvas_back():
    for case, stored, trajectory, _ in decoded():
        rows = torch.arange(case["batch"])
        for step in range(case["forwards"] + 1):
            canvas = trajectory.canvas(rows, torch.full_like(rows, step))
            assert torch.equal(canvas, stored["canvas"][step]), (case["id"], step)


def test_the_decoder_sees_the_published_canvases():
    for case, stored, _, seen in decoded():
        assert torch.equal(torch.stack(seen), distinct(stored["canvas"])), case["id"]


def test_lengths_count_the_end_token_and_the_published_ones_do_not():
    for case, _, trajectory, _ in decoded():
        assert (trajectory.length - trajectory.ended.long()).tolist() == case["length_until_first_eos"], case["id"]


def test_the_reference_records_the_canvases_of_the_usable_steps():
    """Upstream decides by row 0 of the batch, and also records idle steps, which commit nothing."""
    for case, stored, trajectory, _ in decoded():
        usable = DecoderSteps(last_block=False, prompt_ends=True).usable(trajectory)[0]
        steps = usable.nonzero()[:, 0]
        ours = trajectory.canvas(torch.zeros_like(steps), steps)
        canvas, recorded = stored["canvas"][:, 0], case["recorded_states"]
        commits = (canvas[1:] != canvas[:-1]).any(1)[:recorded]
        assert torch.equal(ours, canvas[:recorded][commits]), case["id"]
        if case["steps_per_block"] <= case["block_length"]:
            assert len(steps) == recorded, case["id"]


def test_an_early_end_changes_nothing_up_to_the_end_token():
    ended = 0
    for case, stored, whole, _ in decoded():
        if not bool(whole.ended.any()):
            continue
        ended += 1
        early, seen = decode(case, stored, early_end=True)
        answer = torch.arange(case["gen_length"]) < whole.length[:, None]
        assert torch.equal(early.length, whole.length), case["id"]
        assert torch.equal(early.tokens[answer], whole.tokens[answer]), case["id"]
        assert torch.equal(early.reveal_step[answer], whole.reveal_step[answer]), case["id"]
        needed = whole.reveal_step.masked_fill(~answer, -1).amax(1) + 1
        assert torch.equal(early.num_steps, needed), case["id"]
        assert len(seen) <= case["forwards"] + 1
    assert ended
