"""Choices of the makers of data, each a function of its draws alone."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from dllm_sd.tasks.sources import Draws

T = TypeVar("T")


def one_of(things: Sequence[T], draws: Draws) -> T:
    """One of the things at random."""
    return things[draws.below(len(things))]


def by_share(shares: Mapping[str, int], draws: Draws) -> str:
    """One of the names at random, each in proportion to its share."""
    drawn = draws.below(sum(shares.values()))
    for name, share in shares.items():
        if drawn < share:
            return name
        drawn -= share
    raise AssertionError("the shares add up to more than was drawn")
