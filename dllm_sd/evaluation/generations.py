"""Files of generations, one JSON object per line: reading, checking, grading and summarising them."""

import json
import math
import os
import zlib
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm_sd.errors import InputError
from dllm_sd.evaluation.estimates import figures, majority, wilson_interval
from dllm_sd.evaluation.tally import Tally
from dllm_sd.files.reading import open_unpacked, parse_json, text_lines, why_broken, why_no_object, why_unread
from dllm_sd.files.writing import replacing
from dllm_sd.tasks.task import Grade, Problem, Task

_NAMES = ("id", "attempt", "generation", "correct", "score", "parsed", "schedule")


@dataclass(frozen=True)
class Generation:
    """One graded attempt at one problem: a line of ``generations.jsonl`` or ``graded.jsonl``.

    ``schedule`` names the decoding settings, None where the file does not say. ``fields`` are the other
    fields of the line: length in tokens, decoding steps, the fields of the problem.
    """

    id: str
    attempt: int
    generation: str
    correct: bool
    score: float
    parsed: str | None = None
    schedule: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class InputLine:
    """One line of a file: ``where`` is ``FILE:LINE``, for messages."""

    where: str
    fields: Mapping[str, Any]

    def need(self, name: str, kind: type | tuple[type, ...], words: str, remedy: str) -> Any:
        """Return the field ``name`` of type ``kind``; otherwise raise an InputError that names line, key and remedy."""
        value = self.fields.get(name)
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
        if name not in self.fields:
            raise InputError(f"{self.where}: there is no {name!r}; {remedy}")
        raise InputError(f"{self.where}: {name!r} must be {words}, not {value!r:.60}; {remedy}")

    def optional(self, name: str, kind: type | tuple[type, ...], words: str) -> Any:
        """Return the field as `need` does, or None if it is absent or null."""
        if self.fields.get(name) is None:
            return None
        return self.need(name, kind, words, "correct it or leave it out")


class AttemptNames:
    """Names the attempts of a file line by line: (schedule, id, attempt), each of which may occur once."""

    def __init__(self) -> None:
        self._numbers: dict[str | None, dict[str, int]] = {}  # by schedule: problems numbered in order of appearance
        self._seen: dict[str | None, _Seen] = {}
        self._named: bool | None = None

    def name(self, line: InputLine, number: int) -> tuple[str | None, str, int, int]:
        """Return the schedule, the problem, the problem's number in the schedule, and the attempt of a line.

        A line without an ``attempt`` is the next attempt at its problem; if no line has an ``id``, each line is a
        separate problem.
        """
        schedule = line.optional("schedule", str, "text")
        given = line.optional("id", (str, int), "text or a whole number")
        if self._named is None:
            self._named = given is not None
        elif self._named != (given is not None):
            raise InputError(f"{line.where}: some lines have an 'id' and others have none; give one to all or to none")
        attempt = line.optional("attempt", int, "a whole number")
        seen = self._seen.setdefault(schedule, _Seen())
        if given is None:
            return schedule, f"line {number}", seen.more(), attempt or 0
        problem, numbers = str(given), self._numbers.setdefault(schedule, {})
        place = numbers.setdefault(problem, len(numbers))
        if place == len(seen):
            seen.more()
        if attempt is None:
            attempt = seen.count(place)
        if not seen.add(place, attempt):
            raise InputError(
                f"{line.where}: attempt {attempt} at {problem!r} occurs twice; give every line of a problem an "
                "'attempt' of its own, or none at all"
            )
        return schedule, problem, place, attempt


