"""Critiques: a solution in tagged steps, and its corrected copy (StepAlignFB, arXiv 2606.11173).

The student writes ``<step_1> ... </step_1> <step_2> ... </step_2> ... <answer> ... </answer>``. A critique is not a
comment on this text but a corrected copy: the steps before the first wrong step are copied verbatim, followed by the
correct step under its number and the rest of the solution. A teacher that reads it agrees with the student up to the
mistake and disagrees sharply there. The paper publishes neither its prompts nor its tags; ours are written anew.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dllm_sd.texts.thinking import behind_thinking

Region = Literal["prefix", "error", "after"]
"""The position of a character of a trace: before the first wrong step, in that step, or after it."""
Form = Literal["verbatim_prefix", "full_quote", "no_trace"]
StepsRejection = Literal["no_steps", "bad_order", "no_answer"]

_TAG = re.compile(r"<(/?)(?:step_([0-9]{1,4})|answer)>", re.IGNORECASE)
_SAME_WORD = re.compile(r"[^\W_]{2}|[0-9]\.[0-9]")  # the two characters belong to the same word or number

SOLVER_SUFFIX = """\
Solve it in numbered steps. Put the first one between <step_1> and </step_1>, the next one between <step_2> and \
</step_2>, and so on, one small piece of work each. At the end put the answer alone between <answer> and </answer>."""
"""The end of the student's prompt. It has no placeholder and no brace."""

_CRITIC = """\
You make a fair copy of a student's solution. Where it is right you change nothing, and where it is wrong you put it \
right.

The problem:
{question}

TRUTH:
{truth}

What the student wrote:
{trace}

See which of four cases you have, and do as it says:
A. All of it is right. The copy is the student's solution, letter by letter.
B. The answer is right, but a reason for it is missing. The copy has all of the student's steps, letter by letter, and \
the missing step in its place.
C. It stops before the answer, or leaves a part out. The copy has the steps that are right, letter by letter, and then \
the shortest way to the end.
D. It is wrong. The copy has every step before the first wrong one, letter by letter. Under the number of the wrong \
step it has a right one, and from there it goes on to the answer, with the student's symbols and in steps of the \
student's size.

A wrong step never stands in the copy, not even to say that it is wrong. Nor does anything about the student, about \
these cases or about what you were given. Write the copy and nothing else: <step_1> ... </step_1>, \
<step_2> ... </step_2> and so on, then <answer> ... </answer>."""

CRITIC_ANSWER = _CRITIC.replace("TRUTH:", "The right answer (you must find the way yourself):")
"""The prompt of a critic that knows the final answer only: ``{question}``, ``{truth}``, ``{trace}``."""

CRITIC_REFERENCE = _CRITIC.replace("TRUTH:", "A solution that is right (the student's may differ and be right too):")
"""The prompt of a critic that knows a complete reference solution: ``{question}``, ``{truth}``, ``{trace}``."""

CRITIQUE_TEACHER = """\
{question}

The corrected solution:
{hint}

Now write this solution."""
"""The teacher's prompt. It does not ask for a paraphrase, since the critique copies the student's words."""

WRONG_STEP = "That was wrong. The right step:"
"""The text between the student's wrong step and its correction in `full_quote`."""
RIGHT_STEP = "Step {number} is correct."
"""The text that replaces a correct step of the student in `no_trace`."""


@dataclass(frozen=True)
class SolutionPart:
    """One step, or the answer. Positions count characters of the text from which it was parsed."""

    text: str
    """The text between the tags, without surrounding white space."""
    start: int
    """Position of its first character, that of the opening tag."""
    end: int
    """Position after its last character, that of the closing tag."""
    inside: tuple[int, int]
    """Start and end of ``text``."""
    closed: bool
    """Whether it has a closing tag; otherwise it ends where the next part begins, or is truncated."""


