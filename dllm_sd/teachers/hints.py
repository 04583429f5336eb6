"""Prompt-conditioned teachers: the teacher's prompt holds a hint that the student never sees.

A hint is a context of its own (a teacher that reads the student's completion behind another prompt), and the `prompt`
of a context that also reveals positions on the canvas.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self, TypeVar

import torch

from dllm_sd.errors import InputError
from dllm_sd.losses.sites import Covers
from dllm_sd.randomness import make_key
from dllm_sd.ranges import Count, Ranged, Share
from dllm_sd.tasks.datafile import render
from dllm_sd.tasks.task import Problem, Task
from dllm_sd.teachers.context import (
    ContextDefaults,
    ContextInputs,
    HintInputs,
    Reasoning,
    TeacherInputs,
    TeacherPrompt,
    show,
)
from dllm_sd.teachers.writing import Message
from dllm_sd.texts.thinking import without_thinking

T = TypeVar("T")
_DRAWS = 64

REFERENCE = """\
{question}

The solution:
{hint}

Now write this solution."""

OWN_WORDS = """\
{question}

A reference for this problem, for your eyes only:
---
{hint}
---
Work out why it is right. Then write a solution of your own, from the start and in your own words; you may try ideas \
and take them back. Do not mention the reference."""
"""A template that asks the teacher for a solution in its own words, as the prompt of OPSD does (arXiv 2601.18734)."""

SIBLING = """\
{question}

A right solution:
{hint}

Now write your solution."""

AFRESH = """\
{question}

An earlier attempt at this problem that reached the right answer:
---
{hint}
---
Solve the problem afresh and answer it correctly."""
"""A template that asks for a new solution, as the prompt of SDPO does (arXiv 2601.20802)."""


@dataclass(frozen=True, kw_only=True)
class Prompt(Ranged, ContextDefaults, ABC):
    """Base of all hints: the limits of the prompt; no position is revealed on the canvas.

    A hint must implement `prompt_for`.
    """

    thinking: bool | None = None
    """The chat template's thinking switch for this teacher; None as for the student."""
    reasoning: Reasoning | None = None
    """If it is set (to ``{}`` for its defaults), the teacher writes an analysis first."""
    longest: Count = 10240
    """Longest prompt of the teacher in tokens, not counting an analysis."""
    overflow: Literal["drop", "cut"] = "drop"
    """What happens to a longer one: the rollout is dropped and counted, or the hint is cut at its end."""
    needs_group = False
    needs_outcome = False
    writing = None
    per_problem = False
    marks_regions = False

    @property
    def writer_prompt(self) -> str | None:
        """None: writers are not trained."""
        return None

    @property
    def skill_rank(self) -> int | None:
        """None: no skill is shown."""
        return None

    @property
    def needs_reference(self) -> Literal["solution", "answer"] | None:
        """None: the data's reference is not needed."""
        return None

    @property
    def wording(self) -> str | None:
        """None: `template` is never left out."""
        return None

    def lacks(self, task: Task, problem: Problem, key: str) -> str | None:
        """The part of the reference that `needs_reference` names, where the problem does not have it."""
        needed = self.needs_reference
        if needed is None or (task.reference if needed == "solution" else task.final_answer)(problem) is not None:
            return None
        remedy = task.reference_remedy if needed == "solution" else "name other data"
        return f"needs the {needed} of each problem, but the task's data has none; {remedy}, or another context"

    def marks(self, text: str, note: str) -> Sequence[tuple[int, int, str]]:
        """No spans."""
        return []

    @property
    def hint(self) -> Self:
        """Itself."""
        return self

    def same_view(self, covers: Covers) -> bool:
        """False: the prompt differs."""
        return False

    @abstractmethod
    def prompt_for(self, inputs: HintInputs) -> TeacherPrompt | None:
        """The prompt for one rollout, None if there is no hint."""

    def request(self, inputs: HintInputs) -> tuple[Message, ...] | None:
        """None: there is no writer."""
        return None

    def accept(self, inputs: HintInputs, text: str) -> tuple[str | None, str]:
        """The text, unchanged."""
        return text, "kept"

    def __call__(self, inputs: ContextInputs) -> TeacherInputs:
        return show(inputs, torch.zeros_like(inputs.protected))


