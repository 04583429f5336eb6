"""Divergences: how far the student is from its target at every graded site.

A divergence is called as ``divergence(student_logp [m u], target_logp [t m u], token [m]) -> [t m]``.
It returns one value per target and site (``token_nll`` and ``policy_gradient`` one per site: ``[1 m]``); the only sum
inside is the one over the support ``u``. For the log, every divergence also has
``entries(student_logp, target_logp, token) -> [t m u]``, the summands before any clip, and ``measure``, which gives the
values with and without the clip (`losses/measured.py`).

Clips (field ``clip``, threshold ``clip_at``):

- ``token``: ``min(sum_v d_v, clip_at)``. A bounded divergence; a site beyond the threshold has no gradient.
- ``entry``: ``sum_v min(d_v, clip_at)``, as d-OPSD and OPSD v3 publish it. **This is not a divergence.** It cuts
  only the large positive summands, whose gradient becomes 0; the negative ones stay. So it can be negative, its
  minimum is not at the target (two tokens, teacher (.3, .7), reverse KL: minimum -0.2075 at student (.742, .258)),
  and its gradient can point away from that of the true divergence. It is here to reproduce those papers.
- ``none``.

A probability of zero counts as ``exp(-10000)``: values and gradients stay finite, and ``0 log 0 = 0``.

Axes: ``m`` graded sites, ``t`` targets, ``u`` support, ``v`` vocabulary.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from dllm_sd.errors import InputError
from dllm_sd.losses.fused import summed
from dllm_sd.losses.gap import GatedGap
from dllm_sd.losses.measured import DivergenceDefaults, Measured
from dllm_sd.losses.numerics import floor_logp
from dllm_sd.losses.policy_gradient import PolicyGradient
from dllm_sd.ranges import Positive, Ranged, Share

Clip = Literal["none", "token", "entry"]


def kl_entries(p_logp: Tensor, q_logp: Tensor) -> Tensor:
    """Summands of ``KL(P || Q)``: ``P (log P - log Q)``, ``[... u], [... u] -> [... u]`` (shapes broadcast)."""
    p, q = floor_logp(p_logp), floor_logp(q_logp)
    return p.exp() * (p - q)


def jsd_entries(student_logp: Tensor, target_logp: Tensor, beta: float) -> Tensor:
    """Summands of the generalised Jensen-Shannon divergence, ``[m u], [t m u] -> [t m u]`` (shapes broadcast).

    ``beta T (log T - log M) + (1 - beta) S (log S - log M)`` with ``M = (1 - beta) S + beta T``. By convention
    ``beta = 0`` means forward KL and ``beta = 1`` reverse KL: the limits of JSD / (beta (1 - beta)), since the
    formula itself is 0 there. Source: GKD (arXiv 2306.13649), section 2, as used by OPSD and d-OPSD.
    """
    if beta == 0:
        return kl_entries(target_logp, student_logp)
    if beta == 1:
        return kl_entries(student_logp, target_logp)
    student, target = floor_logp(student_logp), floor_logp(target_logp)
    mixture = torch.logaddexp(student + math.log1p(-beta), target + math.log(beta))
    return beta * kl_entries(target, mixture) + (1 - beta) * kl_entries(student, mixture)


def token_nll(student_logp: Tensor, token: Tensor) -> Tensor:
    """Negative log-likelihood of ``token [m]`` (vocabulary ids) under ``student_logp [m v]``, ``-> [m]``."""
    picked = student_logp.gather(-1, rearrange(token, "m -> m 1"))
    return -rearrange(floor_logp(picked), "m 1 -> m")


def clipped_sum(entries: Tensor, clip: Clip, clip_at: float) -> Tensor:
    """Sum over the support, ``[... u] -> [...]``, clipped per entry, per token, or not at all."""
    if clip == "entry":
        return entries.clamp(max=clip_at).sum(-1)
    total = entries.sum(-1)
    return total.clamp(max=clip_at) if clip == "token" else total


def clip_share(entries: Tensor, clip: Clip, clip_at: float) -> Tensor:
    """The share of entries above the clip, ``[... u] -> [...]``; for a clip of the token 0 or 1.

    The released code of d-OPSD logs this. It is uninformative for a large vocabulary, where a clip that removes half of
    the divergence may affect two entries in a hundred thousand. A run logs the removed share of the divergence instead.
    """
    if clip == "entry":
        return (entries > clip_at).to(entries.dtype).mean(-1)
    if clip == "token":
        return (entries.sum(-1) > clip_at).to(entries.dtype)
    return torch.zeros_like(entries[..., 0])


@dataclass(frozen=True, kw_only=True)
class _Clipped(Ranged, DivergenceDefaults, key="method.divergence"):
    """Base of the divergences between distributions: the fields of the clip, and the sum over the support."""

    clip: Clip = "none"
    """``none``, ``token``, or ``entry`` (not a divergence; see the top of this file)."""
    clip_at: Positive = 0.05
    """Threshold of the clip."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip not in ("none", "token", "entry"):
            raise InputError(f"divergence.clip is {self.clip!r}: choose 'none', 'token' or 'entry'.")

    @property
    def least_at_target(self) -> bool:
        """False with a clip per entry (see the top of this file)."""
        return self.clip != "entry"

    @property
    @abstractmethod
    def _beta(self) -> float:
        """``beta`` of `jsd_entries`."""

    def __call__(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m]``, with gradient to the student."""
        return self.measure(student_logp, target_logp, token).value

    def measure(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Measured:
        """``[m u], [t m u], [m] -> [t m]`` each."""
        clip_at = self.clip_at if self.clip == "entry" else None
        value, total = summed(student_logp, target_logp, self._beta, clip_at)
        return Measured(value.clamp(max=self.clip_at) if self.clip == "token" else value, total)


@dataclass(frozen=True)
class ForwardKL(_Clipped):
    """``KL(target || student)``, which is mode-covering: the student must cover what the target allows."""

    @property
    def _beta(self) -> float:
        return 0.0

    def entries(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m u]``: ``T (log T - log S)``."""
        return kl_entries(target_logp, student_logp)


