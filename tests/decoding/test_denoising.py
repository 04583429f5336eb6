"""How a token is drawn, for both backbones: what may be drawn, which one it is, and how probable it was."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dllm_sd.canvases import DecoderSteps
from dllm_sd.decoding import sampling as drawing
from dllm_sd.decoding.sampling import apply_filters, banned_ids, draw, first_largest, sample_inverse_cdf
from dllm_sd.decoding.settings import Decoding, Meter
from dllm_sd.errors import InputError
from dllm_sd.network.view import View
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.randomness import fold, key_tensor, make_key, uniform
from dllm_sd.trajectory import NEVER, Trajectory
from tests.oracles.sampling import inverse, kept
from tests.tiers import crossed

SAMPLING = {
    "all": Decoding(temperature=1.0),
    "cold": Decoding(temperature=0.3),
    "top k": Decoding(temperature=1.5, top_k=3),
    "top one": Decoding(temperature=1.5, top_k=1),
    "as many as there are": Decoding(temperature=1.5, top_k=23),
    "more than there are": Decoding(temperature=1.5, top_k=100),
    "top p": Decoding(temperature=1.5, top_p=0.7),
    "almost nothing": Decoding(temperature=1.5, top_p=1e-6),
    "almost all": Decoding(temperature=1.5, top_p=0.999),
    "both": Decoding(temperature=0.8, top_k=7, top_p=0.6),
}
NAMES = pytest.mark.parametrize("name", SAMPLING)


NOTHING = torch.zeros(0, dtype=torch.int64)


@pytest.fixture(scope="module")
def logits() -> Tensor:
    """[40 23], one token of each row impossible."""
    rows = 3 * torch.randn((40, 23), generator=torch.Generator().manual_seed(0))
    return rows.scatter(1, torch.arange(40)[:, None] % 23, -torch.inf)


@NAMES
def test_what_may_be_drawn_is_what_a_plain_filter_keeps(logits, name):
    settings = SAMPLING[name]
    plain = [kept(row, settings.temperature, settings.top_k, settings.top_p) for row in logits.tolist()]
    torch.testing.assert_close(apply_filters(logits, settings).softmax(-1), torch.tensor(plain), atol=1e-6, rtol=0)


@NAMES
def test_what_may_be_drawn_is_what_transformers_keeps(logits, name):
    settings, warpers = SAMPLING[name], LogitsProcessorList([TemperatureLogitsWarper(SAMPLING[name].temperature)])
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    unused: Any = None
    assert torch.equal(apply_filters(logits, settings), warpers(unused, logits))


def test_by_hand_top_k_and_top_p_keep_the_smallest_set_that_suffices():
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()

    def left(**settings: Any) -> list[int]:
        return (apply_filters(logits, Decoding(temperature=1.0, **settings))[0] > -torch.inf).nonzero()[:, 0].tolist()

    assert left(top_k=2) == [0, 2]
    assert left(top_p=0.39) == [0]
    assert left(top_p=0.41) == [0, 2]
    assert left(top_p=0.71) == [0, 2, 3]
    assert left(top_k=3, top_p=0.79) == [0, 2, 3]  # of three ninths, two hold 7/9
    assert left(top_k=3, top_p=0.77) == [0, 2]


@NAMES
def test_the_token_is_the_inverse_of_the_distribution(logits, name):
    settings, u = SAMPLING[name], uniform(key_tensor([5]), 40)[0]
    plain = [
        inverse(kept(row, settings.temperature, settings.top_k, settings.top_p), x)
        for row, x in zip(logits.tolist(), u.tolist(), strict=True)
    ]
    assert draw(logits.clone(), settings, NOTHING, u).token.tolist() == plain


def test_tokens_are_drawn_as_often_as_they_are_probable(logits):
    settings = SAMPLING["both"]
    n = 20_000
    drawn = draw(logits[:1].repeat(n, 1), settings, NOTHING, uniform(key_tensor([7]), n)[0])
    shares = drawn.token.bincount(minlength=23) / n
    torch.testing.assert_close(shares, apply_filters(logits[:1], settings).softmax(-1)[0], atol=0.012, rtol=0)


def test_at_temperature_0_the_largest_is_taken_and_filters_have_no_say(logits):
    greedy = Decoding(top_k=1, top_p=0.1)
    for u in (0.01, 0.99):
        assert torch.equal(draw(logits.clone(), greedy, NOTHING, torch.full((40,), u)).token, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_the_log_probability_is_before_the_filters_and_after_the_temperature(logits, temperature):
    u, rows = uniform(key_tensor([3]), 40)[0], torch.arange(40)
    for filters in (Decoding(), Decoding(top_k=1), Decoding(top_p=0.5)):
        for never in (NOTHING, torch.tensor([2, 7, 19])):
            found = draw(logits.clone(), replace(filters, temperature=temperature), never, u)
            assert not torch.isin(found.token, never).any()
            expected = (logits.double() / (temperature or 1)).log_softmax(-1)[rows, found.token]
            torch.testing.assert_close(found.logp.double(), expected, atol=1e-5, rtol=0)
            own = logits.double().log_softmax(-1)[rows, found.token]
            torch.testing.assert_close(found.own.double(), own, atol=1e-5, rtol=0)
            torch.testing.assert_close(found.normaliser, logits.logsumexp(-1), atol=1e-5, rtol=0)


def test_what_is_never_drawn_may_be_far_more_probable_than_all_the_rest(logits):
    far, never = logits.clone(), torch.tensor([4])
    far[:, 4] = 500.0
    for temperature in (0.0, 0.1, 1.0):
        settings, u = Decoding(temperature=temperature), uniform(key_tensor([3]), 40)[0]
        ours, plain = draw(far.clone(), settings, never, u), draw(logits.clone(), settings, never, u)
        assert torch.equal(ours.token, plain.token)
        expected = (far / (temperature or 1)).log_softmax(-1).gather(1, ours.token[:, None])[:, 0]
        torch.testing.assert_close(ours.logp, expected, atol=1e-3, rtol=1e-6)


# Many ids that are never drawn

WIDTH = 5000
LISTS: dict[str, Sequence[int]] = {
    "the tail": range(25, WIDTH),
    "all but the ends": range(20, WIDTH - 4),
    "every second": range(0, WIDTH, 2),
    "the front": range(WIDTH - 30),
    "scattered": sorted(random.Random(0).sample(range(WIDTH), 3000)),
}


@pytest.mark.parametrize(("name", "listed"), crossed(SAMPLING, LISTS))
def test_a_mask_of_many_ids_draws_what_their_numbers_draw(name: str, listed: str):
    ids = LISTS[listed]
    rows = 3 * torch.randn((40, WIDTH), generator=torch.Generator().manual_seed(1))
    u = uniform(key_tensor([9]), 40)[0]
    for settings in (SAMPLING[name], replace(SAMPLING[name], temperature=0.0)):
        mask = banned_ids(replace(settings, suppress=tuple(ids)), (), rows.device, WIDTH)
        assert mask.dtype == torch.bool
        masked, plain = draw(rows.clone(), settings, mask, u), draw(rows.clone(), settings, torch.tensor([*ids]), u)
        assert torch.equal(masked.token, plain.token)
        assert not torch.isin(masked.token, torch.tensor([*ids])).any()
        for one, other in zip(vars(masked).values(), vars(plain).values(), strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


def test_a_few_ids_stay_numbers_and_a_tail_is_cut_off():
    few = banned_ids(Decoding(suppress=(3, 1)), (7,), torch.device("cpu"), WIDTH)
    assert few.tolist() == [1, 3, 7]
    mask = banned_ids(Decoding(suppress=(3,)), range(25, WIDTH), torch.device("cpu"), WIDTH)
    assert mask.nonzero()[:, 0].tolist() == [3]
    assert len(mask) == 25
    with pytest.raises(InputError, match=r"^decode\.suppress leaves no token to draw; list fewer$"):
        banned_ids(Decoding(), range(WIDTH), torch.device("cpu"), WIDTH)


def test_what_is_beyond_the_vocabulary_cannot_be_suppressed_and_its_last_token_can():
    banned_ids(Decoding(suppress=(WIDTH - 1,)), (), torch.device("cpu"), WIDTH)
    with pytest.raises(InputError, match=f"suppress names token {WIDTH}, but the last one is {WIDTH - 1}"):
        banned_ids(Decoding(suppress=(3, WIDTH)), (), torch.device("cpu"), WIDTH)


@pytest.mark.parametrize("backbone", [{}, {"as_": "autoregressive"}], ids=["denoiser", "autoregressive"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_both_backbones_decode_the_same_with_a_mask_and_with_numbers(make_policy, policy_shape, backbone, temperature):
    wide = make_policy(shape=replace(policy_shape, vocab_size=2048), **backbone)
    settings = replace(CANVAS, temperature=temperature)
    masked = wide.decode(PROMPTS, settings, KEYS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "MAX_LISTED_IDS", WIDTH)
        plain = wide.decode(PROMPTS, settings, KEYS)
    assert len(wide.suppress) > drawing.MAX_LISTED_IDS
    assert torch.equal(masked.tokens, plain.tokens)
    assert torch.equal(masked.reveal_step, plain.reveal_step)
    assert masked.tokens.max() < 25


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_searching_by_runs_finds_what_a_search_of_the_whole_finds(size):
    generator = torch.Generator().manual_seed(size)
    weight = torch.rand((400, size), generator=generator, dtype=torch.float64)
    weight = weight.masked_fill(torch.rand((400, size), generator=generator) < 0.3, 0.0)
    weight[:, -1] += 1e-3  # none is empty
    u = torch.rand(400, generator=generator)
    until = weight.cumsum(-1)
    whole = torch.searchsorted(until, u.double()[:, None] * until[:, -1:])[:, 0]
    assert torch.equal(sample_inverse_cdf(weight, u), whole)
    ties = torch.randint(3, (400, size), generator=generator).float()
    assert torch.equal(first_largest(ties), ties.argmax(-1))


# The denoiser

PROMPTS = [[4, 5, 14, 6], [7], [8, 9, 10, 11, 12, 13, 4], [5, 16, 5], [20, 21]]
KEYS = [make_key("row", i) for i in range(len(PROMPTS))]
CANVAS = Decoding(length=16, block_length=8, tokens_per_step=2, temperature=0.8)
DENOISING = {
    "greedy": replace(CANVAS, temperature=0.0),
    "sampled": CANVAS,
    "top k": replace(CANVAS, temperature=1.4, top_k=3),
    "top p": replace(CANVAS, temperature=1.4, top_p=0.5),
    "threshold": replace(CANVAS, threshold=0.3),
    "suppressed": replace(CANVAS, temperature=1.4, suppress=(4, 5, 6, 7)),
}


def student(policy: MaskedDiffusion, done: Trajectory) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, positions and steps of all tokens that were committed, and the student's logits on the step's canvas."""
    canvases = DecoderSteps()(done, KEYS, 0, 1)
    prompt = torch.zeros((canvases.size, canvases.ids.shape[1] - 16), dtype=torch.bool)
    sites = canvases.revealed
    with torch.no_grad():
        logits = policy.site_logits(View(canvases.ids, canvases.mask, torch.cat([prompt, sites], 1)))
    canvas, position = sites.nonzero(as_tuple=True)
    return canvases.rows[canvas], position, canvases.steps[canvas], logits


