"""The user's own questions and answers: a local file or hub dataset, a prompt template, and one of six graders."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dllm_sd.errors import InputError, shown
from dllm_sd.files.writing import Place
from dllm_sd.ranges import Natural
from dllm_sd.tasks.choice import check_options, gold_letter, grade_letter, letters_of, right_letter
from dllm_sd.tasks.conversations import is_conversation, read_conversation
from dllm_sd.tasks.datafile import Entry, Row, chat, fields_of, needed, render
from dllm_sd.tasks.grading import (
    MAX_TEXT,
    evaluate_expression,
    final_number,
    gold_number,
    last_answer,
    marked_expression,
)
from dllm_sd.tasks.math import gold_answer, grade_answer
from dllm_sd.tasks.sources import DatasetTask
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.texts import parse_rubric, render_rubric, rubric_score
from dllm_sd.texts.rubric import RUBRIC_WRITER_PLAIN

_PROMPT = "{question}"
_GRADERS = ("exact", "number", "expression", "math", "choice", "rubric")


@dataclass(frozen=True)
class Jsonl(DatasetTask):
    """The user's own data. Problem fields: those of the rows.

    ``data`` (train and dev) and ``data_test`` (test) are paths of .jsonl or .csv files, or hub datasets as
    ``owner/name`` or ``owner/name:config``, of which the splits train and test are read. ``prompt`` may use any
    ``{field}``; if it consists of a single field that holds a list of messages (``role``, ``content``), the prompt is
    that conversation. ``reference_field`` is the text that supervised training imitates, or a list of one message.
    ``size_dev`` training rows are held out as the dev split, chosen by a fixed permutation.

    ``grader``: "exact" compares the last ``<answer>``, or the whole text without one, with ``answer_field`` up to white
    space; "number" compares the number that the text ends with; "expression" compares the values of arithmetic
    expressions; "math" compares LaTeX answers as the task math does; "choice" compares letters as the task choice does;
    "rubric" needs no answer: the score is `texts.rubric_score` if ``reference_field`` holds a rubric, otherwise 1, and
    a score of at least 0.5 is correct. The default ``prompt`` of "rubric" asks for a rubric for ``{question}``. A
    reference may be a list, which is written as JSON.
    """

    data: Place | None = None
    data_test: Place | None = None
    prompt: str = _PROMPT
    system: str | None = None
    answer_field: str = "answer"
    reference_field: str | None = None
    grader: Literal["exact", "number", "expression", "math", "choice", "rubric"] = "exact"
    size_dev: Natural = 500
    title: ClassVar[str] = "jsonl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grader not in _GRADERS:
            raise InputError(f"task.grader is {self.grader!r}; choose {', '.join(_GRADERS[:-1])} or {_GRADERS[-1]}.")
        if not fields_of(self.prompt) and not set("{}") & set(self.prompt):
            raise InputError(
                "task.prompt uses no field of the rows, so that all problems are the same; add one, such as {question}"
            )

    def prompt_template(self) -> str:
        """Return ``prompt``; for the grader rubric its default is the prompt for a rubric's writer."""
        return RUBRIC_WRITER_PLAIN if self.grader == "rubric" and self.prompt == _PROMPT else self.prompt

    @property
    def rubric_prompt(self) -> str | None:
        """The prompt, if rubrics are graded."""
        return self.prompt_template() if self.grader == "rubric" else None

    @property
    def reference_remedy(self) -> str:
        """The remedy is to set the key that names the field, if it is not set."""
        if self.reference_field is not None:
            return super().reference_remedy
        advice = "set task.reference_field to the field that holds them, such as"
        return f"{advice} task.reference_field={self.answer_field}"

    def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
        """Return the system message, if there is one, and the prompt, or the conversation of the row."""
        conversation = self._conversation(problem.fields, "The problem")
        if conversation is None:
            return super().messages(problem, question)
        if question:
            return [*chat(self.system, "")[:-1], *conversation]
        return [
            *chat(self.system, "")[:-1],
            *(message for message in conversation if message["role"] == "system"),
            *chat(None, ""),
        ]

    def _conversation(self, fields: Mapping[str, Any], where: str) -> list[dict[str, str]] | None:
        """Return the conversation that is the prompt, if the template is a single field that holds one."""
        prompt = self.prompt_template().strip()
        field = prompt.removeprefix("{").removesuffix("}")
        value = fields.get(field)
        if value is None or prompt != f"{{{field}}}" or not is_conversation(value):
            return None
        location = f"{where}: field {field!r}"
        conversation = read_conversation(value, location)
        if conversation[-1]["role"] == "system":
            raise InputError(f"{location} holds nothing but a system message; add the user's, which is the question")
        if conversation[-1]["role"] != "user":
            raise InputError(
                f"{location} ends with the answer of the assistant; end it with the user's message, and put the answer "
                "into a field of its own (task.reference_field)"
            )
        if self.system is not None and conversation[0]["role"] == "system":
            raise InputError(f"{location} has a system message of its own; set task.system to null, or take it out")
        return conversation

    def reference(self, problem: Problem) -> str | None:
        """Return the text of ``reference_field``."""
        if self.reference_field is None:
            return None
        value = needed(problem.fields, self.reference_field)
        if is_conversation(value):
            return _answer_of(value, f"The problem: field {self.reference_field!r}")
        return json.dumps(value, ensure_ascii=False, indent=1) if isinstance(value, list) else str(value)

    def final_answer(self, problem: Problem) -> str | None:
        """Return the text of ``answer_field``, for the grader choice the letter; None if the field is missing."""
        gold = problem.fields.get(self.answer_field)
        if gold is None:
            return None
        return right_letter(problem.fields, gold) if self.grader == "choice" else _answer(gold, "The problem")

    def grade(self, problem: Problem, completion: str) -> Grade:
        """Grade with the grader that ``grader`` names."""
        if self.grader == "rubric":
            rubric = parse_rubric(completion)
            if isinstance(rubric, str):
                return Grade(False, 0.0, None)
            gold = parse_rubric(problem.fields.get(self.reference_field) if self.reference_field else None)
            score = 1.0 if isinstance(gold, str) else rubric_score(rubric, gold)
            return Grade(score >= 0.5, score, render_rubric(rubric))
        gold = needed(problem.fields, self.answer_field)
        if self.grader == "choice":
            return grade_letter(problem.fields, gold, completion)
        if self.grader == "math":
            return grade_answer(gold_answer(gold, "The problem"), completion)
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
            expected = evaluate_expression(_answer(gold, "The problem"))
            if expected is None:
                raise InputError(f"The problem: answer {gold!r:.60} is not an arithmetic expression; correct it.")
            parsed = marked_expression(completion)
            evaluated = None if parsed is None else evaluate_expression(parsed)
            correct = evaluated is not None and evaluated[0] == expected[0]
        return Grade(correct, float(correct), parsed)

    def entries(self, rows: list[Row]) -> Iterable[Entry]:
        """Check the fields that every row needs, so that errors are reported before the model is loaded."""
        return self._checked(rows)

    def _checked(self, rows: list[Row]) -> Iterator[Entry]:
        for row in rows:
            answer = "" if self.grader == "rubric" else _answer(row.value(self.answer_field), row.where)
            if self.grader != "rubric" and not answer.strip():
                raise InputError(f"{row.where}: the answer is empty; fill it, or leave the row out.")
            if self.grader == "number":
                gold_number(answer, row.where)
            elif self.grader == "math":
                gold_answer(answer, row.where)
            elif self.grader == "choice":
                options = row.fields.get("options")
                check_options(options if isinstance(options, list) else [], row.where)
                gold_letter(row.value(self.answer_field), letters_of(row.fields), options, row.where)
            elif self.grader == "expression" and evaluate_expression(answer) is None:
                raise InputError(f"{row.where}: answer {answer!r:.60} is not an arithmetic expression; correct it.")
            if self.reference_field is not None:
                value = row.value(self.reference_field)
                location = f"{row.where}: field {self.reference_field!r}"
                if is_conversation(value):
                    _answer_of(value, location)
                elif isinstance(value, list):
                    _check_list(value, location)
                else:
                    row.text(self.reference_field)
            conversation = self._conversation(row.fields, row.where)
            question = json.dumps(conversation) if conversation else ""
            question = question or render(self.prompt_template(), row.fields, f"task.prompt (for {row.where})")
            if not question.strip():
                raise InputError(
                    f"{row.where}: task.prompt gives an empty prompt; fill its fields, or leave the row out"
                )
            yield Entry(row.number, question, row.fields)


def _answer_of(value: Any, where: str) -> str:
    """Return the text of a reference that is a list of one message."""
    messages = read_conversation(value, where)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise InputError(f"{where} must be text, or a list of one message of the assistant, not a longer conversation")
    return messages[0]["content"]


def _check_list(value: list[Any], where: str) -> None:
    """Refuse a reference list with empty items or items that are neither text nor objects; it is written as JSON."""
    refused = next(
        (item for item in value if not isinstance(item, str | int | float | Mapping) or item in ("", {})), None
    )
    if not value or refused is not None or None in value:
        raise InputError(f"{where} must be text, or a list of texts or objects, not {shown(value)}; correct it.")


def _answer(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{where}: the answer must be a string or a number, not {value!r:.60}; correct it.")
    return str(value)


def _spaced(text: str) -> str:
    return " ".join(text.split())