class _Seen:
    """The attempts seen at each problem: the length of the run 0, 1, 2, ..., and those that came out of order."""

    def __init__(self) -> None:
        self._in_order = array("I")
        self._out_of_order: dict[int, set[int]] = {}

    def __len__(self) -> int:
        return len(self._in_order)

    def more(self) -> int:
        """Add a problem and return its number."""
        self._in_order.append(0)
        return len(self._in_order) - 1

    def count(self, problem: int) -> int:
        """Return how many attempts at a problem were seen."""
        return self._in_order[problem] + len(self._out_of_order.get(problem, ()))

    def add(self, problem: int, attempt: int) -> bool:
        """Add an attempt; return whether it is new."""
        out_of_order = self._out_of_order.get(problem, set())
        if 0 <= attempt < self._in_order[problem] or attempt in out_of_order:
            return False
        if attempt != self._in_order[problem]:
            self._out_of_order.setdefault(problem, out_of_order).add(attempt)
            return True
        self._in_order[problem] += 1
        while self._in_order[problem] in out_of_order:
            out_of_order.remove(self._in_order[problem])
            self._in_order[problem] += 1
        return True


def read_input_lines(path: Path) -> Iterator[InputLine]:
    """Yield the objects of a ``.jsonl`` or ``.jsonl.gz`` file; blank lines are skipped.

    Raises:
        InputError: naming file and line, and the remedy.
    """
    try:
        with open_unpacked(path) as file:
            has_lines = False
            for number, text in enumerate(text_lines(file, lambda number: f"{path}:{number}", str(path), ": this"), 1):
                if text.strip():
                    has_lines = True
                    yield InputLine(f"{path}:{number}", _object(text, f"{path}:{number}"))
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read ({why_unread(error)}); give the path of a readable .jsonl or .jsonl.gz"
        ) from None
    if not has_lines:
        raise InputError(f"{path} holds no generations; give a file with one JSON object on each line")


def _object(text: str, where: str) -> dict[str, Any]:
    claim, remedy = f"{where}: this is not valid JSON", why_no_object(text) or "write one JSON object on each line"
    try:
        fields = parse_json(text, claim, remedy, surrogates=True, parse_constant=float)
    except InputError:
        if words := why_broken(text):
            raise InputError(f"{claim}; {words}") from None
        raise
    if not isinstance(fields, dict):
        raise InputError(f'{where}: this is no JSON object; write one as in {{"id": "1", "generation": "..."}}')
    return fields


def read_generations(path: Path) -> list[Generation]:
    """The graded generations of a file, checked; see `stream_generations`."""
    return list(stream_generations(path))


def stream_generations(path: Path) -> Iterator[Generation]:
    """Yield the checked graded generations of a file.

    Every line needs ``id`` and ``correct``. An absent ``score`` is 1 if correct, else 0; an absent ``attempt`` is
    the next attempt at the problem.

    Raises:
        InputError: naming file, line and key, and the remedy.
    """
    attempts = AttemptNames()
    for number, line in enumerate(read_input_lines(path), 1):
        line.need("id", (str, int), "text or a whole number", "give every line the id of its problem")
        schedule, problem, _, attempt = attempts.name(line, number)
        correct = line.need("correct", bool, "true or false", "grade the file first: dllm-sd grade FILE --task NAME")
        score, parsed = line.optional("score", (int, float), "a number"), line.fields.get("parsed")
        if score is not None and not math.isfinite(score):
            raise InputError(f"{line.where}: 'score' must be finite, not {score}; correct it or leave it out")
        yield Generation(
            id=problem,
            attempt=attempt,
            generation=line.optional("generation", str, "text") or "",
            correct=correct,
            score=float(correct if score is None else score),
            parsed=parsed if parsed is None or isinstance(parsed, str) else json.dumps(parsed),
            schedule=schedule,
            fields={name: value for name, value in line.fields.items() if name not in _NAMES},
        )


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Create the folder if needed, and remove it again if the block fails."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise InputError(f"cannot write to {str(folder)!r}: {error.strerror}; give another --out") from error
    try:
        yield folder
    except BaseException:
        with suppress(OSError):  # another process may have put something there
            for path in made:
                path.rmdir()
        raise


def grades_folder(path: Path) -> Path:
    """Return the folder for the grades of a file: beside it, ``runs/a.jsonl.gz`` to ``runs/a_graded``."""
    path = path.absolute() if not path.name else path
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".jsonl") + "_graded")


