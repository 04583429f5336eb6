from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_sd.decoding.sampling import sample_inverse_cdf
from dllm_sd.decoding.settings import Decoding, Meter
from dllm_sd.errors import InputError
from dllm_sd.network.view import View
from dllm_sd.randomness import key_tensor, make_key, uniform
from dllm_sd.trajectory import NEVER, Trajectory
from tests.oracles.decoding import decode_one, full_logits, transfer_counts
from tests.oracles.toy_denoiser import Recorder, denoised
from tests.tiers import later

PROMPTS = [[4, 5, 14, 6], [7], [8, 9, 10, 11, 12, 13, 4], [5, 16, 5], [20, 21]]
KEYS = [make_key("row", i) for i in range(len(PROMPTS))]
SHORT = Decoding(length=18, block_length=6, tokens_per_step=2)

TOY: dict[str, Any] = {"mask_id": 11, "end_ids": (10,), "pad_id": 9}

SCHEDULES = {
    "two tokens a step": SHORT,
    "one token a step": replace(SHORT, tokens_per_step=1),
    "a rest in each block": replace(SHORT, tokens_per_step=4),
    "more tokens a step than a block has": replace(SHORT, tokens_per_step=9),
    "one block": replace(SHORT, block_length=18),
    "uneven steps": replace(SHORT, steps=13),
    "idle steps": replace(SHORT, steps=27),
    "margin": replace(SHORT, order="margin"),
    "entropy": replace(SHORT, order="entropy"),
    "left to right": replace(SHORT, order="left_to_right"),
    "low threshold": replace(SHORT, threshold=0.2),
    "high threshold": replace(SHORT, threshold=0.7),
    "no early end": replace(SHORT, early_end=False),
    "suppressed tokens": replace(SHORT, suppress=(2, 3, 5)),
}


def counts(settings: Decoding) -> list[int]:
    """The schedule of a block, counted separately."""
    if settings.threshold is not None:
        return []
    if settings.steps is not None:
        return transfer_counts(settings.block_length, settings.steps // (settings.length // settings.block_length))
    left, out = settings.block_length, []
    while left:
        out.append(min(left, settings.tokens_per_step))
        left -= out[-1]
    return out


QUICK = ("a rest in each block", "low threshold", "suppressed tokens")


@pytest.mark.parametrize("name", [*QUICK, *later(*(name for name in SCHEDULES if name not in QUICK))])
def test_a_batch_of_unequal_prompts_decodes_like_the_plain_sampler(policy, name):
    settings = SCHEDULES[name]
    ours = policy.decode(PROMPTS, settings, KEYS)
    for row, prompt in enumerate(PROMPTS):
        tokens, reveal = decode_one(
            full_logits(policy),
            prompt,
            length=settings.length,
            block_length=settings.block_length,
            mask_id=policy.mask_id,
            end_ids=policy.end_ids if settings.early_end else (),
            banned=settings.suppress,
            counts=counts(settings),
            threshold=settings.threshold,
            order=settings.order,
        )
        assert ours.tokens[row].tolist() == [policy.pad_id if token is None else token for token in tokens], row
        assert ours.reveal_step[row].tolist() == [NEVER if step is None else step for step in reveal], row


def assert_same(ours: Trajectory, theirs: Trajectory) -> None:
    for name in ("tokens", "reveal_step", "length"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


ORDERS = ("confidence", "margin", "entropy", "random", "left_to_right")


ROWS = [("margin", 0.9)]


@pytest.mark.parametrize(
    ("order", "temperature"),
    [*ROWS, *later(*(case for case in product(ORDERS, [0.0, 0.9]) if case not in ROWS))],
)
def test_a_row_depends_neither_on_its_batch_nor_on_its_place_in_it(policy, order, temperature):
    settings = replace(SHORT, order=order, temperature=temperature)
    together = policy.decode(PROMPTS, settings, KEYS)
    assert_same(policy.decode(PROMPTS, replace(settings, batch_size=2), KEYS), together)
    turned = policy.decode(PROMPTS[::-1], settings, KEYS[::-1])
    assert_same(turned.select(torch.arange(len(PROMPTS)).flip(0)), together)
    for row, prompt in enumerate(PROMPTS):
        alone = policy.decode([prompt], settings, [KEYS[row]])
        assert_same(alone, together.select(torch.tensor([row])))
        assert alone.prompt_ids.tolist() == [prompt]


@pytest.mark.parametrize("batch_size", [4, *later(1, 2, 64)])
def test_every_row_is_reported_once_when_it_ends_and_slots_are_refilled(policy, batch_size):
    settings = replace(SHORT, temperature=1.0, batch_size=batch_size)
    prompts, keys = PROMPTS * 4, [make_key("refill", i) for i in range(4 * len(PROMPTS))]
    reported, meter = {}, Meter()

    def finished(rows: Tensor, trajectory: Trajectory) -> None:
        for place, row in enumerate(rows.tolist()):
            assert row not in reported
            reported[row] = trajectory.select(torch.tensor([place]))

    together = policy.decode(prompts, settings, keys, finished=finished, meter=meter)
    assert sorted(reported) == list(range(len(prompts)))
    for row, one in reported.items():
        assert_same(one, together.select(torch.tensor([row])))
    ends = [0] * min(batch_size, len(prompts))  # when each slot is free again, by hand
    steps = together.num_steps.tolist()
    for count in (steps[row] for row in sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))):
        ends[ends.index(min(ends))] += count
    assert (meter.rows, meter.forwards) == (sum(together.num_steps.tolist()), max(ends))
    assert meter.occupancy == meter.rows / (max(ends) * len(ends))


