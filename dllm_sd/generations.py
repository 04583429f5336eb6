"""Files of generations, one JSON object a line: read, checked, graded, and summed up."""

import gzip
import json
import math
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from dllm_sd.errors import InputError
from dllm_sd.estimates import majority, pass_at_k, wilson_interval
from dllm_sd.tasks.task import Grade, Problem, Task

_NAMES = ("id", "attempt", "generation", "correct", "score", "parsed", "schedule")


@dataclass(frozen=True)
class Generation:
    """One graded attempt at one problem: a line of ``generations.jsonl`` or ``graded.jsonl``.

    ``schedule`` names the decoding settings, None where the file does not say. ``fields`` is whatever else the line
    holds: length in tokens, decoding steps, the fields of the problem.
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
class Line:
    """One line of a file: ``where`` is ``FILE:LINE``, for messages."""

    where: str
    fields: Mapping[str, Any]

    def need(self, name: str, kind: type | tuple[type, ...], words: str, remedy: str) -> Any:
        """The field ``name``, which must be of ``kind``; an InputError that names line, key and remedy otherwise."""
        value = self.fields.get(name)
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
        if name not in self.fields:
            raise InputError(f"{self.where}: there is no {name!r}; {remedy}")
        raise InputError(f"{self.where}: {name!r} must be {words}, not {value!r:.60}; {remedy}")

    def optional(self, name: str, kind: type | tuple[type, ...], words: str) -> Any:
        """The same, or None where the field is absent or null."""
        if self.fields.get(name) is None:
            return None
        return self.need(name, kind, words, "correct it or leave it out")


class Attempts:
    """Names the attempts of a file as its lines come: (schedule, id, attempt), each of which may occur once."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str | None, str], set[int]] = {}
        self._named: bool | None = None

    def name(self, line: Line, number: int) -> tuple[str | None, str, int]:
        """What a line is an attempt at. A line without an ``attempt`` is the next one of its problem; where no line
        has an ``id``, each is a problem of its own."""
        schedule = line.optional("schedule", str, "text")
        given = line.optional("id", (str, int), "text or a whole number")
        if self._named is None:
            self._named = given is not None
        elif self._named != (given is not None):
            raise InputError(f"{line.where}: some lines have an 'id' and others have none; give one to all or to none")
        problem = f"line {number}" if given is None else str(given)
        seen = self._seen.setdefault((schedule, problem), set())
        attempt = line.optional("attempt", int, "a whole number")
        if attempt is None:
            attempt = len(seen)
        if attempt in seen:
            raise InputError(
                f"{line.where}: attempt {attempt} at {problem!r} is there twice; give every line of a problem an "
                "'attempt' of its own, or none at all"
            )
        seen.add(attempt)
        return schedule, problem, attempt


def read_lines(path: Path) -> Iterator[Line]:
    """The objects of a ``.jsonl`` or ``.jsonl.gz`` file, one after another; blank lines are passed over.

    Raises:
        InputError: naming file and line, and the remedy.
    """
    try:
        with _open(path) as file:
            found = False
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    found = True
                    yield Line(f"{path}:{number}", _object(raw, number, f"{path}:{number}"))
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or f"damaged: {error}"
        raise InputError(f"{path} cannot be read ({reason}); give the path of a readable .jsonl or .jsonl.gz") from None
    if not found:
        raise InputError(f"{path} holds no generations; give a file with one JSON object on each line")


def _open(path: Path) -> BinaryIO:
    # A GzipFile reads bytes like any other file; typeshed alone does not call it a BinaryIO.
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # pyright: ignore[reportReturnType]


