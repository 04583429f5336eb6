"""Servers that run for one test."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.writers.service import Service, running


@pytest.fixture
def make_service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Service]]:
    """Starts servers; the environment has no proxy and no secret."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ExitStack() as stack:
        yield lambda: stack.enter_context(running(Service()))


@pytest.fixture
def service(make_service: Callable[[], Service]) -> Service:
    """One server."""
    return make_service()