@pytest.mark.parametrize("settings", [{"threshold": 0.4}, *later({"guidance": 1.5})], ids=str)
def test_guidance_and_thresholds_do_not_depend_on_the_batch(policy, settings):
    settings = replace(SHORT, temperature=0.5, **settings)
    together = policy.decode(PROMPTS, settings, KEYS)
    assert_same(policy.decode(PROMPTS, replace(settings, batch_size=1), KEYS), together)


def test_guidance_moves_away_from_what_the_model_says_without_the_prompt(policy):
    logits, mask = full_logits(policy), policy.mask_id

    def guided(ids: Sequence[int]) -> Tensor:
        blank = logits([mask] * len(PROMPTS[0]) + list(ids[len(PROMPTS[0]) :]))
        return blank + (1 + 1.5) * (logits(ids) - blank)

    tokens, reveal = decode_one(guided, PROMPTS[0], length=18, block_length=6, mask_id=mask, counts=[2, 2, 2])
    ours = policy.decode(PROMPTS[:1], replace(SHORT, guidance=1.5, early_end=False), KEYS[:1])
    assert ours.tokens[0].tolist() == tokens
    assert ours.reveal_step[0].tolist() == reveal


def test_other_keys_give_other_samples(policy):
    settings = replace(SHORT, temperature=1.0)
    first, again, other = (
        policy.decode(PROMPTS, settings, keys) for keys in (KEYS, KEYS, [make_key(key) for key in KEYS])
    )
    assert_same(first, again)
    assert (first.tokens != other.tokens).any(1).all()


def test_an_early_end_saves_steps_and_changes_nothing_before_the_end(policy):
    settings = replace(SHORT, temperature=1.5, length=48)
    prompts, keys = PROMPTS * 3, [make_key("early", i) for i in range(15)]
    early, whole = (policy.decode(prompts, replace(settings, early_end=end), keys) for end in (True, False))
    answer = torch.arange(48) < whole.length[:, None]
    assert torch.equal(early.length, whole.length)
    assert torch.equal(early.tokens[answer], whole.tokens[answer])
    assert torch.equal(early.reveal_step[answer], whole.reveal_step[answer])
    assert (early.num_steps[whole.ended] < whole.num_steps[whole.ended]).any()
    behind = early.reveal_step == NEVER
    assert behind.any()
    assert not (behind & answer).any()
    assert (early.tokens[behind] == policy.pad_id).all()


