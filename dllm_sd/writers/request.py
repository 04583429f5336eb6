"""What a writer is asked for, how it is to draw its words, and what comes back."""

from collections.abc import Mapping
from dataclasses import dataclass

from dllm_sd.ranges import Natural, PositiveShare, Ranged, Size, Temperature


@dataclass(frozen=True)
class Request:
    """One text to be written."""

    messages: tuple[Mapping[str, str], ...]
    """The chat so far, each message with ``role`` and ``content``."""
    key: int
    """Seeds the randomness of this text, whatever is asked beside it (`dllm_sd.randomness`)."""


@dataclass(frozen=True)
class Sampling(Ranged):
    """How a writer draws its words."""

    length: Size = 1024
    """Longest text, in tokens."""
    temperature: Temperature = 0.0
    """0 takes the likeliest token each time."""
    top_p: PositiveShare = 1.0
    """Probability mass that is drawn from; 1 is all of it."""
    top_k: Natural = 0
    """Likeliest tokens that are drawn from; 0 is all of them. Servers read it that know it (vLLM, SGLang)."""
    thinking: bool | None = None
    """The thinking switch of chat templates that have one; None leaves it to the writer."""


@dataclass(frozen=True)
class Written:
    """A text, or in a word why there is none, for the caller to count."""

    text: str | None
    """As it was written, thinking included; None where there is a `failure`."""
    failure: str | None
    """Such as ``timeout``, ``no_text`` or ``http_503``; None where there is a text."""
    cached: bool = False
    """Whether the text was read from the disk."""
