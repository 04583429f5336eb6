"""What was measured, as data: one JSON file for every claim, in which each run is an entry.

An entry holds its whole command as `key`: what was measured with another command, before the claim was changed, is
measured anew and replaced, and nothing is measured twice.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dllm_sd.files.writing import write_file

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
Stage = Literal["base", "probe", "cost", "tune", "final"]
Name = tuple[Stage, str, str, int]
"""Stage, row, setting and seed."""


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
    """What was measured, by name; accuracies in percent, entropy in nats a token, ``seconds`` by the clock."""
    made: Mapping[str, Any] = field(default_factory=dict)
    """Date, commit and versions."""
    found: Mapping[str, Any] = field(default_factory=dict)
    """Of a probe: its verdict and its premise; of a run that could not go on: why, as ``stopped``."""

    @property
    def name(self) -> Name:
        """What it is a measurement of."""
        return self.stage, self.row, self.setting, self.seed


class Records:
    """The records of a claim, in its file."""

    def __init__(self, file: Path) -> None:
        """Read what the file holds, if it is there."""
        self.file = file
        lines = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        self._records = {record.name: record for record in (Record(**line) for line in lines)}

    def find(self, name: Name, key: str, bases: Mapping[str, str]) -> Record | None:
        """The record of this name, if it is of this very command and of these bases, given by digest.

        A record from before bases were noted counts.
        """
        record = self._records.get(name)
        if record is None or record.key != key or record.made.get("bases", bases) != bases:
            return None
        return record

    def add(self, record: Record) -> None:
        """Add or replace a record, and write the file."""
        self._records[record.name] = record
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.file, json.dumps([asdict(one) for one in self._records.values()], indent=1) + "\n")

    def of(self, stage: Stage, row: str) -> list[Record]:
        """All records of a stage of a row."""
        return [one for one in self._records.values() if (one.stage, one.row) == (stage, row)]


def results_of(claim: str, folder: Path = RESULTS) -> Records:
    """The records of a claim."""
    return Records(folder / f"{claim}.json")
