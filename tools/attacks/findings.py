"""The outcomes of attacks, and their table."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Outcome = Literal["ok", "sentence", "FAULT"]


@dataclass(frozen=True)
class Finding:
    """One attack and its outcome."""

    kind: str
    """kills, writes, damage, races or configs."""
    case: str
    attack: str
    outcome: Outcome
    words: str = ""
    """The sentence, or what was wrong."""


def counts(findings: Iterable[Finding]) -> dict[str, Counter[str]]:
    """Outcomes by kind and case."""
    table: dict[str, Counter[str]] = {}
    for finding in findings:
        table.setdefault(f"{finding.kind}: {finding.case}", Counter())[finding.outcome] += 1
    return table


def report(findings: Sequence[Finding]) -> Iterator[str]:
    """The table of counts, a row a case."""
    table = counts(findings)
    yield f"{'':40}{'ok':>8}{'sentence':>10}{'FAULT':>8}"
    rows = [*table.items(), ("all", sum(table.values(), Counter()))]
    for name, row in rows:
        yield f"{name:40}{row['ok']:>8}{row['sentence']:>10}{row['FAULT']:>8}"


def append(finding: Finding, file: Path) -> None:
    """Append a finding to a file, as a line of JSON."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(asdict(finding)) + "\n")


def spread(count: int, points: int | None) -> list[int]:
    """Up to ``points`` of ``count`` numbers, evenly spread from the first to the last; None takes all."""
    if points is None or points >= count:
        return list(range(count))
    if points < 2:
        return [count // 2][:points]
    return sorted({round(i * (count - 1) / (points - 1)) for i in range(points)})
