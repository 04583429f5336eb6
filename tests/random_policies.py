"""Shared by all tests: tiny random policies in float64, and trajectories of a denoiser that knows nothing."""

import io
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dllm_sd.decoding.settings import Decoding
from dllm_sd.policies.loading import AnyPolicy, build_policy
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.pretrained.model import Model, Shape
from dllm_sd.randomness import make_key
from dllm_sd.trajectory import Trajectory
from tests import exact  # noqa: F401
from tests.oracles.toy_denoiser import denoised

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

SHAPE = Shape(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.2)


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """All that is logged during a test; pytest's own `caplog` would cost every test a millisecond."""
    text, level = io.StringIO(), logging.root.level
    handler = logging.StreamHandler(text)
    logging.root.addHandler(handler)
    logging.root.setLevel(logging.NOTSET)
    yield text
    logging.root.removeHandler(handler)
    logging.root.setLevel(level)


@pytest.fixture(scope="session")
def policy_shape() -> Shape:
    """The shape of the random policies."""
    return SHAPE


@pytest.fixture(scope="session")
def make_policy() -> Callable[..., Any]:
    """Builds a random policy in float64, a denoiser or as asked for.

    Large initial weights make it confident here and unsure there.
    """

    def build(**options: Any) -> AnyPolicy:
        options = {"shape": SHAPE, "dtype": "float64"} | options
        return build_policy(Model(random_init=True, tokenizer="tiny", **options))

    return build


@pytest.fixture(scope="session")
def policy(make_policy: Callable[..., Any]) -> MaskedDiffusion:
    """One random policy for all tests that change nothing in it."""
    return make_policy()


@pytest.fixture(scope="session")
def noise() -> Callable[..., Trajectory]:
    """Decodes ``b`` prompts with a denoiser that gives every token the same probability, the end token included.

    Mask 11, end 10, padding 9; tokens 0 to 10 are drawn; positions are committed in random order.
    """

    def decode(
        b: int = 6, seed: int = 0, early_end: bool = True, blocks_of_prompt: bool = False, **settings: Any
    ) -> Trajectory:
        rng = random.Random(seed)
        prompts = [[rng.randrange(9) for _ in range(rng.randrange(1, 6))] for _ in range(b)]
        settings = {"length": 24, "block_length": 8, "temperature": 1.0, "order": "random"} | settings
        return denoised(
            lambda view: torch.zeros(int(view.sites.sum()), 12),
            prompts,
            Decoding(early_end=early_end, **settings),
            [make_key("noise", seed, row) for row in range(b)],
            mask_id=11,
            end_ids=(10,),
            pad_id=9,
            blocks_of_prompt=blocks_of_prompt,
        )

    return decode