@dataclass(frozen=True)
class ReverseKL(_Clipped):
    """``KL(student || target)``, which is mode-seeking: the student avoids what the target makes improbable (d-OPSD,
    Eq. 12)."""

    @property
    def _beta(self) -> float:
        return 1.0

    def entries(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m u]``: ``S (log S - log T)``."""
        return kl_entries(student_logp, target_logp)


@dataclass(frozen=True)
class GeneralisedJSD(_Clipped):
    """Generalised Jensen-Shannon divergence between student and target (see ``jsd_entries``).

    For ``beta`` strictly between 0 and 1 it is at most log 2 at every site.
    """

    beta: Share = 0.5
    """Weight of the target in the mixture, from 0 (means forward KL) to 1 (means reverse KL)."""

    @property
    def _beta(self) -> float:
        return self.beta

    def tensors_held(self, contexts: int) -> int:
        """A mixture (``0 < beta < 1``) holds one more tensor for each target."""
        of_kl = super().tensors_held(contexts)
        return max(of_kl, 2 + 5 * contexts) if 0 < self.beta < 1 else of_kl

    def entries(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m u]``."""
        return jsd_entries(student_logp, target_logp, self.beta)


@dataclass(frozen=True)
class TokenNLL(DivergenceDefaults):
    """Negative log-likelihood of the rollout's token at the site; the target is not used.

    ``token`` is a vocabulary id, so the support must be ``full``. With trust ``group_advantage`` this is diffu-GRPO.
    """

    reads_target = False

    @property
    def reads_drawn_token(self) -> bool:
        """True: it reads the drawn token and nothing else."""
        return True

    def tensors_held(self, contexts: int) -> int:
        """The inputs, and what the softmax saves for the backward pass."""
        return 3 + contexts

    def entries(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m v], any, [m] -> [1 m 1]``."""
        return rearrange(token_nll(student_logp, token), "m -> 1 m 1")

    def __call__(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m v], any, [m] -> [1 m]``."""
        return rearrange(token_nll(student_logp, token), "m -> 1 m")


DIVERGENCES: dict[str, type] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jsd": GeneralisedJSD,
    "token_nll": TokenNLL,
    "policy_gradient": PolicyGradient,
    "gated_gap": GatedGap,
}
