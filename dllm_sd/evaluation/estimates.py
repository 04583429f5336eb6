"""Estimates from graded attempts: pass@k, the majority's verdict, and the interval of a share."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def pass_at_k(attempts: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of ``k`` attempts is correct (arXiv 2107.03374, Eq. 1)."""
    return 1.0 - math.comb(attempts - correct, k) / math.comb(attempts, k)


def majority(parsed: Sequence[str | None], correct: Sequence[bool]) -> bool:
    """Whether the most frequent answer is right; ties go to the answer given first, unparsed attempts do not vote."""
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


def in_percent(share: float) -> str:
    """A share as people read it everywhere, such as ``58.59 %``."""
    return f"{100 * share:.2f} %"


def figures(
    sizes: Sequence[int], right: Sequence[int], scores: Sequence[float], votes: Callable[[int], Iterable[bool]]
) -> dict[str, Any]:
    """Compute the metrics of graded attempts, each a mean over problems.

    ``accuracy`` is avg@k, where k is the smallest number of attempts at a problem; pass@k is given for powers of two up
    to k and for k itself, and maj@k takes the first k attempts of each problem.

    Args:
        sizes: how many attempts each problem has.
        right: how many of them are correct.
        scores: the mean of their scores.
        votes: given k, whether the majority of a problem's first k attempts is right; asked for k above 1 only.
    """
    n, k = len(sizes), min(sizes)
    accuracy = _mean((hits / size for size, hits in zip(sizes, right, strict=True)), n)
    pass_at = {
        str(j): _mean((pass_at_k(size, hits, j) for size, hits in zip(sizes, right, strict=True)), n) for j in _up_to(k)
    }
    tree: dict[str, Any] = {
        "n": n,
        "accuracy": accuracy,
        "ci95": list(wilson_interval(accuracy, n)),
        "score": _mean(scores, n),
        "generations": sum(sizes),
        "pass_at_k": pass_at,
    }
    if k > 1:
        tree |= {"avg_at_k": {str(k): accuracy}, "maj_at_k": {str(k): _mean(map(float, votes(k)), n)}}
    return tree


def _up_to(k: int) -> list[int]:
    return sorted({2**power for power in range(k.bit_length())} | {k})


def _mean(values: Iterable[float], n: int) -> float:
    return math.fsum(values) / n
