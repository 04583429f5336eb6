"""Any questions with answers: a local file or a hub dataset, a prompt template, and one of three graders."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dllm_sd.errors import InputError
from dllm_sd.randomness import make_key
from dllm_sd.tasks.datafile import Entry, Row, Splits, chat, choose, divide, hub_rows, needed, read_rows, render
from dllm_sd.tasks.grading import MAX_TEXT, evaluate, final_number, gold_number, last_answer, marked_expression
from dllm_sd.tasks.task import Grade, Problem, Split


@dataclass(frozen=True)
class Jsonl:
    """Your own data. Problem fields: whatever the rows have.

    ``data`` (train and dev) and ``data_test`` (test) are paths of .jsonl or .csv files, or hub datasets as
    ``owner/name`` or ``owner/name:config``, of which the splits train and test are read. ``prompt`` may ask for any
    ``{field}``. ``reference_field`` is the text that supervised training imitates. ``size_dev`` training rows are held
    out as the dev split, chosen by a permutation that never changes.

    ``grader``: "exact" compares the last ``<answer>``, or the whole text if there is none, with ``answer_field`` up to
    white space; "number" compares the number that the text ends with; "expression" compares the values of arithmetic
    expressions.
    """

    data: str | None = None
    data_test: str | None = None
    prompt: str = "{question}"
    system: str | None = None
    answer_field: str = "answer"
    reference_field: str | None = None
    grader: Literal["exact", "number", "expression"] = "exact"
    size_dev: int = 500

    def __post_init__(self) -> None:
        if self.size_dev < 0:
            raise InputError("task.size_dev must not be negative; it counts problems.")
        if self.grader not in ("exact", "number", "expression"):
            raise InputError(f"task.grader is {self.grader!r}; choose exact, number or expression.")

    def problems(self, split: Split) -> Sequence[Problem]:
        return choose(self._splits, split)

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        return chat(self.system, render(self.prompt, problem.fields, "task.prompt"))

    def reference(self, problem: Problem) -> str | None:
        return None if self.reference_field is None else str(needed(problem.fields, self.reference_field))

    def grade(self, problem: Problem, completion: str) -> Grade:
        gold = needed(problem.fields, self.answer_field)
        parsed: str | None
        if self.grader == "exact":
            marked = last_answer(completion)
            parsed = _spaced(completion[-MAX_TEXT:] if marked is None else marked)
            correct = parsed == _spaced(_answer(gold, "The problem"))
        elif self.grader == "number":
            number = final_number(completion)
            parsed = None if number is None else str(number)
            correct = number == gold_number(gold, "The problem")
        else:
            expected = evaluate(_answer(gold, "The problem"))
            if expected is None:
                raise InputError(f"The problem: answer {gold!r:.60} is no arithmetic expression; correct it.")
            parsed = marked_expression(completion)
            found = None if parsed is None else evaluate(parsed)
            correct = found is not None and found[0] == expected[0]
        return Grade(correct, float(correct), parsed)

    @cached_property
    def _splits(self) -> Splits:
        train = _load(self.data, "train", "task.data")
        test = _load(self.data_test, "test", "task.data_test")
        return divide("jsonl", self._entries(train), self._entries(test), self.size_dev, make_key("jsonl", "dev"))

    def _entries(self, rows: list[Row]) -> Iterator[Entry]:
        """Check what every row must have, so that a gap is found before the model is loaded."""
        for row in rows:
            gold = _answer(row.value(self.answer_field), row.where)
            if self.grader == "number":
                gold_number(gold, row.where)
            elif self.grader == "expression" and evaluate(gold) is None:
                raise InputError(f"{row.where}: answer {gold!r:.60} is no arithmetic expression; correct it.")
            if self.reference_field is not None:
                row.text(self.reference_field)
            yield Entry(row.number, render(self.prompt, row.fields, f"task.prompt (for {row.where})"), row.fields)


def _load(source: str | None, split: str, key: str) -> list[Row]:
    if source is None:
        return []
    is_file = Path(source).suffix.lower() in (".jsonl", ".json", ".csv") or source.count("/") != 1
    if is_file or Path(source).expanduser().exists():
        return read_rows(source, key)
    name, _, config = source.partition(":")
    return hub_rows(name, config or None, split, key)


def _answer(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{where}: the answer must be a string or a number, not {value!r:.60}; correct it.")
    return str(value)


def _spaced(text: str) -> str:
    return " ".join(text.split())
