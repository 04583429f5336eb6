"""Generated Sudoku puzzles have one solution, belong to one split, and are graded by the rules."""

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from dllm_sd.errors import InputError
from dllm_sd.tasks import Grade, Problem, Split, Sudoku, Task
from dllm_sd.tasks.grids import completions, grids, worked_steps
from dllm_sd.tasks.sudoku import parse_grid
from tests.tiers import later

SPLITS: tuple[Split, ...] = ("train", "dev", "test")
SOLUTION = "1234341221434321"
PUZZLE = "0204341221034301"
PROBLEM = Problem("x", {"puzzle": PUZZLE, "solution": SOLUTION})
WORKED = Sudoku(answer="{steps}\n{solution}")
WORKED_LARGE = Sudoku(answer="{steps}\n{solution}", size=9, empties_max=50)
SPARE = 100  # puzzles of a split that a test looks at


def follows_rules(grid: str) -> bool:
    rows = [grid[i : i + 4] for i in range(0, 16, 4)]
    columns = [grid[i::4] for i in range(4)]
    boxes = [grid[i : i + 2] + grid[i + 4 : i + 6] for i in (0, 2, 8, 10)]
    return all(sorted(unit) == list("1234") for unit in rows + columns + boxes)


def solve(puzzle: str) -> list[str]:
    """All solutions, by trying digits cell by cell."""
    if "0" not in puzzle:
        return [puzzle] if follows_rules(puzzle) else []
    cell = puzzle.index("0")
    peers = {
        puzzle[c]
        for c in range(16)
        if c // 4 == cell // 4 or c % 4 == cell % 4 or (c // 8, c % 4 // 2) == (cell // 8, cell % 4 // 2)
    }
    return [s for d in "1234" if d not in peers for s in solve(puzzle[:cell] + d + puzzle[cell + 1 :])]


def test_sudoku_is_a_task():
    assert isinstance(Sudoku(), Task)


def test_there_are_288_grids_and_all_follow_the_rules():
    assert len(set(grids())) == 288
    assert all(map(follows_rules, grids()))


@pytest.mark.parametrize("split", SPLITS)
def test_every_generated_puzzle_has_exactly_its_solution(split: Split):
    for problem in Sudoku().problems(split)[:SPARE]:
        assert solve(problem.fields["puzzle"]) == [problem.fields["solution"]]


def test_the_bit_sets_count_solutions_as_search_does():
    for puzzle in ("0" * 16, PUZZLE, "1" + "0" * 15, "1234" + "0" * 12, "11" + "0" * 14, SOLUTION):
        assert completions(puzzle).bit_count() == len(solve(puzzle))


def test_the_number_of_empty_cells_is_uniform_over_its_range():
    empties = Counter(problem.fields["puzzle"].count("0") for problem in Sudoku(seed=3).problems("train")[:1000])
    assert set(empties) == {6, 7, 8, 9, 10}
    assert all(140 < count < 260 for count in empties.values())


def test_the_sparsest_puzzles_can_be_generated():
    problem = Sudoku(empties_min=12, empties_max=12).problems("test")[0]
    assert problem.fields["puzzle"].count("0") == 12


def test_no_puzzle_is_in_two_splits_even_under_different_seeds():
    few = [
        {problem.fields["puzzle"] for problem in Sudoku(empties_min=1, empties_max=2, seed=seed).problems(split)[:300]}
        for seed, split in enumerate(SPLITS)
    ]
    assert sum(map(len, few)) == len(set.union(*few))


def test_problems_are_functions_of_seed_split_and_index():
    first = Sudoku(seed=1).problems("train")
    assert first[17] == Sudoku(seed=1, size_train=18).problems("train")[17]
    assert first[17].id == "sudoku/train/17"
    assert first[17].fields != Sudoku(seed=2).problems("train")[17].fields
    assert first[17].fields != first[18].fields


