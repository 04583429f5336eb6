"""Critiques: a solution in tagged steps, and its corrected copy (StepAlignFB, arXiv 2606.11173).

The student writes ``<step_1> ... </step_1> <step_2> ... </step_2> ... <answer> ... </answer>``. A critique is no
comment on it but the same text, put right: what stands before the first wrong step is copied to the letter, then follow
the right step at its number and the rest of the way. A teacher that reads it agrees with the student up to the mistake,
and disagrees sharply there. Neither the paper's prompts nor its tags are known to us; all of these are our own.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dllm_sd.texts.thinking import behind_thinking

Region = Literal["prefix", "error", "after"]
"""Where a character of a trace stands: in a step before the first wrong one, in that one, or behind it."""
Form = Literal["verbatim_prefix", "full_quote", "no_trace"]
Reason = Literal["no_steps", "bad_order", "no_answer"]

_TAG = re.compile(r"<(/?)(?:step_([0-9]{1,4})|answer)>", re.IGNORECASE)
_JOINED = re.compile(r"[^\W_]{2}|[0-9]\.[0-9]")  # one word or number goes on

SOLVER_SUFFIX = """\
Solve it in numbered steps. Put the first one between <step_1> and </step_1>, the next one between <step_2> and \
</step_2>, and so on, one small piece of work each. At the end put the answer alone between <answer> and </answer>."""
"""What the student's prompt ends with. It holds no slot and no brace."""

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
"""Asks a critic that knows the final answer only: ``{question}``, ``{truth}``, ``{trace}``."""

CRITIC_REFERENCE = _CRITIC.replace("TRUTH:", "A solution that is right (the student's may differ and be right too):")
"""Asks a critic that knows a whole reference solution: ``{question}``, ``{truth}``, ``{trace}``."""

CRITIQUE_TEACHER = """\
{question}

A solution to this problem that has been gone through step by step. What was right in it stands as it was; what was \
wrong or missing has been put right:
---
{hint}
---

Now give the solution, in the same steps."""
"""The teacher's prompt. It asks for no other words than those of the critique, as that would work against the copy."""

WRONG = "That was wrong. The right step:"
"""Stands between the student's wrong step and its correction in `full_quote`."""
RIGHT = "Step {number} is correct."
"""Stands for a step that the student got right in `no_trace`."""


@dataclass(frozen=True)
class Part:
    """One step, or the answer. Places count characters of the text that it was read from."""

    text: str
    """What stands between the tags, without the white space around it."""
    start: int
    """Its first character; the opening tag belongs to it."""
    end: int
    """The character behind it; the closing tag belongs to it."""
    inside: tuple[int, int]
    """Where ``text`` starts and ends."""
    closed: bool
    """Whether it has its closing tag; else it ends where the next part begins, or breaks off."""


@dataclass(frozen=True)
class Steps:
    """A solution taken apart: its steps 1, 2, ... in order, and its answer (None without one that is closed)."""

    steps: tuple[Part, ...]
    answer: Part | None


def parse_steps(text: str, needs_answer: bool = False) -> Steps | Reason:
    """A tagged solution, or why it is none.

    Any text may stand between the parts, and the last one may break off. Thinking before it is not looked at.

    Returns:
        The parts; ``no_steps``; ``bad_order`` where the steps are not numbered 1, 2, ... or do not come before the
        answer, or where a closing tag belongs to no step; ``no_answer`` where ``needs_answer`` and there is no closed
        answer with something in it. Of several answers the last one counts, as it does for the graders.
    """
    steps: list[Part] = []
    answer: Part | None = None
    opened: re.Match[str] | None = None
    answering = False  # an answer has begun
    for tag in _TAG.finditer(text, *behind_thinking(text)):
        is_step, is_close = tag[2] is not None, bool(tag[1])
        if not is_step and not steps and opened is None:
            continue  # an answer before all steps is none
        if is_step and is_close:
            if opened is not None and int(tag[2]) == int(opened[2] or 0):
                steps.append(_part(text, opened, tag.start(), tag.end(), True))
                opened = None
            elif opened is not None or int(tag[2]) != len(steps):  # a late end of the last step does no harm
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
    """The first step of the trace that the critique writes otherwise or leaves out, from 0.

    White space does not count, and `RIGHT` stands for the step that it is said of. None where all steps of the trace
    stand in the critique, whatever follows them.
    """
    for place, step in enumerate(trace.steps):
        if place >= len(critique.steps):
            return place
        other = _spaced(critique.steps[place].text)
        if other not in (_spaced(step.text), RIGHT.format(number=place + 1)):
            return place
    return None


