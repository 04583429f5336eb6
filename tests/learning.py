"""Whoever trains learns: a test fails if all updates that it made were skipped, unless it says that it expects this.

Two runs without a step are equal whatever is broken, so that a comparison of them proves nothing.
"""

from collections.abc import Generator
from typing import Any

import pytest

from dllm_sd.training.trainer import Trainer

losses: list[float | None] = []
"""Of the updates that this process made since the last test began, in runs of any kind."""
_update = Trainer._update


def noted(self: Trainer, update: int) -> dict[str, Any]:
    """An update, whose loss is written down."""
    metrics = _update(self, update)
    losses.append(metrics["loss"])
    return metrics


Trainer._update = noted


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, Any, Any]:
    """A test begins, and what its fixtures train is its own."""
    losses.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """After a test that passed: something was learnt, or it has the marker `learns_nothing`."""
    done = yield
    if losses and item.get_closest_marker("learns_nothing") is None:
        assert any(loss is not None for loss in losses), f"none of the {len(losses)} updates of this test took a step"
    return done
