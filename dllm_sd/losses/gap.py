"""The gap between a teacher and the student at the drawn token, and the loss on it.

Skill-conditioned gated self-distillation (SGSD, arXiv 2605.28791): teachers that may be wrong are weighted by
whether the outcome of the rollout agrees with them (`losses/trust.py`), and the gap is gated, so that no site can
dominate.

Axes: ``m`` graded sites, ``t`` targets, ``u`` support, ``v`` vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn.functional import softplus

from dllm_sd.losses.measured import DivergenceDefaults
from dllm_sd.losses.numerics import floor_logp
from dllm_sd.ranges import Count, Positive, Ranged


def local_support(student_logp: Tensor, target_logp: Tensor, token: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student and target on the target's ``k`` most probable entries and the drawn token, renormalised.

    Args:
        student_logp: ``[m v]``.
        target_logp: ``[t m v]``.
        token: int64 ``[m]``.
        k: entries of the target that are kept.

    Returns:
        Student and target, each ``[t m k+1]`` (-inf where the token is one of the ``k``), and bool ``[t m k+1]``: the
        entry of the drawn token.
    """
    top = target_logp.topk(min(k, target_logp.shape[-1]), -1).indices
    drawn = token.expand(len(target_logp), -1)[..., None]
    index = torch.cat([top, drawn], -1)
    duplicate = torch.zeros_like(index, dtype=torch.bool)
    duplicate[..., -1:] = (top == drawn).any(-1, keepdim=True)
    student = student_logp.expand_as(target_logp).gather(-1, index).masked_fill(duplicate, -torch.inf)
    target = target_logp.gather(-1, index).masked_fill(duplicate, -torch.inf)
    return student.log_softmax(-1), target.log_softmax(-1), (index == drawn) & ~duplicate


def drawn_gap(student_logp: Tensor, target_logp: Tensor, token: Tensor, local: int | None = None) -> Tensor:
    """``log target - log student`` of the drawn token, ``[m v], [t m v], [m] -> [t m]``; no gradient to the target.

    With ``local`` both are renormalised on `local_support` first.
    """
    if local is None:
        index = rearrange(token, "m -> 1 m 1")
        student = student_logp[None].gather(-1, index)
        target = target_logp.detach().gather(-1, index.expand(len(target_logp), -1, -1))
        return (floor_logp(target) - floor_logp(student))[..., 0]
    student, target, drawn = local_support(student_logp, target_logp.detach(), token, local)
    return reduce((floor_logp(target) - floor_logp(student)) * drawn, "t m u -> t m", "sum")


def gate(gap: Tensor, tau: float) -> Tensor:
    """``log 2 - log(1 + exp(-gap^2 / (2 tau)))``: 0 without a gap, at most log 2; the slope vanishes at large gaps.

    Source: SGSD (arXiv 2605.28791) and its released code.
    """
    return math.log(2) - softplus(-gap.square() / (2 * tau))


@dataclass(frozen=True)
class GatedGap(Ranged, DivergenceDefaults, key="method.divergence"):
    """The gated gap between each target and the student at the drawn token; the support must be ``full``.

    Its gradient pulls the token's log-probability towards the target's, most strongly at a gap of about 1.2 for
    ``tau = 1``, and vanishes at large gaps. A negative trust reverses its sign.
    Source: SGSD (arXiv 2605.28791), released code, walawalagoose/SGSD commit f296a91.

    Fields:
        tau: width of the gate.
        local: None gates the gap at the drawn token; a number ``k`` gates KL(target || student) on the target's ``k``
            most probable tokens and the drawn one, both renormalised there (an option of the released code).
    """

    tau: Positive = 1.0
    local: Count | None = None
    judges_each_teacher = True

    @property
    def reads_drawn_token(self) -> bool:
        """True; with `local` it reads the target's most probable tokens too."""
        return True

    @property
    def gap_entries(self) -> int | None:
        """`local`."""
        return self.local

    def tensors_held(self, contexts: int) -> int:
        """The inputs, and what the softmax saves for the backward pass."""
        return 3 + contexts

    def entries(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m v], [t m v], [m] -> [t m 1]``: a site has one summand."""
        return self(student_logp, target_logp, token)[..., None]

    def __call__(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m v], [t m v], [m] -> [t m]``."""
        if self.local is None:
            return gate(drawn_gap(student_logp, target_logp, token), self.tau)
        student, target, _ = local_support(student_logp, target_logp.detach(), token, self.local)
        student, target = floor_logp(student), floor_logp(target)
        return gate((target.exp() * (target - student)).sum(-1), self.tau)