@dataclass(frozen=True, kw_only=True)
class Reference(Prompt):
    """The data's reference in the prompt (OPSD, arXiv 2601.18734; the comparison of arXiv 2606.18195, Table 4)."""

    source: Literal["solution", "answer"] = "solution"
    """The whole reference completion, or the final answer alone."""
    question: bool = True
    """False removes only the question from the prompt: the reference-only view of arXiv 2607.02234."""
    problem: Literal["own", "another"] = "own"
    """The problem whose reference is shown. `another` shows that of a training problem drawn at random, as a control:
    it has the form of a hint, but nothing can be learnt from it."""
    template: str | None = None
    """Template of the teacher's prompt; `{question}` is the student's prompt, `{hint}` the hint. None takes one that
    fits the `source`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.wording)

    @property
    def wording(self) -> str:
        """`template`; for None the instruction that was measured to be best: to write the solution down, or to find one
        for the answer."""
        return self.template or (REFERENCE if self.source == "solution" else OWN_WORDS)

    @property
    def needs_reference(self) -> Literal["solution", "answer"]:
        """`source`."""
        return self.source

    def prompt_for(self, inputs: HintInputs) -> TeacherPrompt | None:
        """None where the data has no reference."""
        task, problem = inputs.task, inputs.rollout.problem
        if self.problem == "own":
            text = self._text(task, problem)
        else:
            key = make_key(inputs.key, "reference")
            text = of_another(inputs, key, lambda other: self._text(task, other))
        return None if text is None else TeacherPrompt(tuple(task.messages(problem, self.question)), self.wording, text)

    def _text(self, task: Task, problem: Problem) -> str | None:
        return task.reference(problem) if self.source == "solution" else task.final_answer(problem)


@dataclass(frozen=True, kw_only=True)
class Sibling(Prompt):
    """A successful attempt at the same problem in the prompt (SDPO, arXiv 2601.20802; DemoPSD, arXiv 2607.02502)."""

    at_least: Share = 1.0
    """Score from which an attempt counts as successful."""
    own: bool = False
    """Whether a rollout may be its own hint; otherwise the only success of a group has none."""
    choice: Literal["first", "random"] = "first"
    """The first success, or one drawn at random, the same for all rollouts of the problem that may have it."""
    strip_thinking: bool = True
    """Leave out the thinking, all text up to ``</think>``."""
    template: str = SIBLING
    """Template of the teacher's prompt; `{question}` is the student's prompt, `{hint}` the hint."""
    needs_group = True
    needs_outcome = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.template)

    def prompt_for(self, inputs: HintInputs) -> TeacherPrompt | None:
        """None where no (other) attempt succeeded."""
        text = self.success(inputs)
        return None if text is None else TeacherPrompt(inputs.messages, self.template, text)

    def success(self, inputs: HintInputs) -> str | None:
        """The text of the attempt that is shown, None if there is none."""
        successes = [attempt for attempt in inputs.group if attempt.grade.score >= self.at_least]
        if self.choice == "random":
            successes.sort(key=lambda attempt: make_key(inputs.key, "sibling", attempt.attempt))
        successes = [x for x in successes if self.own or x.attempt != inputs.rollout.attempt]
        if not successes:
            return None
        text = successes[0].text
        return without_thinking(text) if self.strip_thinking and "</think>" in text else text


@dataclass(frozen=True, kw_only=True)
class NoQuestion(Prompt):
    """The student's prompt without the question: what a teacher knows from the canvas alone."""

    def prompt_for(self, inputs: HintInputs) -> TeacherPrompt:
        """Always the same, whatever the problem."""
        return TeacherPrompt(tuple(inputs.task.messages(inputs.rollout.problem, question=False)), "{question}", "")


def of_another(inputs: HintInputs, key: int, value: Callable[[Problem], T | None]) -> T | None:
    """The ``value`` of another training problem, drawn by the key; None where a few dozen draws find none."""
    problems = inputs.problems
    for draw in range(_DRAWS if len(problems) else 0):
        problem = problems[make_key(key, draw) % len(problems)]
        if problem != inputs.rollout.problem and (found := value(problem)) is not None:
            return found
    return None


def check_template(template: str, *more: str) -> None:
    """Refuse a hint's template that leaves out the hint or has slots besides question, hint and ``more``."""
    check_slots(template, "template", "hint", "question", *more)


def check_slots(text: str, name: str, needed: str, *others: str) -> None:
    """Refuse a context's ``text`` without the slot ``needed``, or with one that is not among the ``others``."""
    slots = dict.fromkeys(others, "")
    first, second = (render(text, {**slots, needed: value}, f"the context's {name}") for value in "12")
    if first == second:
        raise InputError(f"the context's {name} has no {{{needed}}}; add it where that text belongs")
