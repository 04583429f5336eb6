"""A summary of graded lines on disk: a few numbers per line stay in memory, the rest is read back for the report."""

import json
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import IO, Any, Generic, TypeVar, overload

from dllm_sd.evaluation.estimates import figures, majority
from dllm_sd.tasks.task import Grade, Problem

StoredT = TypeVar("StoredT")


class Tally:
    """The metrics of the graded lines of a file: 24 bytes per line and 12 per problem, the rest is read back.

    Lines of the same ``problem`` (numbered from 0 in order of appearance) are its attempts, in order.
    """

    def __init__(self, file: IO[bytes]) -> None:
        """Start with no lines; later they are read back from ``file``."""
        self._file = file
        self._places, self._lines = array("q"), array("I")  # of each line: where it begins, its number in the source
        self._problems, self._scores = array("I"), array("d")
        self._sizes, self._right, self._last = array("I"), array("I"), array("I")  # of each problem

    def add(self, problem: int, line: int, place: int, grade: Grade) -> None:
        """Add a graded line: the number of its problem, its line number in the source, and its offset in the file."""
        if problem == len(self._sizes):
            for column in (self._sizes, self._right, self._last):
                column.append(0)
        self._sizes[problem] += 1
        self._right[problem] += grade.correct
        self._last[problem] = len(self._places)
        self._places.append(place)
        self._lines.append(line)
        self._problems.append(problem)
        self._scores.append(grade.score)

    @property
    def graded(self) -> Sequence[tuple[Problem, Grade]]:
        """Every line as a problem and its grade, read back on access."""
        return _Stored(range(len(self._places)), self._read)

    @property
    def asked(self) -> Sequence[Problem]:
        """The problems in order of appearance, each with the fields of its last line."""
        return _Stored(self._last, lambda place: self._read(place)[0])

    def figures(self) -> dict[str, Any]:
        """Accuracy, score, pass@k and maj@k; see `estimates.figures`."""
        order = self._by_problem()

        def votes(k: int) -> Iterator[bool]:
            for places in self._attempts(order):
                grades = [self._read(place)[1] for place in places[:k]]
                yield majority([grade.parsed for grade in grades], [grade.correct for grade in grades])

        scores = (math.fsum(self._scores[i] for i in places) / len(places) for places in self._attempts(order))
        return figures(self._sizes, self._right, array("d", scores), votes)

    def _by_problem(self) -> Sequence[int]:
        """Return the indices of lines, grouped by problem and in order within each."""
        order, free = array("I", bytes(4 * len(self._places))), array("I", [0])
        free.extend(accumulate(self._sizes))
        for place, problem in enumerate(self._problems):
            order[free[problem]] = place
            free[problem] += 1
        return order

    def _attempts(self, order: Sequence[int]) -> Iterator[Sequence[int]]:
        start = 0
        for size in self._sizes:
            yield order[start : start + size]
            start += size

    def _read(self, place: int) -> tuple[Problem, Grade]:
        self._file.seek(self._places[place])
        fields = json.loads(self._file.readline())
        given = fields.get("id")
        name = f"line {self._lines[place]}" if given is None else str(given)
        grade = Grade(fields["correct"], fields["score"], fields["parsed"])
        return Problem(name, {key: value for key, value in fields.items() if key != "generation"}), grade


class _Stored(Sequence[StoredT], Generic[StoredT]):
    """A sequence whose items are read on access: ``read(place)`` for each of ``places``."""

    def __init__(self, places: Sequence[int], read: Callable[[int], StoredT]) -> None:
        self._places, self._read = places, read

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> StoredT: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[StoredT]: ...
    def __getitem__(self, index: int | slice) -> StoredT | Sequence[StoredT]:
        if isinstance(index, slice):
            return _Stored(self._places[index], self._read)
        return self._read(self._places[index])