@dataclass(frozen=True)
class Steps:
    """A parsed solution: steps 1, 2, ... in order, and the answer, which is None without a closed answer tag."""

    steps: tuple[SolutionPart, ...]
    answer: SolutionPart | None


def parse_steps(text: str, needs_answer: bool = False) -> Steps | StepsRejection:
    """Parse a tagged solution, or return the reason why this is not possible.

    Other text may stand between the parts, and the last part may be truncated. Thinking before them is ignored.

    Returns:
        The parts; ``no_steps``; ``bad_order`` if the steps are not numbered 1, 2, ... or do not come before the answer,
        or if a closing tag has no matching step; ``no_answer`` if ``needs_answer`` is true and there is no closed,
        non-empty answer. The last of several answers counts, as in the graders.
    """
    steps: list[SolutionPart] = []
    answer: SolutionPart | None = None
    opened: re.Match[str] | None = None
    answering = False  # an answer tag was opened
    for tag in _TAG.finditer(text, *behind_thinking(text)):
        is_step, is_close = tag[2] is not None, bool(tag[1])
        if not is_step and not steps and opened is None:
            continue  # an answer before the first step is ignored
        if is_step and is_close:
            if opened is not None and int(tag[2]) == int(opened[2] or 0):
                steps.append(_part(text, opened, tag.start(), tag.end(), True))
                opened = None
            elif opened is not None or int(tag[2]) != len(steps):  # a repeated closing tag of the last step is harmless
                return "bad_order"
            continue
        if not is_close:
            if opened is not None and opened[2] is not None:
                steps.append(_part(text, opened, tag.start(), tag.start(), False))
            if is_step and (answering or int(tag[2]) != len(steps) + 1):
                return "bad_order"
            opened, answering = tag, answering or not is_step
        elif opened is not None and opened[2] is None:
            answer, opened = _part(text, opened, tag.start(), tag.end(), True), None
    if opened is not None and opened[2] is not None:
        steps.append(_part(text, opened, len(text), len(text), False))
    if not steps:
        return "no_steps"
    if needs_answer and not (answer and answer.text):
        return "no_answer"
    return Steps(tuple(steps), answer)


def first_change(trace: Steps, critique: Steps) -> int | None:
    """Return the index of the first step of the trace that the critique changes or omits.

    White space is ignored, and `RIGHT_STEP` stands for the step with its number. None if the critique contains all
    steps of the trace, whatever follows them.
    """
    for index, step in enumerate(trace.steps):
        if index >= len(critique.steps):
            return index
        corrected = _spaced(critique.steps[index].text)
        if corrected not in (_spaced(step.text), RIGHT_STEP.format(number=index + 1)):
            return index
    return None


def regions(text: str, critique_text: str) -> list[tuple[int, int, Region]]:
    """Return spans ``(start, end, kind)`` of a trace by its critique, in order and without empty spans.

    ``error`` is the step of `first_change`, or else an answer that the critique changes. ``prefix`` reaches from the
    first step to the error, ``after`` from the error to the end of the text. Without an error everything is ``prefix``.
    Text before the first step belongs to no span. The list is empty if one of the texts is not in steps.
    """
    trace, critique = parse_steps(text), parse_steps(critique_text)
    if isinstance(trace, str) or isinstance(critique, str):
        return []
    start, error = trace.steps[0].start, _error(trace, critique)
    if error is None:
        return [(start, len(text), "prefix")]
    spans: list[tuple[int, int, Region]] = [
        (start, error.start, "prefix"),
        (error.start, error.end, "error"),
        (error.end, len(text), "after"),
    ]
    return [span for span in spans if span[0] < span[1]]


