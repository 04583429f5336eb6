"""Word problems of one to three steps of arithmetic, in plain English, with worked solutions; generated."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from dllm_sd.errors import InputError
from dllm_sd.files.writing import Place
from dllm_sd.randomness import make_key
from dllm_sd.ranges import Natural, Range, Seed, SplitSize
from dllm_sd.tasks.datafile import Entry, Row, needed, split_of
from dllm_sd.tasks.grading import MAX_TEXT, gold_number
from dllm_sd.tasks.gsm8k import grade_number
from dllm_sd.tasks.sources import Draws, GeneratedTask
from dllm_sd.tasks.stories import NAMES, STORIES, Move, Operator
from dllm_sd.tasks.task import Grade, Problem, Split

_ATTEMPTS = 20_000  # most draws for a generated problem
_EQUATION = re.compile(r"(?<![0-9.])([0-9]{1,9}) ?([-+*/]) ?([0-9]{1,9}) ?= ?([0-9]{1,9})(?![0-9.]*[0-9])")

Number = Annotated[int, Range(least=2, most=1000)]
_PROMPT = """\
{question}

Work it out step by step, one calculation in a line. Then write #### and the answer as a number in the last line."""


@dataclass(frozen=True)
class WordProblems(GeneratedTask):
    """Word problems. Problem fields: ``question``, ``answer`` (a number), ``solution`` (a sentence for each step).

    Without ``data`` and ``data_test``, problems are generated: problem i of a split is a function of (seed, split, i)
    and takes ``steps`` calculations with + - * / on numbers from ``number_min`` to ``number_max``; every value on the
    way is whole, at least 2 and at most the square of ``number_max``. A story with its calculations belongs to one
    split only, whatever the seed, the names and the things. Generated problems also have ``equations``, the lines of
    ``solution`` without words, and all their texts are written with the characters of ``ALPHABET``.

    With them, problems are the lines of JSONL files with ``question``, ``answer`` and maybe ``solution``: the last
    ``size_dev`` rows of ``data`` are the dev split, ``data_test`` is the test split, and the remaining sizes limit how
    many rows are used.

    The template ``answer`` says what a reference is: worked by default, ``{equations}`` instead of ``{solution}`` for
    another style, and ``"#### {answer}"`` is the answer alone, a shortcut for a teacher that reads it.
    """

    steps: Literal[1, 2, 3] = 2
    """Calculations that a generated problem takes."""
    number_min: Number = 2
    """Smallest number in a generated problem."""
    number_max: Number = 12
    """Largest number in a generated problem."""
    size_train: SplitSize = 1_000_000
    size_dev: Natural = 1024
    size_test: Natural = 2048
    seed: Seed = 0
    """Seed of the generated problems, independent of the seed of the run."""
    system: str | None = None
    prompt: str = _PROMPT
    answer: str = "{solution}\n#### {answer}"
    data: Place | None = None
    data_test: Place | None = None
    title: ClassVar[str] = "word_problems"
    answered_by: ClassVar[str] = "solution"
    ALPHABET: ClassVar[str] = (
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n.,?#+-*/="  # for tokenizers of characters
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps not in (1, 2, 3):
            raise InputError(f"task.steps is {self.steps!r}; choose 1, 2 or 3.")
        if self.number_min > self.number_max:
            raise InputError(
                f"task.number_min ({self.number_min}) is above task.number_max ({self.number_max}); correct one of "
                "them."
            )
        self.check_templates(("question",), ("answer", "solution", "equations"))

    def grade(self, problem: Problem, completion: str) -> Grade:
        """Grade by the number of the completion, which must equal the answer exactly."""
        answer = needed(problem.fields, "answer")
        return grade_number(None if answer is None else gold_number(answer, "The problem"), completion)

    def first_mistake(self, problem: Problem, completion: str) -> tuple[int, int] | None:
        """Return the first equation that is false, or whose value is none of the solution's; None in right answers."""
        solution = problem.fields.get("solution")
        if not isinstance(solution, str) or self.grade(problem, completion).correct:
            return None
        values = {int(match[4]) for match in _EQUATION.finditer(solution)}
        for match in _EQUATION.finditer(completion[:MAX_TEXT]):
            if not _holds(match) or int(match[4]) not in values:
                return match.span()
        return None

    def generate(self, split: Split, index: int) -> Problem:
        """Tell random stories until one has fitting values and belongs to this split."""
        for attempt in range(_ATTEMPTS):
            told = _tell(self, Draws(make_key(self.seed, "word_problems", split, index, attempt)))
            if told is not None and split_of(told["story"], told["equations"]) == split:
                fields = {name: told[name] for name in ("question", "answer", "solution", "equations")}
                return Problem(f"word_problems/{split}/{index}", fields)
        raise InputError(
            f"No word problem was found in {_ATTEMPTS} draws; widen task.number_min..task.number_max or lower "
            "task.steps."
        )

    def entry(self, row: Row) -> Entry:
        """Read a line with question, answer and maybe a solution."""
        question, answer = row.text("question"), row.text("answer")
        gold_number(answer, row.where)
        solution = row.text("solution") if row.fields.get("solution") is not None else None
        fields = {"question": question, "answer": answer, "solution": solution}
        return Entry(row.number, question.strip(), fields)


def _tell(task: WordProblems, draws: Draws) -> dict[str, str] | None:
    """Draw a story with its numbers; None if its values do not fit."""
    story = STORIES[draws.below(len(STORIES))]
    first, second = draws.shuffled(len(NAMES))[:2]
    words = {"name": NAMES[first], "other": NAMES[second], "things": story.things[draws.below(len(story.things))]}
    value = _number(task, draws)
    sentences, lines, equations = [], [], []
    moves = list(_moves(task.steps, story.groups, story.middle, story.last, draws))
    if moves[0] is not story.groups:
        sentences.append(story.start.format(n=value, **words))
    for move in moves:
        number = _operand(task, move.operator, value, draws)
        result = None if number is None else _result(move.operator, value, number)
        if result is None or not 2 <= result <= task.number_max**2:
            return None
        equations.append(f"{value} {move.operator} {number} = {result}")
        sentences.append(move.told.format(m=value, n=number, **words))
        lines.append(move.worked.format(equation=equations[-1], **words))
        value = result
    if moves[-1] not in story.last:
        sentences.append(story.asked.format(**words))
    return {
        "story": story.title,
        "question": " ".join(sentences),
        "answer": str(value),
        "solution": "\n".join(lines),
        "equations": "\n".join(equations),
    }


def _moves(steps: int, groups: Move, middle: tuple[Move, ...], last: tuple[Move, ...], draws: Draws) -> Iterator[Move]:
    """Yield the moves of a story: half of the stories start with groups, and half end with a question of a move."""
    if starts := draws.below(2):
        yield groups
    for left in reversed(range(steps - starts)):
        moves = last if not left and draws.below(2) else middle
        yield moves[draws.below(len(moves))]


def _number(task: WordProblems, draws: Draws) -> int:
    return task.number_min + draws.below(task.number_max - task.number_min + 1)


def _operand(task: WordProblems, operator: Operator, value: int, draws: Draws) -> int | None:
    """Draw the second number of a step; for a division one of the divisors, None if there is none."""
    if operator != "/":
        return _number(task, draws)
    divisors = [number for number in range(task.number_min, task.number_max + 1) if value % number == 0]
    return divisors[draws.below(len(divisors))] if divisors else None


def _result(operator: str, left: int, right: int) -> int | None:
    """The value of a step; None if it is not whole."""
    if operator == "/":
        return left // right if right and left % right == 0 else None
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def _holds(equation: re.Match[str]) -> bool:
    return _result(equation[2], int(equation[1]), int(equation[3])) == int(equation[4])