def regions(text: str, critique_text: str) -> list[tuple[int, int, Region]]:
    """Spans ``(start, end, kind)`` of a trace by what its critique says of it, in order and without empty ones.

    ``error`` is the step of `first_change`, or else an answer that the critique changes. ``prefix`` reaches from the
    first step up to it, ``after`` from it to the end of the text. Without an error all is ``prefix``. What stands
    before the first step belongs nowhere. Nothing where one of the texts is not in steps.
    """
    trace, critique = parse_steps(text), parse_steps(critique_text)
    if isinstance(trace, str) or isinstance(critique, str):
        return []
    first, error = trace.steps[0].start, _error(trace, critique)
    if error is None:
        return [(first, len(text), "prefix")]
    found: list[tuple[int, int, Region]] = [
        (first, error.start, "prefix"),
        (error.start, error.end, "error"),
        (error.end, len(text), "after"),
    ]
    return [one for one in found if one[0] < one[1]]


def accept_critique(text: str, trace: str) -> tuple[str | None, str]:
    """What of a critic's text is used, from the first step to the end of the answer, and ``kept``; or None and why not.

    Thinking, and what is said before and behind the steps, is dropped. The reasons are those of `parse_steps`, and
    ``quotes_error``: the student's first wrong step stands, to the letter, in what takes its place. That is looked for
    only where the student's answer is missing or is changed (the cases C and D), and only of a step that does not break
    off and is more than one word or number; a part of it is no quote. A trace that is not in steps is compared with
    nothing.
    """
    critique, student = parse_steps(text, needs_answer=True), parse_steps(trace)
    if isinstance(critique, str):
        return None, critique
    assert critique.answer is not None
    end = critique.answer.end
    if not isinstance(student, str):
        place = first_change(student, critique)
        if place is not None and not _same_answer(student, critique) and not _broken_off(student, place):
            start = critique.steps[place - 1].end if place else critique.steps[0].start
            if _quotes(text[start:end], student.steps[place].text):
                return None, "quotes_error"
    return text[critique.steps[0].start : end], "kept"


def verbatim_prefix(trace: str, critique: str) -> str:
    """The critique as it is."""
    return critique


def full_quote(trace: str, critique: str) -> str:
    """The critique with the student's wrong step before its correction (the comparison that reinforces the mistake)."""
    student, right = parse_steps(trace), parse_steps(critique)
    if isinstance(student, str) or isinstance(right, str):
        return critique
    error = _error(student, right)
    if error is None:
        return critique
    place = first_change(student, right)
    if place is not None and place < len(right.steps):
        at = right.steps[place].inside[0]
    else:
        at = right.answer.start if right.answer else len(critique)
    return f"{critique[:at]}{error.text}\n{WRONG}\n{critique[at:]}"


def no_trace(trace: str, critique: str) -> str:
    """The critique with a short sentence for every step that was copied (the comparison that blames right steps)."""
    student, right = parse_steps(trace), parse_steps(critique)
    if isinstance(student, str) or isinstance(right, str):
        return critique
    place = first_change(student, right)
    count = len(student.steps) if place is None else place
    pieces, done = [], 0
    for number, step in enumerate(right.steps[:count], 1):
        pieces += [critique[done : step.inside[0]], RIGHT.format(number=number)]
        done = step.inside[1]
    return "".join([*pieces, critique[done:]])


FORMS: dict[Form, Callable[[str, str], str]] = {
    "verbatim_prefix": verbatim_prefix,
    "full_quote": full_quote,
    "no_trace": no_trace,
}
"""The three forms of a critique that the paper compares, as functions of the trace and the critique."""


def _part(text: str, opening: re.Match[str], stop: int, end: int, closed: bool) -> Part:
    raw = text[opening.end() : stop]
    inner = raw.strip()
    start = opening.end() + len(raw) - len(raw.lstrip()) if inner else opening.end()
    return Part(inner, opening.start(), end, (start, start + len(inner)), closed)


def _error(trace: Steps, critique: Steps) -> Part | None:
    """The step that is changed first, or else an answer that is changed."""
    place = first_change(trace, critique)
    if place is not None:
        return trace.steps[place]
    changed = trace.answer and critique.answer and not _same_answer(trace, critique)
    return trace.answer if changed else None


def _same_answer(trace: Steps, critique: Steps) -> bool:
    if trace.answer is None or critique.answer is None:
        return False
    return _spaced(trace.answer.text) == _spaced(critique.answer.text)


def _broken_off(trace: Steps, place: int) -> bool:
    return place == len(trace.steps) - 1 and not trace.steps[place].closed and trace.answer is None


def _quotes(text: str, wrong: str) -> bool:
    text, wrong = _spaced(text), _spaced(wrong)
    if not wrong or wrong.isalnum():
        return False
    start = text.find(wrong)
    while start >= 0:
        end = start + len(wrong)
        if not _JOINED.match(text, start - 1) and not _JOINED.match(text, end - 1):
            return True
        start = text.find(wrong, end)
    return False


def _spaced(text: str) -> str:
    return " ".join(text.split())
