"""GSM8K: grade-school word problems with a whole number as the answer."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from dllm_sd.errors import InputError
from dllm_sd.files.writing import Place
from dllm_sd.ranges import Natural
from dllm_sd.tasks.datafile import Entry, Row, hub_rows, needed
from dllm_sd.tasks.grading import final_number, gold_number
from dllm_sd.tasks.published import gsm8k_gold, gsm8k_number
from dllm_sd.tasks.sources import DatasetTask
from dllm_sd.tasks.task import Grade, Mode, Problem, check_mode

_ANNOTATION = re.compile(r"<<[^<>]*>>")  # the calculator annotations of the data, as in 2+3 = <<2+3=5>>5

_PROMPT = """\
{question}

Work towards the answer in short steps. Then give the final number, by itself, inside \\boxed{{}}."""


@dataclass(frozen=True)
class Gsm8k(DatasetTask):
    """GSM8K. Problem fields: ``question``, ``answer`` (the number, as text), ``solution`` (the worked steps).

    ``data`` and ``data_test`` are local JSONL files with the fields question and answer (which ends ``#### N``);
    without them, openai/gsm8k is loaded from the hub. ``size_dev`` training rows are held out (without it
    a tenth, at most 500) as the dev split, chosen by a fixed permutation.

    ``mode`` compatible reads completions as d-OPSD's published evaluation does, oddities included (the first box
    counts, the sign of the gold answer is not read); see ``published``. If ``answer`` is None, no completion is
    correct.
    """

    data: Place | None = None
    data_test: Place | None = None
    size_dev: Natural | None = None
    system: str | None = None
    prompt: str = _PROMPT
    answer: str = "{solution}\n\\boxed{{{answer}}}"
    mode: Mode = "default"
    """How completions are read and compared: `default`, or `compatible` with d-OPSD's published evaluation."""
    title: ClassVar[str] = "gsm8k"
    answered_by: ClassVar[str] = "solution"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mode(self.mode)
        self.check_templates(("question",), ("answer", "solution"))

    def grade(self, problem: Problem, completion: str) -> Grade:
        """Grade by the number of the completion, which must equal the gold number exactly."""
        answer = needed(problem.fields, "answer")
        if self.mode == "compatible":
            number, gold = gsm8k_number(completion), gsm8k_gold(answer)
            correct = number is not None and number == gold
            return Grade(correct, float(correct), None if number is None else str(number))
        return grade_number(None if answer is None else gold_number(answer, "The problem"), completion)

    def load(self) -> tuple[list[Row], list[Row]]:
        """Return the rows of the files, or those of the hub if no file is given."""
        if self.data is None and self.data_test is None:
            return (
                hub_rows("openai/gsm8k", "main", "train", "task.data"),
                hub_rows("openai/gsm8k", "main", "test", "task.data_test"),
            )
        return super().load()

    def entries(self, rows: list[Row]) -> Iterable[Entry]:
        """Return the number after ``####``, and the steps before it without their calculator annotations."""
        return map(_entry, rows)


def grade_number(gold: Fraction | None, completion: str) -> Grade:
    """Grade by the number that a completion ends with, which must equal ``gold`` exactly."""
    number = final_number(completion)
    correct = number is not None and number == gold
    return Grade(correct, float(correct), None if number is None else str(number))


def _entry(row: Row) -> Entry:
    question = row.text("question")
    steps, mark, answer = row.text("answer").rpartition("####")
    if not mark:
        raise InputError(f"{row.where}: answer has no '#### N' at its end; add it or leave the line out.")
    answer = answer.strip().replace(",", "")
    gold_number(answer, row.where)
    return Entry(
        row.number,
        question.strip(),
        {"question": question, "answer": answer, "solution": _ANNOTATION.sub("", steps).strip()},
    )
