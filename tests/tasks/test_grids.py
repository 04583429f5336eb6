"""Worked steps fill every empty cell once, in the order in which an oracle of its own finds the cells forced."""

from collections import Counter

import pytest

from dllm_sd.tasks import Sudoku
from dllm_sd.tasks.grids import grids, worked_steps
from tests.tiers import later

SOLUTION = "1234341221434321"
LARGE = "497581263518263947236947158749815632623479581851632479362794815974158326185326794"


def groups(cell: int, size: int) -> list[list[int]]:
    """The cells of the row, the column and the box of a cell."""
    side, row, column = {4: 2, 9: 3}[size], cell // size, cell % size
    cells = range(size * size)
    return [
        [c for c in cells if c // size == row],
        [c for c in cells if c % size == column],
        [c for c in cells if c // size // side == row // side and c % size // side == column // side],
    ]


def may_hold(grid: str, cell: int, digit: str, size: int) -> bool:
    return grid[cell] == "0" and all(grid[c] != digit for group in groups(cell, size) for c in group)


def forced(grid: str, cell: int, size: int) -> dict[str, str]:
    """The digits that logic forces into an empty cell, and by which rule: ``naked`` before ``hidden``."""
    digits = [str(digit) for digit in range(1, size + 1) if may_hold(grid, cell, str(digit), size)]
    if len(digits) == 1:
        return {digits[0]: "naked"}
    return {
        digit: "hidden"
        for digit in digits
        if any([c for c in group if may_hold(grid, c, digit, size)] == [cell] for group in groups(cell, size))
    }


def walk(puzzle: str, solution: str) -> Counter[str]:
    """Follow the worked steps, check each of them, and count the rules that they go by."""
    size = {16: 4, 81: 9}[len(puzzle)]
    grid, rules = puzzle, Counter[str]()
    steps = worked_steps(puzzle, solution)
    for step in steps.splitlines():
        row, column, sign, digit = step
        cell = size * (int(row) - 1) + int(column) - 1
        assert (grid[cell], sign, digit) == ("0", "=", solution[cell])
        every = {c: forced(grid, c, size) for c in range(size * size) if grid[c] == "0"}
        firsts = {rule: next((c for c in every if rule in every[c].values()), None) for rule in ("naked", "hidden")}
        rule = next((rule for rule, first in firsts.items() if first is not None), "neither")
        assert cell == (next(iter(every)) if rule == "neither" else firsts[rule])
        assert every[cell] == ({digit: rule} if rule != "neither" else {})
        grid = grid[:cell] + digit + grid[cell + 1 :]
        rules[rule] += 1
    assert grid == solution
    assert set(steps) <= set("0123456789=\n")
    return rules


@pytest.mark.parametrize(
    ("puzzle", "solution", "steps"),
    [
        ("0204341221034301", SOLUTION, "11=1\n13=3\n33=4\n43=2"),
        (SOLUTION, SOLUTION, ""),
        # The 1 has one place in two boxes; then a 2 must be taken from the solution, which forces another; and so on.
        (
            "1000000000100000",
            "1234342143122143",
            "24=1\n42=1\n12=2\n23=2\n13=3\n14=4\n43=4\n21=3\n22=4\n32=3\n34=2\n31=4\n41=2\n44=3",
        ),
        ("0" + LARGE[1:80] + "0", LARGE, "11=4\n99=4"),
    ],
)
def test_steps_are_written_in_the_order_of_logic(puzzle: str, solution: str, steps: str):
    assert worked_steps(puzzle, solution) == steps


@pytest.mark.parametrize(("low", "high"), [(6, 10), (11, 12)])
def test_small_puzzles_are_worked_out_by_singles(low: int, high: int):
    problems = Sudoku(empties_min=low, empties_max=high).problems("train")[:60]
    rules = sum((walk(problem.fields["puzzle"], problem.fields["solution"]) for problem in problems), Counter())
    assert rules == {"naked": sum(problem.fields["puzzle"].count("0") for problem in problems)}


@pytest.mark.parametrize(
    ("empties", "count", "known"), [(6, 2, {"naked"}), *later((50, 2, {"naked", "hidden", "neither"}))]
)
def test_large_puzzles_are_worked_out_by_all_rules(empties: int, count: int, known: set[str]):
    problems = Sudoku(size=9, empties_min=empties, empties_max=empties).problems("train")[:count]
    rules = sum((walk(problem.fields["puzzle"], problem.fields["solution"]) for problem in problems), Counter())
    assert rules.total() == empties * count
    assert set(rules) == known


def test_where_nothing_is_forced_the_first_empty_cell_is_filled():
    for solution in grids()[::36]:
        rules = walk("0" * 16, solution)
        assert rules["neither"] > 0
        assert rules.total() == 16
        assert worked_steps("0" * 16, solution).startswith(f"11={solution[0]}\n12={solution[1]}\n")
