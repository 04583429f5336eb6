"""Divergences: how far the student is from its target at every graded site.

A divergence is called as ``divergence(student_logp [m u], target_logp [t m u], token [m]) -> [t m]``.
It returns one value per target and site; the only sum inside is the one over the support ``u``. For the log, every
divergence also has ``entries(student_logp, target_logp, token) -> [t m u]`` (the summands before any clip) and
``clip_share(entries) -> [t m]``.

Clips (field ``clip``, threshold ``clip_at``):

- ``token``: ``min(sum_v d_v, clip_at)``. A bounded divergence; a site beyond the threshold has no gradient.
- ``entry``: ``sum_v min(d_v, clip_at)``, as d-OPSD and OPSD v3 publish it. **This is not a divergence.** It cuts
  only the large positive summands, whose gradient becomes 0; the negative ones stay. So it can be negative, its
  minimum is not at the target (two tokens, teacher (.3, .7), reverse KL: minimum -0.2075 at student (.742, .258)),
  and its gradient can point away from that of the true divergence. It is here to reproduce those papers.
- ``none``.

``PolicyGradient`` is no divergence either: a surrogate with advantages ``log target - log rollout policy``, for
supports whose entries need not sum to one. It clips ratios, not summands.

A probability of zero counts as ``exp(-10000)``: values and gradients stay finite, and ``0 log 0 = 0``.

Axes: ``m`` graded sites, ``t`` targets, ``u`` support, ``v`` vocabulary.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from einops import rearrange
from torch import Tensor

from dllm_sd.errors import InputError
from dllm_sd.losses.gap import GatedGap
from dllm_sd.losses.supports import floor_logp

Clip = Literal["none", "token", "entry"]

#: Log-ratios of two policies are cut at this distance from 0 (verl's constant), so that their exponential is finite.
MAX_LOG_RATIO = 20.0


class Divergence(Protocol):
    """What the objective calls."""

    def __call__(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m]``, with the part's clip applied."""
        ...

    def entries(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m u]``: the summands before any clip."""
        ...

    def clip_share(self, entries: Tensor) -> Tensor:
        """``[t m u] -> [t m]``: the share of each site's summands (or of its one sum) that the clip cuts."""
        ...


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
    """What the clip cuts, ``[... u] -> [...]``: the share of entries above it, or 0 or 1 for the whole token."""
    if clip == "entry":
        return (entries > clip_at).to(entries.dtype).mean(-1)
    total = entries.sum(-1)
    return (total > clip_at).to(entries.dtype) if clip == "token" else torch.zeros_like(total)


@dataclass(frozen=True, kw_only=True)
class _Clipped(ABC):
    """What the divergences between distributions share: the fields of the clip, and the sum over the support."""

    clip: Clip = "none"
    """``none``, ``token``, or ``entry`` (not a divergence; see the top of this file)."""
    clip_at: float = 0.05
    """The threshold."""

    def __post_init__(self) -> None:
        if self.clip not in ("none", "token", "entry"):
            raise InputError(f"divergence.clip is {self.clip!r}: choose 'none', 'token' or 'entry'.")
        if not self.clip_at > 0:
            raise InputError(f"divergence.clip_at is {self.clip_at}: give a number above 0, or set clip to 'none'.")

    @abstractmethod
    def entries(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m u]``: the summands before any clip."""

    def clip_share(self, entries: Tensor) -> Tensor:
        """``[t m u] -> [t m]``."""
        return clip_share(entries, self.clip, self.clip_at)

    def __call__(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m]``."""
        return clipped_sum(self.entries(student_logp, target_logp, token), self.clip, self.clip_at)


@dataclass(frozen=True)
class ForwardKL(_Clipped):
    """``KL(target || student)``: the student must cover what the target allows."""

    def entries(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m u]``: ``T (log T - log S)``."""
        return kl_entries(target_logp, student_logp)


@dataclass(frozen=True)
class ReverseKL(_Clipped):
    """``KL(student || target)``: the student must avoid what the target forbids (d-OPSD, equation 12)."""

    def entries(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m u]``: ``S (log S - log T)``."""
        return kl_entries(student_logp, target_logp)


