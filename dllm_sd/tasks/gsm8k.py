"""GSM8K: grade-school word problems with a whole number as the answer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from dllm_sd.errors import InputError
from dllm_sd.randomness import make_key
from dllm_sd.tasks.datafile import Entry, Row, Splits, chat, choose, divide, hub_rows, needed, read_rows, render
from dllm_sd.tasks.grading import final_number, gold_number
from dllm_sd.tasks.task import Grade, Problem, Split

_MARK = re.compile(r"<<[^<>]*>>")  # the data's own calculator notes, as in 2+3 = <<2+3=5>>5

_PROMPT = """\
{question}

Work towards the answer in short steps. Then give the final number, by itself, inside \\boxed{{}}."""


@dataclass(frozen=True)
class Gsm8k:
    """GSM8K. Problem fields: ``question``, ``answer`` (the number, as text), ``solution`` (the worked steps).

    ``data`` and ``data_test`` are local JSONL files with the fields question and answer (which ends ``#### N``); with
    neither, openai/gsm8k is loaded from the hub. ``size_dev`` training rows are held out as the dev split, chosen by a
    permutation that never changes.
    """

    data: str | None = None
    data_test: str | None = None
    size_dev: int = 500
    system: str | None = None
    prompt: str = _PROMPT
    answer: str = "{solution}\n\\boxed{{{answer}}}"

    def __post_init__(self) -> None:
        if self.size_dev < 0:
            raise InputError("task.size_dev must not be negative; it counts problems.")
        render(self.prompt, {"question": ""}, "task.prompt")
        render(self.answer, {"question": "", "answer": "", "solution": ""}, "task.answer")

    def problems(self, split: Split) -> Sequence[Problem]:
        return choose(self._splits, split)

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        return chat(self.system, render(self.prompt, problem.fields, "task.prompt"))

    def reference(self, problem: Problem) -> str | None:
        if "solution" not in problem.fields:
            return None
        return render(self.answer, problem.fields, "task.answer")

    def grade(self, problem: Problem, completion: str) -> Grade:
        gold = gold_number(needed(problem.fields, "answer"), "The problem")
        return grade_number(gold, completion)

    @cached_property
    def _splits(self) -> Splits:
        if self.data is None and self.data_test is None:
            train = hub_rows("openai/gsm8k", "main", "train", "task.data")
            test = hub_rows("openai/gsm8k", "main", "test", "task.data_test")
        else:
            train = read_rows(self.data, "task.data") if self.data is not None else []
            test = read_rows(self.data_test, "task.data_test") if self.data_test is not None else []
        return divide("gsm8k", map(_entry, train), map(_entry, test), self.size_dev, make_key("gsm8k", "dev"))


def grade_number(gold: Fraction, completion: str) -> Grade:
    """Grade by the number that a completion ends with, which must equal ``gold`` exactly."""
    number = final_number(completion)
    return Grade(number == gold, float(number == gold), None if number is None else str(number))


def _entry(row: Row) -> Entry:
    question = row.text("question")
    steps, mark, answer = row.text("answer").rpartition("####")
    if not mark:
        raise InputError(f"{row.where}: answer has no '#### N' at its end; add it or leave the line out.")
    answer = answer.strip().replace(",", "")
    gold_number(answer, row.where)
    return Entry(
        row.number, question.strip(), {"question": question, "answer": answer, "solution": _MARK.sub("", steps).strip()}
    )
