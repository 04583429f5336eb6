"""Targets: how the distributions of the teachers become the distributions that the student is to match.

A target is called as ``target(teacher_logp [c m u]) -> [t m u]``, log-probabilities in and out. ``t = 1`` merges
*distributions*; ``t = c`` keeps them apart, and the trust merges *values*. ``target.measures(teacher_logp) -> {name:
[m]}`` gives what is logged about the merging at each site.

Axes: ``m`` graded sites, ``c`` teacher contexts, ``t`` targets, ``u`` support, ``v`` vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from einops import rearrange
from torch import Tensor

from dllm_sd.errors import InputError
from dllm_sd.losses.divergences import jsd_entries, kl_entries
from dllm_sd.losses.numerics import floor_logp
from dllm_sd.parts import Part
from dllm_sd.ranges import Positive, Range, Ranged, Share


class Target(Part, Protocol):
    """Protocol of a target; `TargetDefaults` implements all but `contexts`, `keeps_contexts` and the call."""

    @property
    def contexts(self) -> int | None:
        """How many teacher contexts are needed, None where the number is free."""
        ...

    @property
    def keeps_contexts(self) -> bool:
        """Whether target ``t`` is made of context ``c`` alone, so that a context's weight is its target's weight."""
        ...

    @property
    def asks_teachers(self) -> bool:
        """Whether it is computed from the distributions of teachers; False where the drawn token itself is the
        target."""
        ...

    @property
    def needs_full_vocabulary(self) -> bool:
        """Whether it takes a mean over the whole vocabulary, so that the support must be full."""
        ...

    @property
    def measured(self) -> tuple[str, ...]:
        """The names of `measures`."""
        ...

    def __call__(self, teacher_logp: Tensor) -> Tensor:
        """``[c m u] -> [t m u]``."""
        ...

    def measures(self, teacher_logp: Tensor) -> dict[str, Tensor]:
        """``[c m u] -> {name: [m]}``: what is logged about each site."""
        ...


class TargetDefaults:
    """Defaults of a target that is made of teachers' distributions, works on any support and logs nothing."""

    asks_teachers: bool = True
    needs_full_vocabulary: bool = False
    measured: tuple[str, ...] = ()

    def measures(self, teacher_logp: Tensor) -> dict[str, Tensor]:
        """No measures."""
        return {}


@dataclass(frozen=True)
class Plain(TargetDefaults):
    """The distribution of the only teacher, unchanged: ``c = t = 1``."""

    contexts = 1
    keeps_contexts = True

    def __call__(self, teacher_logp: Tensor) -> Tensor:
        """``[1 m u] -> [1 m u]``."""
        if len(teacher_logp) != 1:
            raise InputError(
                f"target 'plain' needs exactly one teacher context and got {len(teacher_logp)}: "
                "keep one context, or choose the target 'each' (several) or 'sampled' (none)."
            )
        return teacher_logp


@dataclass(frozen=True)
class Each(TargetDefaults):
    """Each teacher's distribution is a separate target: ``t = c``."""

    contexts = None
    keeps_contexts = True

    def __call__(self, teacher_logp: Tensor) -> Tensor:
        """``[c m u] -> [c m u]``, ``c >= 1``."""
        if len(teacher_logp) == 0:
            raise InputError("target 'each' needs at least one teacher context: add one, or choose 'sampled'.")
        return teacher_logp


@dataclass(frozen=True)
class Sampled(TargetDefaults):
    """The sampled token itself, for likelihood losses such as ``token_nll``.

    No teacher distribution is needed. Those of other policies (the reference policy, the policy that made the
    rollouts) are passed on to the trust: ``t = c >= 0``.
    """

    contexts = None
    keeps_contexts = False
    asks_teachers = False

    def __call__(self, teacher_logp: Tensor) -> Tensor:
        """``[c m u] -> [c m u]``, unchanged."""
        return teacher_logp


