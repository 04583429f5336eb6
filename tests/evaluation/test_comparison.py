"""Two evaluations compared: the test and the interval are those of the books, the pairing is by problem."""

import itertools
import json
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_sd.cli.main import main
from dllm_sd.errors import InputError
from dllm_sd.evaluation.comparison import (
    ContingencyTable,
    bootstrap_interval,
    compare,
    compare_files,
    find_generations,
    mcnemar,
    resample,
)
from dllm_sd.evaluation.recording import VERDICTS, Verdict, write_verdicts
from tests.tiers import later

Rows = list[tuple[str, bool]]


def evaluation(correct: str, start: int = 0) -> dict[str, list[bool]]:
    """Single attempts at problems with running numbers: ``+`` is right, ``-`` is wrong."""
    return {f"p{start + i}": [mark == "+"] for i, mark in enumerate(correct)}


def generations(file: Path, rows: Rows, **more: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"id": name, "generation": "", "correct": correct, **more} for name, correct in rows]
    with file.open("a", encoding="utf-8") as handle:
        handle.writelines(json.dumps(line) + "\n" for line in lines)
    return file


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (3, 3, 1.0),
        (5, 0, 2 * 1 / 32),
        (8, 1, 2 * (1 + 9) / 512),
        (10, 2, 2 * (1 + 12 + 66) / 4096),  # 0.0386
        (4, 3, 1.0),  # 2 (1 + 7 + 21 + 35) / 128
    ],
)
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int, p: float):
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a) == p


@pytest.mark.parametrize(("only_a", "only_b"), list(itertools.combinations_with_replacement(range(7), 2)))
def test_mcnemar_counts_all_splits_that_are_as_uneven(only_a: int, only_b: int):
    n = only_a + only_b
    coins = [sum(flips) for flips in itertools.product((0, 1), repeat=n)]
    uneven = sum(abs(2 * heads - n) >= abs(only_a - only_b) for heads in coins)
    assert mcnemar(only_a, only_b) == pytest.approx(uneven / 2**n, abs=1e-15)


def test_mcnemar_approaches_the_normal_test_in_large_samples():
    a, b = 5300, 5000
    z = (abs(a - b) - 1) / math.sqrt(a + b)  # with the correction for continuity
    assert mcnemar(a, b) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)


def test_the_interval_is_that_of_a_plain_loop_over_the_same_resamples():
    rng = random.Random(1)
    values = [rng.choice([-1.0, -0.5, 0.0, 0.0, 0.5, 1.0, 1.0]) for _ in range(37)]
    means = sorted(sum(values[i] for i in row) / 37 for row in resample(37, range(400), seed=3).tolist())

    def quantile(share: float) -> float:
        place = share * (len(means) - 1)
        low = math.floor(place)
        return means[low] + (place - low) * (means[min(low + 1, len(means) - 1)] - means[low])

    interval = bootstrap_interval(torch.tensor(values), seed=3, resamples=400)
    assert interval == pytest.approx((quantile(0.025), quantile(0.975)), abs=1e-12)


def test_batches_of_resamples_do_not_matter(monkeypatch: pytest.MonkeyPatch):
    values = torch.linspace(-1, 1, 23)
    whole = bootstrap_interval(values, resamples=500)
    monkeypatch.setattr("dllm_sd.evaluation.comparison._BATCH", 23 * 7 + 1)
    assert bootstrap_interval(values, resamples=500) == whole
    monkeypatch.setattr("dllm_sd.evaluation.comparison._BATCH", 1)
    assert bootstrap_interval(values, resamples=500) == whole


def test_resamples_draw_every_problem_equally_often():
    n, rows = 5, 20_000
    drawn = resample(n, range(rows))
    assert drawn.shape == (rows, n)
    counts = torch.bincount(drawn.flatten(), minlength=n).tolist()
    assert len(counts) == n
    expected = rows * n / n
    assert sum((count - expected) ** 2 / expected for count in counts) < 18.5  # chi-square, 4 degrees, p = 0.001
    pairs = torch.bincount(drawn[:, 0] * n + drawn[:, 1], minlength=n * n).tolist()
    assert sum((count - rows / 25) ** 2 / (rows / 25) for count in pairs) < 51.2  # 24 degrees, p = 0.001
    assert not torch.equal(drawn, resample(n, range(rows), seed=1))