@pytest.mark.parametrize(("name", "attention"), crossed(DENOISING, ["whole canvas", "block causal"]))
def test_a_denoisers_log_probabilities_are_the_students_on_the_canvas_of_the_step(
    make_policy: Callable[..., MaskedDiffusion], name: str, attention: str
):
    options = {"block_length": 8} if attention == "block causal" else {}
    policy, settings = make_policy(**options), DENOISING[name]
    done = policy.decode(PROMPTS, settings, KEYS)
    rows, position, _, logits = student(policy, done)
    tokens = done.tokens[rows, position]
    logp = (logits / (settings.temperature or 1)).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert done.logp is not None
    torch.testing.assert_close(done.logp[rows, position].double(), logp, atol=1e-5, rtol=0)
    assert torch.equal(done.logp.isnan(), done.reveal_step == NEVER)
    canvases = DecoderSteps()(done, KEYS, 0, 1)
    assert torch.equal(canvases.old_logp[canvases.revealed], done.logp[rows, position])


@pytest.mark.parametrize("name", ["sampled", "top k", "top p", "suppressed", "threshold"])
def test_a_denoisers_tokens_are_those_of_an_inverse_distribution_at_the_keyed_numbers(policy, name):
    settings = DENOISING[name]
    done = policy.decode(PROMPTS, settings, KEYS)
    rows, position, steps, logits = student(policy, done)
    logits[:, [policy.mask_id, *settings.suppress]] = -torch.inf
    narrow = 0
    for i, (row, place, step) in enumerate(zip(rows.tolist(), position.tolist(), steps.tolist(), strict=True)):
        u = float(uniform(fold(key_tensor([KEYS[row]]), step), 16)[0, place])
        probability = kept(logits[i].float().tolist(), settings.temperature, settings.top_k, settings.top_p)
        assert inverse(probability, u) == done.tokens[row, place]
        narrow += sum(share > 0 for share in probability) < 12
    assert (narrow > 20) == (name in ("top k", "top p"))


