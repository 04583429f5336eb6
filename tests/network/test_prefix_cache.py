"""Block-causal decoding: the mask, the prefix cache, and both against a plain decoder of one row at a time."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from dllm_sd import load_policy
from dllm_sd.decoding.settings import Decoding
from dllm_sd.network.prefix_cache import block_causal
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.randomness import make_key
from dllm_sd.trajectory import NEVER, Trajectory, left_pad
from tests.oracles.block_decoding import decode_blocks, naive_block_mask, network_logits
from tests.oracles.fixtures import checkpoints
from tests.tiers import later

LENGTHS = [1, 3, 4, 6, 8, 9, 10]  # shorter than a block, whole blocks, with a remainder
RNG = random.Random(0)
PROMPTS = [[RNG.randrange(4, 24) for _ in range(length)] for length in LENGTHS]
KEYS = [make_key("cache", i) for i in range(len(PROMPTS))]
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one token a step": (4, {}),
    "three tokens a step": (4, {"tokens_per_step": 3}),
    "low threshold": (4, {"threshold": 0.2}),
    "high threshold": (4, {"threshold": 0.7}),
    "no early end": (4, {"early_end": False}),
    "blocks of five": (5, {"length": 15}),
    "blocks of five, three tokens a step, no early end": (5, {"length": 15, "tokens_per_step": 3, "early_end": False}),
    "blocks of one": (1, {}),
    "blocks as long as the canvas": (12, {"tokens_per_step": 3}),
}
QUICK = ("three tokens a step", "low threshold", "blocks of five", "blocks of one")
ENDS = (1, 5, 9, 13)  # several, so that a random model ends some rows


def settings_of(block_length: int, changes: dict[str, Any]) -> Decoding:
    return Decoding(**{"length": 12, "block_length": block_length, "tokens_per_step": 1, **changes})


@pytest.fixture(scope="module")
def policies(make_policy: Any) -> dict[int, MaskedDiffusion]:
    """Random policies by block length; the same weights."""
    found = {length: make_policy(block_length=length) for length in {length for length, _ in CASES.values()}}
    for policy in found.values():
        policy.end_ids = ENDS
    return found


@contextmanager
def recorded(policy: MaskedDiffusion) -> Iterator[list[Tensor]]:
    """The logits of every decoding step; reading what is only to be remembered has none."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, logits: Tensor) -> None:
        seen.append(logits.clone())  # who draws from them overwrites them

    hook = policy.module.network.get_output_embeddings().register_forward_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


def both(
    policy: MaskedDiffusion, settings: Decoding, prompts: list[list[int]] = PROMPTS, keys: list[int] = KEYS
) -> tuple[Trajectory, Trajectory, float]:
    """The decoding with and without the cache, and by how much their logits differ at most."""
    with recorded(policy) as with_cache:
        cached = policy.decode(prompts, replace(settings, prefix_cache=True), keys)
    with recorded(policy) as without:
        plain = policy.decode(prompts, replace(settings, prefix_cache=False), keys)
    gap = max(float((a - b).abs().max()) for a, b in zip(with_cache, without, strict=True))
    return cached, plain, gap


def assert_same(ours: Trajectory, theirs: Trajectory) -> None:
    for name in ("tokens", "reveal_step", "length"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def assert_as_the_plain_decoder(policy: MaskedDiffusion, settings: Decoding, ours: Trajectory) -> None:
    assert policy.block_length
    logits = network_logits(policy.module.model, policy.block_length)
    for row, prompt in enumerate(PROMPTS):
        tokens, reveal = decode_blocks(
            logits,
            prompt,
            length=settings.length,
            block_length=settings.block_length,
            mask_id=policy.mask_id,
            end_ids=policy.end_ids if settings.early_end else (),
            banned=policy.suppress,
            tokens_per_step=settings.tokens_per_step,
            threshold=settings.threshold,
        )
        assert ours.tokens[row].tolist() == [policy.pad_id if token is None else token for token in tokens], row
        assert ours.reveal_step[row].tolist() == [NEVER if step is None else step for step in reveal], row


@pytest.mark.parametrize("block_length", [1, 3, 4, 20])
def test_a_position_sees_its_own_and_earlier_blocks_and_no_padding(block_length: int):
    _, mask = left_pad(PROMPTS, 0)
    seen = block_causal((mask.long().cumsum(1) - 1).clamp(min=0), mask, block_length)
    width = mask.shape[1]
    for row, length in enumerate(LENGTHS):
        start = width - length
        assert seen[row, 0, start:, start:].tolist() == naive_block_mask(length, block_length)
        assert not seen[row, 0, start:, :start].any()
        assert seen[row, 0].any(1).all()  # a softmax over nothing is not a number


@pytest.mark.parametrize("name", [*QUICK, *later(*(name for name in CASES if name not in QUICK))])
def test_the_cache_changes_neither_logits_nor_tokens_nor_steps(policies: dict[int, MaskedDiffusion], name: str):
    block_length, changes = CASES[name]
    settings = settings_of(block_length, changes)
    cached, plain, gap = both(policies[block_length], settings)
    assert_same(cached, plain)
    assert gap < 1e-12
    if settings.early_end:
        assert bool((plain.reveal_step == NEVER).any())


@pytest.mark.parametrize("name", [*QUICK, *later(*(name for name in CASES if name not in QUICK))])
def test_decoding_equals_the_plain_decoder_of_one_row_at_a_time(policies: dict[int, MaskedDiffusion], name: str):
    block_length, changes = CASES[name]
    policy, settings = policies[block_length], settings_of(block_length, changes)
    assert_as_the_plain_decoder(policy, settings, policy.decode(PROMPTS, settings, KEYS))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"temperature": 0.9}, {"temperature": 0.9, "threshold": 0.3}], ids=repr)
