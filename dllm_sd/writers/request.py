"""The request to a writer, its sampling parameters, and the response."""

from collections.abc import Mapping
from dataclasses import dataclass

from dllm_sd.ranges import Natural, PositiveShare, Ranged, Size, Temperature


@dataclass(frozen=True)
class Request:
    """A request for one text."""

    messages: tuple[Mapping[str, str], ...]
    """The chat so far, each message with ``role`` and ``content``."""
    key: int
    """Random key of this text, independent of the remaining requests of a batch (`dllm_sd.randomness`)."""


@dataclass(frozen=True)
class Sampling(Ranged):
    """The sampling parameters of a writer."""

    length: Size = 1024
    """Most tokens of a text."""
    temperature: Temperature = 0.0
    """Sampling temperature; 0 is greedy."""
    top_p: PositiveShare = 1.0
    """Nucleus sampling: probability mass of the tokens that may be drawn; 1 turns it off."""
    top_k: Natural = 0
    """Number of the most likely tokens that may be drawn; 0 turns it off. Of servers, vLLM and SGLang support it."""
    thinking: bool | None = None
    """The thinking switch of chat templates that have one; None keeps the default of the writer."""


@dataclass(frozen=True)
class Written:
    """A text, or a failure in one word, which the caller counts."""

    text: str | None
    """The text, thinking included; None after a `failure`."""
    failure: str | None
    """The reason without a text, such as ``timeout``, ``no_text`` or ``http_503``; otherwise None."""
    cached: bool = False
    """Whether the text was read from the cache."""
