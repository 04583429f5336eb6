"""Hints that somebody writes: rubrics, critiques and a peer's feedback. The prompts are our own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dllm_sd.errors import InputError
from dllm_sd.randomness import make_key
from dllm_sd.tasks import rubrics
from dllm_sd.tasks.datafile import render
from dllm_sd.tasks.grading import without_thinking
from dllm_sd.tasks.task import Problem
from dllm_sd.teachers.comments import sanitise
from dllm_sd.teachers.context import Ask, Occasion
from dllm_sd.teachers.critiques import Form, Region, accept_critique, formed, regions
from dllm_sd.teachers.hints import Prompt, Sibling, check_template
from dllm_sd.teachers.writing import Message, Writing

RUBRIC = """\
{question}

What a good solution to this problem must show, as a list of criteria (for your eyes only; it may have mistakes):
---
{hint}
---
Let the criteria guide you. Then write a solution of your own, from the start, and do not mention them."""

RUBRIC_WITH_REFERENCE = """\
{question}

The reference answer, and a list of criteria for a good solution (for your eyes only; both may have mistakes):
---
{reference}
---
{hint}
---
Let them guide you. Then write a solution of your own, from the start, and do not mention them."""

RUBRIC_WRITER = """\
You design grading rubrics. For the question below, list what a good solution must show.

Question:
{question}

Write between 5 and 15 criteria that can be checked one by one and do not overlap. Answer with a JSON list and nothing \
else. Each item is an object with three fields: "title", two to five words; "description", one sentence of at most 40 \
words that begins with Essential Criteria:, Important Criteria:, Optional Criteria: or Pitfall Criteria:; "weight", 5 \
for essential ones, 3 or 4 for important ones, 1 or 2 for optional ones, -1 or -2 for pitfalls. Name at least one \
pitfall."""

RUBRIC_GOLD = """\
{question}

The rubric that is wanted (for your eyes only):
{hint}

Write that rubric, and nothing but the JSON list."""

CRITIQUE = """\
{question}

Somebody went through an attempt at this problem. Steps that were right are kept as they were, the others are put right:
---
{hint}
---

Solve the problem step by step in the same form."""

CRITIC = """\
You copy a student's solution faithfully and put it right where it is wrong.

Problem:
{question}

What is right:
{truth}

The student's solution:
{trace}

Decide which case it is, and write the solution accordingly:
A. It is right. Copy all steps, to the letter.
B. The answer is right and a reason is missing. Copy all steps, and put in the step that is missing.
C. It breaks off. Copy the right steps, and finish in few words.
D. It is wrong. Copy every step before the first wrong one, to the letter. At the number of the wrong step write the \
right one, and go on to the answer in the student's notation and with steps of the same size.
Never repeat or mention a wrong step, and do not comment. Write nothing but the tags <step_1>...</step_1>, \
<step_2>...</step_2> and so on, and at the end <answer>...</answer>."""

COMMENTATOR = """\
You know {tutor} well. A colleague who knows {student} better has tried the problem below. Help with what you see.

Problem:
{question}

The attempt:
{response}

First name one key term of the problem, one to three words just as they stand there, as <concept>term</concept>. \
Words that fit any problem do not count. Then write three to five sentences, at most 80 words: what is right, what is \
wrong and what is missing as far as {tutor} goes, with the step that you mean. Do not solve the problem, and do not \
give away the answer or the letter of an option."""

TUTORED = """\
{question}
{hint}

Solve the problem afresh and answer it correctly."""

SOLUTION = """

An earlier attempt at this problem that reached the right answer:
---
{hint}
---"""

COMMENT = """

