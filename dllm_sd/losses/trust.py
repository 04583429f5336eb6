"""Trust: how every target and every rollout is weighted.

A trust has two methods. ``rollout_weight(reward [b], group [b]) -> [b]`` weighs whole rollouts; ``group`` is the id
of the problem, and all rollouts of a problem must be in the same call. The weight is passed on to the rollout's
sites as ``weight [m]``, and ``trust(student_logp [m u], target_logp [t m u], drawn, weight [m]) -> [t m]`` turns
it into the factor of each divergence value; ``drawn`` is the rollout's token at each site, with its
log-probabilities under the current student and when it was drawn. Factors are constants: no gradient flows
through them. For the log, ``trust.measures(...) -> {name: [m]}`` reports where a clip or cap acts.

Axes: ``b`` rollouts, ``m`` graded sites, ``t`` targets, ``u`` support, ``v`` vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from einops import rearrange, repeat
from torch import Tensor

from dllm_sd.errors import InputError
from dllm_sd.losses.divergences import token_nll
from dllm_sd.losses.gap import drawn_gap
from dllm_sd.losses.numerics import at_least_float32, floor_logp
from dllm_sd.losses.roles import AllTeachers, Role
from dllm_sd.parts import Part
from dllm_sd.ranges import Count, NonNegative, Positive, Ranged, Share


@dataclass(frozen=True)
class Drawn:
    """The tokens of the rollouts at the graded sites, all ``[m]``.

    Fields:
        token: vocabulary ids, int64.
        logp: the student's log-probability of them now, over the full vocabulary, detached.
        old_logp: what the decoder gave them when it drew them; NaN where unknown.
        canvas: int64, equal for sites of one canvas, all of which are given.
    """

    token: Tensor
    logp: Tensor
    old_logp: Tensor
    canvas: Tensor


class Pooling(Protocol):
    """Factors that depend on all sites of a canvas, in two steps, so that the sites can be processed in chunks."""

    def evidence(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """The statistic of each site that is pooled, ``[m v], [t m v], [m] -> [t m]``, detached."""
        ...

    def pooled(self, evidence: Tensor, canvas: Tensor, weight: Tensor) -> Tensor:
        """The factors, ``[t m], [m], [m] -> [t m]``; all sites of a canvas must be given."""
        ...


class Trust(Part, Protocol):
    """Protocol of a trust; `TrustDefaults` implements all but `rollout_weight` and the call."""

    @property
    def needs_old_logp(self) -> bool:
        """Whether the log-probabilities that the decoder gave the tokens are read."""
        ...

    @property
    def always_counts(self) -> bool:
        """Whether a rollout of weight 0 still contributes to the loss, so that its canvases need a forward pass."""
        ...

    @property
    def needs_outcome(self) -> bool:
        """Whether it needs to know which rollouts are correct."""
        ...

    @property
    def needs_group(self) -> bool:
        """Whether it compares all rollouts of a problem."""
        ...

    @property
    def weights_likelihoods(self) -> bool:
        """Whether it weights token likelihoods, so that its contexts are the other policies of its formula."""
        ...

    @property
    def judges_each_teacher(self) -> bool:
        """Whether it reads one token of each teacher (`Divergence.judges_each_teacher`)."""
        ...

    @property
    def gap_entries(self) -> int | None:
        """As `Divergence.gap_entries`; the divergence must have the same value."""
        ...

    @property
    def pooling(self) -> Pooling | None:
        """How the factors are computed from all sites of a canvas; None where each site has its own factor."""
        ...

    @property
    def measured(self) -> tuple[str, ...]:
        """The names of `measures`."""
        ...

    def roles(self, contexts: int, passes: int) -> tuple[Role, ...]:
        """The role of each context (`AllTeachers.roles`)."""
        ...

    def rollout_weight(self, reward: Tensor, group: Tensor) -> Tensor:
        """``[b], [b] -> [b]``."""
        ...

    def __call__(self, student_logp: Tensor, target_logp: Tensor, drawn: Drawn, weight: Tensor) -> Tensor:
        """``[m u], [t m u], drawn [m], [m] -> [t m]``, detached."""
        ...

    def measures(self, student_logp: Tensor, target_logp: Tensor, drawn: Drawn, weight: Tensor) -> dict[str, Tensor]:
        """``[m u], [t m u], drawn [m], [m] -> {name: [m]}``: what is logged about each site."""
        ...


class TrustDefaults(AllTeachers):
    """Defaults of a trust that treats each site alone, needs no outcome or group, and neither clips nor caps."""

    needs_old_logp: bool = False
    needs_outcome: bool = False
    needs_group: bool = False
    weights_likelihoods: bool = False
    judges_each_teacher: bool = False
    measured: tuple[str, ...] = ()

    @property
    def always_counts(self) -> bool:
        """False: a weight of 0 leaves a rollout out."""
        return False

    @property
    def gap_entries(self) -> int | None:
        """None: it reads no gap."""
        return None

    @property
    def pooling(self) -> Pooling | None:
        """None: each site has its own factor."""
        return None

    def measures(self, student_logp: Tensor, target_logp: Tensor, drawn: Drawn, weight: Tensor) -> dict[str, Tensor]:
        """No measures."""
        return {}


def group_advantage(reward: Tensor, group: Tensor, normalise: bool, epsilon: float) -> Tensor:
    """Reward minus the mean of its group, ``[b], [b] -> [b]``; a rollout alone in its group gets 0.

    ``normalise`` divides by (unbiased standard deviation of the group + ``epsilon``). Computed in float64 and
    returned in the dtype of ``reward`` (float32 where that is an integer), from the group's lowest reward on, so that
    equal rewards give exactly 0.
    Source: GRPO (arXiv 2402.03300), section 4.1; without ``normalise`` Dr. GRPO and d1's released code.
    """
    index, size = group.unique(return_inverse=True, return_counts=True)[1:]

    def total(x: Tensor) -> Tensor:
        """The sum over each rollout's group, ``[b] -> [b]``."""
        return x.new_zeros(len(size)).index_add(0, index, x)[index]

    lowest = reward.double().new_zeros(len(size)).scatter_reduce(0, index, reward.double(), "amin", include_self=False)
    above, size = reward.double() - lowest[index], size[index]
    centred = above - total(above) / size
    if normalise:
        variance = total(centred.square()) / (size - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + epsilon)
    return centred.to(at_least_float32(reward).dtype)


