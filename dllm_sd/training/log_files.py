"""The log files of a run: metrics.jsonl, samples.jsonl, traces.jsonl; written, cut at a resume, read and checked."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

from dllm_sd.errors import InputError
from dllm_sd.files.reading import damaged_file, open_regular, read_own
from dllm_sd.files.typed_json import own_json
from dllm_sd.training.left_out import is_left_out, left_out

METRICS_FILE = "metrics.jsonl"
LOG_FILES = (METRICS_FILE, "samples.jsonl", "traces.jsonl")
STARTS = "environment.jsonl"
"""Holds a line for each start of the run; it is no log of updates, so it is neither cut nor compared at a resume."""
REMEDY = "correct it, remove the file, or discard the run with resume=fresh"


WATCHED = ("loss", "student/entropy", "eval/accuracy")
"""Metrics whose course says whether a run goes well."""
FEW = 6
"""Updates of which fewer say nothing about a course."""


@dataclass(frozen=True)
class Course:
    """Where a metric began and where it ended: means of the first and the last third of a run; accuracies as such."""

    first: float
    last: float


def course_of(name: str, values: Sequence[float]) -> Course | None:
    """The course of a metric; None where it has too few values."""
    if name == "eval/accuracy":
        return Course(values[0], values[-1]) if len(values) > 1 else None
    third = len(values) // 3
    return Course(fmean(values[:third]), fmean(values[-third:])) if len(values) >= FEW else None


@dataclass(frozen=True)
class LogSums:
    """What the lines of metrics.jsonl come to."""

    left_out: Mapping[str, int] = field(default_factory=dict)
    """What the run left out (`left_out.left_out`)."""
    unchanged: bool = False
    """Whether the run has made optimizer steps, none of which changed a weight."""
    last_accuracy: float | None = None
    """Dev accuracy of the last evaluation."""
    courses: Mapping[str, "Course"] = field(default_factory=dict)
    """How the metrics in `WATCHED` went, by name; none of fewer than `FEW` values, accuracies of fewer than two."""


class MetricsLog:
    """Appends one JSON object per update; a resumed run first removes the lines after its checkpoint."""

    def __init__(self, run: Path, update: int, logged: int | None = None) -> None:
        """Continue after ``update`` finished updates (-1 starts new files).

        The metrics of the last update are not there yet if ``logged``, which else is ``update``, is the one before.

        Raises:
            InputError: if a file was not written by a run; then nothing is changed.
        """
        self.metrics, self.samples, self.traces = files = [run / name for name in LOG_FILES]
        ends = {file: end_of(file, _last(file.name, update, logged)) for file in files if file.exists()}
        for file, end in ends.items():
            os.truncate(file, end)

    def write_start(self, values: Mapping[str, Any]) -> None:
        """Append what a start of the run is made with."""
        _append(self.metrics.with_name(STARTS), values)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append the metrics of an update."""
        _append(self.metrics, values)

    def summed_up(self, passes: int) -> "LogSums":
        """What the run says of itself in its metrics.

        Args:
            passes: updates that share their rollouts.

        Raises:
            InputError: naming the file and the line that was not written by a run.
        """
        changed: list[bool] = []
        seen: dict[str, list[float]] = {name: [] for name in WATCHED}

        def lines() -> Iterator[dict[str, Any]]:
            for line in read_log(self.metrics):
                if line["update"] > 0:  # update 0 is the evaluation before training; a skipped update has no loss
                    changed.append(line.get("loss") is not None and "weights_unchanged" not in line)
                for name, values in seen.items():
                    values += [line[name]] if line.get(name) is not None else []
                yield line

        counts = left_out(lines(), passes)
        accuracies = seen["eval/accuracy"]
        courses = {name: course for name, values in seen.items() if (course := course_of(name, values)) is not None}
        return LogSums(counts, bool(changed) and not any(changed), accuracies[-1] if accuracies else None, courses)

    def write_sample(self, sample: Mapping[str, Any]) -> None:
        """Append one rollout with its text."""
        _append(self.samples, sample)

    def write_traces(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Append traced rollouts (`UpdateTrace.entries`)."""
        for entry in entries:
            _append(self.traces, entry)

    def lines(self) -> Iterator[dict[str, Any]]:
        """The metrics that the run has logged so far, by update.

        Raises:
            InputError: naming the file and the line that was not written by a run.
        """
        return read_log(self.metrics) if self.metrics.exists() else iter(())


def end_of(file: Path, update: int) -> int:
    """The byte offset after the last line of ``update`` in a JSON-lines file whose updates never decrease.

    An incomplete line at the end is ignored. Only the lines after that offset, and the one before it, are parsed.

    Raises:
        InputError: if the file was not written by a run.
    """
    content = read_own(file, REMEDY, sys.maxsize) if update >= 0 else b""
    end = content.rfind(b"\n") + 1  # what follows the last newline is an incomplete line
    _refuse_foreign_lines(file, content[:end])
    while end:
        start = content.rfind(b"\n", 0, end - 1) + 1
        if _update_in(file, content, start, end) <= update:
            break
        end = start
    return end


def log_sums(run: Path, update: int, logged: int | None = None) -> dict[str, str]:
    """Flush the logs to disk; return the SHA-256 of each up to ``update``, which a checkpoint stores, by file name.

    Metrics count up to ``logged``, as in `MetricsLog`.
    """
    names = [name for name in LOG_FILES if (run / name).exists()]
    return {name: _sum(run / name, _last(name, update, logged), flush=True) for name in names}


def _last(name: str, update: int, logged: int | None) -> int:
    """The last update in the log of this name."""
    return update if logged is None or name != METRICS_FILE else logged


def check_logs(run: Path, update: int, sums: Mapping[str, str] | None, logged: int | None = None) -> None:
    """Refuse logs whose content up to ``update`` has changed since the checkpoint of ``update`` was saved.

    Args:
        run: the run folder.
        update: number of finished updates.
        sums: the result of `log_sums` at that time. With None (a checkpoint of an earlier version, or resume=force) it
            is only checked that every line is one of a run.
        logged: as in `MetricsLog`.

    Raises:
        InputError: naming the file. Nothing is changed.
    """
    for name in LOG_FILES if sums is None else ():
        if (run / name).exists():
            for _ in read_log(run / name):
                pass
    names = [name for name in LOG_FILES if (run / name).exists()]
    current = {name: _sum(run / name, _last(name, update, logged)) for name in names}
    for name, saved in (sums or {}).items():
        if current.get(name) != saved:
            raise InputError(
                f"{run / name} does not hold what it held after update {update}, when the checkpoint was saved; put it "
                "back, use resume=force to go on without what is missing, or resume=fresh to begin again"
            )


def _sum(file: Path, update: int, flush: bool = False) -> str:
    end = end_of(file, update)
    with file.open("r+b" if flush else "rb") as handle:
        if flush:
            os.fsync(handle.fileno())
        return hashlib.sha256(handle.read(end)).hexdigest()


def _refuse_foreign_lines(file: Path, lines: bytes) -> None:
    """Refuse lines that do not begin and end as JSON objects, by counting over the whole file."""
    count = lines.count(b"\n")
    if lines and (lines.count(b"}\n") < count or lines.count(b"\n{") < count - 1 or not lines.startswith(b"{")):
        wrong = next(i for i, line in enumerate(lines.split(b"\n"), 1) if line[:1] + line[-1:] != b"{}")
        raise _foreign_line(file, wrong)


def read_log(file: Path) -> Iterator[dict[str, Any]]:
    """Iterate over the lines of a log; an incomplete one at the end is ignored.

    Raises:
        InputError: naming the file and the line that was not written by a run.
    """
    try:
        with open_regular(file) as content:
            for number, line in enumerate(content, 1):
                if line.endswith(b"\n"):
                    yield _parsed(line) or _refuse(file, number)
    except OSError as error:
        raise damaged_file(file, error, REMEDY) from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Parse one line of a log; None unless it is an object whose update and left-out counts are whole numbers."""
    try:
        tree = own_json(line)
    except ValueError:
        return None
    if not isinstance(tree, dict) or type(tree.get("update")) is not int:
        return None
    counts = [tree[name] for name in filter(is_left_out, tree)]
    return tree if all(type(count) is int and count >= 0 for count in counts) else None


def _update_in(file: Path, content: bytes, start: int, end: int) -> int:
    line = _parsed(content[start:end]) or _refuse(file, content.count(b"\n", 0, start) + 1)
    return line["update"]


def _refuse(file: Path, line: int) -> NoReturn:
    raise _foreign_line(file, line)


def _foreign_line(file: Path, line: int) -> InputError:
    return InputError(f"{file}:{line}: this line was not written by a run; {REMEDY}")


def _append(file: Path, values: Mapping[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(values, ensure_ascii=False) + "\n")
