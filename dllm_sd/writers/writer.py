"""The protocol of writers, which a model's weights and a server both implement."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dllm_sd.writers.cache import Cache
from dllm_sd.writers.request import Request, Sampling, Written


class Writer(Protocol):
    """Writes texts, such as hints, from chats."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Plain JSON that identifies the source of the texts, such as URL and model; part of the cache key."""
        ...

    def write(self, requests: Sequence[Request], sampling: Sampling, cache: Cache | None = None) -> list[Written]:
        """Return a text, or the reason why there is none, for each request, in the order of the requests.

        Cached texts are not requested again, equal requests are sent once, and a failure of the writer is not an
        exception.

        Raises:
            InputError: if no request can succeed until the configuration is changed.
        """
        ...
