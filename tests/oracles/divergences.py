"""Divergences, supports and the diffu-GRPO surrogate, one float at a time."""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

Floats = Sequence[float]


def softmax(logits: Floats) -> list[float]:
    """Logits of one site to probabilities."""
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def kl(p: Floats, q: Floats) -> list[float]:
    """Summands of KL(P || Q) from probabilities."""
    return [0.0 if pv == 0 else pv * (math.log(pv) - math.log(qv)) for pv, qv in zip(p, q, strict=True)]


def generalised_jsd(student: Floats, target: Floats, beta: float) -> list[float]:
    """Summands of the generalised JSD from probabilities; beta 0 and 1 are forward and reverse KL."""
    if beta == 0:
        return kl(target, student)
    if beta == 1:
        return kl(student, target)
    mixture = [(1 - beta) * s + beta * t for s, t in zip(student, target, strict=True)]
    pairs = zip(kl(target, mixture), kl(student, mixture), strict=True)
    return [beta * from_target + (1 - beta) * from_student for from_target, from_student in pairs]


def slope(s: float, t: float, beta: float) -> float:
    """Derivative of one summand with respect to log s, worked out on paper."""
    if beta == 0:
        return -t
    if beta == 1:
        return s * (math.log(s) - math.log(t) + 1)
    m = (1 - beta) * s + beta * t
    rise = (1 - beta) * s / m
    return -beta * t * rise + (1 - beta) * s * (math.log(s) - math.log(m) + 1 - rise)


def clipped(entries: Floats, clip: str, clip_at: float) -> float:
    """The value of one site."""
    if clip == "entry":
        return sum(min(d, clip_at) for d in entries)
    return min(sum(entries), clip_at) if clip == "token" else sum(entries)


def value_and_gradient(
    student_logits: Floats, target: Floats, beta: float, clip: str, clip_at: float
) -> tuple[float, list[float]]:
    """Value of one site and its gradient with respect to the student's logits."""
    student = softmax(student_logits)
    entries = generalised_jsd(student, target, beta)
    slopes = [slope(s, t, beta) for s, t in zip(student, target, strict=True)]
    if clip == "entry":
        slopes = [0.0 if d > clip_at else g for d, g in zip(entries, slopes, strict=True)]
    if clip == "token" and sum(entries) > clip_at:
        slopes = [0.0 for _ in slopes]
    gradient = [g - s * sum(slopes) for s, g in zip(student, slopes, strict=True)]
    return clipped(entries, clip, clip_at), gradient


def top_k(probabilities: Floats, k: int) -> list[int]:
    """Indices of the k largest."""
    return sorted(range(len(probabilities)), key=lambda v: -probabilities[v])[:k]


def advantages(reward: Floats, group: Sequence[int], normalise: bool, epsilon: float) -> list[float]:
    """Reward minus the group's mean, over its unbiased standard deviation if asked."""
    out = []
    for own, problem in zip(reward, group, strict=True):
        peers = [r for r, g in zip(reward, group, strict=True) if g == problem]
        centred = own - statistics.fmean(peers)
        spread = statistics.stdev(peers) if len(peers) > 1 else 0.0
        out.append(centred / (spread + epsilon) if normalise else centred)
    return out


def surrogate(
    logp: Tensor, old: Tensor, reference: Tensor | None, advantage: Tensor, ratio_clip: float, kl_weight: float
) -> Tensor:
    """d1's loss per token: PPO's clipped surrogate plus k3. ``[m]`` each, ``-> [m]``; made for autograd."""
    losses = []
    for i in range(len(logp)):
        ratio = torch.exp(logp[i] - old[i])
        kept = torch.minimum(ratio * advantage[i], torch.clamp(ratio, 1 - ratio_clip, 1 + ratio_clip) * advantage[i])
        loss = -kept
        if reference is not None and kl_weight:
            gap = reference[i] - logp[i]
            loss = loss + kl_weight * (torch.exp(gap) - gap - 1)
        losses.append(loss)
    return torch.stack(losses)
