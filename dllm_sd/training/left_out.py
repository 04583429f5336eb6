"""Problems, rollouts and texts that a run leaves out, summed over the run and described in words.

Each kind has a metric. The sums are in `report.json` under `left_out`, and a run prints them at its end.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

LEFT_OUT_WORDS = {
    "data/in_test": "rows of task.data that occur in the test split too",
    "data/in_dev": "rows of task.data that occur in the dev split too",
    "rollouts/too_long": "problems longer than max_prompt",
    "rollouts/grader_failed": "completions on which task.grader failed",
    "rollouts/long_reference": "problems with a reference longer than decode.length",
    "rollouts/rejected": "rollouts rejected by method.gate",
    "rollouts/no_hint": "rollouts without a hint",
    "rollouts/long_hint": "rollouts with too long a hint",
    "writers/damaged": "stored texts of writers that were damaged and asked for again",
    "calibration/skipped": "problems of the calibration without a final answer to read",
    "bank/too_long": "problems of the first bank longer than max_prompt",
    "eval/too_long": "dev problems longer than max_prompt",
}
"""What a metric counts as left out, by the name of the metric."""
REASONS = {
    "writers/dropped/": "texts that a writer did not give",
    "bank/left_out/": "entries that the bank does not take",
    "bank/skipped/": "answers that the bank can take nothing from",
}
"""The same for metrics that are counted by reason: the reason follows this prefix in the name."""
_LATEST = ("rollouts/too_long", "eval/too_long")
"""Metrics whose last value counts, since they are sums over the run or equal at every evaluation."""
_OF_ROLLOUTS = ("rollouts/", "writers/")
"""Metrics of rollouts: all updates that use the same rollouts log the same values."""


def is_left_out(name: str) -> bool:
    """Whether a metric counts what is left out."""
    return name in LEFT_OUT_WORDS or name.startswith(tuple(REASONS))


def left_out(lines: Iterable[Mapping[str, Any]], passes: int) -> dict[str, int]:
    """How much a run left out, by the name of the metric; counts of 0 are omitted.

    Args:
        lines: lines of its metrics.jsonl.
        passes: updates that share their rollouts.
    """
    total = Counter[str]()
    for line in lines:
        fresh = line["update"] % passes == 1 % passes
        for name in filter(is_left_out, line):
            if name in _LATEST:
                total[name] = line[name]
            elif fresh or not name.startswith(_OF_ROLLOUTS):
                total[name] += line[name]
    return {name: count for name, count in total.items() if count}


def in_words(counts: Mapping[str, int]) -> list[str]:
    """The counts as phrases such as ``12 rollouts rejected by method.gate``."""
    phrases: list[str] = []
    for name, count in counts.items():
        start = next((start for start in REASONS if name.startswith(start)), "")
        what = f"{REASONS[start]} ({name.removeprefix(start)})" if start else LEFT_OUT_WORDS.get(name, name)
        phrases += [f"{count} {what}"] if count else []
    return phrases