@dataclass(frozen=True)
class GeneralisedJSD(_Clipped):
    """Generalised Jensen-Shannon divergence between student and target (see ``jsd_entries``).

    For ``beta`` strictly between 0 and 1 it is at most log 2 at every site.
    """

    beta: float = 0.5
    """Weight of the target in the mixture, from 0 (means forward KL) to 1 (means reverse KL)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise InputError(f"divergence.beta is {self.beta}: give a number from 0 (forward KL) to 1 (reverse KL).")

    def entries(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [t m u]``."""
        return jsd_entries(student_logp, target_logp, self.beta)


@dataclass(frozen=True)
class TokenNLL:
    """Negative log-likelihood of the token that stands at the site in the rollout; the target is not read.

    ``token`` is a vocabulary id, so the support must be ``full``. With trust ``group_advantage`` this is diffu-GRPO.
    """

    def entries(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m v], any, [m] -> [1 m 1]``."""
        return rearrange(token_nll(student_logp, token), "m -> 1 m 1")

    def clip_share(self, entries: Tensor) -> Tensor:
        """``[1 m 1] -> [1 m]``: zeros, nothing is clipped."""
        return torch.zeros_like(entries.sum(-1))

    def __call__(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m v], any, [m] -> [1 m]``."""
        return rearrange(token_nll(student_logp, token), "m -> 1 m")


def log_ratio_advantage(rollout_logp: Tensor, teacher_logp: Tensor, weight: str) -> Tensor:
    """``w (log teacher - log rollout)`` with weights over the last axis, ``[m u], [m u] -> [m u]``, detached.

    ``w`` is the softmax of ``rollout_logp`` (``student``), of ``teacher_logp`` (``teacher``), or ``1 / u``
    (``uniform``); a single token therefore always weighs 1.
    Source: released code of arXiv 2604.13016 (thunlp/OPD), student top-k.
    """
    rollout, teacher = floor_logp(rollout_logp).detach(), floor_logp(teacher_logp).detach()
    scores = {"student": rollout, "teacher": teacher, "uniform": torch.zeros_like(rollout)}[weight]
    return scores.softmax(-1) * (teacher - rollout)


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, ratio_clip: float, dual_clip: float | None) -> Tensor:
    """PPO's loss per entry, ``[...], [...] -> [...]``: ``max(-A r, -A clip(r, 1 - e, 1 + e))``, ``r = exp(log_ratio)``.

    ``dual_clip = c`` bounds it by ``-c A`` where ``A < 0``, so that no ratio makes a bad token's loss explode.
    Source: PPO (arXiv 1707.06347), equation 7; dual clip: arXiv 1912.09729.
    """
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - ratio_clip, 1 + ratio_clip))
    if dual_clip is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -advantage * dual_clip), loss)


