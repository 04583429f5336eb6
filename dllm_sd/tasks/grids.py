"""Sudoku grids as strings of digits, row by row: all 4x4 grids, random 9x9 grids and puzzles, and solution steps."""

from collections.abc import Iterator
from functools import cache
from math import isqrt

from dllm_sd.tasks.sources import Draws

_SEARCH_LIMIT = 2000  # cells that a search may fill; beyond that, the given is kept


def obeys(grid: str) -> bool:
    """Return whether every row, column and box of a 4x4 or 9x9 grid contains every digit from 1 once."""
    size = isqrt(len(grid))
    if size == 4:
        return grid in _grid_numbers()
    digits = {str(digit) for digit in range(1, size + 1)}
    return all({grid[cell] for cell in unit} == digits for unit in _units(size))


def has_holes_only(puzzle: str, grid: str) -> bool:
    """Return whether ``grid`` keeps the givens of ``puzzle``."""
    return all(given in ("0", cell) for given, cell in zip(puzzle, grid, strict=True))


def completions(puzzle: str) -> int:
    """Return the solutions of a 4x4 ``puzzle`` as a bit set over ``grids()``; ``bit_count()`` is their number."""
    candidates = (1 << len(grids())) - 1
    for cell, digit in enumerate(puzzle):
        if digit != "0":
            candidates &= _grids_with()[cell][digit]
    return candidates


def worked_steps(puzzle: str, solution: str) -> str:
    """Fill the empty cells of a 4x4 or 9x9 ``puzzle`` one by one; a line ``rc=d`` gives row, column and digit.

    The next cell is the first with a single possible digit; otherwise the first that is the only place of a digit in
    its row, column or box; otherwise the first empty cell. The digits are those of ``solution``.
    """
    size = isqrt(len(puzzle))
    peer_digits = [{puzzle[peer] for peer in peers} for peers in _peers(size)]
    digits = [str(digit) for digit in range(1, size + 1)]
    free = {cell: set(digits) - peer_digits[cell] for cell, digit in enumerate(puzzle) if digit == "0"}
    steps = []
    while free:
        cell = _forced_cell(free, size)
        del free[cell]
        for peer in _peers(size)[cell]:
            free.get(peer, set()).discard(solution[cell])
        steps.append(f"{cell // size + 1}{cell % size + 1}={solution[cell]}")
    return "\n".join(steps)


def _forced_cell(free: dict[int, set[str]], size: int) -> int:
    """Return the cell to fill next, given the digits that each empty cell can hold."""
    for cell, digits in free.items():
        if len(digits) == 1:
            return cell
    for cell, digits in free.items():
        for unit in _units(size):
            if cell in unit and digits.difference(*(free[peer] for peer in unit if peer != cell and peer in free)):
                return cell
    return next(iter(free))


@cache
def grids() -> tuple[str, ...]:
    """Return the 288 filled 4x4 grids, in lexicographic order."""

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


def large_grid(draws: Draws) -> str:
    """Return a random 9x9 grid: the cyclic one with digits, bands, stacks, and rows and columns in them shuffled."""
    digits = draws.shuffled(9)
    rows, columns = ([3 * band + line for band in draws.shuffled(3) for line in draws.shuffled(3)] for _ in range(2))
    transposed = draws.below(2)
    cells = [(column, row) if transposed else (row, column) for row in rows for column in columns]
    return "".join(str(1 + digits[(3 * (row % 3) + row // 3 + column) % 9]) for row, column in cells)


def large_puzzle(solution: str, empties: int, draws: Draws) -> str | None:
    """Empty ``empties`` cells of ``solution``, keeping it the only solution; None if these draws do not succeed."""
    cells = [int(digit) for digit in solution]
    for cell in draws.shuffled(81):
        if not empties:
            break
        digit, cells[cell] = cells[cell], 0
        # A second solution would differ in this cell, since the solution was unique while the cell was given.
        if any(_may_hold(cells, cell, alternative) for alternative in range(1, 10) if alternative != digit):
            cells[cell] = digit
        else:
            empties -= 1
    return None if empties else "".join(map(str, cells))


def _may_hold(cells: list[int], cell: int, digit: int) -> bool:
    """Return whether a solution with ``digit`` in ``cell`` exists, or a bounded search could not rule it out."""
    if any(cells[peer] == digit for peer in _peers()[cell]):
        return False
    trial = list(cells)
    trial[cell] = digit
    return _search(trial, [_SEARCH_LIMIT])


def _search(cells: list[int], budget: list[int]) -> bool:
    budget[0] -= 1
    if budget[0] < 0:
        return True
    next_cell, candidates = -1, [0] * 10
    for cell, digit in enumerate(cells):
        if digit:
            continue
        taken = {cells[peer] for peer in _peers()[cell]}
        free = [d for d in range(1, 10) if d not in taken]
        if len(free) < len(candidates):
            next_cell, candidates = cell, free
            if len(free) < 2:
                break
    if next_cell < 0:
        return True
    for digit in candidates:
        cells[next_cell] = digit
        if _search(cells, budget):
            return True
    cells[next_cell] = 0
    return False


@cache
def _units(size: int = 9) -> tuple[tuple[int, ...], ...]:
    side = isqrt(size)
    rows = [tuple(range(size * line, size * line + size)) for line in range(size)]
    columns = [tuple(range(line, size * size, size)) for line in range(size)]
    corners = [side * (size * band + stack) for band in range(side) for stack in range(side)]
    boxes = [tuple(corner + size * row + step for row in range(side) for step in range(side)) for corner in corners]
    return (*rows, *columns, *boxes)


@cache
def _peers(size: int = 9) -> tuple[tuple[int, ...], ...]:
    cells = range(size * size)
    return tuple(tuple({c for unit in _units(size) if cell in unit for c in unit} - {cell}) for cell in cells)


def _box(cell: int) -> tuple[int, int]:
    return cell // 8, cell % 4 // 2


@cache
def _grid_numbers() -> dict[str, int]:
    return {grid: number for number, grid in enumerate(grids())}


@cache
def _grids_with() -> list[dict[str, int]]:
    """Return, for each cell and digit, the bit set of the 4x4 grids that have the digit in the cell."""
    return [
        {digit: sum(1 << number for number, grid in enumerate(grids()) if grid[cell] == digit) for digit in "1234"}
        for cell in range(16)
    ]
