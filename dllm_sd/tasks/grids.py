"""Filled Sudoku grids as strings of digits, row by row: all of the small ones, keyed draws of the large ones."""

from collections.abc import Iterator
from functools import cache
from math import isqrt

from dllm_sd.tasks.sources import Draws

_NODES = 2000  # cells that a search may fill before a given is kept to be safe


def obeys(grid: str) -> bool:
    """Whether every row, column and box of a 4x4 or 9x9 grid holds every digit from 1 once."""
    size = isqrt(len(grid))
    if size == 4:
        return grid in _numbers()
    digits = {str(digit) for digit in range(1, size + 1)}
    return all({grid[cell] for cell in unit} == digits for unit in _units())


def has_holes_only(puzzle: str, grid: str) -> bool:
    """Whether ``grid`` keeps the givens of ``puzzle``."""
    return all(given in ("0", cell) for given, cell in zip(puzzle, grid, strict=True))


def completions(puzzle: str) -> int:
    """The solutions of a 4x4 ``puzzle`` as a bit set over ``grids()``; ``bit_count()`` says how many there are."""
    left = (1 << len(grids())) - 1
    for cell, digit in enumerate(puzzle):
        if digit != "0":
            left &= _having()[cell][digit]
    return left


@cache
def grids() -> tuple[str, ...]:
    """The 288 filled 4x4 grids, in order."""

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
    """A filled 9x9 grid: the cyclic one with digits, bands, stacks, and rows and columns within them shuffled."""
    digits = draws.shuffled(9)
    rows, columns = ([3 * band + line for band in draws.shuffled(3) for line in draws.shuffled(3)] for _ in range(2))
    turned = draws.below(2)
    cells = [(column, row) if turned else (row, column) for row in rows for column in columns]
    return "".join(str(1 + digits[(3 * (row % 3) + row // 3 + column) % 9]) for row, column in cells)


def large_puzzle(solution: str, empties: int, draws: Draws) -> str | None:
    """``solution`` with ``empties`` cells emptied and no other completion; None where these draws lead to none."""
    cells = [int(digit) for digit in solution]
    for cell in draws.shuffled(81):
        if not empties:
            break
        digit, cells[cell] = cells[cell], 0
        # Another completion would differ here, since there was none while the cell was given.
        if any(_may_hold(cells, cell, other) for other in range(1, 10) if other != digit):
            cells[cell] = digit
        else:
            empties -= 1
    return None if empties else "".join(map(str, cells))


def _may_hold(cells: list[int], cell: int, digit: int) -> bool:
    """Whether a completion with ``digit`` in ``cell`` exists, or could not be ruled out in a bounded search."""
    if any(cells[peer] == digit for peer in _peers()[cell]):
        return False
    trial = list(cells)
    trial[cell] = digit
    return _search(trial, [_NODES])


def _search(cells: list[int], left: list[int]) -> bool:
    left[0] -= 1
    if left[0] < 0:
        return True
    best, choices = -1, [0] * 10
    for cell, digit in enumerate(cells):
        if digit:
            continue
        taken = {cells[peer] for peer in _peers()[cell]}
        free = [d for d in range(1, 10) if d not in taken]
        if len(free) < len(choices):
            best, choices = cell, free
            if len(free) < 2:
                break
    if best < 0:
        return True
    for digit in choices:
        cells[best] = digit
        if _search(cells, left):
            return True
    cells[best] = 0
    return False


@cache
def _units() -> tuple[tuple[int, ...], ...]:
    rows = [tuple(range(9 * line, 9 * line + 9)) for line in range(9)]
    columns = [tuple(range(line, 81, 9)) for line in range(9)]
    corners = [27 * band + 3 * stack for band in range(3) for stack in range(3)]
    return (*rows, *columns, *(tuple(c + 9 * row + step for row in range(3) for step in range(3)) for c in corners))


@cache
def _peers() -> tuple[tuple[int, ...], ...]:
    return tuple(tuple({c for unit in _units() if cell in unit for c in unit} - {cell}) for cell in range(81))


def _box(cell: int) -> tuple[int, int]:
    return cell // 8, cell % 4 // 2


@cache
def _numbers() -> dict[str, int]:
    return {grid: number for number, grid in enumerate(grids())}


@cache
def _having() -> list[dict[str, int]]:
    """For each cell and digit, the bit set of the 4x4 grids that have the digit there."""
    return [
        {digit: sum(1 << number for number, grid in enumerate(grids()) if grid[cell] == digit) for digit in "1234"}
        for cell in range(16)
    ]
