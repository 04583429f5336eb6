"""Sudoku, 4x4 or 9x9: generated endlessly without a network, or read from CSV files; graded by the rules."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from typing import Any, ClassVar, Literal

from dllm_sd.errors import InputError
from dllm_sd.files.writing import Place
from dllm_sd.randomness import make_key
from dllm_sd.ranges import Count, Natural, Seed, SplitSize
from dllm_sd.tasks.datafile import Entry, Row, needed, split_of
from dllm_sd.tasks.grading import MAX_TEXT, last_answer
from dllm_sd.tasks.grids import completions, grids, has_holes_only, large_grid, large_puzzle, obeys, worked_steps
from dllm_sd.tasks.published import sudoku_cells
from dllm_sd.tasks.sources import Draws, GeneratedTask
from dllm_sd.tasks.task import Grade, Mode, Problem, Split, check_mode, mean

_LAYOUT = re.compile(r"[\s\[\](){}|,;+-]+")
_LATEX = re.compile(
    r"\\(?:begin|end)\s{0,3}\{[a-z]{0,8}matrix\}|\\begin\s{0,3}\{array\}\s{0,3}\{(?:[^{}]|\{[^{}]{0,9}\}){0,99}\}"
    r"|\\end\s{0,3}\{array\}|\\(?:hline|left|right|boxed|quad)(?![a-z])|\\\\(?:\[[^\]\s]{0,9}\])?|\\[,;! ]|[&$]"
)
_TRANSPOSED = re.compile(r"[\])}]\s{0,3}\^\s{0,3}\{?\s{0,3}(?:T|t|\\top|\\mathsf)")
_SEGMENT = re.compile(r"(\n|;)")
_ROW_LABEL = re.compile(r"\b(?:row|r)\s{0,3}[1-9]", re.IGNORECASE)
_LABELLED_ROW = re.compile(
    r"[\s*#>|-]{0,9}(?:row|r)\s{0,3}([1-9])\s{0,3}\*{0,2}\s{0,3}[:=]([\s*\[\]()|,0-9]*)\.?\s{0,9}", re.IGNORECASE
)
_RUN = re.compile(r"(?<!\d)[0-9]+(?!\d)")
_STEP = re.compile(r"[0-9]{2} *= *[0-9]+")
_CELL = re.compile(r"(?<![0-9])([1-9])([1-9]) *= *([0-9]+)")
_MOST_EMPTY = {4: 12, 9: 50}
_LARGE_ATTEMPTS = 40  # most solutions from which a 9x9 puzzle is attempted

_PROMPT = """\
Here is a 4x4 Sudoku, read row by row from the top left; 0 marks an empty cell:

{puzzle}

Fill every empty cell with a digit from 1 to 4 and leave the given digits as they are. In the finished grid each row, \
each column and each of the four 2x2 corner boxes holds 1, 2, 3 and 4 once. Write the 16 digits of the finished grid, \
row by row and without anything between them, inside <answer></answer>."""

_LARGE_PROMPT = """\
Here is a 9x9 Sudoku, read row by row from the top left; 0 marks an empty cell:

{puzzle}

