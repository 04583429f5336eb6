"""Graded attempts on disk: each is written when it ends, so that a stopped evaluation can be resumed."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dllm_sd.errors import InputError, on_one_line
from dllm_sd.files.reading import cut_half_line, read_own
from dllm_sd.files.typed_json import build, own_json
from dllm_sd.files.writing import replacing, write_file
from dllm_sd.tasks.task import Grade, Problem

GENERATIONS, SETTINGS = "generations.jsonl", "settings.json"
VERDICTS = "verdicts.jsonl"
"""The verdicts of a run's final test with its best weights, in the run folder."""
MOST_VERDICTS = 20_000
"""Problems of which a schedule's verdicts are kept."""
REMEDY = "remove it, and what it held is decoded again"


@dataclass(frozen=True)
class GradedAttempt:
    """One graded attempt at a problem."""

    id: str
    """Id of the problem."""
    digest: str
    """Hash of the problem's fields, since two generated problems may share an id."""
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
    """Whether the completion has an end token; None if unknown."""

    @property
    def grade(self) -> Grade:
        """The verdict."""
        return Grade(self.correct, self.score, self.parsed)


@dataclass(frozen=True)
class Verdict:
    """Whether each attempt at a problem was correct."""

    id: str
    digest: str
    correct: tuple[bool, ...]


def write_verdicts(file: Path, tests: Mapping[str, Sequence[Verdict]]) -> None:
    """Write verdicts by schedule, in the form of generations without their text, so that two runs can be compared.

    Nothing is written where there was no test.
    """
    lines = [
        {"schedule": schedule, "id": verdict.id, "digest": verdict.digest, "attempt": attempt, "correct": correct}
        for schedule, verdicts in tests.items()
        for verdict in verdicts[:MOST_VERDICTS]
        for attempt, correct in enumerate(verdict.correct)
    ]
    if lines:
        write_file(file, "".join(f"{json.dumps(line)}\n" for line in lines))


def digest(problem: Problem) -> str:
    """Return a hash of a problem's fields, twelve hexadecimal digits."""
    text = json.dumps(problem.fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Record:
    """The attempts of one decoding schedule in an evaluation folder; each process appends to a file of its own."""

    def __init__(self, folder: Path, schedule: str, rank: int) -> None:
        """Read the stored attempts; an incomplete last line in the file of this process is removed.

        Raises:
            InputError: naming the file and the line that holds no attempt.
        """
        self.folder, self.schedule = folder, schedule
        self._file = folder / f".generations.{rank}.jsonl"
        cut_half_line(self._file, REMEDY)
        self.lines = {(line.id, line.attempt): line for name, line in _read(folder) if name == schedule}
        """Stored attempts, by problem and attempt."""
        self.problems: list[str] = []
        """The ids of all evaluated problems; set when the evaluation ends."""

    def append(self, line: GradedAttempt) -> None:
        """Append one attempt to the file, so that a crash of the program does not lose it."""
        with self._file.open("ab") as file:
            file.write(_text(self.schedule, line))


def recorded_model(folder: Path) -> str | None:
    """The run or model whose evaluation ``folder`` holds; None if it holds none that says so."""
    file = folder / SETTINGS
    if not file.is_file():
        return None
    try:
        tree = own_json(read_own(file, "remove it, and what is beside it is replaced"))
    except ValueError:
        return None
    evaluated = tree.get("evaluated") if isinstance(tree, dict) else None
    return evaluated if isinstance(evaluated, str) else None


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Prepare ``folder``: files of an evaluation with other settings are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted, file = json.dumps(settings, indent=1, sort_keys=True).encode(), folder / SETTINGS
    if not file.is_file() or file.read_bytes() != wanted:
        for old in (*_partial(folder), folder / GENERATIONS, folder / "report.json"):
            old.unlink(missing_ok=True)
        write_file(file, wanted)


def finish(
    folder: Path, order: Sequence[str], schedules: Sequence[str] | None = None, attempts: int | None = None
) -> None:
    """Merge the attempts of all processes into generations.jsonl: by schedule, problem (in ``order``) and attempt.

    Args:
        folder: the folder of the evaluation.
        order: ids of the problems that were evaluated.
        schedules: names of the decoding schedules; None takes all stored ones.
        attempts: number of attempts at each problem; None takes the largest stored number.

    Raises:
        InputError: if an attempt is missing; nothing is written or removed.
    """
    stored = {(name, line.id, line.attempt): line for name, line in _read(folder)}
    names = list(dict.fromkeys(name for name, _, _ in stored)) if schedules is None else list(schedules)
    count = attempts or max((attempt + 1 for _, _, attempt in stored), default=1)
    wanted = [(name, problem, i) for name in names for problem in dict.fromkeys(order) for i in range(count)]
    if missing := [key for key in wanted if key not in stored]:
        name, problem, i = missing[0]
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(wanted)} attempts, the first of them attempt {i} at problem "
            f"{problem:.80} under {name:.40}; run the same command again to complete it"
        )
    with replacing(folder / GENERATIONS) as file:
        for key in wanted:
            file.write(_text(key[0], stored[key]))
    for old in _partial(folder):
        old.unlink()


def _text(schedule: str, line: GradedAttempt) -> bytes:
    """Return one line; lone surrogates, which UTF-8 cannot encode, are escaped as in JSON."""
    tree = {"schedule": schedule, **asdict(line)}
    return f"{json.dumps(tree, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace")


def _partial(folder: Path) -> list[Path]:
    return sorted(folder.glob(".generations.*.jsonl"))


def _content(file: Path) -> bytes:
    """Return the content of a file of attempts, empty if the file does not exist."""
    if not os.path.lexists(file):
        return b""
    return read_own(file, REMEDY, sys.maxsize)


def _read(folder: Path) -> Iterator[tuple[str, GradedAttempt]]:
    for file in (folder / GENERATIONS, *_partial(folder)):
        *lines, _ = _content(file).split(b"\n")  # the last is empty, or was cut off
        for number, text in enumerate(lines, 1):
            try:
                tree = own_json(text)
                schedule = build(str, tree.pop("schedule", None) if isinstance(tree, dict) else tree, "schedule")
                yield schedule, build(GradedAttempt, tree)
            except ValueError as error:
                raise InputError(
                    f"{file} line {number} holds no graded attempt ({on_one_line(error):.200}); remove the file, and "
                    "what it held is decoded again"
                ) from error
