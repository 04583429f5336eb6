"""Contexts: a teacher's privileged information. The protocol, and the context that adds nothing.

A context may change two things: the canvas (positions revealed, `suffix.py`) and the prompt (`hints.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from dllm_sd.canvases import Canvases
from dllm_sd.losses.sites import Covers
from dllm_sd.parts import Part
from dllm_sd.ranges import Positive, Ranged, Size, Temperature
from dllm_sd.rollouts.rollout import Rollout
from dllm_sd.skills.retrieval import SkillPair
from dllm_sd.tasks.task import Problem, Task
from dllm_sd.teachers.writing import Message, Writing
from dllm_sd.trajectory import Trajectory


@dataclass(frozen=True)
class ContextInputs:
    """What a context is computed from when it turns the student's canvases into the teacher's inputs."""

    canvases: Canvases
    trajectory: Trajectory
    protected: Tensor
    """bool ``[n l]``: graded sites, which no teacher may see revealed."""
    answer: Tensor | None
    """bool ``[b l]``: tokens of the parsed final answer; None unless a context asks for it."""
    keys: Sequence[int]
    """One key a rollout, for random choices."""
    prompt: tuple[Tensor, Tensor] | None = None
    """This teacher's own prompts, ids int64 and mask bool ``[b p]``; None for the student's prompt."""


@dataclass(frozen=True)
class TeacherInputs:
    """The inputs of a teacher: the last ``l`` columns are the completion, aligned with the student's."""

    ids: Tensor
    """int64 ``[n s]``; prompts may be longer or shorter than the student's."""
    mask: Tensor
    """bool ``[n s]``."""
    shown: Tensor
    """bool ``[n l]``: positions masked for the student and revealed here."""


@dataclass(frozen=True)
class Reasoning(Ranged):
    """The teacher writes an analysis first, which is put at the start of its turn, before the completion."""

    instruction: str = (
        "Do not solve the problem yet. In a few sentences, say what the material above shows: what is asked, what a "
        "solution must respect, and which ideas lead to the answer. The material may contain mistakes."
    )
    """The instruction that follows the hint in the prompt of the analysis."""
    transition: str = "\n\nNow I solve the problem on my own, step by step, and mention no such material.\n\n"
    """Text between the analysis and the completion."""
    length: Size = 1024
    """Longest analysis in tokens (of a denoiser, the length of its canvas)."""
    temperature: Temperature = 1.0
    """Sampling temperature of the analysis; 0 is greedy."""


def no_pairs(problem: Problem, key: int) -> Sequence[SkillPair]:
    """The default of `HintInputs.pairs`: without a skill bank there are none."""
    return ()


@dataclass(frozen=True)
class HintInputs:
    """What a hint is computed from when it makes a teacher's prompt for one rollout."""

    rollout: Rollout
    """The rollout that the teacher will grade."""
    group: Sequence[Rollout]
    """All attempts at this occurrence of the problem, in order."""
    task: Task
    """Builds the student's messages."""
    key: int
    """Key of this occurrence of the problem, for random choices."""
    problems: Sequence[Problem] = ()
    """The training problems, for hints that are taken from other problems."""
    pairs: Callable[[Problem, int], Sequence[SkillPair]] = no_pairs
    """``pairs(problem, key)``: the pairs of the run's skill bank for it, best first."""
    text: str | None = None
    """What the hint's writer wrote and the hint accepted; None where there is no writer, or nothing was accepted."""

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        """The student's messages."""
        return tuple(self.task.messages(self.rollout.problem))

    @property
    def question(self) -> str:
        """Content of the last of these messages."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class TeacherPrompt:
    """A teacher's prompt as text."""

    messages: tuple[dict[str, str], ...]
    """The task's own messages, with or without the question."""
    template: str
    """Takes the place of the last message's content; `{question}` is that content and `{hint}` the `text`."""
    text: str
    more: Mapping[str, str] = field(default_factory=dict)
    """Other slots of the template, by name."""
    weight: float = 1.0
    """Weight of this teacher relative to the others, for this rollout."""