Fill every empty cell with a digit from 1 to 9 and leave the given digits as they are. In the finished grid each row, \
each column and each of the nine 3x3 boxes holds every digit from 1 to 9 once. Write the 81 digits of the finished \
grid, row by row and without anything between them, inside <answer></answer>."""


@dataclass(frozen=True)
class Sudoku(GeneratedTask):
    """Sudoku with a unique solution. Problem fields: ``puzzle`` and ``solution``, 16 or 81 digits, 0 for empty.

    Without ``data`` and ``data_test``, problems are generated: problem i of a split is a function of (seed, split, i)
    and has ``empties_min`` to ``empties_max`` empty cells, and its puzzle belongs to one split only, whatever the seed
    (rarely, a puzzle occurs twice within a split). With them, problems are the rows of CSV files with the columns
    Puzzle and Solution: the last ``size_dev`` rows of ``data`` are the dev split, ``data_test`` is the test split, and
    the remaining sizes limit how many rows are used. Puzzles in a file may have several solutions; each is correct.

    A completion is correct if its grid follows the rules and keeps the givens. Its ``score`` is then 1, otherwise the
    share of empty cells filled as in ``solution``. ``mode`` compatible counts empty cells as d-OPSD's published
    evaluation does (equality with ``solution``, givens are ignored; 4x4 only); see ``published``.

    The template ``answer`` may also use ``{steps}``: a line ``rc=d`` for every empty cell, in an order in which each
    digit can be deduced (see ``worked_steps``).

    With ``easy_up_to``, a generated problem also has the field ``domain``: ``easy`` up to that number of empty cells,
    otherwise ``hard``.

    ``size`` is the length of a row, 4 or 9. A 9x9 puzzle may have up to 50 empty cells, and its solution too belongs to
    one split only.
    """

    empties_min: Count = 6
    """Fewest empty cells of a generated puzzle."""
    empties_max: Count = 10
    """Most empty cells of a generated puzzle."""
    size_train: SplitSize = 1_000_000
    size_dev: Natural = 1024
    size_test: Natural = 3072
    seed: Seed = 0
    """Seed of the generated problems, independent of the seed of the run."""
    system: str | None = None
    prompt: str = _PROMPT
    answer: str = "<answer>{solution}</answer>"
    data: Place | None = None
    data_test: Place | None = None
    mode: Mode = "default"
    """How completions are read and compared: `default`, or `compatible` with d-OPSD's published evaluation."""
    size: Literal[4, 9] = 4
    """Cells in a row: a 4x4 or a 9x9 puzzle."""
    easy_up_to: Natural = 0
    """Most empty cells of a puzzle whose field `domain` is `easy`, others are `hard`; 0 makes no such field."""
    title: ClassVar[str] = "sudoku"
    answered_by: ClassVar[str] = "solution"
    final: ClassVar[str] = "solution"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size not in _MOST_EMPTY:
            raise InputError(f"task.size is {self.size!r}; choose 4 or 9.")
        most = _MOST_EMPTY[self.size]
        if not 1 <= self.empties_min <= self.empties_max <= most:
            raise InputError(
                f"task.empties_min ({self.empties_min}) and task.empties_max ({self.empties_max}) must be ordered and "
                f"lie in 1..{most}, beyond which {'no puzzle has' if most == 12 else 'few puzzles have'} one solution; "
                "correct them."
            )
        check_mode(self.mode)
        if self.mode == "compatible" and self.size != 4:
            raise InputError(
                "task.mode compatible supports 4x4 puzzles only; set task.size to 4 or task.mode to default."
            )
        self.check_templates(("puzzle",), ("solution", "steps"))

    def prompt_template(self) -> str:
        """Return the template ``prompt``; the default depends on the size."""
        return _LARGE_PROMPT if self.size == 9 and self.prompt == _PROMPT else self.prompt

    def answer_fields(self, problem: Problem) -> Mapping[str, Any]:
        """Return the fields of the problem, and ``steps`` if the template uses them."""
        if "{steps}" not in self.answer:
            return problem.fields
        puzzle = self._grid(needed(problem.fields, "puzzle"), "puzzle", "The problem")
        solution = self._grid(needed(problem.fields, "solution"), "solution", "The problem")
        return {**problem.fields, "steps": worked_steps(puzzle, solution)}

    def grade(self, problem: Problem, completion: str) -> Grade:
        """Grade by the rules; ``score`` counts cells."""
        if self.mode == "compatible":
            return self._grade_published(problem, completion)
        puzzle = self._grid(needed(problem.fields, "puzzle"), "puzzle", "The problem")
        grid = parse_grid(completion, self.size**2)
        if grid is None:
            return Grade(False, 0.0, None)
        if is_solution(puzzle, grid):
            return Grade(True, 1.0, grid)
        if "solution" not in problem.fields or "0" not in puzzle:
            return Grade(False, 0.0, grid)
        solution = self._grid(problem.fields["solution"], "solution", "The problem")
        return Grade(False, _share(puzzle, solution, grid), grid)

    def first_mistake(self, problem: Problem, completion: str) -> tuple[int, int] | None:
        """Return the first line ``rc=d`` that fills a cell otherwise than ``solution``; without such lines, the first
        wrong cell of the first run of digits that is as long as a grid."""
        solution, text = problem.fields.get("solution"), completion[:MAX_TEXT]
        if not isinstance(solution, str):
            return None
        steps = list(_CELL.finditer(text))
        for step in steps:
            row, column = int(step[1]) - 1, int(step[2]) - 1
            if max(row, column) >= self.size or step[3] != solution[row * self.size + column]:
                return step.span()
        grid = next((run for run in _RUN.finditer(text) if len(run[0]) == len(solution)), None)
        if steps or grid is None:
            return None
        cell = next((i for i, digit in enumerate(grid[0]) if digit != solution[i]), None)
        return None if cell is None else (grid.start() + cell, grid.start() + cell + 1)

    def chance(self, problems: Sequence[Problem]) -> float | None:
        """Return the expected share of puzzles that random digits in the empty cells solve."""
        return mean([self._chance(problem) for problem in problems]) if problems else None

    def summary(self, graded: Sequence[tuple[Problem, Grade]]) -> dict[str, float]:
        """Return the share of ``solved`` puzzles, of right ``cells`` among empty ones, and that of a ``random_fill``.

        The published accuracy is the share of cells; in compatible mode it replaces ``accuracy``.
        """
        empty = [str(problem.fields.get("puzzle", "")).count("0") for problem, _ in graded]
        if not sum(empty):
            return {}
        right = sum(round(grade.score * cells) for (_, grade), cells in zip(graded, empty, strict=True))
        cells = right / sum(empty)
        figures = {
            "solved": mean([float(grade.correct) for _, grade in graded]),
            "cells": cells,
            "random_fill": 1 / self.size,
        }
        return figures | ({"accuracy": cells} if self.mode == "compatible" else {})

    def generate(self, split: Split, index: int) -> Problem:
        """Return problem ``index`` of ``split``, by keyed draws."""
        problem = self._generate_large(split, index) if self.size == 9 else self._generate_small(split, index)
        if not self.easy_up_to:
            return problem
        easy = problem.fields["puzzle"].count("0") <= self.easy_up_to
        return replace(problem, fields={**problem.fields, "domain": "easy" if easy else "hard"})

    def _grade_published(self, problem: Problem, completion: str) -> Grade:
        puzzle = self._grid(needed(problem.fields, "puzzle"), "puzzle", "The problem")
        solution = self._grid(needed(problem.fields, "solution"), "solution", "The problem")
        grid = sudoku_cells(completion)
        score = _share(puzzle, solution, grid) if grid else 0.0
        return Grade(score == 1.0, score, grid)

    def _chance(self, problem: Problem) -> float:
        puzzle = self._grid(needed(problem.fields, "puzzle"), "puzzle", "The problem")
        solutions = completions(puzzle).bit_count() if self.size == 4 else 1
        return solutions / self.size ** puzzle.count("0")

    def _grid(self, value: Any, name: str, where: str) -> str:
        cells = self.size**2
        if not isinstance(value, str) or not re.fullmatch(rf"[0-{self.size}]{{{cells}}}", value):
            raise InputError(
                f"{where}: {name} must be a string of {cells} digits from 0 to {self.size}, not {value!r:.60}; "
                "correct it."
            )
        return value

    def entry(self, row: Row) -> Entry:
        """Read a row with the columns Puzzle and Solution."""
        puzzle = self._grid(row.text("Puzzle"), "Puzzle", row.where)
        solution = self._grid(row.text("Solution"), "Solution", row.where)
        if not is_solution(puzzle, solution):
            raise InputError(f"{row.where}: Solution does not solve Puzzle; correct the line or leave it out.")
        return Entry(row.number, puzzle, {"puzzle": puzzle, "solution": solution})

    def _generate_small(self, split: Split, index: int) -> Problem:
        puzzle, solution = _small_puzzle(self.seed, self.empties_min, self.empties_max, split, index)
        return Problem(f"sudoku/{split}/{index}", {"puzzle": puzzle, "solution": solution})

    def _generate_large(self, split: Split, index: int) -> Problem:
        span = self.empties_max - self.empties_min + 1
        empties = self.empties_min + make_key(self.seed, "sudoku9", split, index) % span
        tried = 0
        for attempt in count():
            draws = Draws(make_key(self.seed, "sudoku9", split, index, attempt))
            solution = large_grid(draws)
            if split_of(solution) != split:
                continue
            puzzle = large_puzzle(solution, empties, draws)
            if puzzle is not None:
                return Problem(f"sudoku/{split}/{index}", {"puzzle": puzzle, "solution": solution})
            tried += 1
            if tried == _LARGE_ATTEMPTS:
                break
        raise InputError(f"No 9x9 puzzle with {empties} empty cells was found; lower task.empties_max.")


