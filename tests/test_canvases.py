from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dllm_sd.canvases import CANVASES, AllMaskedCanvas, Canvases, DecoderSteps, RandomMasks, attention_mask
from dllm_sd.errors import InputError
from dllm_sd.randomness import make_key
from dllm_sd.trajectory import NEVER, StopAfter, Trajectory, concatenate
from tests.tiers import later

MASK = 11


def keys(trajectory: Trajectory) -> list[int]:
    return [make_key("canvas", row) for row in range(trajectory.size)]


def test_the_table_names_every_rule():
    assert {"decoder_steps": DecoderSteps, "random_masks": RandomMasks, "all_masked": AllMaskedCanvas} == CANVASES


@pytest.mark.parametrize("early_end", [True, False])
@pytest.mark.parametrize("tokens_per_step", [1, 2, 3])
def test_every_position_up_to_the_end_is_revealed_on_exactly_one_canvas(noise, early_end, tokens_per_step):
    trajectory = noise(b=20, early_end=early_end, tokens_per_step=tokens_per_step)
    canvases = DecoderSteps()(trajectory, keys(trajectory), 0, 1)
    times = torch.zeros_like(trajectory.tokens).index_add(0, canvases.rows, canvases.revealed.long())
    answer = torch.arange(24) < trajectory.length[:, None]
    assert (times[answer] == 1).all()
    assert (times[~answer] <= 1).all()
    if early_end:
        assert torch.equal(times == 1, trajectory.reveal_step != NEVER)