def test_filters_change_what_a_denoiser_writes_but_not_what_greedy_decoding_does(policy):
    one, other = (policy.decode(PROMPTS, DENOISING[name], KEYS) for name in ("top k", "top p"))
    assert not torch.equal(one.tokens, other.tokens)
    greedy = policy.decode(PROMPTS, DENOISING["greedy"], KEYS)
    filtered = policy.decode(PROMPTS, replace(DENOISING["greedy"], top_k=2, top_p=0.1), KEYS)
    assert torch.equal(greedy.tokens, filtered.tokens)


def test_the_share_of_busy_slots_is_that_of_the_rows():
    assert Meter().occupancy == 0
    assert Meter(forwards=4, rows=6, slots=8).occupancy == 0.75


@pytest.mark.parametrize("banned", [torch.tensor([3]), torch.tensor([True, False] * 4)])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3, "top_p": 0.9}])
def test_the_smallest_temperature_draws_the_greedy_token_and_nothing_overflows(
    banned: torch.Tensor, filters: dict[str, Any]
):
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) * 1000
    u = torch.rand(64, generator=torch.Generator().manual_seed(2)).clamp(1e-6, 1 - 1e-6)
    greedy, cold = (
        draw(logits.clone(), Decoding(temperature=temperature, **filters), banned, u) for temperature in (0.0, 0.001)
    )
    assert torch.equal(cold.token, greedy.token)
    assert bool(cold.logp.isfinite().all())


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-38, 0.0009])
def test_a_temperature_at_which_logits_overflow_is_refused(temperature: float):
    with pytest.raises(InputError, match=r"decode\.temperature is .*; give a number from 0\.001 to 1000, or 0"):
        Decoding(temperature=temperature)
