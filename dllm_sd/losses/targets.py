"""Targets: how the teachers' distributions become what the student is pulled towards.

A target is called as ``target(teacher_logp [c m u]) -> [t m u]``, log-probabilities in and out.
``t = 1`` merges *distributions*; ``t = c`` keeps them apart, and the trust merges *values*.

How further targets fit, without a change anywhere else:

- *Purified PMI* (arXiv 2607.02234): contexts in the order informed, reference only, plain (``c = 3``);
  ``log_softmax(plain + bound tanh(centred(informed - reference_only) / bound) / beta)``, ``t = 1``.
  The mean that centres runs over the vocabulary, so its support is ``full``.
- *Disagreement barycenter* (DemoPSD, arXiv 2607.02502): contexts informed, plain (``c = 2``);
  ``log_softmax((1 - alpha) informed + alpha plain)`` with ``alpha [m 1]`` from ``jsd_entries(informed, plain)``,
  ``t = 1``; it works on any support.

Axes: ``m`` graded sites, ``c`` teacher contexts, ``t`` targets, ``u`` support.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dllm_sd.errors import InputError


class Target(Protocol):
    """What the objective calls."""

    def __call__(self, teacher_logp: Tensor) -> Tensor:
        """``[c m u] -> [t m u]``."""
        ...


@dataclass(frozen=True)
class Plain:
    """The one teacher's distribution, unchanged: ``c = t = 1``."""

    def __call__(self, teacher_logp: Tensor) -> Tensor:
        """``[1 m u] -> [1 m u]``."""
        if len(teacher_logp) != 1:
            raise InputError(
                f"target 'plain' needs exactly one teacher context and got {len(teacher_logp)}: "
                "keep one context, or choose the target 'each' (several) or 'sampled' (none)."
            )
        return teacher_logp


@dataclass(frozen=True)
class Each:
    """Every teacher's distribution is a target of its own: ``t = c``."""

    def __call__(self, teacher_logp: Tensor) -> Tensor:
        """``[c m u] -> [c m u]``, ``c >= 1``."""
        if len(teacher_logp) == 0:
            raise InputError("target 'each' needs at least one teacher context: add one, or choose 'sampled'.")
        return teacher_logp


@dataclass(frozen=True)
class Sampled:
    """The sampled token itself, for likelihood losses such as ``token_nll``.

    No teacher distribution is needed. Those that are there (a reference or the rollouts' policy) are handed on to
    the trust: ``t = c >= 0``.
    """

    def __call__(self, teacher_logp: Tensor) -> Tensor:
        """``[c m u] -> [c m u]``, unchanged."""
        return teacher_logp


TARGETS: dict[str, type] = {"plain": Plain, "each": Each, "sampled": Sampled}
