"""Graded attempts on disk: every one is written as it ends, so that a stopped evaluation goes on where it stopped."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dllm_sd.errors import InputError, on_one_line
from dllm_sd.files.reading import read_own
from dllm_sd.files.typed_json import build, own_json
from dllm_sd.files.writing import replacing, write_file
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
    ended: bool | None = None
    """Whether it has an end token; None where nobody knows."""

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
        """Read what is there; a line that a crash cut off in the file of this process is removed.

        Raises:
            InputError: naming the file and the line that holds no attempt.
        """
        self.folder, self.schedule = folder, schedule
        self._file = folder / f".generations.{rank}.jsonl"
        _cut_half_line(self._file)
        self.lines = {(line.id, line.attempt): line for name, line in _read(folder) if name == schedule}
        """What is written already, by problem and attempt."""
        self.problems: list[str] = []
        """The ids of all that was evaluated, once it was."""

    def append(self, line: Line) -> None:
        """Write one attempt down, safe from a crash of the program."""
        with self._file.open("ab") as file:
            file.write(_text(self.schedule, line))


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make ``folder`` ready: what it holds of an evaluation with other settings is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted, file = json.dumps(settings, indent=1, sort_keys=True).encode(), folder / SETTINGS
    if not file.is_file() or file.read_bytes() != wanted:
        for old in (*_partial(folder), folder / GENERATIONS, folder / "report.json"):
            old.unlink(missing_ok=True)
        write_file(file, wanted)


def finish(
    folder: Path, order: Sequence[str], schedules: Sequence[str] | None = None, attempts: int | None = None
) -> None:
    """Gather the attempts of all processes in generations.jsonl: by schedule, problem (in ``order``) and attempt.

    Args:
        folder: of the evaluation.
        order: ids of the problems that were evaluated.
        schedules: names of the decoding schedules; None takes those that are found.
        attempts: at each problem; None takes as many as the problem with most of them has.

    Raises:
        InputError: if an attempt is missing; nothing is written or removed.
    """
    found = {(name, line.id, line.attempt): line for name, line in _read(folder)}
    names = list(dict.fromkeys(name for name, _, _ in found)) if schedules is None else list(schedules)
    count = attempts or max((attempt + 1 for _, _, attempt in found), default=1)
    wanted = [(name, problem, i) for name in names for problem in dict.fromkeys(order) for i in range(count)]
    if missing := [key for key in wanted if key not in found]:
        name, problem, i = missing[0]
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(wanted)} attempts, the first of them attempt {i} at problem "
            f"{problem:.80} under {name:.40}; run the same command again to complete it"
        )
    with replacing(folder / GENERATIONS) as file:
        for key in wanted:
            file.write(_text(key[0], found[key]))
    for old in _partial(folder):
        old.unlink()


def _text(schedule: str, line: Line) -> bytes:
    """One line; half of a surrogate pair, which UTF-8 cannot hold, as JSON escapes it."""
    tree = {"schedule": schedule, **asdict(line)}
    return f"{json.dumps(tree, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace")


def _partial(folder: Path) -> list[Path]:
    return sorted(folder.glob(".generations.*.jsonl"))


def _cut_half_line(file: Path) -> None:
    """What a crash left behind the last line break would be glued to the next line."""
    content = _content(file)
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)


def _content(file: Path) -> bytes:
    """All that stands in a file of attempts, nothing where there is none."""
    if not os.path.lexists(file):
        return b""
    return read_own(file, "remove it, and what it held is decoded again", sys.maxsize)


def _read(folder: Path) -> Iterator[tuple[str, Line]]:
    for file in (folder / GENERATIONS, *_partial(folder)):
        *lines, _ = _content(file).split(b"\n")  # the last is empty, or was cut off
        for number, text in enumerate(lines, 1):
            try:
                tree = own_json(text)
                schedule = build(str, tree.pop("schedule", None) if isinstance(tree, dict) else tree, "schedule")
                yield schedule, build(Line, tree)
            except ValueError as error:
                raise InputError(
                    f"{file} line {number} holds no graded attempt ({on_one_line(error):.200}); remove the file, and "
                    "what it held is decoded again"
                ) from error