def test_a_million_problems_cost_nothing_until_looked_at():
    start = time.process_time()
    problems = Sudoku().problems("train")
    assert len(problems) == 1_000_000
    assert problems[999_999].id == "sudoku/train/999999"
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        (SOLUTION, SOLUTION),
        (f"\n {SOLUTION} \n", SOLUTION),
        ("1234\n3412\n2143\n4321", SOLUTION),
        ("[[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]]", SOLUTION),
        ("1 2 | 3 4\n3 4 | 1 2\n----+----\n2 1 | 4 3\n4 3 | 2 1", SOLUTION),
        (f"From {PUZZLE}\n{SOLUTION}", SOLUTION),
        (f"<answer>{SOLUTION}</answer> after {PUZZLE}", SOLUTION),
        (f"<answer>[{SOLUTION}]</answer>", SOLUTION),
        (f"<answer>{SOLUTION}</answer> or <answer>{PUZZLE}", SOLUTION),
        (f"{SOLUTION} <answer>none</answer>", None),
        (SOLUTION[:-1], None),
        (SOLUTION + "1", None),
        (f"11=1\n13=3\n{SOLUTION}", SOLUTION),
        ("11=1\n13=3\n1234\n3412\n2143\n4321", SOLUTION),
        (f"11=1\n13=3\n{SOLUTION[1:]}", None),  # the digit of a step is none of the grid's
        (f"11 = 1\n{SOLUTION[:-1]}", None),
        (f"44=12\n{SOLUTION[2:]}", None),
        ("\u0661" + SOLUTION, None),
        ("\u0661" * 16, None),
        ("", None),
    ],
)
def test_the_grid_is_found(text: str, grid: str | None):
    assert parse_grid(text) == grid


@pytest.mark.parametrize(
    ("text", "correct", "score"),
    [
        (f"<answer>{SOLUTION}</answer>", True, 1),
        (SOLUTION, True, 1),
        ("2234341221434321", False, 3 / 4),  # one empty cell wrong
        (PUZZLE, False, 0),
        (PUZZLE.replace("0", "9"), False, 0),
        ("2143341212344321", False, 1 / 4),  # follows the rules of its own but not the givens
        ("no grid", False, 0),
    ],
)
def test_verdicts(text: str, correct: bool, score: float):
    grade = Sudoku().grade(PROBLEM, text)
    assert (grade.correct, grade.score) == (correct, score)


def test_any_solution_of_an_ambiguous_puzzle_is_correct():
    listed, *others = solve("1234" + "0" * 12)
    problem = Problem("x", {"puzzle": "1234" + "0" * 12, "solution": listed})
    assert others
    for other in others:
        grade = Sudoku().grade(problem, other)
        assert (grade.correct, grade.score) == (True, 1.0)


def test_without_a_solution_the_score_is_all_or_nothing():
    problem = Problem("x", {"puzzle": PUZZLE})
    assert Sudoku().grade(problem, SOLUTION).score == 1.0
    assert Sudoku().grade(problem, "2234341221434321").score == 0.0
    assert Sudoku().reference(problem) is None


@pytest.mark.parametrize("puzzle", [204341221034301, "123", "5" * 16, None])
def test_a_puzzle_that_is_none_is_the_users_mistake(puzzle: object):
    with pytest.raises(InputError, match="puzzle must be a string of 16 digits"):
        Sudoku().grade(Problem("x", {"puzzle": puzzle}), SOLUTION)
    with pytest.raises(InputError, match="no field 'puzzle'"):
        Sudoku().grade(Problem("x", {}), SOLUTION)


def test_the_reference_is_correct_and_bare_templates_are_allowed():
    bare = Sudoku(prompt="{puzzle}", answer="{solution}", system="be brief")
    assert bare.messages(PROBLEM) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": PUZZLE},
    ]
    assert bare.reference(PROBLEM) == SOLUTION
    reference = Sudoku().reference(PROBLEM)
    assert reference == f"<answer>{SOLUTION}</answer>"
    assert Sudoku().grade(PROBLEM, reference or "").correct
    assert PUZZLE in Sudoku().messages(PROBLEM)[0]["content"]


@pytest.mark.parametrize(
    ("task", "count"), [(WORKED, 200), (WORKED_LARGE, 5), *later((WORKED, 2000), (WORKED_LARGE, 20))]
)
def test_the_grid_behind_worked_steps_is_graded_and_nothing_else(task: Sudoku, count: int):
    draws = random.Random(0)
    for problem in task.problems("train")[:count]:
        puzzle, solution = problem.fields["puzzle"], problem.fields["solution"]
        reference = task.reference(problem) or ""
        assert reference == f"{worked_steps(puzzle, solution)}\n{solution}"
        assert set(problem.fields) == {"puzzle", "solution"}
        assert task.grade(problem, reference) == Grade(True, 1.0, solution)
        for length in range(len(reference)):
            assert task.grade(problem, reference[:length]) == Grade(False, 0.0, None)
        steps = reference.rpartition("\n")[0]
        noise = "".join(draws.choice("0123456789") if c.isdigit() else c for c in steps)
        assert task.grade(problem, f"{noise}\n{solution}").parsed == solution
        assert task.grade(problem, f"{steps}\n{solution[::-1]}").parsed == solution[::-1]
        assert task.grade(problem, f"{noise}\n{solution[1:]}").parsed is None


