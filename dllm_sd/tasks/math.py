"""Competition mathematics with answers in LaTeX: MATH, MATH-500, AIME, HMMT and files in the same format."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dllm_sd.errors import InputError
from dllm_sd.files.writing import Place
from dllm_sd.ranges import Natural
from dllm_sd.tasks.answers import same_answer
from dllm_sd.tasks.datafile import Entry, Row, hub_rows, needed
from dllm_sd.tasks.equality import marked_answer, need_algebra, same_published, same_value
from dllm_sd.tasks.grading import last_boxed
from dllm_sd.tasks.published import math_answer
from dllm_sd.tasks.sources import DatasetTask
from dllm_sd.tasks.task import Grade, Mode, Problem, check_mode

Equality = Literal["text", "symbolic"]

_PROMPT = """\
{problem}

Work towards the answer in short steps. Then give the final answer, in LaTeX and by itself, inside \\boxed{{}}."""


@dataclass(frozen=True)
class Math(DatasetTask):
    """Competition mathematics. Problem fields: ``problem``, ``answer`` (LaTeX), ``solution`` (worked, or None).

    ``data`` and ``data_test`` are JSONL files (or hub datasets) with ``problem`` and either ``answer``, text or a whole
    number, or a ``solution`` whose last ``\\boxed{}`` is the answer; without them, ankner/math-500 and
    HuggingFaceH4/MATH-500 are loaded from the hub. ``size_dev`` training rows are held out (without it
    a tenth, at most 500) as the dev split, chosen by a fixed permutation. If a solution has no box, the answer is
    appended to the reference in one.

    ``equality``: "text" compares answers part by part (see ``answers``); "symbolic" also accepts formulas that
    math-verify finds equal, within bounds of size and time. ``mode`` compatible reads and compares answers as d-OPSD's
    published evaluation does; see ``published``. If ``answer`` is None, no completion is correct.
    """

    data: Place | None = None
    data_test: Place | None = None
    size_dev: Natural | None = None
    system: str | None = None
    prompt: str = _PROMPT
    answer: str = "{solution}"
    equality: Equality = "text"
    """`text` compares answers part by part; `symbolic` also accepts formulas that math-verify finds equal."""
    mode: Mode = "default"
    """How completions are read and compared: `default`, or `compatible` with d-OPSD's published evaluation."""
    title: ClassVar[str] = "math"
    answered_by: ClassVar[str] = "solution"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mode(self.mode)
        check_equality(self.equality)
        if self.mode == "compatible" and self.equality != "text":
            raise InputError("task.mode compatible compares text; set task.equality to text or task.mode to default.")
        self.check_templates(("problem",), ("answer", "solution"))

    def grade(self, problem: Problem, completion: str) -> Grade:
        """Grade by the marked answer, which must equal the gold answer."""
        gold = needed(problem.fields, "answer")
        gold = None if gold is None else gold_answer(gold, "The problem")
        if self.mode == "compatible":
            parsed = math_answer(completion)
            correct = gold is not None and parsed is not None and same_published(parsed, gold)
            return Grade(correct, float(correct), parsed)
        return grade_answer(gold, completion, self.equality)

    def load(self) -> tuple[list[Row], list[Row]]:
        """Return the rows of the files, or those of the hub if no file is given."""
        if self.data is None and self.data_test is None:
            return (
                hub_rows("ankner/math-500", None, "train", "task.data"),
                hub_rows("HuggingFaceH4/MATH-500", None, "test", "task.data_test"),
            )
        return super().load()

    def entries(self, rows: list[Row]) -> Iterable[Entry]:
        """Return the entries of rows, with the answer from its own field or from the solution."""
        return _read_entries(rows)


def check_equality(equality: str) -> None:
    """Refuse an unknown ``task.equality``, or one that needs a package that is not installed."""
    if equality not in ("text", "symbolic"):
        raise InputError(f"task.equality is {equality!r}; choose text or symbolic.")
    if equality == "symbolic":
        need_algebra()


def gold_answer(value: Any, where: str) -> str:
    """Return the gold answer as text; the field of a row may be a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise InputError(f"{where}: the answer must be text or a number, not {value!r:.60}; correct it.")
    return str(value)


def grade_answer(gold: str | None, completion: str, equality: Equality = "text") -> Grade:
    """Grade by the answer that a completion marks."""
    parsed = marked_answer(completion)
    correct = gold is not None and parsed is not None and same_answer(gold, parsed)
    if not correct and gold is not None and parsed is not None and equality == "symbolic":
        correct = same_answer(gold, parsed, same_value)
    return Grade(correct, float(correct), parsed)


def _read_entries(rows: list[Row]) -> Iterator[Entry]:
    for row in rows:
        problem = row.text("problem")
        solution = row.text("solution") if row.has("solution") else None
        box = last_boxed(solution) if solution is not None else None
        if row.has("answer"):
            answer = gold_answer(row.value("answer"), row.where)
        elif box is not None and box.strip():
            answer = box
        else:
            raise InputError(f"{row.where} has neither an answer nor a solution with a \\boxed{{}}; add one of them.")
        if solution is not None and box is None:
            solution = f"{solution}\n\\boxed{{{answer}}}"
        yield Entry(row.number, problem.strip(), {"problem": problem, "answer": answer, "solution": solution})
