"""What a writer is asked for, how it is to draw its words, and what comes back."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dllm_sd.errors import InputError


@dataclass(frozen=True)
class Request:
    """One text to be written."""

    messages: tuple[Mapping[str, str], ...]
    """The chat so far, each message with ``role`` and ``content``."""
    key: int
    """Seeds the randomness of this text, whatever is asked beside it (`dllm_sd.randomness`)."""


@dataclass(frozen=True)
class Sampling:
    """How a writer draws its words."""

    length: int = 1024
    """Longest text, in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Probability mass that is drawn from; 1 is all of it."""
    thinking: bool | None = None
    """The thinking switch of chat templates that have one; None leaves it to the writer."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise InputError("a writer's length is the longest text in tokens; give at least 1")
        if not 0 <= self.temperature < math.inf:
            raise InputError("a writer's temperature must be a finite number; give at least 0")
        if not 0 < self.top_p <= 1:
            raise InputError("a writer's top_p is a share of the probability; give a number above 0, at most 1")


@dataclass(frozen=True)
class Written:
    """A text, or in a word why there is none, for the caller to count."""

    text: str | None
    """As it was written, thinking included; None where there is a `failure`."""
    failure: str | None
    """Such as ``timeout``, ``no_text`` or ``http_503``; None where there is a text."""
    cached: bool = False
    """Whether the text was read from the disk."""