def test_a_row_depends_neither_on_its_batch_nor_on_its_place_in_it(policies: dict[int, MaskedDiffusion], changes: Any):
    policy, settings = policies[4], settings_of(4, changes)
    together = policy.decode(PROMPTS, settings, KEYS)
    for batch_size in (1, 2):  # two slots, which the next prompts take over
        assert_same(policy.decode(PROMPTS, replace(settings, batch_size=batch_size), KEYS), together)
    turned = policy.decode(PROMPTS[::-1], settings, KEYS[::-1])
    assert_same(turned.select(torch.arange(len(PROMPTS)).flip(0)), together)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_cache_is_exact_in_float32(make_policy: Any, attention: str):
    policy = make_policy(block_length=4, dtype="float32", attention=attention)
    for changes in ({}, {"temperature": 1.0, "tokens_per_step": 3}):
        cached, plain, gap = both(policy, settings_of(4, changes))
        assert_same(cached, plain)
        assert 0 < gap < 1e-5


def test_guidance_reads_the_whole_canvas_with_and_without_the_cache(policies: dict[int, MaskedDiffusion]):
    cached, plain, gap = both(policies[4], settings_of(4, {"guidance": 1.5}))
    assert_same(cached, plain)
    assert gap == 0


def test_nothing_is_cached_where_logits_speak_about_the_next_position(make_policy: Any):
    policy = make_policy(block_length=4)
    policy.module.shift = True  # the first logits of a block stand in the block before it
    cached, plain, gap = both(policy, settings_of(4, {}))
    assert_same(cached, plain)
    assert gap == 0


def test_a_step_reads_the_active_block_only_and_a_finished_block_once(policies: dict[int, MaskedDiffusion]):
    policy, width = policies[4], []

    def note(module: nn.Module, args: Any, out: Any) -> None:
        width.append((args[0].shape[1], out is not None))

    hook = policy.module.register_forward_hook(note)
    policy.decode(PROMPTS[5:6], settings_of(4, {"early_end": False}), KEYS[5:6])  # 9 tokens: 2 blocks and 1 more
    hook.remove()
    steps = [(4, True)]
    assert width == [(8, False), *steps * 3, (4, False), *steps * 4, (4, False), *steps * 4, (4, False), *steps]


PUBLISHED = ("sdar", "dream")
"""Architectures of the first tier: one that decodes in blocks, and one whose logits speak about the next position."""


@pytest.mark.fixture
@pytest.mark.parametrize(
    "folder",
    [pytest.param(one, id=one.name, marks=() if one.name in PUBLISHED else pytest.mark.slow) for one in checkpoints()],
)
def test_a_published_architecture_decodes_like_the_plain_decoder(folder: Path):
    disable_progress_bar()
    facts = json.loads((folder / "fixture.json").read_text(encoding="utf-8"))
    block_length = facts["block_length"] or facts.get("block_length_of_expected_block_nopad")
    if block_length is None:
        pytest.skip("has no blocks")
    policy = load_policy(str(folder / "single"), block_length=block_length, mask_token=facts["mask_token_id"])
    assert isinstance(policy, MaskedDiffusion)
    for changes in ({}, {"threshold": 0.05}, {"tokens_per_step": 3, "early_end": False}):
        settings = settings_of(block_length, {"length": 2 * block_length, **changes})
        cached, plain, gap = both(policy, settings)
        assert_same(cached, plain)
        assert gap < facts["atol"]
        assert_as_the_plain_decoder(policy, settings, cached)
