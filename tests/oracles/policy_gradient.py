"""The student top-k policy gradient, one token at a time: value and gradient of one site, worked out on paper."""

import math
from collections.abc import Sequence

from tests.oracles.divergences import softmax

Floats = Sequence[float]


def entry_weights(rollout: Floats, teacher: Floats, weight: str) -> list[float]:
    """Weights of the kept entries from their log-probabilities."""
    if weight == "uniform":
        return [1 / len(rollout) for _ in rollout]
    return softmax(rollout if weight == "student" else teacher)


def loss_and_slope(
    logp: float, rollout: float, advantage: float, ratio_clip: float, dual_clip: float | None
) -> tuple[float, float, bool]:
    """Loss of one entry, its derivative with respect to ``logp``, and whether a clip acts."""
    ratio = math.exp(logp - rollout)
    if advantage >= 0:
        if ratio > 1 + ratio_clip:
            return -advantage * (1 + ratio_clip), 0.0, True
        return -advantage * ratio, -advantage * ratio, False
    if ratio < 1 - ratio_clip:
        return -advantage * (1 - ratio_clip), 0.0, True
    if dual_clip is not None and ratio > dual_clip:
        return -advantage * dual_clip, 0.0, True
    return -advantage * ratio, -advantage * ratio, False


def value_and_gradient(
    student_logits: Floats,
    rollout_logp: Floats,
    teacher_logp: Floats,
    ids: Sequence[int],
    weight: str,
    ratio_clip: float,
    dual_clip: float | None,
) -> tuple[float, list[float], int]:
    """Value of one site over the vocabulary entries ``ids``, gradient at the logits, number of clipped entries."""
    student = softmax(student_logits)
    weights = entry_weights([rollout_logp[v] for v in ids], [teacher_logp[v] for v in ids], weight)
    value, clips, slopes = 0.0, 0, [0.0 for _ in student]
    for w, v in zip(weights, ids, strict=True):
        advantage = w * (teacher_logp[v] - rollout_logp[v])
        loss, slope, cut = loss_and_slope(math.log(student[v]), rollout_logp[v], advantage, ratio_clip, dual_clip)
        value, clips = value + loss, clips + cut
        slopes[v] = slope
    return value, [g - s * sum(slopes) for s, g in zip(student, slopes, strict=True)], clips
