"""What the objective asks of a divergence: its value, and what is logged about it, in one evaluation.

Axes: ``m`` graded sites, ``t`` targets, ``u`` support, ``v`` vocabulary.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Measured(NamedTuple):
    """A divergence and what is logged about it."""

    value: Tensor
    """``[t m]``, with the part's clip applied, with gradient."""
    unclipped: Tensor
    """``[t m]``, detached."""
    clip_share: Tensor
    """``[t m]``, detached: the share of each site's summands (or of its one sum) that the clip cuts."""


class Divergence(Protocol):
    """What the objective calls."""

    def measure(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Measured:
        """``[m u], [t m u], [m] -> [t m]`` each; the summands are computed once."""
        ...

    def __call__(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m]``, with the part's clip applied."""
        ...

    def entries(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m u]``: the summands before any clip."""
        ...

    def clip_share(self, entries: Tensor) -> Tensor:
        """``[t m u] -> [t m]``: the share of each site's summands (or of its one sum) that the clip cuts."""
        ...


def unclipped(value: Tensor) -> Measured:
    """A divergence ``[t m]`` without a clip."""
    return Measured(value, value.detach(), torch.zeros_like(value.detach()))
