from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from dllm_sd.errors import InputError
from dllm_sd.trajectory import (
    NEVER,
    StopAfter,
    Trajectory,
    completion_length,
    concatenate,
    is_any_of,
    left_pad,
    reveal_steps,
)

MASK, END, PAD = 11, 10, 9


def by_hand(pad_id: int = PAD) -> Trajectory:
    """Two blocks of 3. Row 0 ends at position 4 and stops; row 1 never ends."""
    prompt_ids, prompt_mask = left_pad([[1, 2], [3]], pad_id)
    return Trajectory(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        tokens=torch.tensor([[5, 6, 7, 8, END, pad_id], [1, 2, 3, 4, 5, 6]]),
        reveal_step=torch.tensor([[1, 0, 1, 2, 3, NEVER], [0, 1, 2, 5, 4, 3]]),
        length=torch.tensor([5, 6]),
        block_length=3,
        mask_id=MASK,
        end_ids=(END,),
        pad_id=pad_id,
    )


def test_the_canvas_before_a_step_shows_what_earlier_steps_committed():
    canvas = by_hand().canvas(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 4, 2, 6]))
    assert canvas.tolist() == [
        [MASK] * 6,
        [MASK, 6, MASK, MASK, MASK, MASK],
        [5, 6, 7, 8, END, MASK],  # what was never revealed stays masked
        [1, 2, MASK, MASK, MASK, MASK],
        [1, 2, 3, 4, 5, 6],
    ]


def test_a_step_reveals_the_difference_of_its_canvas_and_the_next(noise):
    for trajectory in (noise(), noise(early_end=False, tokens_per_step=3), noise(block_length=24)):
        for step in range(int(trajectory.num_steps.max())):
            rows = torch.arange(trajectory.size)
            now, then = (trajectory.canvas(rows, torch.full_like(rows, step + i)) for i in (0, 1))
            assert torch.equal(trajectory.revealed(rows, torch.full_like(rows, step)), now != then)


def test_the_active_block_holds_the_first_masked_position():
    steps = torch.tensor([0, 1, 2, 3, 4])
    assert by_hand().active_block(torch.zeros(5, dtype=torch.int64), steps).tolist() == [0, 0, 1, 1, 1]
    assert by_hand().active_block(torch.tensor([1]), torch.tensor([6])).tolist() == [0]  # nothing is masked


def test_steps_are_counted_up_to_the_last_that_committed():
    assert by_hand().num_steps.tolist() == [4, 6]
    assert by_hand().within(StopAfter("steps", 0)).num_steps.tolist() == [0, 0]


def test_a_completion_has_ended_where_it_holds_an_end_token():
    assert by_hand().ended.tolist() == [True, False]


def test_an_autoregressive_sequence_is_revealed_from_left_to_right():
    tokens = torch.tensor([[4, 5, 6, END]])
    one = replace(by_hand().select(torch.tensor([0])), tokens=tokens, reveal_step=torch.arange(4)[None], block_length=4)
    for step in range(4):
        canvas = one.canvas(torch.tensor([0]), torch.tensor([step]))[0].tolist()
        assert canvas == [*tokens[0, :step].tolist(), *[MASK] * (4 - step)]
        assert one.revealed(torch.tensor([0]), torch.tensor([step])).nonzero().tolist() == [[0, step]]


def test_the_horizon_of_steps_forgets_what_came_later():
    cut = by_hand().within(StopAfter("steps", 2))
    assert cut.tokens.tolist() == [[5, 6, 7, PAD, PAD, PAD], [1, 2, PAD, PAD, PAD, PAD]]
    assert cut.reveal_step.tolist() == [[1, 0, 1, NEVER, NEVER, NEVER], [0, 1, NEVER, NEVER, NEVER, NEVER]]
    assert cut.length.tolist() == [6, 6]
    assert by_hand().within(StopAfter("steps", 4)).length.tolist() == [5, 6]


