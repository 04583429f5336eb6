"""Servers of the shipped models, one of each for all tests that change nothing in it."""

from collections.abc import Iterator
from typing import Any

import pytest

from dllm_sd.decoding.settings import Decoding
from dllm_sd.policies.loading import AnyPolicy, build_policy
from dllm_sd.pretrained.model import Model
from dllm_sd.serving.service import Limits, Service

DECODE = Decoding(length=16, block_length=4, tokens_per_step=2, temperature=1.0, batch_size=8)
LIMITS = Limits(prompt=64, completion=512, waiting=64, body=2**16)


def service_of(policy: AnyPolicy, model: Model, name: str = "tiny", **options: Any) -> Service:
    """A policy as it is served in tests."""
    return Service(policy, model, **{"decode": DECODE, "limits": LIMITS, "name": name, **options})


def start(model: Model, **options: Any) -> Iterator[Any]:
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    from tests.serving.served import serving

    with serving(service_of(build_policy(model), model, **options)) as served:
        yield served


@pytest.fixture(scope="package")
def diffusion() -> Iterator[Any]:
    """A served diffusion model."""
    yield from start(Model(path="tiny"))


@pytest.fixture(scope="package")
def causal() -> Iterator[Any]:
    """A served autoregressive model."""
    yield from start(Model(path="tiny_ar"), name="tiny_ar")
