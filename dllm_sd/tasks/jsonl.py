"""The user's own questions and answers: a local file or hub dataset, a prompt template, and a grader."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dllm_sd.errors import InputError, shown
from dllm_sd.files.writing import Function, Place
from dllm_sd.ranges import Natural, Positive, PositiveShare, Size
from dllm_sd.tasks.choice import check_options, gold_letter, grade_letter, letters_of, right_letter
from dllm_sd.tasks.conversations import is_conversation, read_conversation
from dllm_sd.tasks.datafile import Entry, Row, Splits, chat, fields_of, needed, render
from dllm_sd.tasks.grading import (
    MAX_TEXT,
    evaluate_expression,
    final_number,
    gold_number,
    last_answer,
    marked_expression,
)
from dllm_sd.tasks.math import gold_answer, grade_answer
from dllm_sd.tasks.own_grader import Failed, Worker, file_and_function, search, worker
from dllm_sd.tasks.sources import DatasetTask
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.texts import parse_rubric, render_rubric, rubric_score
from dllm_sd.texts.rubric import RUBRIC_WRITER_PLAIN

_PROMPT = "{question}"
_QUESTIONS = ("question", "messages", "prompt")
"""Fields of which the default prompt is the first that a row has."""
_GRADERS = ("exact", "number", "expression", "math", "choice", "rubric", "regex")


@dataclass(frozen=True)
class Jsonl(DatasetTask):
    """The user's own data. Problem fields: those of the rows.

    ``data`` (train and dev) and ``data_test`` (test) are paths of files (JSON Lines, CSV or Parquet, also packed with
    gzip), or datasets: ``owner/name`` on the hub or a folder, of which the splits train and test are read;
    ``owner/name:config:split`` names others. ``prompt`` may use any ``{field}``; by default it is the first of the
    fields question, messages and prompt. If it consists of a single field that holds a list of messages (``role``,
    ``content``), the prompt is that conversation. ``reference_field`` is the text that supervised training imitates, or
    a list of one message. If ``reference_field`` or ``answer_field`` is the field of the conversation, the conversation
    ends with the assistant's message, which is then the reference or the answer, and not part of the prompt.
    ``size_dev`` training rows are held out as the dev split, chosen by a fixed permutation; without it a tenth of them,
    at most 500.

    ``grader``: "exact" compares the last ``<answer>``, or the whole text without one, with ``answer_field`` up to white
    space; "number" compares the number that the text ends with; "expression" compares the values of arithmetic
    expressions; "math" compares LaTeX answers as the task math does; "choice" compares letters as the task choice does;
    "rubric" needs no answer: the score is `texts.rubric_score` if ``reference_field`` holds a rubric, otherwise 1, and
    a score of at least ``threshold`` is correct. The default ``prompt`` of "rubric" asks for a rubric for
    ``{question}``. "regex" compares the last match of ``pattern`` in the completion (its first group, if it has one)
    with the answer up to white space. A reference may be a list, which is written as JSON.

    ``grader`` may also name a function in a file of the user's own, as in ``my_reward.py:score``. It is called as
    ``score(problem, completion)`` with the fields of the row and the text, in a process of its own, and returns a
    number from 0 to 1 (or that and the answer that it read, for majority votes); a score of at least ``threshold`` is
    correct. No answer is needed. A call may take ``grader_seconds`` and ``grader_memory`` MiB, as may a match of
    "regex"; a completion on which the function fails counts as wrong.
    """

    data: Place | None = None
    data_test: Place | None = None
    """File of test problems, or a data set of the hub; without it there is no final test."""
    prompt: str = _PROMPT
    system: str | None = None
    answer_field: str = "answer"
    """Field with the right answer, which the grader compares with."""
    reference_field: str | None = None
    """Field with the text that supervised training imitates and teachers may see; None has none."""
    grader: Function = "exact"
    """How a completion is graded: `exact`, `number`, `expression`, `math`, `choice`, `rubric`, `regex`, or a function
    of your own, such as `my_reward.py:score`."""
    pattern: str | None = None
    """Regular expression of the grader `regex`; its first group, or else the whole match, is the answer."""
    threshold: PositiveShare = 0.5
    """Score from which a completion is correct, for the grader `rubric` and functions of your own."""
    grader_seconds: Positive = 10.0
    """Most seconds of a call to a function of your own, or of a match of `pattern`."""
    grader_memory: Size = 4096
    """Most memory of that call in MiB."""
    size_dev: Natural | None = None
    title: ClassVar[str] = "jsonl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grader not in _GRADERS and file_and_function(self.grader) is None:
            raise InputError(
                f"task.grader is {self.grader!r}; choose {', '.join(_GRADERS[:-1])} or {_GRADERS[-1]}, or name a "
                "function in a file of your own, as in my_reward.py:score"
            )
        self._check_pattern()
        if not fields_of(self.prompt) and not set("{}") & set(self.prompt):
            raise InputError(
                "task.prompt uses no field of the rows, so that all problems are the same; add one, such as {question}"
            )

    def _check_pattern(self) -> None:
        """Refuse a pattern that is missing, of no use, or no regular expression."""
        if (self.pattern is None) == (self.grader == "regex"):
            raise InputError(
                "task.grader=regex and task.pattern belong together; set both, as in task.pattern='answer: (.+)', or "
                "neither"
            )
        try:
            re.compile(self.pattern or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"task.pattern is not a regular expression ({error!s:.80}); correct it") from None

    @property
    def _needs_answer(self) -> bool:
        """Whether the grader compares with an answer."""
        return self.grader in _GRADERS and self.grader != "rubric"

    def _own(self) -> Worker:
        """Return the process of the user's function."""
        file, function = file_and_function(self.grader) or ("", "")
        return worker(file, function, self.grader_seconds, self.grader_memory)

    def prompt_template(self) -> str:
        """Return ``prompt``; for the grader rubric its default is the prompt for a rubric's writer."""
        return RUBRIC_WRITER_PLAIN if self.grader == "rubric" and self.prompt == _PROMPT else self.prompt

    def _template(self, fields: Mapping[str, Any]) -> str:
        """Return the template of the prompt of a row with these fields."""
        template = self.prompt_template()
        if template != _PROMPT:
            return template
        return f"{{{next((name for name in _QUESTIONS if name in fields), 'question')}}}"

    @property
    def rubric_prompt(self) -> str | None:
        """The prompt, if rubrics are graded."""
        return self.prompt_template() if self.grader == "rubric" else None

    @property
    def reference_remedy(self) -> str:
        """The remedy is to set the key that names the field, if it is not set."""
        if self.reference_field is not None:
            return super().reference_remedy
        names = self._reference_candidates() or [self.answer_field]
        known = " or ".join(f"task.reference_field={name}" for name in names[:5])
        return f"set task.reference_field to the field that holds them, such as {known}"

    def _reference_candidates(self) -> list[str]:
        """Return the columns of the data, if it has been read, that may hold references, longest texts first."""
        splits: Splits | None = vars(self).get("_splits")
        if splits is None or not splits["train"]:
            return []
        fields = splits["train"][0].fields
        used = fields_of(self._template(fields))
        texts = {name: str(value) for name, value in fields.items() if isinstance(value, str | int | float)}
        names = sorted((name for name in texts if name not in used), key=lambda name: -len(texts[name]))
        return names + [name for name in used if is_conversation(fields.get(name))]

    def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
        """Return the system message, if there is one, and the prompt, or the conversation of the row."""
        turns = self._turns(problem.fields, "The problem")
        if turns is not None:
            kept = [message for message in turns.prompt if message["role"] == "system"]
            return [*chat(self.system, "")[:-1], *(turns.prompt if question else [*kept, *chat(None, "")])]
        if question:
            return chat(self.system, render(self._template(problem.fields), problem.fields, "task.prompt"))
        blank = render(self._template(problem.fields), dict.fromkeys(problem.fields, ""), "task.prompt")
        return chat(self.system, blank.strip())

    def _turns(self, fields: Mapping[str, Any], where: str) -> "_Turns | None":
        """Return the conversation that is the prompt, if the template is a single field that holds one."""
        template = self._template(fields).strip()
        field = template.removeprefix("{").removesuffix("}")
        value = fields.get(field)
        if value is None or template != f"{{{field}}}" or not is_conversation(value):
            return None
        location = f"{where}: field {field!r}"
        conversation, answer = read_conversation(value, location), None
        if field in (self.reference_field, self.answer_field):
            if conversation[-1]["role"] != "assistant" or len(conversation) == 1:
                raise InputError(
                    f"{location} must end with a message of the assistant after one of the user, since "
                    f"task.{'reference_field' if field == self.reference_field else 'answer_field'} names it"
                )
            answer = conversation.pop()["content"]
        if conversation[-1]["role"] == "system":
            raise InputError(f"{location} holds nothing but a system message; add the user's, which is the question")
        if conversation[-1]["role"] != "user":
            raise InputError(
                f"{location} ends with the answer of the assistant; set task.reference_field={field} (to imitate it) "
                f"or task.answer_field={field} (to grade by it), or end it with the user's message, and put the answer "
                "into a field of its own"
            )
        if self.system is not None and conversation[0]["role"] == "system":
            raise InputError(f"{location} has a system message of its own; set task.system to null, or take it out")
        return _Turns(field, conversation, answer)

    def _value(self, fields: Mapping[str, Any], name: str) -> Any:
        """Return a field; of the conversation that is the prompt it is the answer at its end."""
        turns = self._turns(fields, "The problem") if is_conversation(fields.get(name)) else None
        return turns.answer if turns is not None and turns.field == name else fields.get(name)

    def reference(self, problem: Problem) -> str | None:
        """Return the text of ``reference_field``."""
        if self.reference_field is None:
            return None
        needed(problem.fields, self.reference_field)
        value = self._value(problem.fields, self.reference_field)
        if is_conversation(value):
            return _answer_of(value, f"The problem: field {self.reference_field!r}")
        return json.dumps(value, ensure_ascii=False, indent=1) if isinstance(value, list) else str(value)

    def final_answer(self, problem: Problem) -> str | None:
        """Return the text of ``answer_field``, for the grader choice the letter; None if the field is missing."""
        gold = self._value(problem.fields, self.answer_field)
        if gold is None:
            return None
        return right_letter(problem.fields, gold) if self.grader == "choice" else _answer(gold, "The problem")

    def grade(self, problem: Problem, completion: str) -> Grade:
        """Grade with the grader that ``grader`` names."""
        if self.grader not in _GRADERS:
            return self._own().grade(problem.fields, completion[-MAX_TEXT:], self.threshold)
        if self.grader == "rubric":
            rubric = parse_rubric(completion)
            if isinstance(rubric, str):
                return Grade(False, 0.0, None)
            gold = parse_rubric(problem.fields.get(self.reference_field) if self.reference_field else None)
            score = 1.0 if isinstance(gold, str) else rubric_score(rubric, gold)
            return Grade(score >= self.threshold, score, render_rubric(rubric))
        needed(problem.fields, self.answer_field)
        gold = self._value(problem.fields, self.answer_field)
        if self.grader == "choice":
            return grade_letter(problem.fields, gold, completion)
        if self.grader == "math":
            return grade_answer(gold_answer(gold, "The problem"), completion)
        parsed: str | None
        if self.grader == "exact":
            marked = last_answer(completion)
            parsed = _spaced(completion[-MAX_TEXT:] if marked is None else marked)
            correct = parsed == _spaced(_answer(gold, "The problem"))
        elif self.grader == "regex":
            found = search(self.pattern or "", completion[-MAX_TEXT:], self.grader_seconds, self.grader_memory)
            parsed = None if found is None else _spaced(found)
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
            turns = self._turns(row.fields, row.where)
            answer = self._checked_answer(row, turns) if self._needs_answer else ""
            if self.grader == "number":
                gold_number(answer, row.where)
            elif self.grader == "math":
                gold_answer(answer, row.where)
            elif self.grader == "choice":
                options = row.fields.get("options")
                check_options(options if isinstance(options, list) else [], row.where)
                gold_letter(row.fields[self.answer_field], letters_of(row.fields), options, row.where)
            elif self.grader == "expression" and evaluate_expression(answer) is None:
                raise InputError(f"{row.where}: answer {answer!r:.60} is not an arithmetic expression; correct it.")
            if self.reference_field is not None and (turns is None or turns.field != self.reference_field):
                _check_reference(row, self.reference_field)
            template = self._template(row.fields)
            question = (
                json.dumps(turns.prompt) if turns else render(template, row.fields, f"task.prompt (for {row.where})")
            )
            if not question.strip():
                raise InputError(
                    f"{row.where}: task.prompt gives an empty prompt; fill its fields, or leave the row out"
                )
            if self.grader not in _GRADERS and row is rows[0]:
                self._try_own(row)
            yield Entry(row.number, question, row.fields)

    def _try_own(self, row: Row) -> None:
        """Call the user's function with the answer of a row, so that a broken one is refused before any work."""
        problem = Problem("first", row.fields)
        answer = self.reference(problem) or row.fields.get(self.answer_field)
        try:
            self._own().score(row.fields, str("" if answer is None else answer))
        except Failed as error:
            raise InputError(
                f"task.grader {self.grader} fails on {row.where} ({error}); correct the function"
            ) from None

    def summary(self, graded: Sequence[tuple[Problem, Grade]]) -> dict[str, float]:
        """Return how often the user's function failed, which is where it read no answer."""
        if self.grader in _GRADERS:
            return {}
        return {"grader_failed": sum(grade.parsed is None for _, grade in graded)}

    def _checked_answer(self, row: Row, turns: "_Turns | None") -> str:
        """Return the answer of a row, which must be there and not be empty."""
        own = turns if turns is not None and turns.field == self.answer_field else None
        answer = _answer(own.answer if own else row.value(self.answer_field, "task.answer_field"), row.where)
        if not answer.strip():
            raise InputError(f"{row.where}: the answer is empty; fill it, or leave the row out.")
        return answer


@dataclass(frozen=True)
class _Turns:
    """The conversation in a ``field``: the messages of the prompt, and the answer after it if that is of use."""

    field: str
    prompt: list[dict[str, str]]
    answer: str | None


def _check_reference(row: Row, name: str) -> None:
    """Refuse a reference that is neither text, nor a number, nor a list that can be written."""
    value, location = row.value(name, "task.reference_field"), f"{row.where}: field {name!r}"
    if is_conversation(value):
        _answer_of(value, location)
    elif isinstance(value, list):
        _check_list(value, location)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        row.text(name)


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
