"""Multiple choice: SciKnowEval, GPQA and files in the same format, graded by the letter."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, ClassVar

from dllm_sd.errors import InputError, shown
from dllm_sd.files.writing import Place
from dllm_sd.ranges import Natural
from dllm_sd.tasks.datafile import Entry, Row, needed
from dllm_sd.tasks.letters import read_letter
from dllm_sd.tasks.sources import DatasetTask
from dllm_sd.tasks.task import Grade, Problem, mean

_DEFAULT_LETTERS = "ABCD"  # the letters of a problem that does not list them
_OPTION = re.compile(r"(?:^|\n)[ \t]{0,8}[(*]{0,2}([A-Z])[*]{0,2}[:.)]")
_INLINE_OPTION = re.compile(r"(?<!\w)\(([A-Z])\)")

_PROMPT = """\
{question}

Work towards the answer in short steps. Then put the letter of the right option, by itself, inside \\boxed{{}}."""


@dataclass(frozen=True)
class Choice(DatasetTask):
    """Multiple choice. Problem fields: ``question`` (options included), ``letters`` (such as ABCD), ``answer``.

    ``data`` and ``data_test`` are JSONL files (or hub datasets). Their rows have ``prompt``, the question and its
    lettered options in one text, and ``answer``, the letter; or they have ``question``, ``options`` (a list) and
    ``answer``: the letter, the index of an option counted from 0, or its text. ``size_dev`` training rows are held out
    (without it a tenth, at most 50) as the dev split, chosen by a fixed permutation.

    A completion is graded by the letter in its last box, else in its last closed answer tag, else by the last "answer
    is X" or "X is correct", else by the letter if its last line is a single letter. Several letters at once count as no
    answer.
    """

    data: Place | None = None
    data_test: Place | None = None
    size_dev: Natural | None = None
    system: str | None = None
    prompt: str = _PROMPT
    answer: str = "\\boxed{{{answer}}}"
    title: ClassVar[str] = "choice"
    usual_dev: ClassVar[int] = 50
    answered_by: ClassVar[str] = "answer"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_templates(("question", "letters"), ("answer",), optional=("letters",))

    def grade(self, problem: Problem, completion: str) -> Grade:
        """Grade by the letter that the completion gives."""
        return grade_letter(problem.fields, needed(problem.fields, "answer"), completion)

    def final_answer(self, problem: Problem) -> str | None:
        """Return the letter of the right option."""
        answer = problem.fields.get("answer")
        return None if answer is None else right_letter(problem.fields, answer)

    def chance(self, problems: Sequence[Problem]) -> float | None:
        """Return the mean of 1 / number of options."""
        return mean([1 / len(letters_of(problem.fields)) for problem in problems]) if problems else None

    def entries(self, rows: list[Row]) -> Iterable[Entry]:
        """Return entries with question and options as one text, the letters, and the right letter."""
        return _read_entries(rows)


def grade_letter(fields: Mapping[str, Any], answer: Any, completion: str) -> Grade:
    """Grade by the letter that a completion gives; ``answer`` is a letter, or the index or text of an option."""
    letters, gold = letters_of(fields), right_letter(fields, answer)
    letter = read_letter(completion, letters if gold in letters else letters + gold, fields.get("options"))
    return Grade(letter == gold, float(letter == gold), letter)


def right_letter(fields: Mapping[str, Any], answer: Any) -> str:
    """Return the letter of the right option of a problem with these fields."""
    return gold_letter(answer, letters_of(fields), fields.get("options"), "The problem")


def letters_of(fields: Mapping[str, Any]) -> str:
    """Return the letters of a problem: its field, one per option, or those listed in its text; ABCD by default."""
    letters = fields.get("letters")
    if isinstance(letters, str) and letters and set(letters) <= set(ascii_uppercase):
        return letters
    options = fields.get("options")
    if isinstance(options, list | tuple) and 0 < len(options) <= len(ascii_uppercase):
        return ascii_uppercase[: len(options)]
    text = next((fields[name] for name in ("prompt", "question") if isinstance(fields.get(name), str)), "")
    return listed_letters(text) or _DEFAULT_LETTERS


def listed_letters(text: str) -> str:
    """Return the letters A, B, ... of the last list of options in a text; empty if it has fewer than two."""
    best = ""
    for pattern in (_OPTION, _INLINE_OPTION):
        run = ""
        for letter in pattern.findall(text):
            if letter == "A":
                best, run = (run if len(run) > 1 else best), "A"
            elif run and len(run) < len(ascii_uppercase) and letter == ascii_uppercase[len(run)]:
                run += letter
        best = run if len(run) > 1 else best
        if best:
            return best
    return ""


def gold_letter(answer: Any, letters: str, options: Any, where: str) -> str:
    """Return the letter of the right option; ``answer`` is a letter, an index counted from 0, or an option's text."""
    texts = [str(option).strip() for option in options] if isinstance(options, list | tuple) else []
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
        return letters[answer]
    if isinstance(answer, str):
        bare = answer.strip().strip("()").upper()
        if len(bare) == 1 and (bare in letters or (not texts and bare in ascii_uppercase)):
            return bare
        if texts.count(answer.strip()) == 1:
            return letters[texts.index(answer.strip())]
    raise InputError(f"{where}: the answer {answer!r:.60} is none of the options {', '.join(letters)}; correct it.")


def check_options(options: Sequence[Any], where: str) -> None:
    """Refuse options that are empty, equal to another option, or neither text nor numbers."""
    seen: set[str] = set()
    for option in options:
        if isinstance(option, bool) or not isinstance(option, str | int | float):
            raise InputError(f"{where}: an option must be text or a number, not {option!r:.60}; correct it.")
        text = str(option).strip()
        if not text:
            raise InputError(f"{where}: an option is empty; fill it, or leave the row out.")
        if text in seen:
            raise InputError(f"{where}: the option {shown(text)} occurs twice; correct it, or leave the row out.")
        seen.add(text)


def _read_entries(rows: list[Row]) -> Iterator[Entry]:
    for row in rows:
        options = row.fields.get("options")
        if options is None:
            text = row.text("prompt" if "prompt" in row.fields else "question")
            letters = listed_letters(text)
            if not letters:
                raise InputError(f"{row.where} lists no options such as A: and B:; add them, or a list named options.")
        else:
            if not isinstance(options, list | tuple) or not 2 <= len(options) <= len(ascii_uppercase):
                raise InputError(f"{row.where}: options must be a list of 2 to 26 texts, not {options!r:.60}.")
            check_options(options, row.where)
            letters = ascii_uppercase[: len(options)]
            lines = [f"{letter}: {option}" for letter, option in zip(letters, options, strict=True)]
            text = "\n".join([row.text("question").strip(), "", *lines])
        answer = gold_letter(row.value("answer"), letters, options, row.where)
        yield Entry(row.number, text.strip(), {"question": text, "letters": letters, "answer": answer})
