"""Policy gradient with the teacher's log-ratio as the reward. It is no divergence, but has the same interface.

A surrogate with advantages ``log target - log rollout policy``, for supports whose entries need not sum to one. It
clips ratios, not summands.

Axes: ``m`` graded sites, ``t`` targets, ``u`` support, ``v`` vocabulary.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from einops import rearrange
from torch import Tensor

from dllm_sd.errors import InputError
from dllm_sd.losses.measured import DivergenceDefaults
from dllm_sd.losses.numerics import floor_logp
from dllm_sd.losses.roles import Role
from dllm_sd.ranges import Positive, Range, Ranged

#: Log-ratios of two policies are cut at this distance from 0 (verl's constant), so that their exponential is finite.
MAX_LOG_RATIO = 20.0


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
class PolicyGradient(Ranged, DivergenceDefaults, key="method.divergence"):
    """Policy gradient with the log-ratio of teacher and rollout policy as the reward of every kept token.

    On-policy and with ``weight = student`` its gradient is that of the reverse KL on the kept entries, with the
    weights held constant: a student top-k estimate between the sampled token (``tokens = sampled``) and the sum over
    the whole vocabulary. Source: released code of arXiv 2604.13016 (thunlp/OPD); ``surrogate = log`` on the sampled
    token is SDPO's (arXiv 2601.20802) loss without full logits.

    ``target_logp`` holds the teacher and, off-policy, the policy that made the rollouts as a second entry (target
    ``each``). Without it the current student, detached, takes its place: all ratios are 1. Advantages and weights are
    constants. The support is ``TopK(rest="keep")`` or ``full``; for ``tokens = sampled`` it must be ``full``.

    Fields:
        tokens: ``support`` (every kept entry) or ``sampled`` (the token of the rollout, weight 1).
        weight: of the entries: softmax of the rollout policy's log-probabilities over the kept entries
            (``student``), of the teacher's (``teacher``), or equal (``uniform``).
        ratio_clip: largest distance of the ratio from 1 before PPO's clip applies.
        dual_clip: bound on the ratio where the advantage is negative; None for no bound.
        surrogate: ``ratio`` (``-A r``, clipped) or ``log`` (``-A log s``, never clipped; on-policy the same gradient).
    """

    tokens: Literal["support", "sampled"] = "support"
    weight: Literal["student", "teacher", "uniform"] = "student"
    ratio_clip: Positive = 0.2
    dual_clip: Annotated[float, Range(above=1)] | None = 3.0
    surrogate: Literal["ratio", "log"] = "ratio"
    reads_rollout_policy = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens not in ("support", "sampled"):
            raise InputError(f"divergence.tokens is {self.tokens!r}: choose 'support' or 'sampled'.")
        if self.weight not in ("student", "teacher", "uniform"):
            raise InputError(f"divergence.weight is {self.weight!r}: choose 'student', 'teacher' or 'uniform'.")
        if self.surrogate not in ("ratio", "log"):
            raise InputError(f"divergence.surrogate is {self.surrogate!r}: choose 'ratio' or 'log'.")

    @property
    def reads_drawn_token(self) -> bool:
        """True for ``tokens = sampled``."""
        return self.tokens == "sampled"

    @property
    def needs_unnormalised(self) -> bool:
        """True for ``tokens = support``."""
        return self.tokens == "support"

    def tensors_held(self, contexts: int) -> int:
        """The inputs, and what the softmax saves for the backward pass."""
        return 3 + contexts

    def roles(self, contexts: int, passes: int) -> tuple[Role, ...]:
        """The teacher, and the policy that made the rollouts if there is a second context."""
        return ("teacher", "rollouts")[:contexts]

    def advantage(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [m u]`` (``[m 1]`` for ``sampled``), detached."""
        _, rollout, teacher = self._policies(student_logp, target_logp, token)
        return log_ratio_advantage(rollout, teacher, self.weight)

    def entries(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [1 m u]`` (``[1 m 1]`` for ``sampled``): the summands with unclipped ratios."""
        return self._summands(student_logp, target_logp, token, clipped=False)

    def __call__(self, student_logp: Tensor, target_logp: Tensor, token: Tensor) -> Tensor:
        """``[m u], [t m u], [m] -> [1 m]``: one value, since the rollout policy is not a target."""
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