@dataclass(frozen=True)
class PurifiedPMI(Ranged, TargetDefaults, key="method.target"):
    """The plain base distribution, shifted by what the question adds to the reference: ``c = 3``, ``t = 1``.

    ``softmax(log plain + D / beta)`` with ``D = bound tanh(centred(log informed - log reference_only) / bound)``.
    The contexts come in the order informed (question and reference), reference only, plain (question only). What the
    reference says without the question cancels. Source: Purified OPSD (arXiv 2607.02234), equations 13 to 17.

    Where only one of the two gives an entry the probability 0, the log-ratio is about 10000 and moves the unweighted
    mean by 10000 / v.

    Fields:
        beta: the divisor of the shift; the larger it is, the closer the target stays to the plain base.
        bound: the paper's c, the largest size of ``D``; None for no tanh (then centring changes nothing).
        centre: the mean that is subtracted: ``uniform`` over the vocabulary (paper, so the support is ``full``), or
            weighted by the plain ``base``'s probability (not in the paper: then the many improbable entries do not
            dominate the mean).
    """

    beta: Positive = 1.0
    bound: Positive | None = 10.0
    centre: Literal["uniform", "base"] = "uniform"
    contexts = 3
    keeps_contexts = False
    needs_full_vocabulary = True
    measured = ("target/shift", "target/bound_share")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.centre not in ("uniform", "base"):
            raise InputError(f"target.centre is {self.centre!r}: choose 'uniform' or 'base'.")

    def __call__(self, teacher_logp: Tensor) -> Tensor:
        """``[3 m v] -> [1 m v]``, detached."""
        shift = self.bounded(self.centred(teacher_logp)) / self.beta
        plain = floor_logp(teacher_logp[-1]).detach()
        return rearrange((plain + shift).log_softmax(-1), "m v -> 1 m v")

    def centred(self, teacher_logp: Tensor) -> Tensor:
        """Log-ratio of informed and reference only without its mean, ``[3 m v] -> [m v]``, detached (equation 14)."""
        if len(teacher_logp) != 3:
            raise InputError(
                f"target 'pmi' needs exactly three teacher contexts and got {len(teacher_logp)}: "
                "give informed, reference only and plain, in this order."
            )
        informed, reference_only, plain = floor_logp(teacher_logp).detach()
        gap = informed - reference_only
        if self.centre == "uniform":
            return gap - gap.mean(-1, keepdim=True)
        return gap - (plain.exp() * gap).sum(-1, keepdim=True)

    def bounded(self, centred: Tensor) -> Tensor:
        """``bound tanh(x / bound)``, ``[m v] -> [m v]`` (equation 15)."""
        return centred if self.bound is None else self.bound * (centred / self.bound).tanh()

    def measures(self, teacher_logp: Tensor) -> dict[str, Tensor]:
        """``[3 m v] -> {name: [m]}``.

        ``target/shift`` is KL(target || plain), ``target/bound_share`` the share of entries beyond the bound.
        """
        centred = self.centred(teacher_logp)
        limit = math.inf if self.bound is None else self.bound
        return {
            "target/shift": kl_entries(self(teacher_logp)[0], teacher_logp[-1].detach()).sum(-1),
            "target/bound_share": (centred.abs() > limit).to(centred.dtype).mean(-1),
        }


@dataclass(frozen=True)
class Barycenter(Ranged, TargetDefaults, key="method.target"):
    """The geometric barycenter of the teacher with the hint and the plain one: ``c = 2``, ``t = 1``.

    ``log_softmax((1 - a) log informed + a log plain)`` with ``a = 2 alpha_max (sigmoid(beta d) - 1/2)`` and ``d`` the
    Jensen-Shannon divergence of the two at the site. The contexts come in the order informed, plain. Everything is
    computed on the support as it is, a tail bucket being one entry like the others.
    Source: DemoPSD (arXiv 2607.02502), equations 7 to 11, and the probability floor of its appendix B.

    Fields:
        beta: how fast the share of the plain distribution grows with the disagreement.
        alpha_max: the largest share of the plain distribution in the exponent, from 0 (never) to 1.
        floor: smaller probabilities of either distribution count as this, without renormalising.
    """

    beta: Positive = 50.0
    alpha_max: Share = 0.15
    floor: Annotated[float, Range(above=0, below=1)] = 1e-8
    contexts = 2
    keeps_contexts = False
    measured = ("target/disagreement", "target/alpha")

    def __call__(self, teacher_logp: Tensor) -> Tensor:
        """``[2 m u] -> [1 m u]``, detached."""
        informed, plain = self._floored(teacher_logp)
        alpha = rearrange(self._alpha(self._disagreement(informed, plain)), "m -> m 1")
        return rearrange(torch.lerp(informed, plain, alpha).log_softmax(-1), "m u -> 1 m u")

    def measures(self, teacher_logp: Tensor) -> dict[str, Tensor]:
        """``[2 m u] -> {name: [m]}``: ``target/disagreement`` is ``d``, ``target/alpha`` is ``a``."""
        disagreement = self._disagreement(*self._floored(teacher_logp))
        return {"target/disagreement": disagreement, "target/alpha": self._alpha(disagreement)}

    def _disagreement(self, informed: Tensor, plain: Tensor) -> Tensor:
        """``[m u], [m u] -> [m]`` (equation 7)."""
        return jsd_entries(informed, plain, beta=0.5).sum(-1)

    def _alpha(self, disagreement: Tensor) -> Tensor:
        """``[m] -> [m]`` (equation 8)."""
        return 2 * self.alpha_max * ((self.beta * disagreement).sigmoid() - 0.5)

    def _floored(self, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
        """Informed and plain, each ``[m u]``, detached."""
        if len(teacher_logp) != 2:
            raise InputError(
                f"target 'barycenter' needs exactly two teacher contexts and got {len(teacher_logp)}: "
                "give informed and plain, in this order."
            )
        informed, plain = floor_logp(teacher_logp).detach().clamp(min=math.log(self.floor))
        return informed, plain


TARGETS: dict[str, type] = {
    "plain": Plain,
    "each": Each,
    "sampled": Sampled,
    "pmi": PurifiedPMI,
    "barycenter": Barycenter,
}