def accept_critique(text: str, trace: str) -> tuple[str | None, str]:
    """Return the part of a critic's text that is used, and ``kept``; or None and the reason.

    The part that is used reaches from the first step to the end of the answer; thinking, and text before and after it,
    is dropped. The reasons are those of `parse_steps`, and ``quotes_error``: the correction repeats the student's first
    wrong step verbatim. This is checked only if the student's answer is missing or changed (the cases C and D), and
    only for a step that is not truncated and is longer than a single word or number; a part of the step is not a
    quotation. If the trace is not in steps, nothing is compared.
    """
    critique, student = parse_steps(text, needs_answer=True), parse_steps(trace)
    if isinstance(critique, str):
        return None, critique
    assert critique.answer is not None
    end = critique.answer.end
    if not isinstance(student, str):
        changed = first_change(student, critique)
        if changed is not None and not _same_answer(student, critique) and not _is_truncated(student, changed):
            start = critique.steps[changed - 1].end if changed else critique.steps[0].start
            if _quotes(text[start:end], student.steps[changed].text):
                return None, "quotes_error"
    return text[critique.steps[0].start : end], "kept"


def verbatim_prefix(trace: str, critique: str) -> str:
    """Return the critique unchanged."""
    return critique


def full_quote(trace: str, critique: str) -> str:
    """Insert the student's wrong step before its correction; the ablation that reinforces the mistake."""
    student, corrected = parse_steps(trace), parse_steps(critique)
    if isinstance(student, str) or isinstance(corrected, str):
        return critique
    error = _error(student, corrected)
    if error is None:
        return critique
    changed = first_change(student, corrected)
    if changed is not None and changed < len(corrected.steps):
        position = corrected.steps[changed].inside[0]
    else:
        position = corrected.answer.start if corrected.answer else len(critique)
    return f"{critique[:position]}{error.text}\n{WRONG_STEP}\n{critique[position:]}"


def no_trace(trace: str, critique: str) -> str:
    """Replace every copied step of the critique by a short sentence; the ablation that blames right steps."""
    student, corrected = parse_steps(trace), parse_steps(critique)
    if isinstance(student, str) or isinstance(corrected, str):
        return critique
    changed = first_change(student, corrected)
    count = len(student.steps) if changed is None else changed
    pieces, position = [], 0
    for number, step in enumerate(corrected.steps[:count], 1):
        pieces += [critique[position : step.inside[0]], RIGHT_STEP.format(number=number)]
        position = step.inside[1]
    return "".join([*pieces, critique[position:]])


FORMS: dict[Form, Callable[[str, str], str]] = {
    "verbatim_prefix": verbatim_prefix,
    "full_quote": full_quote,
    "no_trace": no_trace,
}
"""The three forms of a critique that the paper compares, as functions of trace and critique."""


def _part(text: str, opening: re.Match[str], stop: int, end: int, closed: bool) -> SolutionPart:
    raw = text[opening.end() : stop]
    inner = raw.strip()
    start = opening.end() + len(raw) - len(raw.lstrip()) if inner else opening.end()
    return SolutionPart(inner, opening.start(), end, (start, start + len(inner)), closed)


def _error(trace: Steps, critique: Steps) -> SolutionPart | None:
    """Return the first changed step, or else an answer that is changed."""
    index = first_change(trace, critique)
    if index is not None:
        return trace.steps[index]
    answer_changed = trace.answer and critique.answer and not _same_answer(trace, critique)
    return trace.answer if answer_changed else None


def _same_answer(trace: Steps, critique: Steps) -> bool:
    if trace.answer is None or critique.answer is None:
        return False
    return _spaced(trace.answer.text) == _spaced(critique.answer.text)


def _is_truncated(trace: Steps, index: int) -> bool:
    return index == len(trace.steps) - 1 and not trace.steps[index].closed and trace.answer is None


def _quotes(text: str, wrong: str) -> bool:
    text, wrong = _spaced(text), _spaced(wrong)
    if not wrong or wrong.isalnum():
        return False
    start = text.find(wrong)
    while start >= 0:
        end = start + len(wrong)
        if not _SAME_WORD.match(text, start - 1) and not _SAME_WORD.match(text, end - 1):
            return True
        start = text.find(wrong, end)
    return False


def _spaced(text: str) -> str:
    return " ".join(text.split())
