"""Hints that are written by a model: rubrics, critiques and a peer's feedback. The prompts are not those of the
papers."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

from dllm_sd.errors import InputError, shown
from dllm_sd.randomness import make_key
from dllm_sd.tasks.datafile import fields_of, render
from dllm_sd.tasks.task import Problem, Task
from dllm_sd.teachers.context import HintInputs, TeacherPrompt
from dllm_sd.teachers.hints import Prompt, Sibling, check_slots, check_template, of_another
from dllm_sd.teachers.writing import Message, Writing
from dllm_sd.texts import (
    FORMS,
    Criteria,
    Form,
    accept_critique,
    generic,
    is_unfinished,
    noisy,
    parse_rubric,
    reduced,
    regions,
    render_rubric,
)
from dllm_sd.texts.critique import CRITIC_ANSWER, CRITIC_REFERENCE, CRITIQUE_TEACHER
from dllm_sd.texts.feedback import FEEDBACK, sanitise
from dllm_sd.texts.rubric import RUBRIC_TEACHER, RUBRIC_WRITER_PLAIN
from dllm_sd.texts.thinking import without_thinking

TUTORED = """\
{question}
{hint}

Now write your solution."""

SOLUTION = """

A right solution:
{hint}"""

COMMENT = """

A reviewer's advice:
{hint}"""


Source = Literal["data", "written", "generic", "random", "noisy", "reduced"]


@dataclass(frozen=True, kw_only=True)
class Rubric(Prompt):
    """Criteria for a good solution in the prompt (RCSD, arXiv 2606.19327, Eq. 5), and its degraded variants (Table 6).

    Rubrics of the data are in the problem's field `field`; the degraded variants are made from them."""

    source: Source = "written"
    """Where the rubric comes from: `data`, the problem's field; `written`, a writer; `generic`, one rubric for all
    questions; `random`, another problem's; `noisy`, half of the own and half of another's; `reduced`, half of the
    own."""
    field: str = "rubric"
    """The field of the problem: a list, or a JSON text."""
    reference: bool = False
    """Whether the prompt also holds the reference answer (as in the released code)."""
    lines: bool = False
    """One criterion a line instead of JSON."""
    template: str = RUBRIC_TEACHER
    """Template of the teacher's prompt; `{question}` is the student's prompt, `{hint}` the rubric; with `reference`
    also `{reference}`."""
    prompt: str = RUBRIC_WRITER_PLAIN
    """The writer's prompt: `{question}`, and optionally `{reference}`. Set it to the `task.prompt` of Stage I, with
    which the writer was trained; the defaults of both are the same."""
    question: str | None = None
    """The question as the writer reads it, a template over the problem's fields such as `{question}` (the paper's bare
    question); None takes the whole prompt, with the task's instructions."""
    writing: Writing | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    per_problem = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.template, *(["reference"] if self.reference else []))
        if self.reference:
            check_slots(self.template, "template", "reference", "question", "hint")
        check_slots(self.prompt, "prompt", "question", "reference")
        if (self.source == "written") != (self.writing is not None):
            raise InputError("a rubric context is written by somebody: set source to written and writing, or neither")

    @property
    def writer_prompt(self) -> str:
        """`prompt`: Stage I of RCSD trains its writer on it."""
        return self.prompt

    @property
    def needs_reference(self) -> Literal["solution"] | None:
        """The solution, if the prompt of the teacher or of the writer shows it."""
        asked = self.source == "written" and "reference" in fields_of(self.prompt)
        return "solution" if self.reference or asked else None

    def lacks(self, task: Task, problem: Problem, key: str) -> str | None:
        """Also a rubric in `field`, unless it is written or the same for all."""
        if self.source in ("written", "generic") or self._of(problem) is not None:
            return super().lacks(task, problem, key)
        reason = parse_rubric(problem.fields[self.field]) if self.field in problem.fields else "there is no such field"
        reason = str(reason).replace("_", " ")
        return (
            f"needs a rubric of each problem in the field {shown(self.field)}, but the task's data has none there "
            f"({reason}); set {key}.field to the field that holds them, or {key}.source to written, with a writer"
        )

    def request(self, inputs: HintInputs) -> tuple[Message, ...] | None:
        """The same for all rollouts of a problem, so that it is written once."""
        task, problem = inputs.task, inputs.rollout.problem
        question = inputs.question
        if self.question is not None:
            question = render(self.question, problem.fields, f"the context's question (for {problem.id})")
        slots = {"question": question, "reference": task.reference(problem) or ""}
        return ({"role": "user", "content": render(self.prompt, slots, "the context's prompt")},)

    def accept(self, inputs: HintInputs, text: str) -> tuple[str | None, str]:
        """The rubric in the text, rendered in one format; with `lines` the text as it is."""
        if self.lines:
            text = without_thinking(text).strip()
            return (text, "kept") if text else (None, "empty")
        rubric = parse_rubric(text)
        if isinstance(rubric, str):
            return None, "unfinished" if is_unfinished(text) else rubric
        return render_rubric(rubric), "kept"

    def prompt_for(self, inputs: HintInputs) -> TeacherPrompt | None:
        """None where there is no usable rubric, or no reference although `reference` asks for it."""
        task, problem = inputs.task, inputs.rollout.problem
        text, reference = self._text(inputs), task.reference(problem)
        if text is None or (self.reference and reference is None):
            return None
        more = {"reference": reference or ""} if self.reference else {}
        return TeacherPrompt(inputs.messages, self.template, text, more)

    def _text(self, inputs: HintInputs) -> str | None:
        if self.source == "written":
            return inputs.text
        key = make_key(inputs.key, "rubric")
        rubric = generic() if self.source == "generic" else self._of(inputs.rollout.problem)
        if self.source in ("random", "noisy"):
            other = of_another(inputs, key, self._of)
            mixed = noisy(rubric, [other], key) if rubric and other else None
            rubric = other if self.source == "random" else mixed
        if self.source == "reduced" and rubric:
            rubric = reduced(rubric, key)
        if rubric is None:
            return None
        return (
            "\n".join(criterion.description for criterion in rubric.criteria) if self.lines else render_rubric(rubric)
        )

    def _of(self, problem: Problem) -> Criteria | None:
        rubric = parse_rubric(problem.fields.get(self.field))
        return None if isinstance(rubric, str) else rubric


