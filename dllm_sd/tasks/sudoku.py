"""4x4 Sudoku: generated without end and without a network, or read from CSV files; graded by the rules."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import count
from typing import Any

from dllm_sd.errors import InputError
from dllm_sd.randomness import make_key
from dllm_sd.tasks.datafile import (
    Entry,
    Generated,
    Row,
    Splits,
    chat,
    choose,
    divide,
    needed,
    read_rows,
    render,
    split_of,
)
from dllm_sd.tasks.grading import MAX_TEXT, last_answer
from dllm_sd.tasks.task import Grade, Problem, Split

_CELLS = range(16)
_LAYOUT = re.compile(r"[\s\[\](){}|,+-]+")
_GRID = re.compile(r"(?<!\d)[0-9]{16}(?!\d)")

_PROMPT = """\
Here is a 4x4 Sudoku, read row by row from the top left; 0 marks an empty cell:

{puzzle}

Fill every empty cell with a digit from 1 to 4 and leave the given digits as they are. In the finished grid each row, \
each column and each of the four 2x2 corner boxes holds 1, 2, 3 and 4 once. Write the 16 digits of the finished grid, \
row by row and without anything between them, inside <answer></answer>."""


@dataclass(frozen=True)
class Sudoku:
    """4x4 Sudoku with one solution. Problem fields: ``puzzle`` and ``solution``, 16 digits each, 0 for empty.

    Without ``data`` and ``data_test`` problems are generated: problem i of a split is a function of (seed, split, i),
    has ``empties_min`` to ``empties_max`` empty cells, and its puzzle belongs to one split only, whatever the seed
    (within a split a puzzle may recur, rarely). With them, problems are the rows of CSV files with the columns Puzzle
    and Solution: the last ``size_dev`` rows of ``data`` are the dev split, ``data_test`` is the test split, and the
    other sizes say how many rows to use at most. Puzzles in a file may have several solutions; any of them is correct.

    A completion's grid is correct where it follows the rules and keeps the givens. Its ``score`` is then 1, otherwise
    the share of empty cells filled as in ``solution``.
    """

    empties_min: int = 6
    empties_max: int = 10
    size_train: int = 1_000_000
    size_dev: int = 1024
    size_test: int = 3072
    seed: int = 0
    system: str | None = None
    prompt: str = _PROMPT
    answer: str = "<answer>{solution}</answer>"
    data: str | None = None
    data_test: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.empties_min <= self.empties_max <= 12:
            raise InputError(
                f"task.empties_min ({self.empties_min}) and task.empties_max ({self.empties_max}) must be ordered and "
                "lie in 1..12, beyond which no puzzle has one solution; correct them."
            )
        for name in ("size_train", "size_dev", "size_test"):
            if getattr(self, name) < 0:
                raise InputError(f"task.{name} must not be negative; it counts problems.")
        render(self.prompt, {"puzzle": ""}, "task.prompt")
        render(self.answer, {"puzzle": "", "solution": ""}, "task.answer")

    def problems(self, split: Split) -> Sequence[Problem]:
        size = {"train": self.size_train, "dev": self.size_dev, "test": self.size_test}[split]
        if not size:
            raise InputError(f"task.size_{split} is 0, so the {split} split holds no problems; raise it.")
        if self.data is not None or self.data_test is not None:
            return choose(self._files, split)[:size]
        return Generated(range(size), partial(self._generate, split))

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        return chat(self.system, render(self.prompt, problem.fields, "task.prompt"))

    def reference(self, problem: Problem) -> str | None:
        if "solution" not in problem.fields:
            return None
        return render(self.answer, problem.fields, "task.answer")

    def grade(self, problem: Problem, completion: str) -> Grade:
        puzzle = _grid(needed(problem.fields, "puzzle"), "puzzle", "The problem")
        grid = parse_grid(completion)
        if grid is None:
            return Grade(False, 0.0, None)
        if is_solution(puzzle, grid):
            return Grade(True, 1.0, grid)
        if "solution" not in problem.fields or "0" not in puzzle:
            return Grade(False, 0.0, grid)
        solution = _grid(problem.fields["solution"], "solution", "The problem")
        hits = [grid[cell] == solution[cell] for cell in _CELLS if puzzle[cell] == "0"]
        return Grade(False, sum(hits) / len(hits), grid)

    def _generate(self, split: Split, index: int) -> Problem:
        span = self.empties_max - self.empties_min + 1
        empties = self.empties_min + make_key(self.seed, "sudoku", split, index) % span
        for attempt in count():
            draw = make_key(self.seed, "sudoku", split, index, attempt)  # one key holds the grid and its empty cells
            draw, number = divmod(draw, len(grids()))
            solution = grids()[number]
            puzzle, filled = list(solution), list(_CELLS)
            for _ in range(empties):
                draw, place = divmod(draw, len(filled))
                puzzle[filled.pop(place)] = "0"
            text = "".join(puzzle)
            if completions(text).bit_count() == 1 and split_of(text) == split:
                return Problem(f"sudoku/{split}/{index}", {"puzzle": text, "solution": solution})
        raise AssertionError("count() does not end")

    @cached_property
    def _files(self) -> Splits:
        train = read_rows(self.data, "task.data") if self.data is not None else []
        test = read_rows(self.data_test, "task.data_test") if self.data_test is not None else []
        return divide("sudoku", map(_entry, train), map(_entry, test), self.size_dev, key=None)


def parse_grid(text: str) -> str | None:
    """The 16 digits that a completion answers with, or None.

    They are looked for in the last closed answer tag, or in the whole text if there is none: the last run of exactly
    16 digits, else the last one when white space, brackets, pipes and commas are taken out.
    """
    marked = last_answer(text)
    text = text[-MAX_TEXT:] if marked is None else marked
    runs = _GRID.findall(text) or _GRID.findall(_LAYOUT.sub("", text))
    return runs[-1] if runs else None


def is_solution(puzzle: str, grid: str) -> bool:
    """Whether ``grid`` is a filled 4x4 grid after the rules that keeps the givens of ``puzzle``."""
    return grid in _numbers() and all(given in ("0", cell) for given, cell in zip(puzzle, grid, strict=True))


def completions(puzzle: str) -> int:
    """The solutions of ``puzzle`` as a bit set over ``grids()``; ``bit_count()`` says how many there are."""
    left = (1 << len(grids())) - 1
    for cell, digit in enumerate(puzzle):
        if digit != "0":
            left &= _having()[cell][digit]
    return left


@cache
def grids() -> tuple[str, ...]:
    """The 288 filled grids, in order."""

    def extend(grid: str) -> Iterator[str]:
        if len(grid) == 16:
            yield grid
            return
        row, column = divmod(len(grid), 4)
        peers = [c for c in range(len(grid)) if c // 4 == row or c % 4 == column or _box(c) == _box(len(grid))]
        taken = {grid[cell] for cell in peers}
        for digit in "1234":
            if digit not in taken:
                yield from extend(grid + digit)

    return tuple(extend(""))


def _box(cell: int) -> tuple[int, int]:
    return cell // 8, cell % 4 // 2


@cache
def _numbers() -> dict[str, int]:
    return {grid: number for number, grid in enumerate(grids())}


@cache
def _having() -> list[dict[str, int]]:
    """For each cell and digit, the bit set of the grids that have the digit there."""
    return [
        {digit: sum(1 << number for number, grid in enumerate(grids()) if grid[cell] == digit) for digit in "1234"}
        for cell in _CELLS
    ]


def _grid(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-4]{16}", value):
        raise InputError(f"{where}: {name} must be a string of 16 digits from 0 to 4, not {value!r:.60}; correct it.")
    return value


def _entry(row: Row) -> Entry:
    puzzle = _grid(row.text("Puzzle"), "Puzzle", row.where)
    solution = _grid(row.text("Solution"), "Solution", row.where)
    if not is_solution(puzzle, solution):
        raise InputError(f"{row.where}: Solution does not solve Puzzle; correct the line or leave it out.")
    return Entry(row.number, puzzle, {"puzzle": puzzle, "solution": solution})
