"""How the cases of a test are split between the two tiers."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest


def later(*cases: Any) -> list[Any]:
    """Cases of the second tier, as parameters; of several values where a case is a tuple."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]


def spread(cases: Iterable[Any], every: int) -> list[Any]:
    """Cases of one kind, as parameters: one of ``every`` that many is in the first tier."""
    return [pytest.param(case, marks=() if i % every == 0 else pytest.mark.slow) for i, case in enumerate(cases)]


def crossed(rows: Iterable[Any], columns: Iterable[Any]) -> list[Any]:
    """All pairs of two lists, as parameters: in the first tier few that name each value once, else in the second."""
    rows, columns = [*rows], [*columns]
    first = {(i % len(rows), i % len(columns)) for i in range(max(len(rows), len(columns)))}
    return [
        pytest.param(row, column, marks=() if (i, j) in first else pytest.mark.slow)
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]


def newest(cases: Mapping[Any, Collection[Any]]) -> list[Any]:
    """Cases by what they try, as parameters: in the first tier those that try something that none before them tries."""
    met, found = set[Any](), []
    for case, tried in cases.items():
        found.append(pytest.param(case, marks=pytest.mark.slow if met.issuperset(tried) else ()))
        met |= set(tried)
    return found
