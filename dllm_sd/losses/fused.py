"""Fused divergences: the sum over the support and its derivative in one pass, with one tensor ``[t m u]`` saved.

Autograd would save a dozen tensors for the one-line formulas of `kl_entries` and `jsd_entries`.

Axes: ``m`` graded sites, ``t`` targets, ``u`` support.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dllm_sd.losses.numerics import LOG_ZERO, floor_logp


def summed(student_logp: Tensor, target_logp: Tensor, beta: float, clip_at: float | None) -> tuple[Tensor, ...]:
    """The generalised Jensen-Shannon divergence (0: forward KL, 1: reverse KL), summands clipped at ``clip_at``.

    ``[m u], [t m u] -> [t m]``: the sum, with gradient to the student, and the sum before the clip.
    """
    sums: Any = _Summed.apply(student_logp, target_logp, beta, clip_at)
    return sums


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_logp: Tensor, target_logp: Tensor, beta: float, clip_at: float | None
    ) -> tuple[Tensor, Tensor]:
        entries, slope = _entries(floor_logp(student_logp), floor_logp(target_logp), beta)
        if beta == 0:  # elsewhere the slope is 0 where the student's probability is
            slope.masked_fill_(student_logp < LOG_ZERO, 0)
        total = entries.sum(-1)
        if clip_at is None:
            value, total = total, total.clone()
        else:
            slope.masked_fill_(entries > clip_at, 0)
            value = entries.clamp_(max=clip_at).sum(-1)
        ctx.slope, ctx.type = slope if ctx.needs_input_grad[0] else None, student_logp.dtype
        ctx.mark_non_differentiable(total)
        return value, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.slope is None:
            return None, None, None, None
        weight = gradients[0][..., None]
        gradient = ctx.slope[0] * weight[0] if len(ctx.slope) == 1 else (ctx.slope * weight).sum(0)
        return gradient.to(ctx.type), None, None, None


def _entries(student: Tensor, target: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Summands and their derivative by the student's log-probability, ``[t m u]`` each; both may be overwritten."""
    if beta == 0:  # T (log T - log S)
        probability = target.exp()
        return (target - student).mul_(probability), probability.neg_()
    if beta == 1:  # S (log S - log T)
        probability = student.exp()
        entries = (student - target).mul_(probability)
        return entries, entries + probability
    # b T (log T - log M) + (1 - b) S (log S - log M); the second summand is the derivative of both.
    mixture = torch.logaddexp(student + math.log1p(-beta), target + math.log(beta))
    slope = (student - mixture).mul_(student.exp()).mul_(1 - beta)
    return mixture.neg_().add_(target).mul_(target.exp()).mul_(beta).add_(slope), slope
