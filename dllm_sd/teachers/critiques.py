"""Critiques as text: a solution in tagged steps, and its corrected copy (step-aligned feedback, arXiv 2606.11173).

The student writes ``<step_1>...</step_1> <step_2>...</step_2> ... <answer>...</answer>``. A critique is no comment but
the same text with the first wrong step put right: what stands before it is copied to the letter, so that a teacher that
reads it agrees with the student up to there and nowhere else.
"""

import re
from dataclasses import dataclass
from typing import Literal

LONGEST = 60_000
"""Characters of a text that are read."""
_STEP = re.compile(r"<step_([0-9]{1,4})>(.*?)(?:</step_\1>|(?=<step_[0-9]{1,4}>|<answer>)|\Z)", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)

Region = Literal["prefix", "error", "after"]
REGIONS: tuple[Region, ...] = ("prefix", "error", "after")
"""Where a token of a rollout stands: before the first wrong step, in it, or behind it."""
Form = Literal["verbatim_prefix", "full_quote", "no_trace"]


@dataclass(frozen=True)
class Steps:
    """A solution taken apart."""

    texts: tuple[str, ...]
    """Each step without its tags."""
    spans: tuple[tuple[int, int], ...]
    """First character of each step and the one behind it, tags included."""
    answer: str | None
    """None where the text ends before it."""


def parse_steps(text: str) -> tuple[Steps | None, str]:
    """A tagged solution and "kept"; or None and the reason: no_steps, bad_order.

    Steps are numbered from 1; the last one may break off.
    """
    text = text[:LONGEST]
    answer = _ANSWER.search(text)
    found = list(_STEP.finditer(text, 0, answer.start() if answer else len(text)))
    if not found:
        return None, "no_steps"
    if [int(one[1]) for one in found] != list(range(1, len(found) + 1)):
        return None, "bad_order"
    spans = tuple(one.span() for one in found)
    return Steps(tuple(one[2].strip() for one in found), spans, answer[1].strip() if answer else None), "kept"


def first_change(trace: Steps, critique: Steps) -> int | None:
    """The first step of the trace that the critique writes otherwise, from 0; None if it copies all of them."""
    for place, text in enumerate(trace.texts):
        if place >= len(critique.texts) or _spaced(text) != _spaced(critique.texts[place]):
            return place
    return None


def accept_critique(text: str, trace_text: str) -> tuple[str | None, str]:
    """A critique as it is used, and "kept"; or None and the reason.

    It must be steps (no_steps, bad_order) with an answer (no_answer), and must not quote the step that it corrects
    (quotes_error).
    """
    text = text.strip()[:LONGEST]
    steps, reason = parse_steps(text)
    if steps is None:
        return None, reason
    if not steps.answer:
        return None, "no_answer"
    trace, _ = parse_steps(trace_text)
    change = first_change(trace, steps) if trace else None
    if trace and change is not None and change < len(steps.texts):
        wrong = _spaced(trace.texts[change])
        if wrong and wrong in _spaced(steps.texts[change]):
            return None, "quotes_error"
    return text, "kept"


def formed(critique_text: str, trace_text: str, form: Form) -> str:
    """The critique in one of the three forms that the paper compares.

    ``verbatim_prefix`` is the critique itself; ``full_quote`` shows the student's wrong step before its correction;
    ``no_trace`` says only of a right step that it is right.
    """
    critique, trace = parse_steps(critique_text)[0], parse_steps(trace_text)[0]
    if form == "verbatim_prefix" or critique is None or trace is None:
        return critique_text
    change = first_change(trace, critique)
    right = len(trace.texts) if change is None else change
    parts = []
    for place, text in enumerate(critique.texts):
        if form == "no_trace" and place < right:
            text = f"Step {place + 1} is right."
        if form == "full_quote" and place == change:
            text = f"{trace.texts[place]}\nThis step is wrong. Instead:\n{text}"
        parts.append(f"<step_{place + 1}>{text}</step_{place + 1}>")
    return "\n".join([*parts, f"<answer>{critique.answer or ''}</answer>"])


def regions(trace_text: str, critique_text: str) -> list[tuple[int, int, Region]]:
    """Character spans of a trace by what its critique says of them; all of it is ``prefix`` if nothing is changed.

    Nothing where one of them is not in steps.
    """
    critique, trace = parse_steps(critique_text)[0], parse_steps(trace_text)[0]
    if critique is None or trace is None:
        return []
    change = first_change(trace, critique)
    if change is None:
        return [(0, len(trace_text), "prefix")]
    start, end = trace.spans[change]
    return [(0, start, "prefix"), (start, end, "error"), (end, len(trace_text), "after")]


def _spaced(text: str) -> str:
    return " ".join(text.split())
