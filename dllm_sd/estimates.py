"""Estimates from graded attempts: pass@k, the majority's verdict, and the interval of a share."""

import math
from collections import Counter
from collections.abc import Sequence


def pass_at_k(attempts: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of ``k`` attempts is correct (arXiv 2107.03374, Eq. 1)."""
    return 1.0 - math.comb(attempts - correct, k) / math.comb(attempts, k)


def majority(parsed: Sequence[str | None], correct: Sequence[bool]) -> bool:
    """Whether the answer that most attempts gave is right; the first of equals counts, no answer is no vote."""
    votes = Counter(answer for answer in parsed if answer is not None)
    if not votes:
        return False
    chosen = votes.most_common(1)[0][0]
    return correct[parsed.index(chosen)]


def wilson_interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a share observed over ``n`` independent problems (Wilson, 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
