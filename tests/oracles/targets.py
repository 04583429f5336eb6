"""Merged targets, one float at a time: probabilities of one site in, probabilities out."""

import math
from collections.abc import Sequence

from tests.oracles.divergences import generalised_jsd

Floats = Sequence[float]


def normalised(weights: Floats) -> list[float]:
    """Positive weights to probabilities."""
    return [w / sum(weights) for w in weights]


def pmi_shifts(informed: Floats, reference_only: Floats, plain: Floats, centre: str) -> list[float]:
    """Centred log-ratio of two distributions."""
    gaps = [math.log(i / r) for i, r in zip(informed, reference_only, strict=True)]
    shares = plain if centre == "base" else [1 / len(gaps) for _ in gaps]
    mean = sum(share * gap for share, gap in zip(shares, gaps, strict=True))
    return [gap - mean for gap in gaps]


def pmi(
    informed: Floats, reference_only: Floats, plain: Floats, beta: float, bound: float | None, centre: str
) -> list[float]:
    """The plain base times the exponential of the bounded shift."""
    weights = []
    for p, shift in zip(plain, pmi_shifts(informed, reference_only, plain, centre), strict=True):
        bounded = shift if bound is None else bound * math.tanh(shift / bound)
        weights.append(p * math.exp(bounded / beta))
    return normalised(weights)


def disagreement(informed: Floats, plain: Floats, floor: float) -> float:
    """Jensen-Shannon divergence of two floored distributions."""
    return sum(generalised_jsd([max(p, floor) for p in plain], [max(p, floor) for p in informed], 0.5))


def barycenter(
    informed: Floats, plain: Floats, beta: float, alpha_max: float, floor: float
) -> tuple[float, list[float]]:
    """Share of the plain distribution, and the weighted geometric mean."""
    d = disagreement(informed, plain, floor)
    alpha = (1 / (1 + math.exp(-beta * d)) - 0.5) * 2 * alpha_max
    pairs = zip(informed, plain, strict=True)
    return alpha, normalised([max(i, floor) ** (1 - alpha) * max(p, floor) ** alpha for i, p in pairs])
