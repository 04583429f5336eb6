"""Graded attempts on disk: every one is written as it ends, so that a stopped evaluation goes on where it stopped."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dllm_sd.tasks.task import Grade, Problem

GENERATIONS, SETTINGS = "generations.jsonl", "settings.json"


@dataclass(frozen=True)
class Line:
    """One graded attempt at a problem."""

    id: str
    """Of the problem."""
    digest: str
    """Of the problem's fields: two generated problems may share an id."""
    attempt: int
    generation: str
    correct: bool
    score: float
    parsed: str | None
    length: int
    """Tokens, up to and including the end."""
    steps: int
    """Decoding steps."""

    @property
    def grade(self) -> Grade:
        """The verdict."""
        return Grade(self.correct, self.score, self.parsed)


def digest(problem: Problem) -> str:
    """Twelve hexadecimal digits that tell problems apart by their fields."""
    text = json.dumps(problem.fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Record:
    """The attempts of one decoding schedule in an evaluation folder; each process appends to a file of its own."""

    def __init__(self, folder: Path, schedule: str, rank: int) -> None:
        self.folder, self.schedule = folder, schedule
        self.lines = {(line.id, line.attempt): line for name, line in _read(folder) if name == schedule}
        """What is written already, by problem and attempt."""
        self._file = folder / f".generations.{rank}.jsonl"

    def append(self, line: Line) -> None:
        """Write one attempt down, safe from a crash of the program."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"schedule": self.schedule, **asdict(line)}, ensure_ascii=False) + "\n")


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make ``folder`` ready: what it holds of an evaluation with other settings is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted, file = json.dumps(settings, indent=1, sort_keys=True), folder / SETTINGS
    if not file.is_file() or file.read_text(encoding="utf-8") != wanted:
        for old in (*_partial(folder), folder / GENERATIONS, folder / "report.json"):
            old.unlink(missing_ok=True)
        file.write_text(wanted, encoding="utf-8")


def finish(folder: Path, order: Iterable[str]) -> None:
    """Gather the attempts of all processes in generations.jsonl: by schedule, problem (in ``order``) and attempt."""
    place = {problem: i for i, problem in enumerate(order)}
    found = {(name, line.id, line.attempt): (name, line) for name, line in _read(folder)}
    schedules = list(dict.fromkeys(name for name, _, _ in found))
    rows = sorted(found.values(), key=lambda row: (schedules.index(row[0]), place.get(row[1].id, -1), row[1].attempt))
    partial = folder / f".{GENERATIONS}.partial"
    with partial.open("w", encoding="utf-8") as file:
        for name, line in rows:
            file.write(json.dumps({"schedule": name, **asdict(line)}, ensure_ascii=False) + "\n")
    partial.replace(folder / GENERATIONS)
    for old in _partial(folder):
        old.unlink()


def _partial(folder: Path) -> list[Path]:
    return sorted(folder.glob(".generations.*.jsonl"))


def _read(folder: Path) -> Iterator[tuple[str, Line]]:
    names = {f.name for f in fields(Line)}
    for file in (folder / GENERATIONS, *_partial(folder)):
        for text in file.read_text(encoding="utf-8").split("\n") if file.is_file() else ():
            try:
                tree = json.loads(text)
            except ValueError:  # cut off by a crash
                continue
            yield tree["schedule"], Line(**{key: value for key, value in tree.items() if key in names})
