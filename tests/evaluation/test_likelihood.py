import math
from itertools import combinations, permutations

import pytest
import torch

from dllm_sd.decoding.settings import Decoding
from dllm_sd.evaluation.likelihood import draw_masks, log_likelihoods, spans, written_greedily
from dllm_sd.network.view import View
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.randomness import make_key
from tests.tiers import later

PROMPT, ANSWER = [5, 9, 14, 6, 20], [7, 12, 4]
PAIRS = [
    (PROMPT, ANSWER),
    ([8, 4], [5, 6, 7, 8, 9, 10]),
    ([], [11, 6]),
    ([4] * 7, [13]),
    (PROMPT, []),
    ([6], [4, 4, 5]),
]
KEYS = [make_key("pair", i) for i in range(len(PAIRS))]


def log_probabilities(policy: MaskedDiffusion, prompt: list[int], answer: list[int], hidden: set[int]) -> list[float]:
    """What one plain forward over the whole text says about each answer token with ``hidden`` of them masked."""
    ids = torch.tensor([[*prompt, *(policy.mask_id if i in hidden else token for i, token in enumerate(answer))]])
    with torch.no_grad():
        logits = policy.site_logits(View(ids, torch.ones_like(ids).bool(), torch.ones_like(ids).bool()))
    return logits.log_softmax(-1)[range(len(prompt), len(prompt) + len(answer)), answer].tolist()


def over_masks(policy: MaskedDiffusion, prompt: list[int], answer: list[int]) -> float:
    """LLaDA's estimator in expectation: every number of hidden tokens, every set of that size."""
    size, total = len(answer), 0.0
    for count in range(1, size + 1):
        sets = list(combinations(range(size), count))
        for hidden in sets:
            found = log_probabilities(policy, prompt, answer, set(hidden))
            total += sum(found[i] for i in hidden) * size / count / len(sets) / size
    return total