def _object(raw: bytes, number: int, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError:
        raise InputError(f"{where}: this is not UTF-8 text; save the file as UTF-8") from None
    except (ValueError, RecursionError):
        raise InputError(f"{where}: this is not valid JSON; write one JSON object on each line") from None
    if not isinstance(fields, dict):
        raise InputError(f'{where}: this is no JSON object; write one as in {{"id": "1", "generation": "..."}}')
    return fields


def read_generations(path: Path) -> list[Generation]:
    """The graded generations of a file, checked.

    Every line needs ``id`` and ``correct``. An absent ``score`` is that of the verdict, and an absent ``attempt`` is
    the next one of its problem.

    Raises:
        InputError: naming file, line and key, and the remedy.
    """
    attempts, found = Attempts(), []
    for number, line in enumerate(read_lines(path), 1):
        line.need("id", (str, int), "text or a whole number", "give every line the id of its problem")
        schedule, problem, attempt = attempts.name(line, number)
        correct = line.need("correct", bool, "true or false", "grade the file first: dllm-sd grade FILE --task NAME")
        score, parsed = line.optional("score", (int, float), "a number"), line.fields.get("parsed")
        if score is not None and not math.isfinite(score):
            raise InputError(f"{line.where}: 'score' must be finite, not {score}; correct it or leave it out")
        found.append(
            Generation(
                id=problem,
                attempt=attempt,
                generation=line.optional("generation", str, "text") or "",
                correct=correct,
                score=float(correct if score is None else score),
                parsed=parsed if parsed is None or isinstance(parsed, str) else json.dumps(parsed),
                schedule=schedule,
                fields={name: value for name, value in line.fields.items() if name not in _NAMES},
            )
        )
    return found


@contextmanager
def _new_file(path: Path) -> Iterator[TextIO]:
    """A text file to write that takes its name when the block ends, and vanishes if the block fails."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """The folder, made if need be, and taken away again if the block fails."""
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


def default_folder(path: Path) -> Path:
    """Where the grades of a file go: beside it, ``runs/a.jsonl.gz`` to ``runs/a_graded``."""
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
    one by one, with ``correct``, ``score`` and ``parsed`` set and all else kept. Of several lines with one ``id`` each
    is an attempt; generations under several schedules are reported schedule by schedule, the first one at the top.
    ``name``, ``mode`` and ``settings`` are for the report.

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
    attempts = Attempts()
    schedules: dict[str | None, list[tuple[Problem, Grade]]] = {}
    with ExitStack() as stack:
        stack.enter_context(_new_folder(folder))
        graded, report_handle = stack.enter_context(_new_file(target)), stack.enter_context(_new_file(report_file))
        for number, line in enumerate(read_lines(path), 1):
            schedule, problem_id, _ = attempts.name(line, number)
            problem, grade = _grade(line, problem_id, task)
            schedules.setdefault(schedule, []).append((problem, grade))
            verdict = {"correct": grade.correct, "score": grade.score, "parsed": grade.parsed}
            graded.write(json.dumps({**line.fields, **verdict}) + "\n")
        report = {"task": name, "mode": mode, **_report(task, schedules), "settings": dict(settings or {})}
        report_handle.write(json.dumps(report, indent=1))
    return report


def _grade(line: Line, problem_id: str, task: Task) -> tuple[Problem, Grade]:
    """The problem of a line (without the generation, so that a long file stays small) and the verdict."""
    generation = line.need("generation", str, "text", "put the model's output there")
    problem = Problem(problem_id, {name: value for name, value in line.fields.items() if name != "generation"})
    try:
        return problem, task.grade(problem, generation)
    except InputError as error:
        raise InputError(f"{line.where}: {error}") from error


def _report(task: Task, schedules: Mapping[str | None, Sequence[tuple[Problem, Grade]]]) -> dict[str, Any]:
    trees = {schedule: _summary(task, graded) for schedule, graded in schedules.items()}
    (first, tree), *others = trees.items()
    if not others:
        return tree
    return {**tree, "schedule": first, "schedules": {str(schedule): tree for schedule, tree in trees.items()}}


def _summary(task: Task, graded: Sequence[tuple[Problem, Grade]]) -> dict[str, Any]:
    problems: dict[str, list[Grade]] = {}
    for problem, grade in graded:
        problems.setdefault(problem.id, []).append(grade)
    tree = {**summarise(problems.values()), **measures(task, graded)}
    return tree | {"ci95": list(wilson_interval(tree["accuracy"], tree["n"]))}  # of the task's own accuracy, if any


def measures(task: Task, graded: Sequence[tuple[Problem, Grade]]) -> dict[str, float]:
    """What a task measures beside the accuracy, and its chance level where it has one."""
    chance = task.chance(list({problem.id: problem for problem, _ in graded}.values()))
    return task.summary(graded) if chance is None else {**task.summary(graded), "chance": chance}


def summarise(problems: Collection[Sequence[Grade]]) -> dict[str, Any]:
    """The figures of graded attempts, each a mean over problems of what a problem's attempts say.

    ``accuracy`` is avg@k. k is what the problem with the fewest attempts has; pass@k is given for powers of two up to
    it, and maj@k takes the first k attempts of each problem.
    """
    n, k = len(problems), min(map(len, problems))
    right = [sum(grade.correct for grade in grades) for grades in problems]
    counts = list(zip(map(len, problems), right, strict=True))
    accuracy = _mean(hits / size for size, hits in counts)
    tree: dict[str, Any] = {
        "n": n,
        "accuracy": accuracy,
        "ci95": list(wilson_interval(accuracy, n)),
        "score": _mean(math.fsum(grade.score for grade in grades) / len(grades) for grades in problems),
        "generations": sum(map(len, problems)),
        "pass_at_k": {str(j): _mean(pass_at_k(size, hits, j) for size, hits in counts) for j in _up_to(k)},
    }
    if k > 1:
        firsts = [grades[:k] for grades in problems]
        votes = [majority([g.parsed for g in first], [g.correct for g in first]) for first in firsts]
        tree |= {"avg_at_k": {str(k): accuracy}, "maj_at_k": {str(k): _mean(map(float, votes))}}
    return tree


def _up_to(k: int) -> list[int]:
    return sorted({2**power for power in range(k.bit_length())} | {k})


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)