def grade_file(
    path: Path,
    task: Task,
    folder: Path,
    *,
    name: str,
    mode: str = "default",
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Grade a file of generations; write ``folder/graded.jsonl`` and ``folder/report.json``, whole or not at all.

    Every line needs ``generation`` and the fields that the task's grader reads. The lines are read, graded and written
    one by one, with ``correct``, ``score`` and ``parsed`` set and all other fields kept. Several lines with the same
    ``id`` are attempts at one problem; several schedules are reported one by one, the first one at the top level.
    ``name``, ``mode`` and ``settings`` are written into the report.

    Returns:
        The report: ``task, mode, n, accuracy, ci95, score, pass_at_k``, and what the task's summary adds.

    Raises:
        InputError: naming file, line and key, and the remedy.
    """
    target, report_file = folder / "graded.jsonl", folder / "report.json"
    if target.resolve() == path.resolve():
        raise InputError(f"the grades of {path} would be written over it; give another --out")
    if report_file.exists() and not target.exists():
        raise InputError(f"{report_file} is the report of something else; give another --out")
    attempts = AttemptNames()
    schedules: dict[str | None, Tally] = {}
    with ExitStack() as stack:
        stack.enter_context(_new_folder(folder))
        graded, written = (stack.enter_context(replacing(file, alone=False)) for file in (target, report_file))
        place = 0
        for number, line in enumerate(read_input_lines(path), 1):
            schedule, problem_id, problem, _ = attempts.name(line, number)
            grade = _grade(line, problem_id, task)
            schedules.setdefault(schedule, Tally(graded)).add(problem, number, place, grade)
            verdict = {"correct": grade.correct, "score": grade.score, "parsed": grade.parsed}
            place += graded.write((json.dumps({**line.fields, **verdict}) + "\n").encode())
        report = {"task": name, "mode": mode, **_report(task, schedules), "settings": dict(settings or {})}
        written.write(json.dumps(report, indent=1).encode())
    return report


def _grade(line: InputLine, problem_id: str, task: Task) -> Grade:
    generation = line.need("generation", str, "text", "put the model's output there")
    fields = {name: value for name, value in line.fields.items() if name != "generation"}
    try:
        return task.grade(Problem(problem_id, fields), generation)
    except InputError as error:
        raise InputError(f"{line.where}: {error}") from error


def _report(task: Task, schedules: Mapping[str | None, Tally]) -> dict[str, Any]:
    trees = {schedule: _summary(task, tally) for schedule, tally in schedules.items()}
    (first, tree), *further = trees.items()
    if not further:
        return tree
    return {**tree, "schedule": first, "schedules": {str(schedule): tree for schedule, tree in trees.items()}}


def _summary(task: Task, tally: Tally) -> dict[str, Any]:
    tree = {**tally.figures(), **measures(task, tally.graded, tally.asked)}
    return tree | {"ci95": list(wilson_interval(tree["accuracy"], tree["n"]))}  # of the task's own accuracy, if any


def measures(task: Task, graded: Sequence[tuple[Problem, Grade]], asked: Sequence[Problem]) -> dict[str, float]:
    """Return a task's measures beside accuracy, and its chance level on the problems ``asked`` if it has one."""
    chance = task.chance(asked)
    return task.summary(graded) if chance is None else {**task.summary(graded), "chance": chance}


def summarise(problems: Collection[Sequence[Grade]]) -> dict[str, Any]:
    """Compute the metrics of graded attempts, by problem; see `estimates.figures`."""

    def votes(k: int) -> Iterator[bool]:
        for grades in problems:
            yield majority([grade.parsed for grade in grades[:k]], [grade.correct for grade in grades[:k]])

    return figures(
        [len(grades) for grades in problems],
        [sum(grade.correct for grade in grades) for grades in problems],
        [math.fsum(grade.score for grade in grades) / len(grades) for grades in problems],
        votes,
    )