@lru_cache(maxsize=8192)  # the dev and test splits, which take tens of draws each, are asked for again and again
def _small_puzzle(seed: int, empties_min: int, empties_max: int, split: Split, index: int) -> tuple[str, str]:
    """The 4x4 puzzle ``index`` of a split with one solution, and that."""
    empties = empties_min + make_key(seed, "sudoku", split, index) % (empties_max - empties_min + 1)
    for attempt in count():
        draw = make_key(seed, "sudoku", split, index, attempt)  # one key for grid and empty cells
        draw, number = divmod(draw, len(grids()))
        solution = grids()[number]
        puzzle, filled = list(solution), list(range(16))
        for _ in range(empties):
            draw, index_of_cell = divmod(draw, len(filled))
            puzzle[filled.pop(index_of_cell)] = "0"
        text = "".join(puzzle)
        if completions(text).bit_count() == 1 and split_of(text) == split:
            return text, solution
    raise AssertionError("count() does not end")


def parse_grid(text: str, cells: int = 16) -> str | None:
    """Return the grid of ``cells`` digits that a completion answers with, or None.

    It is read from the last closed answer tag, or from the whole text without one: the last run of exactly that many
    digits, otherwise the last such run after white space, brackets, pipes, commas and LaTeX matrix markup are removed.
    Worked steps such as ``12=3`` are not part of a run. Lines such as ``Row 2: 3 4 1 2`` are put in the order of their
    labels. A transposed matrix is not read.
    """
    marked = last_answer(text)
    text = text[-MAX_TEXT:] if marked is None else marked
    if _TRANSPOSED.search(text):
        return None
    text = _rows_joined(_LATEX.sub(" ", text), cells)
    for candidate in (text, _LAYOUT.sub("", _STEP.sub("=", text))):
        runs = [run for run in _RUN.findall(candidate) if len(run) == cells]
        if runs:
            return runs[-1]
    return None


