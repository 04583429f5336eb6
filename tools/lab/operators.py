"""Data of Countdown with two numbers, where a hint may be a solution, its operator, or an attempt that is wrong.

Without a hint the first model is trained on small numbers only, with one on all, so that a hint helps with larger ones;
two others go on from it with larger numbers of one domain.
Sums and products have two right forms, ``3+15`` and ``15+3``: a solution in the prompt fixes one of them, its operator
leaves both. A problem's domain is that of its operator: ``sums`` (``+ -``) or ``products`` (``* /``).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement, count, cycle, islice
from pathlib import Path
from typing import Any

from dllm_sd.randomness import make_key
from dllm_sd.tasks.datafile import split_of
from dllm_sd.tasks.sources import Draws
from dllm_sd.tasks.task import Split
from tools.lab.draws import by_share, one_of

OPERATORS = "+-*/"
DOMAINS = {"+": "sums", "-": "sums", "*": "products", "/": "products"}
PLAIN, LARGEST, LARGEST_ELSEWHERE = 30, 99, 199
"""Largest number of a question without a hint in training, of the problems of the methods, and of those elsewhere."""
LEAST_TARGET = 2
SHARE_OF = {"+": 33, "-": 33, "*": 31, "/": 3}
"""Problems of the methods per hundred by operator; two numbers rarely have a whole quotient."""
KINDS = {"plain": 40, "solution": 15, "operator": 15, "attempt": 15, "solution and comment": 15}
"""Rows of the training data per hundred, by what stands before the question."""
SAME = 3
"""Behind a solution, this many of four rows repeat it; the others have its other form, where there is one."""


@dataclass(frozen=True)
class Training:
    """The questions without a hint of a data set; those behind hints are the same kinds in all."""

    plain: Mapping[str, int]
    """Rows per hundred by operator."""
    most: int
    """Largest number of a question."""


TRAINED_ON = {
    "mixed": Training(SHARE_OF, PLAIN),
    "sums": Training({"+": 50, "-": 50}, LARGEST),
    "products": Training({"+": 3, "-": 3, "*": 86, "/": 8}, LARGEST),
}
"""By data set; the model trained on the first is trained further on one of the others, to know one domain better."""


@dataclass(frozen=True)
class CountdownProblem:
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
    """The value of an expression if it is whole and large enough for a target, else None."""
    quotient = a // b if a % b == 0 else 0
    value = {"+": a + b, "-": a - b, "*": a * b, "/": quotient}[operator]
    return value if value >= LEAST_TARGET else None


@cache
def distinct(split: Split, operator: str, least: int, most: int) -> tuple[CountdownProblem, ...]:
    """All problems of a split that the operator solves, each once, with a larger number from ``least`` to ``most``."""
    found = []
    for b, a in combinations_with_replacement(range(1, most + 1), 2):
        target = reached(a, b, operator)
        if a < least or target is None or split_of(b, a, target) != split:
            continue
        orders = list(dict.fromkeys([(a, b), (b, a)]))
        forms = [f"{x}{op}{y}" for op in OPERATORS for x, y in orders if reached(x, y, op) == target]
        numbers = orders[make_key("laboratory", "order", a, b, target) % len(orders)]
        found.append(CountdownProblem(numbers, target, operator, tuple(forms)))
    return tuple(found)


def problems(
    split: Split, purpose: str, shares: Mapping[str, int] = SHARE_OF, least: int = 1, most: int = LARGEST
) -> Iterator[CountdownProblem]:
    """Problems of a split without end, by ``shares`` of operators; one comes again only after all of its operator."""
    turns = {
        operator: cycle(_shuffled(distinct(split, operator, least, most), purpose, operator)) for operator in shares
    }
    draws = Draws(make_key("laboratory", "operators", purpose, split))
    while True:
        yield next(turns[by_share(shares, draws)])


def _shuffled(found: Sequence[CountdownProblem], *purpose: str) -> list[CountdownProblem]:
    order = Draws(make_key("laboratory", "operators", *purpose)).shuffled(len(found))
    return [found[i] for i in order]


def row(problem: CountdownProblem, kind: str, draws: Draws) -> dict[str, str]:
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


def wrong_attempts(problem: CountdownProblem) -> list[str]:
    """All expressions of the two numbers that miss the target."""
    a, b = problem.numbers
    texts = [f"{x}{operator}{y}" for operator in OPERATORS for x, y in ((a, b), (b, a))]
    return [text for text in texts if text not in problem.forms]


def training_rows(name: str) -> Iterator[dict[str, str]]:
    """Prompts and completions without end, of a data set in `TRAINED_ON`."""
    training = TRAINED_ON[name]
    plain = problems("train", name, training.plain, most=training.most)
    hinted = problems("train", name, most=LARGEST_ELSEWHERE)
    for i in count():
        draws = Draws(make_key("laboratory", "operators", name, i))
        kind = by_share(KINDS, draws)
        yield row(next(plain if kind == "plain" else hinted), kind, draws)


def write_operators(folder: Path, rows: int) -> None:
    """The training data of the three models, and the problems of the methods, with solution, rubric and domain."""
    for name in TRAINED_ON:
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for entry in islice(training_rows(name), rows):
                file.write(json.dumps(entry) + "\n")
    sets: Mapping[str, tuple[Split, int, int]] = {
        "train": ("train", 1, LARGEST),
        "test": ("test", 1, LARGEST),
        "larger": ("test", LARGEST + 1, LARGEST_ELSEWHERE),
    }
    for name, (split, least, most) in sets.items():
        write_problems(folder / f"{name}.jsonl", once(split, least, most))
    (folder / "bank.json").write_text(json.dumps(bank(), indent=1) + "\n", encoding="utf-8")


def once(split: Split, least: int, most: int) -> list[CountdownProblem]:
    """Distinct problems of a split, as many as the shares of the operators allow."""
    found = {operator: distinct(split, operator, least, most) for operator in OPERATORS}
    size = min(len(found[operator]) / share for operator, share in SHARE_OF.items())
    kept = [problem for operator, share in SHARE_OF.items()
            for problem in _shuffled(found[operator], "once", split)[: int(size * share)]]  # fmt: skip
    return list({problem.question: problem for problem in _shuffled(kept, "all", split)}.values())


def write_problems(file: Path, kept: Sequence[CountdownProblem]) -> None:
    """Problems for the methods, a line each."""
    with file.open("w", encoding="utf-8") as lines:
        for i, problem in enumerate(kept):
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


def bank() -> dict[str, Any]:
    """Four skills, to try each of the operators, of which mostly one fits a problem."""
    skills = [{"id": f"gen_{i}", "title": operator, "principle": operator, "when_to_apply": operator}
              for i, operator in enumerate(OPERATORS)]  # fmt: skip
    mistakes = [{"id": f"err_{i}", "description": operator, "why_it_happens": operator, "how_to_avoid": operator}
                for i, operator in enumerate(OPERATORS)]  # fmt: skip
    return {"skills": skills, "mistakes": mistakes, "metadata": {}}
