"""Observers of the loss: they are shown what the equation computes, and change nothing.

Axes: ``n`` canvases, ``l`` completion, ``i`` sites of a chunk, ``c`` contexts, ``t`` targets, ``u`` support,
``v`` vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What the equation computes at a chunk of sites, before any sum, without gradient."""

    rows: slice
    """The chunk, of the sites in their order."""
    token: Tensor
    """int64 ``[i]``: the token of the rollout."""
    student_logp: Tensor
    """``[i v]``."""
    teacher_logp: Tensor
    """``[c i v]``."""
    student_u: Tensor
    """``[i u]``: the student on the support."""
    teacher_u: Tensor
    """``[c i u]``: the teachers on the support."""
    target: Tensor
    """``[t i u]``."""
    value: Tensor
    """``[t i]``: the divergence before the clip."""
    clipped: Tensor
    """``[t i]``: after it."""
    trust: Tensor
    """``[t i]``: the factor of each divergence, the weights of rollout and context included."""


class Observer(Protocol):
    """Observes the sites of a micro-batch."""

    def begin(self, sites: Tensor) -> None:
        """Learn where the micro-batch is graded, bool ``[n l]``; called once, before the first chunk."""
        ...

    def record(self, seen: Seen) -> None:
        """See a chunk; called once for each, in order, without gradient."""
        ...
