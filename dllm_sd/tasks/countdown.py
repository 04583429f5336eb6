"""Countdown: reach a target from given numbers, each used once, with + - * /."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any, ClassVar

from dllm_sd.errors import InputError
from dllm_sd.files.writing import Place
from dllm_sd.randomness import make_key
from dllm_sd.ranges import Natural, Range, Seed, SplitSize
from dllm_sd.tasks.datafile import Entry, Row, needed, split_of
from dllm_sd.tasks.grading import evaluate_expression, marked_expression
from dllm_sd.tasks.published import countdown_expression, python_value, reaches, uses
from dllm_sd.tasks.sources import Draws, GeneratedTask
from dllm_sd.tasks.task import Grade, Mode, Problem, Split, check_mode, mean

_ATTEMPTS = 20_000  # most draws for a generated problem
_ENUMERABLE = 4  # most numbers for which all random expressions are enumerated

HowMany = Annotated[int, Range(least=2, most=6)]
Operand = Annotated[int, Range(least=1, most=10_000)]
TargetNumber = Annotated[int, Range(least=1, most=1_000_000)]
_PROMPT = """\
Numbers: {numbers}
Target: {target}

Find an arithmetic expression that equals the target. Use every number listed exactly once and nothing but +, -, *, / \
and parentheses. Put the expression, without an equals sign, inside \\boxed{{}}."""


@dataclass(frozen=True)
class Countdown(GeneratedTask):
    """Countdown. Problem fields: ``numbers`` (list), ``target``, ``solution`` (an expression, or None in file data).

    Without ``data`` and ``data_test``, problems are generated that are solvable with positive whole intermediate
    values: problem i of a split is a function of (seed, split, i), and its numbers (in any order) with its target
    belong to one split only. With them, problems are the lines of JSONL files, ``{"numbers": [3, 4], "target": 7}`` or
    ``{"input": "3,4", "output": "7"}``: the last ``size_dev`` rows of ``data`` are the dev split, ``data_test`` is the
    test split, and the remaining sizes limit how many rows are used.

    ``mode`` compatible grades as d-OPSD's published evaluation does, oddities included (powers and floor division are
    allowed, ``3.2`` uses the numbers 3 and 2, values may differ by 1e-5); see ``published``.
    """

    numbers_min: HowMany = 3
    """Fewest numbers of a generated problem."""
    numbers_max: HowMany = 4
    """Most numbers of a generated problem."""
    number_min: Operand = 1
    """Smallest number of a generated problem."""
    number_max: Operand = 99
    """Largest number of a generated problem."""
    target_min: TargetNumber = 10
    """Smallest target of a generated problem."""
    target_max: TargetNumber = 100
    """Largest target of a generated problem."""
    size_train: SplitSize = 1_000_000
    size_dev: Natural = 1024
    size_test: Natural = 1024
    seed: Seed = 0
    """Seed of the generated problems, independent of the seed of the run."""
    system: str | None = None
    prompt: str = _PROMPT
    answer: str = "\\boxed{{{solution}}}"
    data: Place | None = None
    data_test: Place | None = None
    mode: Mode = "default"
    """How completions are read and compared: `default`, or `compatible` with d-OPSD's published evaluation."""
    title: ClassVar[str] = "countdown"
    answered_by: ClassVar[str] = "solution"
    final: ClassVar[str] = "solution"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("numbers", "number", "target"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if low > high:
                raise InputError(f"task.{name}_min ({low}) is above task.{name}_max ({high}); correct one of them.")
        check_mode(self.mode)
        self.check_templates(("numbers", "target"), ("solution",))

    def grade(self, problem: Problem, completion: str) -> Grade:
        """Grade by exact arithmetic: the expression must reach the target and use every number once."""
        if self.mode == "compatible":
            return _grade_published(problem.fields, completion)
        numbers, target = _instance(problem.fields, "The problem")
        expression = marked_expression(completion)
        evaluated = None if expression is None else evaluate_expression(expression)
        correct = evaluated is not None and evaluated[0] == target and sorted(evaluated[1]) == sorted(numbers)
        return Grade(correct, float(correct), expression)

    def chance(self, problems: Sequence[Problem]) -> float | None:
        """Return the share of random expressions that reach the target (``blind_share``); None if not computed."""
        return _blind_chance(problems)

    def summary(self, graded: Sequence[tuple[Problem, Grade]]) -> dict[str, float]:
        """Return ``solved``, and as ``random_fill`` the share that random expressions solve (up to four numbers)."""
        if not graded:
            return {}
        chance = _blind_chance(problem for problem, _ in graded)
        solved = {"solved": mean([float(grade.correct) for _, grade in graded])}
        return solved if chance is None else {**solved, "random_fill": chance}

    def generate(self, split: Split, index: int) -> Problem:
        """Combine random numbers at random until one value is left; keep it if it is a target of this split."""
        for attempt in range(_ATTEMPTS):
            draws = Draws(make_key(self.seed, "countdown", split, index, attempt))
            size = self.numbers_min + draws.below(self.numbers_max - self.numbers_min + 1)
            numbers = [self.number_min + draws.below(self.number_max - self.number_min + 1) for _ in range(size)]
            solved = _combine([(number, str(number)) for number in numbers], draws)
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

    def entry(self, row: Row) -> Entry:
        """Read a line in either of the two formats."""
        if "input" in row.fields:
            values = {"numbers": list(map(_whole, row.text("input").split(","))), "target": _whole(row.text("output"))}
        else:
            values = {"numbers": row.value("numbers"), "target": row.value("target")}
        numbers, target = _instance(values, row.where)
        fields = {"numbers": numbers, "target": target, "solution": None}
        return Entry(row.number, (tuple(sorted(numbers)), target), fields)


def _blind_chance(problems: Iterable[Problem]) -> float | None:
    instances = (_instance(problem.fields, "The problem") for problem in problems)
    shares = [blind_share(numbers, target) for numbers, target in instances if len(numbers) <= _ENUMERABLE]
    return mean(shares) if shares else None


def blind_share(numbers: Sequence[float], target: float) -> float:
    """Return the probability that a random expression reaches ``target``.

    The expression combines two parts, drawn at random in random order, by one of ``+ - * /``, until one part is left;
    intermediate values may be fractions or negative. Division by zero reaches nothing.
    """
    if len(numbers) == 1:
        return float(abs(numbers[0] - target) < 1e-9)
    total, pairs = 0.0, 0
    for i, j in combinations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        remaining = [number for index, number in enumerate(numbers) if index not in (i, j)]
        pairs += 1
        total += 2 * blind_share([*remaining, a + b], target) + 2 * blind_share([*remaining, a * b], target)
        total += blind_share([*remaining, a - b], target) + blind_share([*remaining, b - a], target)
        total += blind_share([*remaining, a / b], target) if b else 0.0
        total += blind_share([*remaining, b / a], target) if a else 0.0
    return total / (8 * pairs)


def _grade_published(fields: Mapping[str, Any], completion: str) -> Grade:
    numbers, target = needed(fields, "numbers"), needed(fields, "target")
    if isinstance(target, bool) or not isinstance(target, int | float):
        raise InputError(f"The problem: target must be a number, not {target!r:.60}; correct it.")
    numbers, _ = _instance({"numbers": numbers, "target": 0}, "The problem")
    expression = countdown_expression(completion)
    value = python_value(expression) if uses(expression, numbers) else None
    correct = value is not None and reaches(value, target)
    return Grade(correct, float(correct), expression)


def _combine(parts: list[tuple[int, str]], draws: Draws) -> tuple[int, str] | None:
    """Combine (value, expression) pairs at random until one is left; None if a value is not a positive integer."""
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
