"""The comparison of two evaluations on the same problems: difference of accuracies, interval and p-value."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_sd.errors import InputError
from dllm_sd.evaluation.generations import stream_generations
from dllm_sd.evaluation.recording import VERDICTS
from dllm_sd.randomness import fold, key_tensor, make_key, uniform

_BATCH = 2**22  # numbers drawn at a time

AttemptVerdicts = Mapping[str, Sequence[bool]]
"""Whether each attempt was correct, by the id of its problem."""


@dataclass(frozen=True)
class ContingencyTable:
    """Numbers of problems that both, one or none of the evaluations solved: the table of McNemar's test."""

    both: int
    only_a: int
    only_b: int
    neither: int


@dataclass(frozen=True)
class Comparison:
    """``b`` against ``a`` on the ``n`` problems that both contain; a problem counts with the mean of its attempts.

    ``difference`` is accuracy b - accuracy a with the 95 % interval ``ci95``. ``counts`` and ``p_value`` (McNemar's
    exact test) are None where a problem has several attempts. ``alone_a`` and ``alone_b`` are the numbers of
    problems that only one of the two contains; they are left out.
    """

    n: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    ci95: tuple[float, float]
    counts: ContingencyTable | None
    p_value: float | None
    alone_a: int
    alone_b: int


def compare(a: AttemptVerdicts, b: AttemptVerdicts, *, seed: int = 0, resamples: int = 10_000) -> Comparison:
    """Compare two evaluations problem by problem; the result depends on verdicts and ``seed``, not on their order.

    Raises:
        InputError: if they share no problem.
    """
    shared = sorted(a.keys() & b.keys())
    if not shared:
        raise InputError(
            f"the two evaluations share no problem ({_some(a)} against {_some(b)}); compare evaluations on one task"
        )
    right_a, right_b = (torch.tensor([_share(v[i]) for i in shared], dtype=torch.float64) for v in (a, b))
    single = all(len(v[problem]) == 1 for v in (a, b) for problem in shared)
    counts = _counts([(a[i][0], b[i][0]) for i in shared]) if single else None
    return Comparison(
        n=len(shared),
        accuracy_a=math.fsum(right_a.tolist()) / len(shared),
        accuracy_b=math.fsum(right_b.tolist()) / len(shared),
        difference=math.fsum((right_b - right_a).tolist()) / len(shared),
        ci95=bootstrap_interval(right_b - right_a, seed=seed, resamples=resamples),
        counts=counts,
        p_value=None if counts is None else mcnemar(counts.only_a, counts.only_b),
        alone_a=len(a) - len(shared),
        alone_b=len(b) - len(shared),
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's test (Psychometrika 12, 1947), by the exact binomial instead of chi-square.

    If neither of the two were better, each problem that only one of them solves would be a fair coin; the p-value is
    the chance of a split at least as uneven as ``only_a`` to ``only_b``.

    >>> round(mcnemar(10, 2), 4)
    0.0386
    """
    n, tail, ways = only_a + only_b, 0, 1
    for i in range(min(only_a, only_b) + 1):
        tail, ways = tail + ways, ways * (n - i) // (i + 1)  # ways is the binomial coefficient (n, i), exactly
    return min(1.0, 2 * tail / 2**n)


def bootstrap_interval(differences: Tensor, *, seed: int = 0, resamples: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of a mean of paired differences ``[n]`` by resampling the problems.

    Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13: a problem is drawn with the
    results of both evaluations, so that the pairing is kept.
    """
    values, n = differences.to(torch.float64), len(differences)
    rows = max(1, _BATCH // n)
    means = [
        values[resample(n, range(start, min(start + rows, resamples)), seed)].mean(dim=1)
        for start in range(0, resamples, rows)
    ]
    low, high = torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def resample(n: int, numbers: range, seed: int = 0) -> Tensor:
    """Return the problems of the bootstrap resamples with these ``numbers``, int64 ``[len(numbers), n]``."""
    keys = fold(key_tensor([make_key(seed, "bootstrap")]), torch.tensor(list(numbers), dtype=torch.int64))
    return (uniform(keys, n).to(torch.float64) * n).to(torch.int64)


def compare_files(a: Path, b: Path) -> dict[str, Comparison]:
    """Compare the generations in two files or folders, schedule by schedule.

    If each of them holds a single schedule, these two are compared, whatever their names.

    Raises:
        InputError: naming the file, and the remedy.
    """
    (left, digests_a), (right, digests_b) = (_read(find_generations(path)) for path in (a, b))
    for problem in digests_a.keys() & digests_b.keys():
        if digests_a[problem] != digests_b[problem]:
            raise InputError(f"{a} and {b} hold different problems with the id {problem!r}; evaluate the same task")
    if len(left) == len(right) == 1:
        (name_a, only_a), (name_b, only_b) = *left.items(), *right.items()
        return {name_a if name_a == name_b else f"{name_a} | {name_b}": compare(only_a, only_b)}
    if not left.keys() & right.keys():
        raise InputError(f"{a} and {b} share no schedule ({', '.join(left)} against {', '.join(right)}); decode alike")
    return {name: compare(left[name], right[name]) for name in left if name in right}


def _read(path: Path) -> tuple[dict[str, dict[str, list[bool]]], dict[str, Any]]:
    """Return whether attempts were correct, by schedule (``default`` if unnamed) and problem, and problems' digests.

    A problem's digest is the last ``digest`` among its lines; problems without one are left out.
    """
    verdicts: dict[str, dict[str, list[bool]]] = {}
    digests: dict[str, Any] = {}
    for item in stream_generations(path):
        verdicts.setdefault(item.schedule or "default", {}).setdefault(item.id, []).append(item.correct)
        digests[item.id] = item.fields.get("digest")
    return verdicts, {problem: digest for problem, digest in digests.items() if digest is not None}


def find_generations(path: Path) -> Path:
    """Return the file of verdicts: ``path`` itself, the generations in the folder or in its ``eval/TASK``, or else the
    verdicts of a run's final test.

    Raises:
        InputError: if the file does not exist, or there are several.
    """
    if not path.is_dir():
        if path.exists():
            return path
        raise InputError(f"there is no {str(path)!r}; name a folder with generations.jsonl or graded.jsonl, or a file")
    for pattern in ("", "eval/*/"):
        files = sorted(file for name in ("generations", "graded") for file in path.glob(f"{pattern}{name}.jsonl"))
        if len(files) > 1:
            raise InputError(f"{path} holds {', '.join(str(file.relative_to(path)) for file in files)}; name one file")
        if files:
            return files[0]
    if (tested := path / VERDICTS).is_file():
        return tested
    raise InputError(
        f"{path} holds no generations.jsonl, graded.jsonl or {VERDICTS}; evaluate it first: dllm-sd eval {path}"
    )


def _counts(pairs: Sequence[tuple[bool, bool]]) -> ContingencyTable:
    return ContingencyTable(
        *(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False)))
    )


def _share(correct: Sequence[bool]) -> float:
    return sum(correct) / len(correct)


def _some(verdicts: AttemptVerdicts) -> str:
    return next((repr(problem) for problem in verdicts), "nothing")