@pytest.mark.parametrize("settings", [SHORT, replace(SHORT, threshold=0.5), replace(SHORT, steps=27)], ids=repr)
def test_logits_are_asked_for_exactly_the_masked_positions_of_each_rows_active_block(settings):
    model, seen = Recorder(), []
    done = denoised(model, [[1], [2], [3], [4]], settings, KEYS[:4], **TOY, watch=seen.append)
    asked = 0
    for view in model.asked:
        completion = view.ids[:, 1:]
        for row in range(len(completion)):
            masked = [i for i, token in enumerate(completion[row].tolist()) if token == 11]
            block = masked[0] // settings.block_length
            expected = [1 + i for i in masked if i // settings.block_length == block]
            assert view.sites[row].nonzero()[:, 0].tolist() == expected
            asked += len(expected)
    assert asked < sum(view.ids.numel() for view in model.asked) / 2
    assert len(seen) == len(model.asked) + 1
    assert [len(view.ids) for view in model.asked] == sorted((len(view.ids) for view in model.asked), reverse=True)
    assert torch.equal(seen[-1].masked_fill(done.reveal_step == NEVER, 9), done.tokens)


def test_the_output_head_runs_on_the_sites_only(policy):
    rows = []
    hook = policy.module.model.lm_head.register_forward_hook(lambda _, args, out: rows.append(args[0].shape[:-1]))
    policy.decode(PROMPTS, replace(SHORT, early_end=False), KEYS)
    hook.remove()
    assert [n for (n,) in rows] == [len(PROMPTS) * masked for masked in (6, 4, 2)] * 3


def test_logits_at_sites_are_those_of_the_whole_canvas_without_padding(policy):
    ids = [[5, 0, 7, 0], [0, 6, 0, 0, 0, 9]]
    padded = torch.tensor([[2] * (6 - len(row)) + row for row in ids])
    mask = torch.tensor([[False] * (6 - len(row)) + [True] * len(row) for row in ids])
    sites = (padded == policy.mask_id) & mask
    ours = policy.site_logits(View(padded, mask, sites))
    alone = [full_logits(policy)(row)[torch.tensor(row) == policy.mask_id] for row in ids]
    torch.testing.assert_close(ours.detach(), torch.cat(alone), atol=1e-12, rtol=1e-12)


def test_the_mask_suppressed_and_unknown_tokens_are_never_committed(make_policy, policy_shape):
    wide = make_policy(shape=replace(policy_shape, vocab_size=64))  # the tokenizer knows 25
    assert wide.suppress == tuple(range(25, 64))
    for temperature in (0.0, 5.0):
        settings = replace(SHORT, temperature=temperature, early_end=False, suppress=(3, 4, 5))
        tokens = wide.decode(PROMPTS * 4, settings, range(20)).tokens
        assert not torch.isin(tokens, torch.tensor([wide.mask_id, 3, 4, 5, *wide.suppress])).any()
        assert temperature == 0 or tokens.unique().numel() == 25 - 4


@pytest.mark.parametrize("rows", [50, *later(200)])
def test_tokens_are_drawn_from_the_softmax_at_the_temperature_without_what_is_suppressed(rows):
    logits = torch.linspace(-2, 3, 12)
    settings = Decoding(length=40, block_length=40, temperature=2.0, suppress=(5,), early_end=False, order="random")
    drawn = denoised(
        lambda view: logits.expand(int(view.sites.sum()), 12),
        [[1]] * rows,
        settings,
        [make_key("draw", i) for i in range(rows)],
        **TOY,
    ).tokens
    allowed = logits.clone()
    allowed[[5, 11]] = -torch.inf
    assert_frequencies(drawn.flatten(), (allowed / 2).softmax(-1))


def assert_frequencies(drawn: Tensor, expected: Tensor) -> None:
    """Within five standard deviations, for every token; impossible tokens never."""
    count = drawn.numel()
    frequency = torch.bincount(drawn, minlength=len(expected)) / count
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((frequency - expected).abs() <= 5 * deviation).all(), (frequency, expected)


@pytest.mark.parametrize("rows", [500, *later(2000)])
def test_a_position_that_was_not_committed_draws_anew_at_the_next_step(rows):
    logits = torch.tensor([0.7, 0.3, 0.0]).log()
    settings = Decoding(length=8, block_length=8, tokens_per_step=1, temperature=1.0, early_end=False)
    keys, ids = [make_key("anew", i) for i in range(rows)], {**TOY, "mask_id": 2}
    drawn = denoised(lambda view: logits.expand(int(view.sites.sum()), 3), [[0]] * rows, settings, keys, **ids)
    chance = 0.3 ** torch.arange(1, 9).double()  # the rarer token is committed only where all that is masked drew it
    deviation = (rows * chance * (1 - chance)).sum().sqrt()
    assert abs((drawn.tokens == 1).sum() - rows * chance.sum()) < 5 * deviation


def test_sampling_follows_the_distribution_down_to_the_tail():
    p = torch.tensor([0.4, 0.0, 0.3, 1e-3, 0.2, 0.09, 0.009, 0.0])
    u = uniform(key_tensor([make_key("sample")]), 200_000)[0]
    assert_frequencies(sample_inverse_cdf(p.expand(200_000, 8), u), p)


def test_sampling_takes_valid_tokens_at_the_edges_of_the_interval():
    p = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    u = torch.tensor([2.0**-24, 0.5, 1 - 2.0**-24])
    assert sample_inverse_cdf(p.expand(3, 5), u).tolist() == [1, 1, 3]
    wide = torch.randn(3, 100_000, generator=torch.Generator().manual_seed(0)) * 3
    token = sample_inverse_cdf(wide.softmax(-1), u)
    assert ((token >= 0) & (token < 100_000)).all()
    assert (wide.softmax(-1).gather(1, token[:, None]) > 0).all()


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy", "random", "left_to_right"])
def test_tokens_that_the_model_rules_out_are_never_taken_and_spoil_no_order(order):
    def model(view: View, impossible: float) -> Tensor:
        logits = Recorder()(view)
        logits[:, 3] = impossible
        return logits

    def decode(impossible: float) -> Trajectory:
        settings = replace(SHORT, order=order, early_end=False)
        return denoised(lambda view: model(view, impossible), [[1], [2], [3]], settings, KEYS[:3], **TOY)

    never = decode(-torch.inf)
    assert not (never.tokens == 3).any()
    assert_same(never, decode(-1e4))


def test_decoding_runs_in_eval_mode_without_gradient_and_restores_the_mode(make_policy):
    policy = make_policy()
    modes = []
    head = policy.module.network.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: modes.append((policy.module.training, out.requires_grad)))
    for training in (True, False):
        policy.module.train(training)
        policy.decode(PROMPTS[:1], SHORT, KEYS[:1])
        assert policy.module.training is training
    assert set(modes) == {(False, False)}