@pytest.mark.parametrize("seed", [0, *later(1, 2)])
def test_the_interval_is_close_to_the_normal_one_in_large_samples(seed: int):
    rng = random.Random(seed)
    differences = [float((rng.random() < 0.7) - (rng.random() < 0.6)) for _ in range(800)]
    centre, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(800)
    low, high = bootstrap_interval(torch.tensor(differences), seed=seed)
    assert low == pytest.approx(centre - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(centre + 1.96 * error, abs=0.1 * error)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = random.Random(5), 0
    for trial in range(400):
        differences = [float((rng.random() < 0.6) - (rng.random() < 0.5)) for _ in range(100)]
        low, high = bootstrap_interval(torch.tensor(differences), seed=trial, resamples=400)
        covered += low <= 0.1 <= high
    assert 0.91 < covered / 400 < 0.98


def test_a_comparison_follows_from_the_verdicts():
    # 0 1 2 3 4 5 6 7
    a = evaluation("++-+----")
    b = evaluation("+-++++--")
    found = compare(a, b)
    assert (found.n, found.accuracy_a, found.accuracy_b, found.difference) == (8, 3 / 8, 5 / 8, 2 / 8)
    assert found.counts == ContingencyTable(both=2, only_a=1, only_b=3, neither=2)
    assert found.p_value == 2 * (1 + 4) / 16
    assert (found.alone_a, found.alone_b) == (0, 0)
    assert found.ci95[0] < 0.25 < found.ci95[1]


def test_swapping_the_two_swaps_the_signs():
    a, b = evaluation("++-+-----+-+"), evaluation("+-++++--+--+")
    there, back = compare(a, b), compare(b, a)
    assert back.difference == -there.difference
    assert back.ci95 == pytest.approx((-there.ci95[1], -there.ci95[0]))
    assert back.p_value == there.p_value


def test_equal_evaluations_do_not_differ():
    a = evaluation("++-+----")
    found = compare(a, a)
    assert (found.difference, found.ci95, found.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_the_order_of_the_problems_does_not_matter_and_the_seed_does():
    rng = random.Random(0)
    a, b = (evaluation("".join(rng.choice("+-") for _ in range(60))) for _ in range(2))
    shuffled = dict(sorted(b.items(), key=lambda pair: pair[0][::-1]))
    assert compare(a, b) == compare(dict(reversed(a.items())), shuffled)
    in_order = [float(b[name][0]) - float(a[name][0]) for name in sorted(a)]  # sorted: alike in every process
    assert compare(a, b).ci95 == bootstrap_interval(torch.tensor(in_order))
    assert compare(a, b, seed=1).ci95 != compare(a, b).ci95
    assert replace(compare(a, b, seed=1), ci95=(0, 0)) == replace(compare(a, b), ci95=(0, 0))


def test_only_shared_problems_count():
    a, b = evaluation("++--+"), evaluation("++--+++", start=3)
    found = compare(a, b)
    assert (found.n, found.alone_a, found.alone_b) == (2, 3, 5)
    assert found.counts == ContingencyTable(both=1, only_a=0, only_b=1, neither=0)
    with pytest.raises(InputError, match=r"share no problem \('p0' against 'p9'\); compare evaluations on one task"):
        compare(a, evaluation("++", start=9))


def test_attempts_are_averaged_within_their_problem():
    a = {"x": [True, True, False, False], "y": [False] * 4, "z": [True]}
    b = {"x": [True, True, True, False], "y": [True, False], "z": [True]}
    found = compare(a, b)
    assert (found.accuracy_a, found.accuracy_b) == (pytest.approx(1.5 / 3), pytest.approx(2.25 / 3))
    assert found.difference == pytest.approx((0.25 + 0.5 + 0) / 3)
    assert (found.counts, found.p_value) == (None, None)
    assert 0 <= found.ci95[0] < found.difference < found.ci95[1] <= 0.5


def test_the_interval_is_narrower_than_without_the_pairing():
    rng = random.Random(2)
    hard = [rng.random() < 0.5 for _ in range(400)]
    a = {str(i): [not bad] for i, bad in enumerate(hard)}
    b = {str(i): [not bad or rng.random() < 0.1] for i, bad in enumerate(hard)}
    low, high = compare(a, b).ci95
    assert low > 0
    assert high - low < 0.5 * 2 * 1.96 * math.sqrt(2 * 0.25 / 400)


def test_files_are_compared_by_id(tmp_path: Path):
    a = generations(tmp_path / "a.jsonl", [("x", True), ("y", False), ("z", False)])
    b = generations(tmp_path / "b.jsonl", [("z", True), ("y", False), ("x", True), ("w", True)])
    (found,) = compare_files(a, b).values()
    assert found.counts == ContingencyTable(both=1, only_a=0, only_b=1, neither=1)
    assert (found.alone_a, found.alone_b) == (0, 1)


def test_attempts_in_files_are_lines_of_one_id(tmp_path: Path):
    a = generations(tmp_path / "a.jsonl", [("x", True), ("x", False), ("y", False)])
    b = generations(tmp_path / "b.jsonl", [("x", True), ("y", True)])
    (found,) = compare_files(a, b).values()
    assert (found.n, found.accuracy_a, found.accuracy_b, found.p_value) == (2, 0.25, 1.0, None)


def test_schedules_are_compared_with_their_like(tmp_path: Path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for file, schedule, correct in [(a, "slow", False), (a, "fast", True), (b, "fast", False), (b, "new", True)]:
        generations(file, [("x", correct)], schedule=schedule)
    found = compare_files(a, b)
    assert {name: (result.accuracy_a, result.accuracy_b) for name, result in found.items()} == {"fast": (1.0, 0.0)}
    c, d = (generations(tmp_path / f"{name}.jsonl", [("x", True)], schedule=name) for name in "cd")
    assert compare_files(c, d).keys() == {"c | d"}
    with pytest.raises(InputError, match=r"share no schedule \(slow, fast against c\); decode alike"):
        compare_files(a, c)


@pytest.mark.parametrize("place", ["generations.jsonl", "graded.jsonl", "eval/gsm8k/generations.jsonl"])
def test_the_file_of_a_folder_is_found(tmp_path: Path, place: str):
    file = generations(tmp_path / place, [("x", True)])
    assert find_generations(tmp_path) == find_generations(file) == file


def test_the_folder_itself_comes_before_its_tasks(tmp_path: Path):
    generations(tmp_path / "eval" / "gsm8k" / "generations.jsonl", [("x", True)])
    file = generations(tmp_path / "graded.jsonl", [("x", True)])
    assert find_generations(tmp_path) == file


def test_a_folder_with_a_choice_or_nothing_is_refused(tmp_path: Path):
    with pytest.raises(
        InputError, match=r"holds no generations.jsonl, graded.jsonl or verdicts.jsonl; evaluate it first: dllm-sd eval"
    ):
        find_generations(tmp_path)
    for task in ("gsm8k", "sudoku"):
        generations(tmp_path / "eval" / task / "generations.jsonl", [("x", True)])
    words = "holds eval/gsm8k/generations.jsonl, eval/sudoku/generations.jsonl; name one file"
    with pytest.raises(InputError, match=words):
        find_generations(tmp_path)
    with pytest.raises(InputError, match=r"there is no '.*/missing'; name a folder with"):
        find_generations(tmp_path / "missing")


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Two evaluations in a working folder: 12 problems only one of them solves, 10 to 2; the files that are there."""
    monkeypatch.chdir(tmp_path)
    marks = {"a": "+" * 5 + "-" * 10 + "+" * 2 + "-" * 3, "b": "+" * 5 + "+" * 10 + "-" * 2 + "-" * 3}
    for name, correct in marks.items():
        generations(Path(name) / "generations.jsonl", [(f"p{i}", mark == "+") for i, mark in enumerate(correct)])
    return lambda: {str(path) for path in Path().rglob("*") if path.is_file()}


def test_the_command_prints_a_table_and_writes_nothing(two: Callable[[], set[str]], capsys: pytest.CaptureFixture[str]):
    before = two()
    assert main(["eval", "--compare", "a", "b/generations.jsonl"]) == 0
    words = [[cell.strip() for cell in row.split("│")[1:-1]] for row in capsys.readouterr().out.splitlines()]
    cells = dict(row for row in words if len(row) == 2)
    low, _, high = cells.pop("95 % interval").split()
    assert float(low) == pytest.approx(40 - 100 * 1.96 * math.sqrt((0.6 - 0.16) / 20), abs=6)  # in steps of 5
    assert float(high) == pytest.approx(40 + 100 * 1.96 * math.sqrt((0.6 - 0.16) / 20), abs=6)  # in steps of 5
    assert cells == {
        "problems of both": "20",
        "only in A, only in B": "0, 0",
        "accuracy of A": "35.00 %",
        "accuracy of B": "75.00 %",
        "B - A, points": "+40.00",
        "both right": "5",
        "only A right": "2",
        "only B right": "10",
        "neither right": "3",
        "McNemar's p": "0.039",
    }
    assert two() == before


def test_several_attempts_are_compared_without_the_test(
    two: Callable[[], set[str]], capsys: pytest.CaptureFixture[str]
):
    generations(Path("a/generations.jsonl"), [("p0", False)])
    assert main(["eval", "--compare", "a", "b"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "a problem with several attempts counts by their mean, and McNemar's test is left out" in out
    assert "32.50 %" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval"], "eval needs a RUN_OR_MODEL, or --compare A B with two finished evaluations"),
        (["eval", "run", "--compare", "a", "b"], "eval --compare A B reads two finished evaluations and takes nothing"),
        (["eval", "--compare", "a", "b", "--task", "gsm8k"], "eval --compare A B reads two finished evaluations"),
        (["eval", "--compare", "a", "b", "--out", "c"], "eval --compare A B reads two finished evaluations"),
        (["eval", "--compare", "a", "b", "seed=3"], "eval --compare A B reads two finished evaluations"),
        (["eval", "--compare", "a", "c"], "there is no 'c'; name a folder with generations.jsonl or graded.jsonl"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    two: Callable[[], set[str]], capsys: pytest.CaptureFixture[str], words: list[str], message: str
):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"dllm-sd: {message}")
    assert err.count("\n") == 1


def test_different_problems_under_one_id_are_not_compared(tmp_path: Path):
    one = generations(tmp_path / "a.jsonl", [("p0", True)], digest="aaaa")
    other = generations(tmp_path / "b.jsonl", [("p0", True)], digest="bbbb")
    (same,) = compare_files(one, one).values()
    assert same.n == 1
    with pytest.raises(InputError, match=r"hold different problems with the id 'p0'; evaluate the same task"):
        compare_files(one, other)


def test_runs_that_were_only_trained_are_compared_by_the_verdicts_of_their_final_test(tmp_path: Path):
    tests = {"trained": [Verdict(f"p{i}", "d", (i % 3 == 0,)) for i in range(30)]}
    other = {"trained": [Verdict(f"p{i}", "d", (i % 2 == 0,)) for i in range(30)]}
    for name, verdicts in (("a", tests), ("b", other)):
        (tmp_path / name).mkdir()
        write_verdicts(tmp_path / name / VERDICTS, verdicts)
    found = compare_files(tmp_path / "a", tmp_path / "b")["trained"]
    assert found.counts == ContingencyTable(both=5, only_a=5, only_b=10, neither=10)
    assert found.p_value == mcnemar(5, 10)
    (tmp_path / "a" / "eval" / "sudoku").mkdir(parents=True)
    line = {"id": "p0", "correct": True, "schedule": "trained"}
    (tmp_path / "a" / "eval" / "sudoku" / "generations.jsonl").write_text(json.dumps(line) + "\n")
    assert compare_files(tmp_path / "a", tmp_path / "b")["trained"].n == 1  # a later evaluation counts instead
    write_verdicts(tmp_path / "none", {})
    assert not (tmp_path / "none").exists()


def test_the_verdicts_that_a_run_keeps_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dllm_sd.evaluation.recording.MOST_VERDICTS", 3)
    write_verdicts(tmp_path / "file", {name: [Verdict(str(i), "d", (True, False)) for i in range(9)] for name in "ab"})
    assert len((tmp_path / "file").read_text().splitlines()) == 2 * 3 * 2
