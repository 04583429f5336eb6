"""The double of vLLM that the tests of a file share."""

from collections.abc import Iterator

import pytest

from tests.engines.double import Double


@pytest.fixture(scope="module")
def shared() -> Iterator[Double]:
    double = Double()
    yield double
    double.stop()


@pytest.fixture
def double(shared: Double) -> Iterator[Double]:
    """The shared double, which serves as it should before and after the test."""
    shared.seen.clear()
    yield shared
    shared.behave()
