"""Rows of real data files are read, and what they give as right is graded as right."""

import json
import re
from pathlib import Path

import pytest

from dllm_sd.tasks import Countdown, Gsm8k, Math, Mode, Problem, Sudoku

SAMPLES = Path(__file__).parent / "samples"
MODES: tuple[Mode, ...] = ("default", "compatible")


@pytest.mark.parametrize("mode", MODES)
def test_gsm8k_answers_are_right_and_only_signs_are_lost_on_the_published_reader(mode: Mode) -> None:
    task = Gsm8k(data_test=str(SAMPLES / "gsm8k.jsonl"), mode=mode)
    problems = task.problems("test")
    wrong = [p.fields["answer"] for p in problems if not task.grade(p, task.reference(p) or "").correct]
    assert len(problems) == 16
    assert wrong == ([] if mode == "default" else ["-10", "-3"])
    rows = [json.loads(line) for line in (SAMPLES / "gsm8k.jsonl").read_text().splitlines()]
    if mode == "default":
        assert all(task.grade(p, row["answer"]).correct for p, row in zip(problems, rows, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_math_solutions_are_right(mode: Mode) -> None:
    task = Math(data_test=str(SAMPLES / "math500.jsonl"), mode=mode)
    problems = task.problems("test")
    assert len(problems) == 20
    assert all(task.grade(problem, task.reference(problem) or "").correct for problem in problems)


@pytest.mark.parametrize("mode", MODES)
def test_countdown_solutions_are_right(mode: Mode) -> None:
    lines = (SAMPLES / "countdown_solved.jsonl").read_text().splitlines()
    for line in lines:
        row = json.loads(line)
        *numbers, target = map(int, row["input"].split(","))
        parts = [str(number) for number in numbers]
        values = list(numbers)
        for step in row["output"].split(","):
            match = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step)
            assert match is not None
            sides = []
            for side in (match.group(1), match.group(3)):
                place = values.index(int(side))
                values.pop(place)
                sides.append(parts.pop(place))
            values.append(int(match.group(4)))
            parts.append(f"({sides[0]} {match.group(2)} {sides[1]})")
        problem = Problem("x", {"numbers": numbers, "target": target})
        assert Countdown(mode=mode).grade(problem, f"\\boxed{{{parts[-1]}}}").correct
    assert len(lines) == 30


@pytest.mark.parametrize("mode", MODES)
def test_sudoku_solutions_are_right(mode: Mode) -> None:
    task = Sudoku(data_test=str(SAMPLES / "sudoku.csv"), mode=mode)
    graded = [(problem, task.grade(problem, task.reference(problem) or "")) for problem in task.problems("test")]
    assert len(graded) == 40
    published = {"accuracy": 1} if mode == "compatible" else {}
    assert task.summary(graded) == {"solved": 1, "cells": 1, "random_fill": 1 / 4, **published}