def _rows_joined(text: str, cells: int) -> str:
    """Join each block of labelled rows into one run of digits, if every row is there once and complete."""
    if not _ROW_LABEL.search(text):
        return text
    size = math.isqrt(cells)
    joined: list[str] = []
    block: dict[str, str] = {}
    segments: list[str] = []
    for segment in [*_SEGMENT.split(text), None]:
        row = _LABELLED_ROW.fullmatch(segment) if segment is not None else None
        if row is not None:
            digits = "".join(re.findall("[0-9]", row[2]))
            segments.append(segment or "")
            block[row[1]] = digits if len(digits) == size and row[1] not in block else ""
        elif segment is not None and block and (not segment.strip() or segment == ";"):
            segments.append(segment)
        else:
            is_complete = sorted(block) == [str(number) for number in range(1, size + 1)] and all(block.values())
            joined += [" ", *(block[label] for label in sorted(block)), "\n"] if is_complete else segments
            joined.append(segment or "")
            block, segments = {}, []
    return "".join(joined)


def is_solution(puzzle: str, grid: str) -> bool:
    """Return whether ``grid`` is a valid filled grid that keeps the givens of ``puzzle``."""
    return len(grid) == len(puzzle) and has_holes_only(puzzle, grid) and obeys(grid)


def _share(puzzle: str, solution: str, grid: str) -> float:
    """Return the share of the empty cells of ``puzzle`` that ``grid`` fills as ``solution`` does."""
    hits = [grid[cell] == solution[cell] for cell, given in enumerate(puzzle) if given == "0"]
    return sum(hits) / len(hits) if hits else 0.0
