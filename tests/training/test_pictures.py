"""Pictures of a rollout: what was masked, revealed and graded, in colours that mean the same everywhere."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nan

from dllm_sd.training import pictures
from dllm_sd.training.pictures import LEFT, TOP, advantage_picture, strength, token_texts, trajectory_picture
from dllm_sd.trajectory import NEVER


def pixels(picture: Any) -> Any:
    return np.asarray(picture)[TOP:, LEFT:]


def colour_of(value: float, others: float) -> list[int]:
    table = torch.tensor([[value, others]])
    return pixels(trajectory_picture(torch.tensor([0, 0]), table, ["a", "b"]))[5, 5].tolist()


def test_the_picture_of_a_trajectory_shows_what_was_masked_revealed_and_graded():
    value = torch.tensor([[10.0, nan, nan], [nan, nan, -10.0]])
    cells = pixels(trajectory_picture(torch.tensor([0, 1, NEVER]), value, ["a", "b", "c"]))
    seen = [[tuple(cells[14 * step + 7, 14 * place + 7].tolist()) for place in range(3)] for step in range(2)]
    assert seen == [
        [pictures.RED, pictures.MASKED, pictures.MASKED],
        [pictures.EARLIER, pictures.NOW, pictures.VIOLET],
    ]


def test_a_colour_means_the_same_divergence_in_every_picture():
    assert colour_of(0.1, 0.001) == colour_of(0.1, 10.0)
    assert colour_of(0.1, 1.0) != colour_of(1.0, 1.0)
    assert [round(strength(nats), 3) for nats in (0.0, 1e-4, 1e-3, 0.1, -0.1, 10.0, 1e9)] == [
        *(0.1, 0.1, 0.1, 0.55, 0.55, 1.0, 1.0)
    ]


@pytest.mark.parametrize(("steps", "length"), [(1, 1), (16, 16), (3, 300), (2000, 2000)])
def test_a_picture_of_any_size_is_bounded(steps: int, length: int):
    order, value = torch.zeros(length, dtype=torch.int64), torch.full((steps, length), nan)
    value[:, 0] = 0.5
    picture = trajectory_picture(order, value, ["t"] * length)
    assert picture.width <= 3600 + 100
    assert picture.height <= 2000 + 200


def test_the_axes_and_tokens_are_written_in():
    value = torch.full((2, 3), nan)
    drawn = [np.asarray(trajectory_picture(torch.tensor([0, 0, 1]), value, tokens)) for tokens in ("abc", "abd")]
    below = TOP + 2 * 14 + 15
    assert np.array_equal(drawn[0][:below], drawn[1][:below])
    assert not np.array_equal(drawn[0][below:], drawn[1][below:])
    assert bool((drawn[0][:TOP] != 255).any())  # caption and legend
    assert bool((drawn[0][TOP : TOP + 28, : LEFT - 2] != 255).any())  # numbers of steps


def test_bars_go_up_and_down_by_nats_and_the_wrong_step_is_grey():
    picture = advantage_picture(torch.tensor([2.0, nan, -1.0, 99.0]), torch.tensor([0, 1, 1, -1]), list("abcd"))
    plot, middle = pixels(picture), pictures.BAR_HEIGHT // 2
    blue, red = np.array(pictures.BLUE), np.array(pictures.RED)
    up = [(plot[:, 14 * place + 7] == blue).all(-1).sum() for place in (0, 3)]
    down = (plot[middle:, 14 * 2 + 7] == red).all(-1).sum()
    assert up == [pytest.approx(middle / 2, abs=2), pytest.approx(middle, abs=2)]
    assert down == pytest.approx(middle / 4, abs=2)
    assert tuple(plot[4, 14 + 7].tolist()) == pictures.ERROR


def test_a_token_is_shown_as_its_text_or_its_id(policy: Any):
    ids = [*policy.encode_completion("12")[:2], policy.pad_id]
    assert token_texts(policy, ids) == ["1", "2", f"<{policy.pad_id}>"]