def test_canvases_are_what_the_decoder_saw(noise):
    trajectory = noise()
    canvases = DecoderSteps()(trajectory, keys(trajectory), 0, 1)
    assert canvases.size == int(trajectory.num_steps.sum())
    p = trajectory.prompt_ids.shape[1]
    for i in range(canvases.size):
        row, step = int(canvases.rows[i]), int(canvases.steps[i])
        reveal = trajectory.reveal_step[row].tolist()
        tokens = trajectory.tokens[row].tolist()
        shown = [0 <= k < step for k in reveal]
        known = [k >= step for k in reveal]
        block = shown.index(False) // 8
        assert canvases.ids[i, :p].tolist() == trajectory.prompt_ids[row].tolist()
        assert canvases.ids[i, p:].tolist() == [t if s else MASK for t, s in zip(tokens, shown, strict=True)]
        assert canvases.mask[i].tolist() == [*trajectory.prompt_mask[row].tolist(), *[True] * 24]
        assert canvases.masked[i].tolist() == known
        assert canvases.active[i].tolist() == [k and j // 8 == block for j, k in enumerate(known)]
        assert canvases.revealed[i].tolist() == [k == step for k in reveal]
        assert canvases.tokens[i].tolist() == tokens
        assert canvases.weight[i] == 1


def test_steps_after_the_one_that_fixes_the_end_are_not_used(noise):
    trajectory = noise(b=20, early_end=False)
    usable = DecoderSteps().usable(trajectory)
    for row in range(20):
        needed = int(trajectory.reveal_step[row, : int(trajectory.length[row])].max())
        assert usable[row].nonzero()[:, 0].tolist() == list(range(needed + 1))


@pytest.mark.parametrize("remainder", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_chunks_are_consecutive_and_disjoint(noise, remainder, parts):
    trajectory = noise(b=12)
    rule = DecoderSteps(remainder=remainder)
    chunks = [rule(trajectory, keys(trajectory), part, parts) for part in range(parts)]
    for row in range(12):
        usable = rule.usable(trajectory)[row].nonzero()[:, 0].tolist()
        steps = [chunk.steps[chunk.rows == row].tolist() for chunk in chunks]
        each = len(usable) // parts
        assert [step for chunk in steps for step in chunk] == (usable if remainder else usable[: each * parts])
        assert all(len(chunk) in ((each, each + 1) if remainder else (each,)) for chunk in steps)


def test_the_last_block_and_the_last_state_can_be_left_out(noise):
    trajectory = noise(b=20, early_end=False)
    everything = DecoderSteps().usable(trajectory)
    without_block = DecoderSteps(last_block=False).usable(trajectory)
    without_both = DecoderSteps(last_block=False, last_state=False).usable(trajectory)
    for row in range(20):
        steps = everything[row].nonzero()[:, 0].tolist()
        kept = [step for step in steps if step < 8]  # 4 steps in each of the first two blocks of three
        assert without_block[row].nonzero()[:, 0].tolist() == kept
        assert without_both[row].nonzero()[:, 0].tolist() == kept[:-1]


def test_an_end_token_in_the_prompt_can_count_as_the_end(noise):
    trajectory = noise()
    prompts = trajectory.prompt_ids.clone()
    prompts[2, -1] = 10
    trajectory = replace(trajectory, prompt_ids=prompts)
    usable = DecoderSteps(prompt_ends=True).usable(trajectory)
    assert usable.any(1).tolist() == [True, True, False, True, True, True]
    assert torch.equal(usable.any(1) | (torch.arange(6) == 2), DecoderSteps().usable(trajectory).any(1))


def test_prompt_padding_that_is_the_end_token_does_not_count_as_the_end(noise):
    trajectory = noise()
    padded = trajectory.prompt_ids.masked_fill(~trajectory.prompt_mask, 10)
    assert not trajectory.prompt_mask.all()
    usable = DecoderSteps(prompt_ends=True).usable(replace(trajectory, prompt_ids=padded, pad_id=10))
    assert torch.equal(usable, DecoderSteps().usable(trajectory))


def test_a_shorter_horizon_has_fewer_canvases_and_grades_only_what_it_knows(noise):
    whole = noise(early_end=False)
    cut = whole.within(StopAfter("steps", 3))
    canvases = DecoderSteps()(cut, keys(cut), 0, 1)
    assert canvases.steps.tolist() == [0, 1, 2] * cut.size
    known = cut.reveal_step[canvases.rows] != NEVER
    assert not (canvases.masked & ~known).any()
    nothing = whole.within(StopAfter("steps", 0))
    assert DecoderSteps()(nothing, keys(nothing), 0, 1).size == 0


def mean_over_draws(trajectory: Trajectory, rule: RandomMasks, draws: int) -> Tensor:
    """Mean over many keys of weight x mask, float64 ``[b l]``."""
    total = torch.zeros(trajectory.tokens.shape, dtype=torch.float64)
    for draw in range(draws):
        canvases = rule(trajectory, [make_key(draw, row) for row in range(trajectory.size)], 0, 1)
        total.index_add_(0, canvases.rows, canvases.masked * canvases.weight[:, None].double())
    return total / (draws * rule.draws)


@pytest.mark.parametrize("end_padding", [True, *later(False)])
def test_the_weights_of_random_masks_make_every_answer_token_count_the_same(noise, end_padding):
    trajectory = noise(b=40)
    mean = mean_over_draws(trajectory, RandomMasks(draws=12, t_min=0.05, end_padding=end_padding), 100)
    length = torch.full((40,), 24) if end_padding else trajectory.length
    answer = torch.arange(24) < length[:, None]
    assert not mean[~answer].any()
    # Var(mask / t) = E[1 / t] - 1 = log(1 / t_min) / (1 - t_min) - 1, about 2.2
    deviation = (2.2 / (40 * 1200)) ** 0.5
    scaled = mean * length[:, None]
    per_row = torch.where(answer, scaled, 0).sum(1) / length
    assert abs(per_row.mean() - 1) < 5 * deviation
    assert (abs(scaled[answer] - 1) < 6 * (2.2 / 1200) ** 0.5).all()


def blocks_by_hand(trajectory: Trajectory) -> list[list[int]]:
    """The block of every completion position, counted over the whole row from its first prompt token."""
    lengths, size = trajectory.prompt_mask.sum(1).tolist(), trajectory.block_length
    return [[(p + i) // size - p // size for i in range(trajectory.tokens.shape[1])] for p in lengths]


def test_the_active_block_of_a_block_causal_model_may_begin_in_the_prompt(noise):
    trajectory = noise(b=12, blocks_of_prompt=True)
    canvases, blocks = DecoderSteps()(trajectory, keys(trajectory), 0, 1), blocks_by_hand(trajectory)
    for i in range(canvases.size):
        row, step = int(canvases.rows[i]), int(canvases.steps[i])
        reveal = trajectory.reveal_step[row].tolist()
        first = next(j for j in range(24) if not 0 <= reveal[j] < step)
        expected = [reveal[j] >= step and blocks[row][j] == blocks[row][first] for j in range(24)]
        assert canvases.active[i].tolist() == expected
        assert not bool((canvases.revealed[i] & ~canvases.active[i]).any())


def test_the_last_block_of_a_block_causal_model_may_be_shorter(noise):
    trajectory = noise(b=20, early_end=False, blocks_of_prompt=True)
    everything, without = DecoderSteps().usable(trajectory), DecoderSteps(last_block=False).usable(trajectory)
    for row, blocks in enumerate(blocks_by_hand(trajectory)):
        reveal = trajectory.reveal_step[row].tolist()
        first = min(step for step, block in zip(reveal, blocks, strict=True) if block == blocks[-1])
        steps = everything[row].nonzero()[:, 0].tolist()
        assert without[row].nonzero()[:, 0].tolist() == [step for step in steps if step < first]


def test_random_masks_of_a_block_causal_model_hide_some_of_one_block_only(noise):
    trajectory = noise(b=60, blocks_of_prompt=True)
    blocks = blocks_by_hand(trajectory)
    for end_padding, t_min in ((True, 0.001), (False, 0.001), (False, 0.999)):
        rule = RandomMasks(draws=3, end_padding=end_padding, t_min=t_min)
        canvases = rule(trajectory, keys(trajectory), 0, 1)
        met = set()
        for i in range(canvases.size):
            row = int(canvases.rows[i])
            end = 24 if end_padding else int(trajectory.length[row])
            hidden = [j for j in range(24) if canvases.masked[i, j]]
            touched = {blocks[row][j] for j in hidden}
            assert len(touched) <= 1
            assert len(touched) == 1 or t_min < 0.5  # no draw is spent on a block behind the end
            assert all(j < end for j in hidden)
            met |= touched
            shown = [t if j not in hidden and j < end else MASK for j, t in enumerate(trajectory.tokens[row].tolist())]
            assert canvases.ids[i, -24:].tolist() == shown
        assert met == {block for row in blocks for block in row}


@pytest.mark.parametrize("end_padding", [False, *later(True)])
def test_one_block_at_a_time_has_the_mean_over_all_blocks_as_its_expectation(noise, end_padding):
    trajectory = noise(b=400, blocks_of_prompt=True)
    mean = mean_over_draws(trajectory, RandomMasks(draws=4, t_min=0.05, end_padding=end_padding), 30)
    length = torch.full((400,), 24) if end_padding else trajectory.length
    answer = torch.arange(24) < length[:, None]
    assert not mean[~answer].any()
    # Var(blocks * mask / t) = blocks * E[1 / t] - 1, at most 4 * 3.2 - 1
    scaled, blocks = mean * length[:, None], torch.tensor(blocks_by_hand(trajectory))
    for block in range(4):
        here = answer & (blocks == block)
        assert abs(scaled[here].mean() - 1) < 6 * (11.8 / (120 * int(here.any(1).sum()))) ** 0.5, block
    assert abs(scaled[answer].mean() - 1) < 6 * (11.8 / (120 * 400)) ** 0.5


def test_random_masks_hide_about_t_of_the_answer_and_everything_behind_it(noise):
    trajectory = noise(b=300)
    canvases = RandomMasks(draws=4, end_padding=False)(trajectory, keys(trajectory), 0, 1)
    length = trajectory.length[canvases.rows]
    answer = torch.arange(24) < length[:, None]
    completion = canvases.ids[:, -24:]
    assert torch.equal(completion == MASK, canvases.masked | ~answer)
    assert torch.equal(completion[~canvases.masked & answer], canvases.tokens[~canvases.masked & answer])
    t = 1 / (canvases.weight * length)
    assert ((t > 0) & (t <= 1 + 1e-6)).all()
    hidden, variance = canvases.masked.sum(1) - t * length, length * t * (1 - t)
    assert abs(hidden.sum()) < 5 * variance.sum().sqrt()
    assert torch.equal(canvases.steps, torch.full_like(canvases.rows, -1))
    assert torch.equal(canvases.revealed, canvases.masked)


def test_the_masking_rates_of_one_rollout_are_spread_evenly(noise):
    trajectory = noise(b=1)
    canvases = RandomMasks(draws=8, t_min=0.2)(trajectory, keys(trajectory), 0, 1)
    t = (1 / (canvases.weight * 24)).sort().values
    torch.testing.assert_close(t.diff(), torch.full((7,), 0.8 / 8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", [RandomMasks(draws=3), RandomMasks(end_padding=False), AllMaskedCanvas(0.5)], ids=repr)
def test_synthetic_canvases_depend_on_the_key_and_the_pass_alone(noise, rule):
    trajectory = noise(b=7)
    together = rule(trajectory, keys(trajectory), 0, 2)
    for row, key in enumerate(keys(trajectory)):
        one = trajectory.select(torch.tensor([row]))
        alone, of_row = rule(one, [key], 0, 2), together.rows == row
        width = alone.ids.shape[1]  # the prompt is no longer padded
        assert torch.equal(alone.ids, together.ids[of_row][:, -width:])
        assert torch.equal(alone.masked, together.masked[of_row])
        assert torch.equal(alone.weight, together.weight[of_row])
    assert not torch.equal(rule(trajectory, keys(trajectory), 1, 2).ids, together.ids)
    padded = concatenate([trajectory, wider(trajectory)]).select(torch.arange(8))
    again = rule(padded, [*keys(trajectory), 0], 0, 2)
    assert torch.equal(again.ids[again.rows < 7][:, 20:], together.ids)


def wider(trajectory: Trajectory) -> Trajectory:
    """One more row, whose prompt is 20 tokens longer than any."""
    p = trajectory.prompt_ids.shape[1] + 20
    one = trajectory.select(torch.tensor([0]))
    return replace(one, prompt_ids=torch.ones((1, p), dtype=torch.int64), prompt_mask=torch.ones((1, p)).bool())


def test_all_masked_hides_the_completion_and_some_of_the_prompt(noise):
    trajectory = noise(b=400)
    canvases: Canvases = AllMaskedCanvas(prompt_mask_ratio=0.3)(trajectory, keys(trajectory), 0, 1)
    p = trajectory.prompt_ids.shape[1]
    assert (canvases.ids[:, p:] == MASK).all()
    assert torch.equal(canvases.masked, torch.arange(24) < trajectory.length[:, None])
    prompt, real = canvases.ids[:, :p], trajectory.prompt_mask
    assert torch.equal(prompt[~real], trajectory.prompt_ids[~real])
    hidden = prompt[real] == MASK
    assert torch.equal(prompt[real][~hidden], trajectory.prompt_ids[real][~hidden])
    assert abs(hidden.double().mean() - 0.3) < 5 * (0.3 * 0.7 / hidden.numel()) ** 0.5
    assert torch.equal(AllMaskedCanvas(0.0)(trajectory, keys(trajectory), 0, 1).ids[:, :p], trajectory.prompt_ids)


def test_attention_sees_everything_but_prompt_padding(noise):
    trajectory = noise()
    mask = attention_mask(trajectory, torch.tensor([3, 0]))
    assert torch.equal(mask[:, : trajectory.prompt_ids.shape[1]], trajectory.prompt_mask[[3, 0]])
    assert mask[:, -24:].all()


@pytest.mark.parametrize(
    "build",
    [lambda: RandomMasks(draws=0), lambda: RandomMasks(t_min=0.0), lambda: AllMaskedCanvas(prompt_mask_ratio=1.0)],
)
def test_impossible_rules_are_refused(build):
    with pytest.raises(InputError, match=r"method\.canvases\.\w+ is .*; give"):
        build()
