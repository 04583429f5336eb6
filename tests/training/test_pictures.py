"""Pictures of a rollout: what was masked, revealed and graded."""

import pytest
import torch
from torch import nan

from dllm_sd.training.pictures import trajectory_picture
from dllm_sd.trajectory import NEVER


def test_the_picture_of_a_trajectory_shows_what_was_masked_revealed_and_graded():
    reveal_step = torch.tensor([0, 1, NEVER])
    value = torch.tensor([[4.0, nan, nan], [nan, 2.0, 0.0]])
    picture = trajectory_picture(reveal_step, value, cell=1)
    grey, white, blue, red = [0.75] * 3, [1.0] * 3, [0.55, 0.7, 1.0], [0.9, 0.0, 0.0]
    half = [(a + b) / 2 for a, b in zip(blue, [0.9, 0.05, 0.05], strict=True)]
    expected = torch.tensor([[red, grey, grey], [white, half, grey]]).permute(2, 0, 1)
    assert torch.allclose(picture, expected, atol=1e-6)


def test_the_picture_has_square_cells_and_legal_colours():
    reveal_step = torch.tensor([1, 0, 2, 2])
    value = torch.full((3, 4), nan)
    value[2] = torch.tensor([nan, nan, 1e-20, 7.0])
    picture = trajectory_picture(reveal_step, value, cell=4)
    assert picture.shape == (3, 12, 16)
    assert picture.dtype == torch.float32
    assert bool(((picture >= 0) & (picture <= 1)).all())
    assert torch.equal(picture[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2), picture)


def test_a_trajectory_that_was_not_graded_still_has_a_picture():
    picture = trajectory_picture(torch.tensor([0]), torch.full((1, 1), nan), cell=1)
    assert picture[:, 0, 0].tolist() == pytest.approx([0.55, 0.7, 1.0])