def test_a_demonstration_is_revealed_from_left_to_right(policy):
    one = policy.demonstration([7, 8], [9, 10, policy.end_ids[0]], replace(SHORT, length=6))
    assert one.prompt_ids.tolist() == [[7, 8]]
    assert one.tokens.tolist() == [[9, 10, 1, 2, 2, 2]]
    assert one.reveal_step.tolist() == [[0, 1, 2, NEVER, NEVER, NEVER]]
    assert one.length.tolist() == [3]


def test_text_and_tokens_go_back_and_forth(policy):
    tokens = policy.encode_completion("12+3=15")
    assert tokens[-1] in policy.end_ids
    assert policy.text(tokens) == "12+3=15"
    assert policy.encode([{"role": "user", "content": "1"}, {"role": "user", "content": "2"}]) == [5, 24, 24, 6]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"length": 0}, "decode.length is 0; give a whole number from 1 to"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "decode.top_k is -1; give a whole number of at least 0"),
        ({"top_p": 0.0}, "decode.top_p is 0; give a number above 0 and at most 1"),
        ({"top_p": 1.1}, "at most 1"),
        ({"threshold": 1.1}, "decode.threshold is 1.1; give a number above 0 and at most 1, or null"),
        ({"threshold": 0.9, "order": "margin"}, "order to confidence"),
        ({"threshold": 0.9, "steps": 18}, "steps to null"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings, says):
    with pytest.raises(InputError, match=says):
        replace(SHORT, **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"length": 10, "block_length": 4}, "decode.block_length 4 does not divide decode.length 10"),
        ({"steps": 2}, "decode.steps must be at least the number of blocks"),
        ({"continuous": True}, r"^decode\.continuous is for autoregressive models and this one denoises"),
    ],
    ids=str,
)
def test_what_no_canvas_can_do_is_refused_before_the_first_pass(policy, settings, says):
    meter = Meter()
    with pytest.raises(InputError, match=says):
        policy.decode([[4]], replace(SHORT, **settings), [0], meter=meter)
    assert meter.forwards == 0