def surrogate_factor(logp: Tensor, old_logp: Tensor, advantage: Tensor, ratio_clip: float) -> Tensor:
    """Factor of ``-logp`` whose gradient is that of PPO's clipped surrogate; all ``[m] -> [m]``.

    With ``r = exp(logp - old_logp)``, ``d/dlogp [-min(r A, clip(r, 1 - e, 1 + e) A)]`` is ``-A r`` where the minimum
    is the unclipped term (``r <= 1 + e`` for ``A > 0``, ``r >= 1 - e`` for ``A < 0``) and 0 elsewhere; the factor of
    ``-logp`` is the negative of it. Source: PPO (arXiv 1707.06347), equation 7.
    """
    ratio = (logp - old_logp).exp()
    return torch.where(outside_clip(ratio, advantage, ratio_clip), 0, advantage * ratio)


def outside_clip(ratio: Tensor, advantage: Tensor, ratio_clip: float) -> Tensor:
    """Whether PPO's clip ends the gradient, bool: the ratio went too far in the advantage's direction, ``[m] -> [m]``.

    An advantage of 0 has no direction.
    """
    return torch.where(advantage > 0, ratio > 1 + ratio_clip, ratio < 1 - ratio_clip) & (advantage != 0)


def k3_factor(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """Factor of ``-logp`` whose gradient is that of the k3 estimate of KL(student || reference); ``[m] -> [m]``.

    ``k3 = exp(d) - d - 1`` with ``d = reference_logp - logp`` has ``d/dlogp k3 = 1 - exp(d)``; the factor of ``-logp``
    is ``exp(d) - 1``. Source: Schulman, "Approximating KL divergence" (2020), as used by GRPO.
    """
    return (reference_logp - logp).expm1()


@dataclass(frozen=True)
class Equal(TrustDefaults):
    """Every rollout and every target has the weight 1."""

    def rollout_weight(self, reward: Tensor, group: Tensor) -> Tensor:
        """``[b], [b] -> [b]``: ones."""
        return torch.ones_like(at_least_float32(reward))

    def __call__(self, student_logp: Tensor, target_logp: Tensor, drawn: Drawn, weight: Tensor) -> Tensor:
        """``[m u], [t m u], drawn [m], [m] -> [t m]``; without targets ``[1 m]``, for likelihood losses."""
        weight = weight.detach().to(at_least_float32(student_logp).dtype)
        return repeat(weight, "m -> t m", t=max(1, len(target_logp)))


@dataclass(frozen=True)
class ImportanceCap(Ranged, TrustDefaults, key="method.trust"):
    """Importance weight of the drawn token, truncated: ``min(exp(clamp(logp - old_logp)), cap)``.

    It corrects for a student that has moved since the rollouts were made, or for a decoder that drew from another
    distribution; the cap trades variance for bias. Source: SDPO (arXiv 2601.20802), released code; DemoPSD
    (arXiv 2607.02502), appendix B.

    Fields:
        cap: the largest weight.
        clamp: largest absolute log-ratio, against overflow.
    """

    cap: Positive = 2.0
    clamp: Positive = 20.0
    needs_old_logp = True
    measured = ("trust/clipped",)

    def rollout_weight(self, reward: Tensor, group: Tensor) -> Tensor:
        """``[b], [b] -> [b]``: ones."""
        return torch.ones_like(at_least_float32(reward))

    def __call__(self, student_logp: Tensor, target_logp: Tensor, drawn: Drawn, weight: Tensor) -> Tensor:
        """``[m u], [t m u], drawn [m], [m] -> [t m]``; without targets ``[1 m]``."""
        factor = (weight.detach() * self._ratio(drawn).clamp(max=self.cap)).to(at_least_float32(student_logp).dtype)
        return repeat(factor, "m -> t m", t=max(1, len(target_logp)))

    def measures(self, student_logp: Tensor, target_logp: Tensor, drawn: Drawn, weight: Tensor) -> dict[str, Tensor]:
        """``trust/clipped`` is 1 where the weight is above the cap."""
        ratio = self._ratio(drawn)
        return {"trust/clipped": (ratio > self.cap).to(ratio.dtype)}

    def _ratio(self, drawn: Drawn) -> Tensor:
        """The importance weight before the cap, ``[m]``."""
        if drawn.old_logp.isnan().any():
            raise InputError("these rollouts carry no log-probabilities; set method.trust to equal.")
        log_ratio = floor_logp(drawn.logp.detach()) - floor_logp(drawn.old_logp.detach())
        return log_ratio.clamp(-self.clamp, self.clamp).exp()


@dataclass(frozen=True)
class GroupAdvantage(Ranged, TrustDefaults, key="method.trust"):
    """Group-relative advantage with PPO's clip and a KL penalty: diffu-GRPO (d1, arXiv 2504.12216) on ``token_nll``.

    The factors are such that the *gradient* of factor x NLL is exactly that of
    ``-min(r A, clip(r, 1 - ratio_clip, 1 + ratio_clip) A) + kl (exp(d) - d - 1)``, with ``r = exp(logp - old_logp)``
    and ``d = reference_logp - logp`` at the sampled token; the *value* is not that of the surrogate.

    The targets (target ``sampled``, support ``full``) are the other policies that the formula needs, in this order:
    none (``r = 1``); one: the reference if ``kl > 0``, else the policy that made the rollouts;
    two: the reference, then the policy that made the rollouts. Without the latter ``r = 1``, exact on-policy.

    Fields:
        normalise: divide advantages by the group's standard deviation.
        epsilon: added to that standard deviation.
        ratio_clip: largest distance of the ratio from 1; beyond it the gradient is 0.
        kl: weight of the KL penalty to the reference policy; 0 for none.
    """

    normalise: bool = True
    epsilon: Positive = 1e-4
    ratio_clip: Positive = 0.5
    kl: NonNegative = 0.0
    needs_outcome = True
    needs_group = True
    weights_likelihoods = True
    measured = ("trust/clipped",)

    @property
    def always_counts(self) -> bool:
        """True with a penalty: the KL holds for rollouts without an advantage too."""
        return self.kl > 0

    def roles(self, contexts: int, passes: int) -> tuple[Role, ...]:
        """The reference if there is a penalty, the policy that made the rollouts if these serve several updates."""
        reference: tuple[Role, ...] = ("reference",) if self.kl > 0 else ()
        return (*reference, "rollouts") if passes > 1 else reference

    def rollout_weight(self, reward: Tensor, group: Tensor) -> Tensor:
        """``[b], [b] -> [b]``: the advantages."""
        return group_advantage(reward, group, self.normalise, self.epsilon)

    def __call__(self, student_logp: Tensor, target_logp: Tensor, drawn: Drawn, weight: Tensor) -> Tensor:
        """``[m v], [t m v], drawn [m], [m] -> [1 m]`` with ``t`` of 0, 1 or 2."""
        self._check(len(target_logp))
        logp, old = self._logp_and_old_logp(student_logp, target_logp, drawn.token)
        factor = surrogate_factor(logp, old, weight.detach().to(logp.dtype), self.ratio_clip)
        if self.kl > 0:
            factor = factor + self.kl * k3_factor(logp, -token_nll(target_logp[0].detach(), drawn.token))
        return rearrange(factor, "m -> 1 m")

    def measures(self, student_logp: Tensor, target_logp: Tensor, drawn: Drawn, weight: Tensor) -> dict[str, Tensor]:
        """``trust/clipped`` is 1 where the clip of the ratio ends the surrogate's gradient."""
        logp, old = self._logp_and_old_logp(student_logp, target_logp, drawn.token)
        outside = outside_clip((logp - old).exp(), weight, self.ratio_clip)
        return {"trust/clipped": outside.to(logp.dtype)}

    def _logp_and_old_logp(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the tokens under the student and the policy that made the rollouts, ``[m]`` each."""
        logp = -token_nll(student_logp.detach(), token)
        old = -token_nll(target_logp[-1].detach(), token) if len(target_logp) > (self.kl > 0) else logp
        return logp, old

    def _check(self, targets: int) -> None:
        if self.kl > 0 and targets == 0:
            raise InputError("trust.kl is above 0 but there is no reference: add the base weights as a teacher.")
        if targets > 2:
            raise InputError(f"trust 'group_advantage' takes at most two teachers and got {targets}: remove some.")


@dataclass(frozen=True)
class OutcomeValidated(Ranged, TrustDefaults, key="method.trust"):
    """The weight of a teacher on a rollout is +1, -1 or 0, by whether the outcome of the rollout agrees with the
    teacher.

    A teacher supports a canvas if its gap to the student at the drawn tokens, clipped to +-``clip``, is above
    ``threshold`` on average over the canvas's sites, and suppresses it below ``-threshold``. To support a correct
    rollout and to suppress a wrong one is +1 (the student is pulled towards this teacher), the reverse is -1 (it is
    pushed away).
    An autoregressive rollout is one canvas; on masked diffusion each canvas is judged alone.
    Source: SGSD (arXiv 2605.28791), released code, walawalagoose/SGSD commit f296a91.

    Fields:
        clip: largest absolute gap of a site in the average.
        threshold: averages with a smaller absolute value give the weight 0.
        at_least: score from which a rollout counts as correct.
        local: as in divergence ``gated_gap``; set both to the same.
    """

    clip: Positive = 3.0
    threshold: NonNegative = 0.05
    at_least: Share = 1.0
    local: Count | None = None
    needs_outcome = True
    judges_each_teacher = True

    @property
    def gap_entries(self) -> int | None:
        """`local`."""
        return self.local

    @property
    def pooling(self) -> Self:
        """Itself: a teacher is judged by all sites of a canvas."""
        return self

    def rollout_weight(self, reward: Tensor, group: Tensor) -> Tensor:
        """``[b], [b] -> [b]``: 1 where the rollout is correct, else -1."""
        return torch.where(reward >= self.at_least, 1, -1).to(at_least_float32(reward).dtype)

    def evidence(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """The clipped gap of each site, ``[m v], [t m v], [m] -> [t m]``, detached."""
        return drawn_gap(student_logp.detach(), target_logp, token, self.local).clamp(-self.clip, self.clip)

    def support(self, student_logp: Tensor, target_logp: Tensor, drawn: Drawn) -> Tensor:
        """How much each target supports the canvas of each site, ``[m v], [t m v], drawn [m] -> [t m]``."""
        return _mean_over_canvas(self.evidence(student_logp, target_logp, drawn.token), drawn.canvas)

    def pooled(self, evidence: Tensor, canvas: Tensor, weight: Tensor) -> Tensor:
        """The factors, ``[t m], [m], [m] -> [t m]``; all sites of a canvas must be given."""
        support = _mean_over_canvas(evidence, canvas)
        return weight.detach().to(support.dtype) * support.sign() * (support.abs() > self.threshold)

    def __call__(self, student_logp: Tensor, target_logp: Tensor, drawn: Drawn, weight: Tensor) -> Tensor:
        """``[m v], [t m v], drawn [m], [m] -> [t m]``."""
        return self.pooled(self.evidence(student_logp, target_logp, drawn.token), drawn.canvas, weight)


def _mean_over_canvas(value: Tensor, canvas: Tensor) -> Tensor:
    """At each site the mean over all sites of its canvas, ``[t m], [m] -> [t m]``."""
    index, count = canvas.unique(return_inverse=True, return_counts=True)[1:]
    total = value.new_zeros(len(value), len(count)).index_add(1, index, value)
    return (total / count)[:, index]


TRUSTS: dict[str, type] = {
    "equal": Equal,
    "importance_cap": ImportanceCap,
    "group_advantage": GroupAdvantage,
    "outcome_validated": OutcomeValidated,
}
