"""Servers that run for one test."""

from collections.abc import Callable, Iterator
from threading import Thread

import pytest

from tests.writers.service import Service


@pytest.fixture
def make_service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Service]]:
    """Starts servers; the environment has no proxy and no secret."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running: list[tuple[Service, Thread]] = []

    def start() -> Service:
        service = Service()
        thread = Thread(target=service.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        running.append((service, thread))
        return service

    yield start
    for service, thread in running:
        service.released.set()
        service.shutdown()
        thread.join()
        service.server_close()


@pytest.fixture
def service(make_service: Callable[[], Service]) -> Service:
    """One server."""
    return make_service()
