"""What was measured, as data: one JSON file for every claim, in which each run is an entry.

An entry is found again by its `key`, which is the whole command, so that a claim that was changed is measured anew and
nothing is measured twice.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dllm_sd.files.writing import write_file

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
Stage = Literal["base", "probe", "cost", "tune", "final"]


@dataclass(frozen=True)
class Record:
    """One measurement of a row."""

    row: str
    stage: Stage
    """The base before training, a probe, the cost of an update, a run of the tuning, or one with a fresh seed."""
    key: str
    """The command without its run folder; ``LAB`` stands for the laboratory's folder."""
    setting: str = ""
    """The setting of the tuning grid."""
    seed: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    """What was measured, by name; accuracies in percent, entropy in nats a token, seconds of one core."""
    made: Mapping[str, Any] = field(default_factory=dict)
    """Date, commit and versions."""
    found: Mapping[str, Any] = field(default_factory=dict)
    """Of a probe: its verdict and its premise."""


class Records:
    """The records of a claim, in its file."""

    def __init__(self, file: Path) -> None:
        """Read what the file holds, if it is there."""
        self.file = file
        lines = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        self._records = {(line["stage"], line["row"], line["key"]): Record(**line) for line in lines}

    def find(self, stage: Stage, row: str, key: str) -> Record | None:
        """The record of this very command."""
        return self._records.get((stage, row, key))

    def add(self, record: Record) -> None:
        """Add or replace a record, and write the file."""
        self._records[record.stage, record.row, record.key] = record
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.file, json.dumps([asdict(one) for one in self._records.values()], indent=1) + "\n")

    def keep(self, wanted: set[tuple[str, str, str]]) -> None:
        """Drop records of commands that the claim no longer has."""
        kept = {name: one for name, one in self._records.items() if name in wanted}
        if len(kept) < len(self._records):
            self._records = kept
            write_file(self.file, json.dumps([asdict(one) for one in kept.values()], indent=1) + "\n")

    def of(self, stage: Stage, row: str) -> list[Record]:
        """All records of a stage of a row."""
        return [one for one in self._records.values() if (one.stage, one.row) == (stage, row)]


def results_of(claim: str, folder: Path = RESULTS) -> Records:
    """The records of a claim."""
    return Records(folder / f"{claim}.json")
