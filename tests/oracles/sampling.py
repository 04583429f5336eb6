"""Plain sampling in Python floats: filter after temperature, top-k and top-p, then the inverse of the distribution."""

import math
from collections.abc import Sequence


def kept(logits: Sequence[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Probabilities of what may be sampled; 0 for the rest."""
    scaled = [x / temperature for x in logits]
    if top_k:
        least = sorted(scaled, reverse=True)[min(top_k, len(scaled)) - 1]
        scaled = [x if x >= least else -math.inf for x in scaled]
    probability = _softmax(scaled)
    if top_p < 1:
        before = 0.0
        for token in sorted(range(len(scaled)), key=lambda i: -scaled[i]):
            if before >= top_p:
                scaled[token] = -math.inf
            before += probability[token]
    return _softmax(scaled)


def inverse(probability: Sequence[float], u: float) -> int:
    """The first token at which the summed probability reaches ``u``."""
    total = 0.0
    for token, share in enumerate(probability):
        total += share
        if share and total >= u:
            return token
    return max(i for i, share in enumerate(probability) if share)


def _softmax(scaled: Sequence[float]) -> list[float]:
    top = max(scaled)
    weights = [math.exp(x - top) for x in scaled]
    return [weight / sum(weights) for weight in weights]