What a reviewer said about your last attempt:
---
{hint}
---"""


Source = Literal["data", "written", "generic", "random", "noisy", "reduced"]


@dataclass(frozen=True, kw_only=True)
class Rubric(Prompt):
    """Criteria for a good solution in the prompt (RCSD, arXiv 2606.19327, Eq. 5), and its degraded variants (Table 6).

    Those of the data and what is made of them are in the problem's field `field`.
    """

    source: Source = "written"
    """From the data, from a writer, one for all questions, another question's, half and half, or half of it."""
    field: str = "rubric"
    """The field of the problem: a list, or a JSON text."""
    reference: bool = False
    """Whether the reference answer stands in the prompt too (the released code)."""
    lines: bool = False
    """One criterion a line instead of JSON."""
    template: str = RUBRIC
    prompt: str = RUBRIC_WRITER
    """Asks the writer: `{question}`, and `{reference}` if it wants to."""
    writing: Writing | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    per_problem: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.template, *(["reference"] if self.reference else []))
        if (self.source == "written") != (self.writing is not None):
            raise InputError("a rubric context is written by somebody: set source to written and writing, or neither")

    def request(self, occasion: Occasion) -> tuple[Message, ...] | None:
        """The same for all rollouts of a problem, so that it is written once."""
        task, problem = occasion.task, occasion.rollout.problem
        slots = {"question": task.messages(problem)[-1]["content"], "reference": task.reference(problem) or ""}
        return ({"role": "user", "content": render(self.prompt, slots, "the context's prompt")},)

    def accept(self, occasion: Occasion, text: str) -> tuple[str | None, str]:
        """The rubric that the text holds, written anew; as it is where it is to be lines."""
        if self.lines:
            text = without_thinking(text).strip()
            return (text, "kept") if text else (None, "empty")
        rubric, reason = rubrics.parse_rubric(text)
        return (rubrics.render_rubric(rubric), reason) if rubric else (None, reason)

    def ask(self, occasion: Occasion) -> Ask | None:
        """None where there is no usable rubric, or no reference that is to stand with it."""
        task, problem = occasion.task, occasion.rollout.problem
        text, reference = self._text(occasion), task.reference(problem)
        if text is None or (self.reference and reference is None):
            return None
        more = {"reference": reference or ""} if self.reference else {}
        return Ask(tuple(task.messages(problem)), self.template, text, more)

    def _text(self, occasion: Occasion) -> str | None:
        if self.source == "written":
            return occasion.text
        if self.source == "generic":
            return rubrics.render_rubric(rubrics.GENERIC, self.lines)
        own, key = self._of(occasion.rollout.problem), make_key(occasion.key, "rubric")
        if self.source == "reduced":
            own = rubrics.reduced(own, key) if own else ()
        if self.source in ("random", "noisy"):
            other = self._of(self._another(occasion, key))
            own = other if self.source == "random" or not other else rubrics.noisy(own, other, key)
        return rubrics.render_rubric(own, self.lines) if own else None

    def _of(self, problem: Problem) -> rubrics.Rubric:
        return rubrics.read_rubric(problem.fields.get(self.field))[0]

    def _another(self, occasion: Occasion, key: int) -> Problem:
        """Another training problem, by the key."""
        problems, mine = occasion.problems, occasion.rollout.problem
        place = key % len(problems)
        return problems[(place + 1) % len(problems)] if problems[place].id == mine.id else problems[place]


