"""What a run leaves out: the table of its names and words, the sums over a run, and what is said of them.

Whatever is not learnt from has a name among the metrics, stands in `report.json` as `left_out`, and is told at the end.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

LEFT_OUT_WORDS = {
    "data/in_test": "rows of task.data that occur in the test split too",
    "data/in_dev": "rows of task.data that occur in the dev split too",
    "rollouts/too_long": "problems longer than max_prompt",
    "rollouts/long_reference": "problems with a reference longer than decode.length",
    "rollouts/rejected": "rollouts rejected by method.gate",
    "rollouts/no_hint": "rollouts without a hint",
    "rollouts/long_hint": "rollouts with too long a hint",
    "writers/damaged": "stored texts of writers that were damaged and asked for again",
    "calibration/skipped": "problems of the calibration without a final answer to read",
    "bank/too_long": "problems of the first bank longer than max_prompt",
    "eval/too_long": "dev problems longer than max_prompt",
}
"""What is left out, by the name of its metric."""
REASONS = {
    "writers/dropped/": "texts that a writer did not give",
    "bank/left_out/": "entries that the bank does not take",
    "bank/skipped/": "answers that the bank can take nothing from",
}
"""The same of what is counted by reason: the name goes on with the reason."""
_LATEST = ("rollouts/too_long", "eval/too_long")
"""Of these the last value counts: they are sums over the run, or the same at every evaluation."""
_OF_ROLLOUTS = ("rollouts/", "writers/")
"""Metrics of rollouts, which all updates show that these serve."""


def is_left_out(name: str) -> bool:
    """Whether a metric counts what is left out."""
    return name in LEFT_OUT_WORDS or name.startswith(tuple(REASONS))


def left_out(lines: Iterable[Mapping[str, Any]], passes: int) -> dict[str, int]:
    """How much a run left out, by name; what it never met has none.

    Args:
        lines: of its metrics.
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
    """The counts with what was left out, such as ``12 rollouts rejected by method.gate``."""
    said: list[str] = []
    for name, count in counts.items():
        start = next((start for start in REASONS if name.startswith(start)), "")
        words = f"{REASONS[start]} ({name.removeprefix(start)})" if start else LEFT_OUT_WORDS.get(name, name)
        said += [f"{count} {words}"] if count else []
    return said
