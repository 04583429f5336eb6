"""Which columns of one's own data hold question, answer and worked solution, and how completions are graded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dllm_sd.errors import InputError, shown
from dllm_sd.tasks.choice import Choice
from dllm_sd.tasks.conversations import is_conversation
from dllm_sd.tasks.formats import Row
from dllm_sd.tasks.jsonl import Jsonl

QUESTIONS = ("question", "messages", "prompt", "problem", "instruction", "input", "query", "conversations", "text", "q")
ANSWERS = ("answer", "final_answer", "target", "label", "output", "response", "completion", "solution", "a")
REFERENCES = ("solution", "reference", "rationale", "reasoning", "explanation", "response", "output", "completion")
"""Names by which a column is known, the first that the data has."""
INSTRUCTIONS: Mapping[str, str] = {
    "number": "Work towards the answer in short steps. Then give the final number, by itself, inside \\boxed{{}}.",
    "math": "Work towards the answer in short steps. Then give the final answer, by itself, inside \\boxed{{}}.",
    "exact": "Work towards the answer in short steps. Then give the final answer, by itself, inside <answer></answer>.",
}
"""What a prompt may ask for, so that the grader finds the answer."""
LONG_ANSWER = 80
"""Characters of an answer that is more than a final result."""


@dataclass(frozen=True)
class Columns:
    """What was found in the data."""

    task: str
    """The task that reads it: jsonl, or choice for data in its format."""
    question: str
    answer: str | None
    """None where a function of the user's own grades without one."""
    reference: str | None
    """The column that supervised training imitates and teachers may see."""
    grader: str
    worked: bool
    """Whether references are more than the final result."""
    rows: int

    @property
    def free(self) -> bool:
        """Whether answers are long texts, which a completion hardly ever repeats exactly."""
        return self.grader == "exact" and self.worked and self.answer == self.reference

    @property
    def instruction(self) -> str | None:
        """What the prompt may ask for; None for a conversation, to which nothing is added, and for long texts."""
        return None if self.free or self.question == self.reference else INSTRUCTIONS.get(self.grader)


def find_columns(rows: Sequence[Row], given: Mapping[str, str | None]) -> Columns:
    """Find the columns by their names and contents.

    Args:
        rows: all rows of the data, at least one.
        given: columns that the user named, and the grader, by ``question``, ``answer``, ``reference``, ``grader``.

    Raises:
        InputError: if a column is missing, or the answers cannot be graded.
    """
    names = [name for name in rows[0].fields if all(row.has(name) for row in rows)]
    for option in ("question", "answer", "reference"):
        if (name := given[option]) is not None and name not in names:
            raise InputError(f"--{option} {shown(name)} is no column that every row fills; {_known(names)}")
    question = given["question"] or _named(names, QUESTIONS)
    if question is None:
        raise InputError(f"no column is known to hold the questions; name it by --question ({_known(names)})")
    others = [name for name in names if name != question]
    answer = given["answer"] or _named(others, ANSWERS)
    if answer is None and is_conversation(rows[0].fields[question]) and _answered(rows, question):
        answer = question
    grader = given["grader"]
    if answer is None and (grader is None or (grader != "rubric" and ":" not in grader)):
        raise InputError(
            f"no column is known to hold the answers; name it by --answer ({_known(others)}), or give a function of "
            "your own by --grader, as in my_reward.py:score"
        )
    reference = given["reference"] or _named([name for name in others if name != answer], REFERENCES) or answer
    task = "jsonl"
    if grader is None and answer is not None:
        task, grader = _grader(rows, question, answer)
    long = any(len(_text(row.fields[reference])) > LONG_ANSWER for row in rows) if reference else False
    worked = reference is not None and (reference != answer or long)
    return Columns(task, question, answer, reference, str(grader), worked, len(rows))


def _known(names: Sequence[str]) -> str:
    return f"there are {shown(', '.join(names))}" if names else "no column is filled in every row"


def _named(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The column with the first of the wanted names, whatever its case and spaces."""
    plain = {name.strip().lower().replace(" ", "_").replace("-", "_"): name for name in reversed(names)}
    return next((plain[name] for name in wanted if name in plain), None)


def _answered(rows: Sequence[Row], question: str) -> bool:
    """Whether every conversation ends with a message of the assistant."""
    conversations = [row.fields[question] for row in rows]
    return all(is_conversation(turns) and turns[-1].get("role") == "assistant" for turns in conversations)


def _text(value: Any) -> str:
    return str(value[-1].get("content")) if is_conversation(value) else str(value)


def _grader(rows: Sequence[Row], question: str, answer: str) -> tuple[str, str]:
    """The task and the first grader that can read all answers; "exact" reads every text."""
    if (question, answer) == ("question", "answer") and "options" in rows[0].fields:
        list(Choice().entries(list(rows)))
        return "choice", "choice"
    formulas = any("\\" in _text(row.fields[answer]) or "$" in _text(row.fields[answer]) for row in rows)
    for grader in ("number", *(["math"] if formulas else [])):
        try:
            list(_task(question, answer, grader).entries(list(rows)))
        except InputError:
            continue
        return "jsonl", grader
    list(_task(question, answer, "exact").entries(list(rows)))
    return "jsonl", "exact"


def _task(question: str, answer: str, grader: str) -> Jsonl:
    reference = question if question == answer else None
    return Jsonl(prompt=f"{{{question}}}", answer_field=answer, reference_field=reference, grader=grader)