@dataclass(frozen=True, kw_only=True)
class Critique(Prompt):
    """The rollout itself in the prompt, corrected from its first wrong step on (arXiv 2606.11173).

    The task's prompt must ask for tagged steps: ``<step_1>...</step_1>`` and so on, then ``<answer>...</answer>``.
    """

    truth: Literal["answer", "solution"] = "answer"
    """What the critic knows: the right answer, or the whole reference."""
    form: Form = "verbatim_prefix"
    """The critique as it is, or what the paper compares it with: the wrong step quoted, or right ones left out."""
    template: str = CRITIQUE
    prompt: str = CRITIC
    """Asks the critic: `{question}`, `{truth}`, `{trace}`."""
    writing: Writing | None = field(default_factory=Writing)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.template)
        if self.writing is None:
            raise InputError("a critique context needs somebody who writes it; set its writing")

    def request(self, occasion: Occasion) -> tuple[Message, ...] | None:
        """None where the data says nothing of what is right."""
        task, problem = occasion.task, occasion.rollout.problem
        truth = task.final_answer(problem) if self.truth == "answer" else task.reference(problem)
        if truth is None:
            return None
        slots = {
            "question": task.messages(problem)[-1]["content"],
            "truth": truth,
            "trace": without_thinking(occasion.rollout.text),
        }
        return ({"role": "user", "content": render(self.prompt, slots, "the context's prompt")},)

    def accept(self, occasion: Occasion, text: str) -> tuple[str | None, str]:
        """A corrected copy of the steps, in the form that is asked for."""
        trace = without_thinking(occasion.rollout.text)
        found, reason = accept_critique(without_thinking(text), trace)
        return (None if found is None else formed(found, trace, self.form)), reason

    def ask(self, occasion: Occasion) -> Ask | None:
        """None without a critique."""
        messages = tuple(occasion.task.messages(occasion.rollout.problem))
        return None if occasion.text is None else Ask(messages, self.template, occasion.text)

    def marks(self, text: str, note: str) -> Sequence[tuple[int, int, Region]]:
        """Where the rollout is right, where it first goes wrong, and what follows (of ``verbatim_prefix`` only)."""
        return regions(text, note) if self.form == "verbatim_prefix" else []


@dataclass(frozen=True, kw_only=True)
class Feedback(Sibling):
    """A peer's words on this very rollout, beside a successful attempt (OPCoD, arXiv 2606.14368, Sec. 3.3, App. C).

    Either may be missing; a rollout with neither is left out. Without a writer it is what `sibling` is.
    """

    template: str = TUTORED
    solution: str = SOLUTION
    """What the successful attempt stands in, as a part of the hint."""
    comment: str = COMMENT
    """What the feedback stands in, behind it."""
    prompt: str = COMMENTATOR
    """Asks the peer: `{question}`, `{response}`, `{tutor}` and `{student}` (their domains)."""
    tutor: str = ""
    student: str = ""
    anchored: bool = True
    """Use only feedback that names a term of the problem, without what gives the answer away (App. C.2)."""
    writing: Writing | None = field(default_factory=Writing)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.solution)
        check_template(self.comment)
        slots = dict.fromkeys(("question", "tutor", "student"), "")
        one, other = (render(self.prompt, {**slots, "response": text}, "the context's prompt") for text in "12")
        if one == other:
            raise InputError("the context's prompt has no {response}; say where the rollout stands")

    def request(self, occasion: Occasion) -> tuple[Message, ...]:
        """The tutor's prompt about one rollout."""
        messages = occasion.task.messages(occasion.rollout.problem)
        slots = {
            "question": messages[-1]["content"],
            "response": without_thinking(occasion.rollout.text),
            "tutor": self.tutor,
            "student": self.student,
        }
        return ({"role": "user", "content": render(self.prompt, slots, "the context's prompt")},)

    def accept(self, occasion: Occasion, text: str) -> tuple[str | None, str]:
        """The feedback without its thinking and, if `anchored`, made safe."""
        text = without_thinking(text).strip()
        if self.anchored:
            problem = occasion.task.messages(occasion.rollout.problem)[-1]["content"]
            return sanitise(text, problem)
        return (text, "kept") if text else (None, "empty")

    def ask(self, occasion: Occasion) -> Ask | None:
        """None where there is neither a success nor feedback."""
        messages, parts = tuple(occasion.task.messages(occasion.rollout.problem)), []
        for template, text in ((self.solution, self.success(occasion)), (self.comment, occasion.text)):
            if text is not None:
                parts.append(render(template, {"question": "", "hint": text}, "the context's template"))
        return Ask(messages, self.template, "".join(parts)) if parts else None