def test_steps_are_worked_out_only_for_a_template_that_asks_for_them(monkeypatch: pytest.MonkeyPatch):
    assert Sudoku(answer="{steps}; {solution}").reference(PROBLEM) == f"11=1\n13=3\n33=4\n43=2; {SOLUTION}"
    assert Sudoku(answer="{steps}").reference(Problem("x", {"puzzle": PUZZLE})) is None
    assert WORKED.final_answer(PROBLEM) == SOLUTION
    assert Sudoku(mode="compatible").grade(PROBLEM, WORKED.reference(PROBLEM) or "").correct
    with pytest.raises(InputError, match="puzzle must be a string of 16 digits"):
        WORKED.reference(Problem("x", {"puzzle": "1", "solution": SOLUTION}))
    monkeypatch.setattr("dllm_sd.tasks.sudoku.worked_steps", None)
    assert Sudoku().reference(PROBLEM) == f"<answer>{SOLUTION}</answer>"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"empties_min": 9, "empties_max": 8}, r"task\.empties_min \(9\)"),
        ({"empties_min": 0}, r"task\.empties_min"),
        ({"empties_max": 13}, r"task\.empties_max \(13\)"),
        ({"size_dev": -1}, r"task\.size_dev is -1; give"),
        ({"prompt": "{solution}"}, r"task\.prompt asks for \{solution\}"),
        ({"prompt": "{puzzle}{steps}"}, r"task\.prompt asks for \{steps\}; .*of which there are: \{puzzle\}\.$"),
        ({"answer": "{step}"}, r"task\.answer asks for \{step\}; .*there are: \{puzzle\}, \{solution\}, \{steps\}\.$"),
        ({"answer": "{"}, r"task\.answer is not a template"),
    ],
)
def test_wrong_fields_are_refused(fields: dict, message: str):
    with pytest.raises(InputError, match=message):
        Sudoku(**fields)


def test_an_empty_generated_split_is_refused():
    with pytest.raises(InputError, match=r"^task\.size_dev is 0, so the dev split holds no problems; raise it\.$"):
        Sudoku(size_dev=0).problems("dev")


