"""What the objective asks of a divergence: its value, and the same before the clip, in one evaluation.

Axes: ``m`` graded sites, ``t`` targets, ``u`` support, ``v`` vocabulary.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Measured(NamedTuple):
    """A divergence with and without its clip."""

    value: Tensor
    """``[t m]``, with the part's clip applied, with gradient."""
    unclipped: Tensor
    """``[t m]``, before any clip, detached."""


class Divergence(Protocol):
    """What a divergence must have."""

    def __call__(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m]``, with the part's clip applied."""
        ...

    def entries(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m u]``: the summands before any clip."""
        ...


@runtime_checkable
class SelfMeasuring(Divergence, Protocol):
    """A divergence that computes its values with and without the clip in one go."""

    def measure(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Measured:
        """``[m u], [t m u], [m] -> [t m]`` each."""
        ...


def measure(divergence: Divergence, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Measured:
    """``[m u], [t m u], [m] -> [t m]`` each, in one go where the divergence can, else from value and summands."""
    if isinstance(divergence, SelfMeasuring):
        return divergence.measure(student_logp, target_logp, token)
    value = divergence(student_logp, target_logp, token)
    with torch.no_grad():
        return Measured(value, divergence.entries(student_logp, target_logp, token).sum(-1))
