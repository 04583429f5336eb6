"""Countdown: reach a target from given numbers, each used once, with + - * /."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
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
from dllm_sd.tasks.grading import evaluate, marked_expression
from dllm_sd.tasks.task import Grade, Problem, Split

_ATTEMPTS = 20_000  # draws before a generated problem is given up

_PROMPT = """\
Numbers: {numbers}
Target: {target}

Find an arithmetic expression that equals the target. Use every number listed exactly once and nothing but +, -, *, / \
and parentheses. Put the expression, without an equals sign, inside \\boxed{{}}."""


@dataclass(frozen=True)
class Countdown:
    """Countdown. Problem fields: ``numbers`` (list), ``target``, ``solution`` (an expression, or None in file data).

    Without ``data`` and ``data_test`` problems are generated, solvable with whole positive steps: problem i of a split
    is a function of (seed, split, i), and its numbers (in any order) with its target belong to one split only.
    With them, problems are the lines of JSONL files, ``{"numbers": [3, 4], "target": 7}`` or
    ``{"input": "3,4", "output": "7"}``: the last ``size_dev`` rows of ``data`` are the dev split, ``data_test`` is the
    test split, and the other sizes say how many rows to use at most.
    """

    numbers_min: int = 3
    numbers_max: int = 4
    number_min: int = 1
    number_max: int = 99
    target_min: int = 10
    target_max: int = 100
    size_train: int = 1_000_000
    size_dev: int = 1024
    size_test: int = 1024
    seed: int = 0
    system: str | None = None
    prompt: str = _PROMPT
    answer: str = "\\boxed{{{solution}}}"
    data: str | None = None
    data_test: str | None = None

    def __post_init__(self) -> None:
        for low, high, floor, ceiling in (
            ("numbers_min", "numbers_max", 2, 6),
            ("number_min", "number_max", 1, 10_000),
            ("target_min", "target_max", 1, 1_000_000),
        ):
            if not floor <= getattr(self, low) <= getattr(self, high) <= ceiling:
                raise InputError(
                    f"task.{low} ({getattr(self, low)}) and task.{high} ({getattr(self, high)}) must be ordered and "
                    f"lie in {floor}..{ceiling}; correct them."
                )
        for name in ("size_train", "size_dev", "size_test"):
            if getattr(self, name) < 0:
                raise InputError(f"task.{name} must not be negative; it counts problems.")
        render(self.prompt, {"numbers": "", "target": ""}, "task.prompt")
        render(self.answer, {"numbers": "", "target": "", "solution": ""}, "task.answer")

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
        if problem.fields.get("solution") is None:
            return None
        return render(self.answer, problem.fields, "task.answer")

    def grade(self, problem: Problem, completion: str) -> Grade:
        numbers, target = _instance(problem.fields, "The problem")
        expression = marked_expression(completion)
        read = None if expression is None else evaluate(expression)
        correct = read is not None and read[0] == target and sorted(read[1]) == sorted(numbers)
        return Grade(correct, float(correct), expression)

    def _generate(self, split: Split, index: int) -> Problem:
        """Draw numbers, join two at random until one value is left, and keep it if it is a target of this split."""
        for attempt in range(_ATTEMPTS):
            draws = _Draws(make_key(self.seed, "countdown", split, index, attempt))
            size = self.numbers_min + draws.below(self.numbers_max - self.numbers_min + 1)
            numbers = [self.number_min + draws.below(self.number_max - self.number_min + 1) for _ in range(size)]
            solved = _join([(number, str(number)) for number in numbers], draws)
            if solved is None or not self.target_min <= solved[0] <= self.target_max:
                continue
            target, solution = solved
            if split_of(*sorted(numbers), target) == split:
                return Problem(
                    f"countdown/{split}/{index}", {"numbers": numbers, "target": target, "solution": solution}
                )
        raise InputError(
            f"No Countdown problem was found in {_ATTEMPTS} draws; widen task.target_min..task.target_max or "
            "task.number_min..task.number_max."
        )

    @cached_property
    def _files(self) -> Splits:
        train = read_rows(self.data, "task.data") if self.data is not None else []
        test = read_rows(self.data_test, "task.data_test") if self.data_test is not None else []
        return divide("countdown", map(_entry, train), map(_entry, test), self.size_dev, key=None)


class _Draws:
    """Integers drawn one after another, a function of ``key`` alone; many small ones are cut from one hash."""

    def __init__(self, key: int) -> None:
        self.key, self.count, self.pool, self.span = key, 0, 0, 0

    def below(self, bound: int) -> int:
        """An integer in ``[0, bound)``, uniform to one part in a million."""
        if self.span < bound << 20:
            self.pool, self.span, self.count = make_key(self.key, self.count), 1 << 63, self.count + 1
        self.pool, drawn = divmod(self.pool, bound)
        self.span //= bound
        return drawn


def _join(parts: list[tuple[int, str]], draws: _Draws) -> tuple[int, str] | None:
    """Join pairs of (value, expression) by random operators until one is left; None if a value is not whole and > 0."""
    while True:
        (a, left), (b, right) = (parts.pop(draws.below(len(parts))) for _ in range(2))
        operator = "+-*/"[draws.below(4)]
        if operator == "/" and a % b:
            return None
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operator]
        if value < 1:
            return None
        if not parts:
            return value, f"{left} {operator} {right}"
        parts.append((value, f"({left} {operator} {right})"))


def _instance(fields: Mapping[str, Any], where: str) -> tuple[list[int], int]:
    numbers, target = needed(fields, "numbers"), needed(fields, "target")
    if not isinstance(numbers, list | tuple) or not numbers or not all(type(number) is int for number in numbers):
        raise InputError(f"{where}: numbers must be a list of whole numbers, not {numbers!r:.60}; correct it.")
    if type(target) is not int:
        raise InputError(f"{where}: target must be a whole number, not {target!r:.60}; correct it.")
    return list(numbers), target


def _whole(text: str) -> int | str:
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else text


def _entry(row: Row) -> Entry:
    if "input" in row.fields:
        given = {"numbers": list(map(_whole, row.text("input").split(","))), "target": _whole(row.text("output"))}
    else:
        given = {"numbers": row.value("numbers"), "target": row.value("target")}
    numbers, target = _instance(given, row.where)
    fields = {"numbers": numbers, "target": target, "solution": None}
    return Entry(row.number, (tuple(sorted(numbers)), target), fields)