@dataclass(frozen=True)
class PolicyGradient:
    """Policy gradient with the log-ratio of teacher and rollout policy as the reward of every kept token.

    On-policy and with ``weight = student`` its gradient is that of the reverse KL on the kept entries, with the
    weights held constant: a student top-k estimate between the sampled token (``tokens = sampled``) and the sum over
    the whole vocabulary. Source: released code of arXiv 2604.13016 (thunlp/OPD); ``surrogate = log`` on the sampled
    token is SDPO's (arXiv 2601.20802) loss without full logits.

    ``target_logp`` holds the teacher and, off-policy, the policy that made the rollouts as a second entry (target
    ``each``). Without it the student as it is now, detached, stands in: all ratios are 1. Advantages and weights are
    constants. The support is ``TopK(rest="keep")`` or ``full``; for ``tokens = sampled`` it must be ``full``.

    Fields:
        tokens: ``support`` (every kept entry) or ``sampled`` (the token that stands in the rollout, weight 1).
        weight: of the entries: softmax of the rollout policy's log-probabilities over the kept entries
            (``student``), of the teacher's (``teacher``), or equal (``uniform``).
        ratio_clip: how far the ratio may leave 1 before PPO's clip acts.
        dual_clip: bound on the ratio where the advantage is negative; None for no bound.
        surrogate: ``ratio`` (``-A r``, clipped) or ``log`` (``-A log s``, never clipped; on-policy the same gradient).
    """

    tokens: Literal["support", "sampled"] = "support"
    weight: Literal["student", "teacher", "uniform"] = "student"
    ratio_clip: float = 0.2
    dual_clip: float | None = 3.0
    surrogate: Literal["ratio", "log"] = "ratio"

    def __post_init__(self) -> None:
        if self.tokens not in ("support", "sampled"):
            raise InputError(f"divergence.tokens is {self.tokens!r}: choose 'support' or 'sampled'.")
        if self.weight not in ("student", "teacher", "uniform"):
            raise InputError(f"divergence.weight is {self.weight!r}: choose 'student', 'teacher' or 'uniform'.")
        if not self.ratio_clip > 0:
            raise InputError(f"divergence.ratio_clip is {self.ratio_clip}: give a number above 0, such as 0.2.")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise InputError(f"divergence.dual_clip is {self.dual_clip}: give a number above 1, or null for no bound.")
        if self.surrogate not in ("ratio", "log"):
            raise InputError(f"divergence.surrogate is {self.surrogate!r}: choose 'ratio' or 'log'.")

    def advantage(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [m u]`` (``[m 1]`` for ``sampled``), detached."""
        _, rollout, teacher = self._policies(student_logp, target_logp, token)
        return log_ratio_advantage(rollout, teacher, self.weight)

    def entries(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [1 m u]`` (``[1 m 1]`` for ``sampled``): the summands before any clip."""
        return self._summands(student_logp, target_logp, token, clipped=False)

    def clip_share(self, entries: Tensor) -> Tensor:
        """``[1 m u] -> [1 m]``: zeros. What is clipped depends on the ratios, which ``entries`` do not show."""
        return torch.zeros_like(entries.sum(-1))

    def __call__(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [1 m]``."""
        return self._summands(student_logp, target_logp, token, clipped=True).sum(-1)

    def _summands(self, student_logp: Tensor, target_logp: Tensor, token: Tensor, clipped: bool) -> Tensor:
        """``[1 m u]`` or ``[1 m 1]``."""
        student, rollout, teacher = self._policies(student_logp, target_logp, token)
        advantage = log_ratio_advantage(rollout, teacher, self.weight)
        log_ratio = (student - rollout).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        if self.surrogate == "log":
            loss = -advantage * student
        elif clipped:
            loss = clipped_surrogate(log_ratio, advantage, self.ratio_clip, self.dual_clip)
        else:
            loss = -advantage * log_ratio.exp()
        return rearrange(loss, "m u -> 1 m u")

    def _policies(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Student, rollout policy and teacher (both detached) at the tokens that count, each ``[m u]`` or ``[m 1]``."""
        if len(target_logp) not in (1, 2):
            raise InputError(
                f"divergence 'policy_gradient' takes one or two targets (teacher, rollout policy) and got "
                f"{len(target_logp)}: change the number of teacher contexts."
            )
        student = floor_logp(student_logp)
        teacher = floor_logp(target_logp[0]).detach()
        rollout = floor_logp(target_logp[1]).detach() if len(target_logp) == 2 else student.detach()
        if self.tokens == "support":
            return student, rollout, teacher
        index = rearrange(token, "m -> m 1")
        return student.gather(-1, index), rollout.gather(-1, index), teacher.gather(-1, index)


DIVERGENCES: dict[str, type] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jsd": GeneralisedJSD,
    "token_nll": TokenNLL,
    "policy_gradient": PolicyGradient,
    "gated_gap": GatedGap,
}
