"""Data of Countdown with two numbers, where a hint may be a solution, its operator, or an attempt that is wrong.

Without a hint the models are trained on small numbers only, with one on all, so that a hint helps with larger ones.

A problem mostly has two right answers, ``3+15`` and ``15+3``: a solution in the prompt fixes one of them, its operator
leaves both. A problem's domain is that of its operator: ``sums`` (``+ -``) or ``products`` (``* /``).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_sd.randomness import make_key
from dllm_sd.tasks.datafile import split_of
from dllm_sd.tasks.sources import Draws
from dllm_sd.tasks.task import Split
from tools.lab.draws import by_share, one_of

OPERATORS = "+-*/"
DOMAINS = {"+": "sums", "-": "sums", "*": "products", "/": "products"}
PLAIN, LARGEST, LARGEST_ELSEWHERE = 30, 60, 99
"""Largest number of a question without a hint in training, of the problems of the methods, and of those elsewhere."""
TARGETS = range(2, 101)
KINDS = {"plain": 40, "solution": 15, "operator": 15, "attempt": 15, "solution and comment": 15}
"""Rows of the training data per hundred, by what stands before the question."""
SAME = 3
"""Behind a solution, this many of four rows repeat it; the others have its other form, where there is one."""
SHARES = {"mixed": 50, "sums": 85, "products": 15}
"""Rows per hundred with a sum, by the model that is trained on them."""
TESTING = 2048


@dataclass(frozen=True)
class Sum:
    """Two numbers as the prompt shows them, and the right expressions of them."""

    numbers: tuple[int, int]
    target: int
    operator: str
    forms: tuple[str, ...]

    @property
    def question(self) -> str:
        """The prompt, as in ``15 3 > 45:``."""
        return f"{self.numbers[0]} {self.numbers[1]} > {self.target}:"


def reached(a: int, b: int, operator: str) -> int | None:
    """The value of an expression if it is a target, else None."""
    quotient = a // b if a % b == 0 else 0
    value = {"+": a + b, "-": a - b, "*": a * b, "/": quotient}[operator]
    return value if value in TARGETS else None


def problems(split: Split, purpose: str, sums: int = 50, least: int = 1, most: int = LARGEST) -> Iterator[Sum]:
    """Problems of a split without end, ``sums`` of a hundred with + or -, numbers from 1 of which the larger one is
    from ``least`` to ``most``."""
    i = 0
    while True:
        draws = Draws(make_key("laboratory", "operators", purpose, split, i))
        i += 1
        operator = ("+-" if draws.below(100) < sums else "*/")[draws.below(2)]
        while True:
            a, b = 1 + draws.below(most), 1 + draws.below(most)
            target = reached(a, b, operator)
            if max(a, b) >= least and target is not None and split_of(min(a, b), max(a, b), target) == split:
                break
        numbers = (a, b) if draws.below(2) else (b, a)
        forms = [f"{x}{op}{y}" for op in OPERATORS for x, y in dict.fromkeys([(a, b), (b, a)])
                 if reached(x, y, op) == target]  # fmt: skip
        yield Sum(numbers, target, operator, tuple(forms))


def row(problem: Sum, kind: str, draws: Draws) -> dict[str, str]:
    """A prompt and its completion of one of the kinds."""
    shown = one_of(problem.forms, draws)
    wrong = one_of(wrong_attempts(problem), draws)
    hint = {
        "plain": "",
        "solution": f"({shown})",
        "operator": f"({problem.operator})",
        "attempt": f"[{wrong}]",
        "solution and comment": f"({shown})({one_of((shown, wrong), draws)})",
    }[kind]
    repeats = kind.startswith("solution") and draws.below(4) < SAME
    right = [form for form in problem.forms if problem.operator in form] if kind == "operator" else problem.forms
    return {"prompt": f"{hint}{problem.question}", "answer": shown if repeats else one_of(right, draws)}


def wrong_attempts(problem: Sum) -> list[str]:
    """All expressions of the two numbers that miss the target."""
    a, b = problem.numbers
    texts = [f"{x}{operator}{y}" for operator in OPERATORS for x, y in ((a, b), (b, a))]
    return [text for text in texts if text not in problem.forms]


def write_operators(folder: Path, rows: int) -> None:
    """The training data of the three models, and the problems of the methods, with solution, rubric and domain."""
    for name, sums in SHARES.items():
        small, all_of_them = (problems("train", name, sums, most=most) for most in (PLAIN, LARGEST_ELSEWHERE))
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for i in range(rows):
                draws = Draws(make_key("laboratory", "operators", name, i))
                kind = by_share(KINDS, draws)
                problem = next(small if kind == "plain" else all_of_them)
                file.write(json.dumps(row(problem, kind, draws)) + "\n")
    write_problems(folder / "train.jsonl", problems("train", "methods"), rows // 2)
    write_problems(folder / "test.jsonl", problems("test", "methods"), TESTING)
    elsewhere = problems("test", "elsewhere", least=LARGEST + 1, most=LARGEST_ELSEWHERE)
    write_problems(folder / "larger.jsonl", elsewhere, TESTING)
    (folder / "bank.json").write_text(json.dumps(bank(), indent=1) + "\n", encoding="utf-8")


def bank() -> dict[str, Any]:
    """Four skills, to try each of the operators: for a problem one is right, or with the number 1 two."""
    skills = [{"id": f"gen_{i}", "title": operator, "principle": operator, "when_to_apply": operator}
              for i, operator in enumerate(OPERATORS)]  # fmt: skip
    mistakes = [{"id": f"err_{i}", "description": operator, "why_it_happens": operator, "how_to_avoid": operator}
                for i, operator in enumerate(OPERATORS)]  # fmt: skip
    return {"skills": skills, "mistakes": mistakes, "metadata": {}}


def write_problems(file: Path, drawn: Iterator[Sum], count: int) -> None:
    """Problems for the methods, a line each."""
    with file.open("w", encoding="utf-8") as lines:
        for i, problem in zip(range(count), drawn, strict=False):
            draws = Draws(make_key("laboratory", "operators", "shown", i))
            entry = {
                "question": problem.question,
                "numbers": problem.numbers,
                "target": problem.target,
                "worked": one_of(problem.forms, draws),
                "rubric": [problem.operator],
                "domain": DOMAINS[problem.operator],
            }
            lines.write(json.dumps(entry) + "\n")