@dataclass(frozen=True, kw_only=True)
class Critique(Prompt):
    """A critique in the prompt: the rollout itself, corrected from its first wrong step on (arXiv 2606.11173).

    The task's prompt must ask for tagged steps: ``<step_1>...</step_1>`` and so on, then ``<answer>...</answer>``.
    """

    truth: Literal["answer", "solution"] = "answer"
    """What the critic is given: the correct answer, or the whole reference."""
    form: Form = "verbatim_prefix"
    """The critique as it is, or an ablation of the paper: with the wrong step quoted, or without the correct steps."""
    template: str = CRITIQUE_TEACHER
    """Template of the teacher's prompt; `{question}` is the student's prompt, `{hint}` the hint."""
    prompt: str | None = None
    """The critic's prompt: `{question}`, `{truth}`, `{trace}`; None takes one that fits the `truth`."""
    writing: Writing | None = field(default_factory=Writing)  # pyright: ignore[reportIncompatibleVariableOverride]
    marks_regions = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.template)
        if self.prompt is not None:
            check_slots(self.prompt, "prompt", "trace", "question", "truth")
        if self.writing is None:
            raise InputError("a critique context needs somebody who writes it; set its writing")

    @property
    def needs_reference(self) -> Literal["solution", "answer"]:
        """`truth`."""
        return self.truth

    def request(self, inputs: HintInputs) -> tuple[Message, ...] | None:
        """None where the data has no such answer or reference."""
        task, problem = inputs.task, inputs.rollout.problem
        truth = task.final_answer(problem) if self.truth == "answer" else task.reference(problem)
        if truth is None:
            return None
        slots = {
            "question": inputs.question,
            "truth": truth,
            "trace": without_thinking(inputs.rollout.text),
        }
        prompt = self.prompt or (CRITIC_ANSWER if self.truth == "answer" else CRITIC_REFERENCE)
        return ({"role": "user", "content": render(prompt, slots, "the context's prompt")},)

    def accept(self, inputs: HintInputs, text: str) -> tuple[str | None, str]:
        """A corrected copy of the steps, in `form`."""
        trace = without_thinking(inputs.rollout.text)
        critique, reason = accept_critique(without_thinking(text), trace)
        return (None if critique is None else FORMS[self.form](trace, critique)), reason

    def prompt_for(self, inputs: HintInputs) -> TeacherPrompt | None:
        """None without a critique."""
        return None if inputs.text is None else TeacherPrompt(inputs.messages, self.template, inputs.text)

    def marks(self, text: str, note: str) -> Sequence[tuple[int, int, str]]:
        """The spans before the first wrong step, of that step, and after it."""
        return regions(text, note)