def over_orders(policy: MaskedDiffusion, prompt: list[int], answer: list[int], block_length: int) -> float:
    """The mean over all orders, block by block, of the chain rule (later blocks masked: invisible to the model)."""
    blocks: dict[int, list[int]] = {}
    for i in range(len(answer)):
        blocks.setdefault((len(prompt) + i) // block_length, []).append(i)
    total = 0.0
    for positions in blocks.values():
        orders = list(permutations(positions))
        later = set(range(positions[-1] + 1, len(answer)))
        for order in orders:
            for known, i in enumerate(order):
                total += log_probabilities(policy, prompt, answer, later | set(order[known:]))[i] / len(orders)
    return total


@pytest.mark.parametrize("samples", [7, 128])
def test_the_likelihood_of_a_short_answer_is_the_exact_expectation(policy, samples):
    (ours,) = log_likelihoods(policy, [(PROMPT, ANSWER)], [1], samples=samples)
    assert ours == pytest.approx(over_masks(policy, PROMPT, ANSWER), abs=1e-9)
    assert ours == pytest.approx(over_orders(policy, PROMPT, ANSWER, 1000), abs=1e-9)


def test_one_token_has_the_probability_that_the_model_gives_it(policy):
    (ours,) = log_likelihoods(policy, [(PROMPT, [7])], [1])
    assert ours == pytest.approx(log_probabilities(policy, PROMPT, [7], {0})[0], abs=1e-12)


@pytest.mark.parametrize("samples", [3, *(pytest.param(samples, marks=pytest.mark.slow) for samples in (1, 6))])
def test_the_estimate_is_unbiased(policy, samples):
    keys = [make_key("trial", i) for i in range(200)]
    found = torch.tensor(log_likelihoods(policy, [(PROMPT, ANSWER)] * 200, keys, samples=samples, batch_size=256))
    error = float(found.std()) / math.sqrt(len(found))
    assert error > 0
    assert abs(float(found.mean()) - over_masks(policy, PROMPT, ANSWER)) < 4 * error


@pytest.mark.parametrize("samples", [5, *(pytest.param(samples, marks=pytest.mark.slow) for samples in (2, 6))])
def test_the_estimate_of_a_block_causal_model_is_unbiased_and_exact_where_masks_are_few(make_policy, samples):
    policy = make_policy(block_length=4)
    prompt, answer = [5, 9, 14, 6, 20], [7, 12, 4, 8, 8, 5, 11, 9]  # blocks of 3, 4 and 1 answer tokens
    right = over_orders(policy, prompt, answer, 4)
    (ours,) = log_likelihoods(policy, [(prompt, answer)], [3], samples=15)
    assert ours == pytest.approx(right, abs=1e-9)
    keys = [make_key("trial", i) for i in range(100)]
    found = torch.tensor(log_likelihoods(policy, [(prompt, answer)] * 100, keys, samples=samples, batch_size=256))
    assert abs(float(found.mean()) - right) < 4 * float(found.std()) / math.sqrt(len(found))


@pytest.mark.parametrize(("samples", "block_length"), [(2, None), (2, 4), *later((100, None), (100, 4))])
def test_neither_batch_nor_company_changes_a_likelihood(make_policy, samples, block_length):
    policy = make_policy(block_length=block_length)
    whole = log_likelihoods(policy, PAIRS, KEYS, samples=samples, batch_size=50)
    for size in (1, 3):
        assert log_likelihoods(policy, PAIRS, KEYS, samples=samples, batch_size=size) == pytest.approx(whole, abs=1e-9)
    alone = [log_likelihoods(policy, [pair], [key], samples=samples)[0] for pair, key in zip(PAIRS, KEYS, strict=True)]
    assert alone == pytest.approx(whole, abs=1e-9)
    assert whole[4] == 0.0


def test_more_samples_come_closer(policy):
    pair = ([8, 4], [5, 6, 7, 8, 9, 10, 11, 12])
    (right,) = log_likelihoods(policy, [pair], [0], samples=255)
    spread = []
    for samples in (4, 64):
        found = log_likelihoods(policy, [pair] * 40, range(40), samples=samples, batch_size=256)
        spread.append(sum((value - right) ** 2 for value in found))
    assert spread[1] < spread[0] / 4


@pytest.mark.parametrize(("length", "samples"), [(3, 7), (1, 5), *later((3, 6), (9, 40), (40, 16))])
def test_each_token_weighs_one_on_average(length, samples):
    total = torch.zeros(length, dtype=torch.float64)
    for trial in range(400):
        hidden, weight = draw_masks(length, samples, make_key("mask", trial))
        assert bool(hidden.any(1).all())
        assert len(torch.unique(hidden, dim=0)) == len(hidden)
        total += weight @ hidden.double() / 400
    assert float(total.mean()) == pytest.approx(1.0, abs=1e-9)
    assert float((total - 1).abs().max()) < 0.2


def test_guidance_moves_likelihoods_away_from_those_without_a_prompt(policy):
    def value(prompt: list[int], guidance: float) -> float:
        return log_likelihoods(policy, [(prompt, [7])], [1], guidance=guidance)[0]

    blank = [policy.mask_id] * len(PROMPT)
    ids = torch.tensor([[*PROMPT, policy.mask_id], [*blank, policy.mask_id]])
    sites = torch.zeros_like(ids).bool()
    sites[:, -1] = True
    with torch.no_grad():
        seen, unseen = policy.site_logits(View(ids, torch.ones_like(sites), sites))
    right = (unseen + 2.5 * (seen - unseen)).log_softmax(-1)[7]
    assert value(PROMPT, 1.5) == pytest.approx(float(right), abs=1e-9)
    assert value(PROMPT, 0.0) == pytest.approx(float(seen.log_softmax(-1)[7]), abs=1e-9)


@pytest.mark.parametrize("block_length", [4, *later(None)])
def test_what_the_sampler_writes_greedily_is_greedy_and_a_change_is_not(make_policy, block_length):
    policy = make_policy(block_length=block_length)
    prompts = [[5, 9, 14, 6], [7, 8, 4, 12, 20, 21, 6, 6], [4, 4, 13, 5]]
    settings = Decoding(length=8, block_length=block_length or 8, tokens_per_step=1, early_end=False)
    written = policy.decode(prompts, settings, [0] * 3).tokens.tolist()
    changed = [[*row[:i], 4 + (row[i] - 3) % 8, *row[i + 1 :]] for row, i in zip(written, (0, 7, 4), strict=True)]
    pairs = [*zip(prompts, written, strict=True), *zip(prompts, changed, strict=True), ([5], [])]
    for size in (1, 4, 50):
        assert written_greedily(policy, pairs, batch_size=size) == [True] * 3 + [False] * 3 + [True]


def test_the_parts_of_an_answer_are_the_blocks_of_the_model():
    assert spans(5, 3, None) == [range(5, 8)]
    assert spans(5, 8, 4) == [range(5, 8), range(8, 12), range(12, 13)]
    assert spans(0, 4, 4) == [range(0, 4)]
    assert spans(5, 0, None) == spans(5, 0, 4) == spans(4, 0, 4) == []