class Hint(Part, Protocol):
    """Protocol of a hint: makes a teacher's prompt from a problem and its rollouts."""

    @property
    def thinking(self) -> bool | None:
        """The chat template's thinking switch for this teacher; None as for the student."""
        ...

    @property
    def reasoning(self) -> Reasoning | None:
        """Whether the teacher writes an analysis first."""
        ...

    @property
    def longest(self) -> int:
        """Longest prompt of the teacher in tokens, not counting an analysis."""
        ...

    @property
    def overflow(self) -> Literal["drop", "cut"]:
        """What happens to a longer one: the rollout is dropped and counted, or the hint is cut at its end."""
        ...

    @property
    def needs_group(self) -> bool:
        """Whether it needs the other rollouts of a problem."""
        ...

    @property
    def needs_outcome(self) -> bool:
        """Whether it needs to know which rollouts are correct."""
        ...

    @property
    def writing(self) -> Writing | None:
        """The writer of a text for each rollout, and its settings; None for hints without a writer."""
        ...

    @property
    def per_problem(self) -> bool:
        """Whether all rollouts of a problem share one text, in all updates."""
        ...

    @property
    def writer_prompt(self) -> str | None:
        """The prompt template of a writer that is trained for this hint; None where writers are not trained."""
        ...

    @property
    def skill_rank(self) -> int | None:
        """Rank of the pair of the skill bank that it shows, from 0; None if it shows none."""
        ...

    @property
    def needs_reference(self) -> Literal["solution", "answer"] | None:
        """The part of the data's reference that it needs: the worked solution or the final answer; None for neither."""
        ...

    @property
    def wording(self) -> str | None:
        """The template of the teacher's prompt where other settings may choose it; None where `template` alone does."""
        ...

    def lacks(self, task: Task, problem: Problem, key: str) -> str | None:
        """A clause on what the hint at config ``key`` needs and a problem does not have, and the remedy; None if all is
        there."""
        ...

    @property
    def marks_regions(self) -> bool:
        """Whether `marks` returns any spans."""
        ...

    def marks(self, text: str, note: str) -> Sequence[tuple[int, int, str]]:
        """Spans ``(start, end, label)`` of a rollout's ``text``, in characters, which its hint ``note`` labels."""
        ...

    def request(self, inputs: HintInputs) -> tuple[Message, ...] | None:
        """The chat messages for the writer; None if there is no request."""
        ...

    def accept(self, inputs: HintInputs, text: str) -> tuple[str | None, str]:
        """The part of a written text that is used, or None, and the reason under which it is counted."""
        ...

    def prompt_for(self, inputs: HintInputs) -> TeacherPrompt | None:
        """The prompt for one rollout, None if there is no hint."""
        ...


class Context(Part, Protocol):
    """Protocol of a context: a teacher's privileged information; `ContextDefaults` implements all but `same_view` and
    the call."""

    @property
    def weight(self) -> float:
        """Weight of its target in the loss; other than 1 only where each context is a target of its own."""
        ...

    @property
    def needs_answer_span(self) -> bool:
        """Whether it needs `ContextInputs.answer`."""
        ...

    @property
    def shows_later_blocks(self) -> bool:
        """Whether it may reveal blocks after the active one, to which a block-causal model cannot attend."""
        ...

    @property
    def needs_steps(self) -> bool:
        """Whether it needs the canvases of decoding steps."""
        ...

    @property
    def reveals(self) -> bool:
        """Whether it reveals positions on the canvas, to which an autoregressive model cannot attend."""
        ...

    @property
    def reveals_whole_block(self) -> bool:
        """Whether it reveals all of the active block, so that the teacher can choose no site there."""
        ...

    @property
    def by_peer(self) -> bool:
        """Whether it shows a peer's feedback on the rollout, so that two students can teach each other."""
        ...

    @property
    def hint(self) -> Hint | None:
        """The hint that makes this teacher's prompt; None where it reads the student's."""
        ...

    def same_view(self, covers: Covers) -> bool:
        """Whether the teacher reads exactly the student's input (end padding aside) where the sites cover ``covers`` of
        each canvas."""
        ...

    def tutored(self, tutor: str, student: str, writing: Writing | None) -> "Context":
        """A copy for a tutor and a student of these domains, with the tutor's ``writing``."""
        ...

    def __call__(self, inputs: ContextInputs) -> TeacherInputs:
        """The teacher's inputs for every canvas."""
        ...


class ContextDefaults:
    """Defaults of a context of weight 1 that reveals nothing and has no hint."""

    weight: float = 1.0
    needs_steps: bool = False
    reveals: bool = False
    by_peer: bool = False

    @property
    def needs_answer_span(self) -> bool:
        """False."""
        return False

    @property
    def shows_later_blocks(self) -> bool:
        """False."""
        return False

    @property
    def reveals_whole_block(self) -> bool:
        """False."""
        return False

    @property
    def hint(self) -> Hint | None:
        """None: the teacher reads the student's prompt."""
        return None

    def tutored(self, tutor: str, student: str, writing: Writing | None) -> Self:
        """Itself: no peer writes."""
        return self


@dataclass(frozen=True)
class Nothing(Ranged, ContextDefaults, key="method.contexts"):
    """The student's own canvas: the teacher can differ from the student only in its weights.

    Beside an informed teacher, with target `each` and teacher `base`, it holds the student near the initial weights, as
    a KL penalty to the reference policy does (`beta` in TRL): the loss is the divergence to the informed teacher plus
    ``weight`` times that to the initial model, both by the divergence of the method.
    """

    weight: Positive = 1.0
    """Weight of this teacher in the loss, relative to the others."""

    def same_view(self, covers: Covers) -> bool:
        """Always true."""
        return True

    def __call__(self, inputs: ContextInputs) -> TeacherInputs:
        return show(inputs, torch.zeros_like(inputs.protected))


def show(inputs: ContextInputs, positions: Tensor) -> TeacherInputs:
    """The student's canvases after this teacher's prompts, with the final tokens revealed at ``positions [n l]``."""
    canvases, length = inputs.canvases, positions.shape[1]
    ids, mask = canvases.ids.clone(), canvases.mask
    ids[:, -length:] = torch.where(positions, canvases.tokens, ids[:, -length:])
    if inputs.prompt is not None:
        prompt_ids, prompt_mask = (x.to(ids.device)[canvases.rows] for x in inputs.prompt)
        ids, mask = torch.cat([prompt_ids, ids[:, -length:]], 1), torch.cat([prompt_mask, mask[:, -length:]], 1)
    return TeacherInputs(ids, mask, positions)