def test_the_horizon_of_blocks_forgets_the_blocks_behind():
    cut = by_hand().within(StopAfter("blocks", 1))
    assert cut.tokens.tolist() == [[5, 6, 7, PAD, PAD, PAD], [1, 2, 3, PAD, PAD, PAD]]
    assert cut.num_steps.tolist() == [2, 3]
    whole = by_hand().within(StopAfter("blocks", 2))
    assert torch.equal(whole.tokens, by_hand().tokens)
    assert whole.length.tolist() == [5, 6]


def blocks_by_hand(trajectory: Trajectory) -> list[list[int]]:
    """The block of every completion position, counted over the whole row from its first prompt token."""
    lengths, size = trajectory.prompt_mask.sum(1).tolist(), trajectory.block_length
    return [[(p + i) // size - p // size for i in range(trajectory.tokens.shape[1])] for p in lengths]


def test_blocks_of_the_prompt_go_on_into_the_completion(noise):
    trajectory = noise(b=12, block_length=4, blocks_of_prompt=True)
    assert set(trajectory.prompt_mask.sum(1).tolist()) == {1, 2, 3, 4, 5}
    assert trajectory.block.tolist() == blocks_by_hand(trajectory)
    assert torch.equal(trajectory.select(torch.tensor([3])).block, trajectory.block[3:4])
    assert torch.equal(replace(trajectory, blocks_of_prompt=False).block, (torch.arange(24) // 4).expand(12, -1))


def test_a_decoder_finishes_one_block_of_the_prompt_before_the_next(noise):
    trajectory = noise(b=12, block_length=4, tokens_per_step=3, blocks_of_prompt=True, early_end=False)
    for row, blocks in enumerate(blocks_by_hand(trajectory)):
        reveal = trajectory.reveal_step[row].tolist()
        for step in sorted(set(reveal)):
            (active,) = {blocks[i] for i in range(24) if reveal[i] == step}
            assert blocks[next(i for i in range(24) if reveal[i] >= step)] == active
            assert trajectory.active_block(torch.tensor([row]), torch.tensor([step])).tolist() == [active]


def test_the_horizon_of_blocks_counts_the_block_in_which_the_completion_begins(noise):
    whole = noise(b=12, block_length=4, blocks_of_prompt=True, early_end=False)
    cut, blocks = whole.within(StopAfter("blocks", 2)), blocks_by_hand(whole)
    for row in range(12):
        kept = [block < 2 for block in blocks[row]]
        assert sum(kept) == 8 - int(whole.prompt_mask[row].sum()) % 4
        expected = [token if keep else PAD for token, keep in zip(whole.tokens[row].tolist(), kept, strict=True)]
        assert cut.tokens[row].tolist() == expected
        assert (cut.reveal_step[row] != NEVER).tolist() == kept


def test_a_horizon_shows_the_same_canvases_up_to_its_end(noise):
    whole = noise(early_end=False)
    rows = torch.arange(whole.size)
    for step in range(6):
        steps = torch.full_like(rows, step)
        assert torch.equal(
            whole.within(StopAfter("steps", 5)).canvas(rows, steps), whole.canvas(rows, steps.clamp(max=5))
        )


@pytest.mark.parametrize("pad_id", [PAD, END])
def test_a_horizon_that_cuts_the_end_off_has_not_ended(pad_id):
    # Many families pad with the end token: what was never revealed must not be mistaken for it.
    assert by_hand(pad_id).within(StopAfter("steps", 2)).ended.tolist() == [False, False]
    assert by_hand(pad_id).within(StopAfter("steps", 4)).ended.tolist() == [True, False]


def test_selecting_rows_trims_prompts_to_the_longest_left():
    picked = by_hand().select(torch.tensor([1]))
    assert picked.prompt_ids.tolist() == [[3]]
    assert picked.prompt_mask.tolist() == [[True]]
    assert picked.tokens.tolist() == [[1, 2, 3, 4, 5, 6]]
    both = by_hand().select(torch.tensor([1, 0, 1]))
    assert both.prompt_ids.tolist() == [[PAD, 3], [1, 2], [PAD, 3]]
    assert both.length.tolist() == [6, 5, 6]
    assert by_hand().select(torch.tensor([True, False])).prompt_ids.tolist() == [[1, 2]]
    assert by_hand().select(torch.tensor([False, False])).size == 0


def test_concatenating_what_was_selected_gives_the_whole_back(noise):
    whole = noise()
    again = concatenate([whole.select(torch.tensor([row])) for row in range(whole.size)])
    for f in fields(whole):
        ours, theirs = getattr(again, f.name), getattr(whole, f.name)
        if isinstance(theirs, Tensor):
            assert torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True), f.name
        else:
            assert ours == theirs, f.name


def test_concatenating_refuses_other_layouts_and_nothing(noise):
    with pytest.raises(ValueError, match="layouts"):
        concatenate([noise(), noise(block_length=12)])
    with pytest.raises(ValueError, match="layouts"):
        concatenate([noise(), noise(blocks_of_prompt=True)])
    with pytest.raises(ValueError, match="nothing"):
        concatenate([])


def test_left_padding_puts_prompts_to_the_right():
    ids, mask = left_pad([[1, 2, 3], [], [4]], PAD)
    assert ids.tolist() == [[1, 2, 3], [PAD] * 3, [PAD, PAD, 4]]
    assert mask.tolist() == [[True] * 3, [False] * 3, [False, False, True]]
    assert left_pad([], PAD)[0].shape == (0, 0)


def test_length_counts_up_to_and_including_the_first_end_token():
    tokens = torch.tensor([[1, END, END], [1, 2, 3], [END, 1, 2], [1, 2, END]])
    assert completion_length(tokens, [END]).tolist() == [2, 3, 1, 3]
    assert completion_length(tokens, [3, END]).tolist() == [2, 3, 1, 3]
    revealed = torch.tensor([[True, False, True], [True] * 3, [False] * 3, [True, True, False]])
    assert completion_length(tokens, [END], revealed).tolist() == [3, 3, 3, 3]


def test_is_any_of_compares_with_every_wanted_id():
    assert is_any_of(torch.tensor([[1, 2], [3, 4]]), (4, 1)).tolist() == [[True, False], [False, True]]
    assert not is_any_of(torch.tensor([1, 2]), ()).any()


def test_nothing_in_a_trajectory_grows_with_steps_times_length(noise):
    whole = noise(b=1, length=256, block_length=32, tokens_per_step=1, early_end=False)
    sizes = {f.name: value.numel() for f in fields(whole) if isinstance(value := getattr(whole, f.name), Tensor)}
    p, length = whole.prompt_ids.shape[1], 256
    assert sizes == {
        "prompt_ids": p,
        "prompt_mask": p,
        "tokens": length,
        "reveal_step": length,
        "length": 1,
        "logp": length,
    }


def test_reveal_steps_are_recovered_from_canvases(noise):
    whole = noise(early_end=False)
    rows = torch.arange(whole.size)
    steps = range(int(whole.num_steps.max()) + 1)
    canvases = torch.stack([whole.canvas(rows, torch.full_like(rows, step)) for step in steps])
    assert torch.equal(reveal_steps(canvases, MASK), whole.reveal_step)
    assert torch.equal(reveal_steps(canvases[:6], MASK), whole.within(StopAfter("steps", 5)).reveal_step)


def test_decoders_that_mask_again_are_refused():
    canvases = torch.tensor([[[MASK, MASK]], [[4, MASK]], [[MASK, 5]]])
    with pytest.raises(InputError, match="position 0 of completion 0 at step 1"):
        reveal_steps(canvases, MASK)


def test_decoders_that_edit_are_refused():
    canvases = torch.tensor([[[MASK, MASK], [MASK, MASK]], [[4, 5], [MASK, 5]], [[4, 5], [4, 6]]])
    with pytest.raises(InputError, match="position 1 of completion 1 at step 1"):
        reveal_steps(canvases, MASK)


def test_moving_to_a_device_moves_every_tensor():
    moved = by_hand().to("meta")
    assert all(value.is_meta for f in fields(moved) if isinstance(value := getattr(moved, f.name), Tensor))