@dataclass(frozen=True, kw_only=True)
class Feedback(Sibling):
    """A peer's feedback on this rollout and a successful attempt (OPCoD, arXiv 2606.14368, Sec. 3.3, App. C).

    Either may be missing; a rollout with neither is left out. Without a writer it shows a successful attempt alone, as
    `sibling` does.
    """

    template: str = TUTORED
    """Template of the teacher's prompt; `{question}` is the student's prompt, `{hint}` the hint."""
    solution: str = SOLUTION
    """Template of the part of the hint that holds the successful attempt."""
    comment: str = COMMENT
    """Template of the part that holds the feedback, after it."""
    prompt: str = FEEDBACK
    """The peer's prompt: `{question}`, `{response}`, and the domains `{tutor_domain}`, `{student_domain}`."""
    tutor: str = ""
    """The tutor's domain."""
    student: str = ""
    """The student's domain."""
    anchored: bool = True
    """Use only feedback that names a term of the problem, and remove what gives the answer away (App. C.2)."""
    writing: Writing | None = field(default_factory=Writing)  # pyright: ignore[reportIncompatibleVariableOverride]
    by_peer = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.solution)
        check_template(self.comment)
        check_slots(self.prompt, "prompt", "response", "question", "tutor_domain", "student_domain")

    def tutored(self, tutor: str, student: str, writing: Writing | None) -> Self:
        """A copy for a tutor and a student of these domains, with the tutor's ``writing``."""
        return replace(self, tutor=tutor, student=student, writing=writing)

    def request(self, inputs: HintInputs) -> tuple[Message, ...]:
        """The tutor's prompt about one rollout."""
        slots = {
            "question": inputs.question,
            "response": without_thinking(inputs.rollout.text),
            "tutor_domain": self.tutor,
            "student_domain": self.student,
        }
        return ({"role": "user", "content": render(self.prompt, slots, "the context's prompt")},)

    def accept(self, inputs: HintInputs, text: str) -> tuple[str | None, str]:
        """The feedback without its thinking and, if `anchored`, without what gives the answer away."""
        text = without_thinking(text).strip()
        if self.anchored:
            return sanitise(text, inputs.question, inputs.task.final_answer(inputs.rollout.problem))
        return (text, "kept") if text else (None, "empty")

    def prompt_for(self, inputs: HintInputs) -> TeacherPrompt | None:
        """None where there is neither a success nor feedback."""
        parts = []
        for template, text in ((self.solution, self.success(inputs)), (self.comment, inputs.text)):
            if text is not None:
                parts.append(render(template, {"question": "", "hint": text}, "the context's template"))
        return TeacherPrompt(inputs.messages, self.template, "".join(parts)) if parts else None
