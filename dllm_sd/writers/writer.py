"""What all writers offer, be they a model's weights or a server."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dllm_sd.writers.cache import Cache
from dllm_sd.writers.request import Request, Sampling, Written


class Writer(Protocol):
    """Writes texts, such as hints, for chats."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Plain JSON that says whose texts these are, such as a server's address and model; part of the cache's key."""
        ...

    def write(self, requests: Sequence[Request], sampling: Sampling, cache: Cache | None = None) -> list[Written]:
        """One text, or the reason why there is none, for each request, in the order of the requests.

        What the cache holds is not asked again, equal requests are asked once, and a failure is never an exception.

        Raises:
            InputError: if no request can succeed before the configuration is mended.
        """
        ...