def csv_file(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("Puzzle,Solution\n" + "".join(f"{puzzle},{solution}\n" for puzzle, solution in rows))
    return str(path)


def test_files_give_their_rows_and_the_last_are_held_out(tmp_path: Path):
    rows = [("0" + grid[1:], grid) for grid in grids()[:10]]
    task = Sudoku(
        data=csv_file(tmp_path / "train.csv", rows),
        data_test=csv_file(tmp_path / "test.csv", rows[:2]),
        size_dev=3,
        size_train=4,
    )
    assert [problem.fields["puzzle"] for problem in task.problems("train")] == [puzzle for puzzle, _ in rows[2:6]]
    assert [problem.id for problem in task.problems("dev")] == ["sudoku/dev/7", "sudoku/dev/8", "sudoku/dev/9"]
    assert len(task.problems("test")) == 2


def test_files_that_do_not_serve_are_refused(tmp_path: Path):
    good = csv_file(tmp_path / "good.csv", [(PUZZLE, SOLUTION)])
    with pytest.raises(InputError, match=r"set task\.data_test to a file"):
        Sudoku(data=good).problems("test")
    with pytest.raises(InputError, match=r"set task\.data to a file with more rows than task\.size_dev"):
        Sudoku(data=good).problems("train")
    wrong = csv_file(tmp_path / "wrong.csv", [(PUZZLE, SOLUTION), (PUZZLE, "2143341212344321")])
    with pytest.raises(InputError, match=r"wrong\.csv, line 3: Solution does not solve Puzzle"):
        Sudoku(data=wrong).problems("train")
    short = csv_file(tmp_path / "short.csv", [("123", SOLUTION)])
    with pytest.raises(InputError, match=r"short\.csv, line 2: Puzzle must be a string of 16 digits"):
        Sudoku(data=short).problems("train")


LARGE = "497581263518263947236947158749815632623479581851632479362794815974158326185326794"


def solutions_of(puzzle: str, most: int = 2) -> int:
    """How many completions a 9x9 puzzle has, up to ``most``, by plain search."""
    if "0" not in puzzle:
        return 1
    free = {}
    for cell in (cell for cell in range(81) if puzzle[cell] == "0"):
        row, column = divmod(cell, 9)
        seen = set(puzzle[9 * row : 9 * row + 9]) | set(puzzle[column::9])
        corner = 27 * (row // 3) + 3 * (column // 3)
        for line in range(3):
            seen |= set(puzzle[corner + 9 * line : corner + 9 * line + 3])
        free[cell] = [digit for digit in "123456789" if digit not in seen]
    cell = min(free, key=lambda cell: len(free[cell]))
    count = 0
    for digit in free[cell]:
        count += solutions_of(puzzle[:cell] + digit + puzzle[cell + 1 :], most - count)
        if count >= most:
            break
    return count


@pytest.mark.parametrize("empties", [6, 30, 50])
def test_large_puzzles_have_one_solution_and_come_quickly(empties: int):
    task = Sudoku(size=9, empties_min=empties, empties_max=empties)
    start = time.process_time()
    problems = [task.problems(split)[index] for split in SPLITS for index in range(5)]
    assert time.process_time() - start < 10
    for problem in problems:
        puzzle, solution = problem.fields["puzzle"], problem.fields["solution"]
        assert puzzle.count("0") == empties
        assert solutions_of(puzzle) == 1
        assert all(given in ("0", cell) for given, cell in zip(puzzle, solution, strict=True))
        assert task.grade(problem, task.reference(problem) or "").correct
        assert "9x9" in task.messages(problem)[0]["content"]
    assert problems[0] == task.problems("train")[0]
    assert len({problem.fields["solution"] for problem in problems}) == len(problems)


def test_large_puzzles_are_graded_by_the_rules():
    task, problem = Sudoku(size=9), Problem("x", {"puzzle": "00" + LARGE[2:], "solution": LARGE})
    assert task.grade(problem, "\n".join(LARGE[i : i + 9] for i in range(0, 81, 9))).correct
    assert task.grade(problem, "94" + LARGE[2:]).score == 0
    assert task.grade(problem, "41" + LARGE[2:]).score == 0.5
    assert task.chance([problem]) == 1 / 81


def test_the_compatible_mode_compares_with_the_listed_solution():
    listed, other, *_ = solve("1234" + "0" * 12)
    problem = Problem("x", {"puzzle": "1234" + "0" * 12, "solution": listed})
    published = Sudoku(mode="compatible")
    assert published.grade(problem, f"<answer>{listed}</answer>").correct
    assert not published.grade(problem, f"<answer>{other}</answer>").correct
    assert published.grade(PROBLEM, f"<answer>[{SOLUTION}]</answer>").score < 1
    with pytest.raises(InputError, match=r"task\.mode compatible supports 4x4 puzzles only"):
        Sudoku(mode="compatible", size=9)
    with pytest.raises(InputError, match=r"task\.size is 5; choose 4 or 9"):
        Sudoku(size=5)  # pyright: ignore[reportArgumentType]


def test_the_summary_counts_puzzles_and_cells():
    task, half = Sudoku(), "2234341221434321"
    graded = [(PROBLEM, task.grade(PROBLEM, text)) for text in (SOLUTION, half, "nothing", PUZZLE)]
    empty = PUZZLE.count("0")
    wrong = sum(grade.score < 1 for _, grade in graded)
    summary = task.summary(graded)
    assert wrong == 3
    assert summary["solved"] == 1 / 4
    assert summary["cells"] == pytest.approx(sum(grade.score for _, grade in graded) * empty / (4 * empty))
    assert summary["random_fill"] == 1 / 4
    assert task.summary([]) == {}
    assert task.chance([PROBLEM]) == pytest.approx(4.0**-empty)
    assert task.chance([]) is None


GRID = "1234341221434321"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("11=1\n12=2\n13=4\n14=1", "13=4"),
        ("11=1\n12=2\n1234341221434321", None),
        ("11 = 1; 51=1", "51=1"),
        ("11=1\n12=33", "12=33"),
        ("1234341221434312", "1"),
        ("1234341221434321", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_the_first_wrong_step_is_found(text: str, found: str | None) -> None:
    problem = Problem("p", {"puzzle": f"0000{GRID[4:]}", "solution": GRID})
    span = Sudoku().first_mistake(problem, text)
    assert (None if span is None else text[slice(*span)]) == found
    assert found != "1" or span == (14, 15)
