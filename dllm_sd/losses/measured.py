"""The protocol of a divergence: its value, its value before the clip, and what it reads.

Axes: ``m`` graded sites, ``t`` targets, ``u`` support, ``v`` vocabulary.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dllm_sd.losses.roles import AllTeachers, Role
from dllm_sd.parts import Part


class Measured(NamedTuple):
    """A divergence with and without its clip."""

    value: Tensor
    """``[t m]``, with the part's clip applied, with gradient."""
    unclipped: Tensor
    """``[t m]``, before any clip, detached."""


class Divergence(Part, Protocol):
    """Protocol of a divergence; `DivergenceDefaults` implements all but `entries` and the call."""

    @property
    def reads_target(self) -> bool:
        """Whether it compares the student with the targets; False for the likelihood of the drawn token."""
        ...

    @property
    def reads_drawn_token(self) -> bool:
        """Whether it looks up the drawn token by its vocabulary id, so that the support must be full."""
        ...

    @property
    def reads_rollout_policy(self) -> bool:
        """Whether it reads one teacher and, as a second target, the policy that made the rollouts."""
        ...

    @property
    def judges_each_teacher(self) -> bool:
        """Whether it reads one token of each teacher, so that the targets must be the teachers themselves."""
        ...

    @property
    def least_at_target(self) -> bool:
        """Whether it is smallest where the student equals the target, so that it holds the student near any target."""
        ...

    @property
    def gap_entries(self) -> int | None:
        """For a part that judges each teacher: the target entries that its gap is computed on; None for all of them."""
        ...

    @property
    def needs_unnormalised(self) -> bool:
        """Whether a partial support must keep the log-probabilities without renormalising them."""
        ...

    def roles(self, contexts: int, passes: int) -> tuple[Role, ...]:
        """The role of each context (`AllTeachers.roles`)."""
        ...

    def tensors_held(self, contexts: int) -> int:
        """Tensors ``[m v]`` that loss and gradient hold at once on the full vocabulary, its inputs among them."""
        ...

    def measure(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Measured:
        """``[m u], [t m u], [m] -> [t m]`` each."""
        ...

    def __call__(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m]``, with the part's clip applied."""
        ...

    def entries(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m u]``: the summands before any clip."""
        ...


class DivergenceDefaults(AllTeachers, ABC):
    """Defaults of a divergence between student and each target, on any support that returns distributions."""

    reads_target: bool = True
    reads_rollout_policy: bool = False
    judges_each_teacher: bool = False

    @property
    def reads_drawn_token(self) -> bool:
        """False: it reads distributions."""
        return False

    @property
    def least_at_target(self) -> bool:
        """True, as for every divergence."""
        return True

    @property
    def gap_entries(self) -> int | None:
        """None: it reads no gap."""
        return None

    @property
    def needs_unnormalised(self) -> bool:
        """False: it compares distributions."""
        return False

    def tensors_held(self, contexts: int) -> int:
        """The tensors that autograd holds for a Kullback-Leibler divergence."""
        return 3 + 4 * contexts

    def measure(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Measured:
        """``[m u], [t m u], [m] -> [t m]`` each, from the value and the summands."""
        value = self(student_logp, target_logp, token)
        with torch.no_grad():
            return Measured(value, self.entries(student_logp, target_logp, token).sum(-1))

    @abstractmethod
    def __call__(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m]``, with the part's clip applied."""

    @abstractmethod
    def entries(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m u]``: the summands before any clip."""


def clipped_share(unclipped: float, clipped: float) -> float:
    """The share of the divergence that the clip removes, from the sums over all sites before and after the clip.

    A clip per vocabulary entry lowers positive summands only, so the clipped sum can be negative and the share above 1.
    The clip of a policy gradient's importance ratio can raise the surrogate, and then the share is negative. NaN if the
    unclipped sum is 0 and the clipped one is not.
    """
    removed = unclipped - clipped
    if not removed:
        return 0.0
    return removed / unclipped if unclipped else math.nan
