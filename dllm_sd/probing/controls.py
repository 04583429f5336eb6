"""Controls of a teacher: the same hint of another problem, and the hint without the question.

A control is the teacher's context with one thing exchanged, so that a difference can have one cause only. Both work for
any hint, and for positions that are revealed on the canvas.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.teachers import NoQuestion
from dllm_sd.teachers.context import Context, ContextInputs, Hint, HintInputs, TeacherInputs, TeacherPrompt

ControlKind = Literal["own", "another", "no_question"]
"""The teacher itself; with the hint, or the revealed tokens, of another problem; without the question."""

Name = tuple[str, int, int]


@dataclass(frozen=True)
class Donors:
    """From which rollout of another problem each rollout takes its hint and its revealed tokens."""

    rollout: Mapping[Name, Rollout]
    """By the name of a rollout; the donor has its briefs."""
    tokens: Mapping[int, Tensor]
    """int64 ``[l]``: the donor's completion, by the key of a rollout."""
    context: int
    """The context whose hint is exchanged."""

    def text(self, rollout: Rollout) -> str | None:
        """The hint of the donor."""
        donor = self.rollout.get(name_of_rollout(rollout))
        return donor.briefs[self.context].text if donor is not None and donor.briefs else None


def name_of_rollout(rollout: Rollout) -> Name:
    """Unique among the rollouts of a batch."""
    return rollout.problem.id, rollout.occurrence, rollout.attempt


def find_donors(rollouts: Rollouts, keys: Sequence[int], context: int) -> Donors:
    """For each kept rollout the next one of another problem; rollouts of a single problem have none."""
    kept, found, tokens = rollouts.kept, dict[Name, Rollout](), dict[int, Tensor]()
    canvas = rollouts.trajectory.tokens
    for row, rollout in enumerate(kept):
        order = (*range(row + 1, len(kept)), *range(row))
        other = next((i for i in order if kept[i].problem.id != rollout.problem.id), None)
        if other is not None:
            found[name_of_rollout(rollout)], tokens[keys[row]] = kept[other], canvas[other]
    return Donors(found, tokens, context)


class ControlHint:
    """A hint with one thing exchanged; everything else is that of ``hint``."""

    skill_rank = None

    def __init__(self, hint: Hint, kind: ControlKind, donors: Donors) -> None:
        self.inner, self.kind, self.donors = hint, kind, donors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def prompt_for(self, inputs: HintInputs) -> TeacherPrompt | None:
        """The prompt of the hint, with another's text or without the question; None where there is no other hint."""
        prompt = self.inner.prompt_for(inputs)
        if prompt is None or self.kind == "own":
            return prompt
        problem = inputs.rollout.problem
        if self.kind == "no_question":
            return replace(prompt, messages=tuple(inputs.task.messages(problem, question=False)))
        text = self.donors.text(inputs.rollout)
        if text is None:
            return None
        other = self.inner.prompt_for(replace(inputs, rollout=self.donors.rollout[name_of_rollout(inputs.rollout)]))
        return replace(prompt, text=text, more=prompt.more if other is None else other.more)


class ControlContext:
    """A context with one thing exchanged; everything else is that of ``context``."""

    def __init__(self, context: Context, hint: Hint | None, kind: ControlKind, donors: Donors) -> None:
        self.inner, self.hint, self.kind, self.donors = context, hint, kind, donors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, inputs: ContextInputs) -> TeacherInputs:
        """The teacher's inputs, in which another rollout's tokens may stand where this one's are revealed."""
        if self.kind == "another" and self.inner.reveals:
            own, tokens = inputs.canvases.tokens, self.donors.tokens
            rows = [tokens[key] for key in inputs.keys]
            inputs = replace(inputs, canvases=replace(inputs.canvases, tokens=torch.stack(rows)[inputs.canvases.rows]))
            assert inputs.canvases.tokens.shape == own.shape
        return self.inner(inputs)


def control(context: Context, kind: ControlKind, donors: Donors) -> Any:
    """The context with one thing exchanged (`ControlKind`)."""
    hint: Any = context.hint
    if hint is None and kind == "no_question":
        hint = NoQuestion()
    elif hint is not None:
        hint = ControlHint(hint, kind, donors)
    changed: Any = context if context.hint is context else replace(context, prompt=hint)  # pyright: ignore
    return ControlContext(changed, hint, kind, donors)


def kinds_for(context: Context, rows: Donors, reads_prompt: bool) -> tuple[ControlKind, ...]:
    """The controls that have a meaning for a context.

    Args:
        context: of the teacher.
        rows: donors; without any there is no other problem.
        reads_prompt: whether the teacher may have a prompt of another length than the student's.
    """
    if context.hint is None and not context.reveals:
        return ("own",)
    kinds: tuple[ControlKind, ...] = ("own", "another") if rows.rollout else ("own",)
    return (*kinds, "no_question") if reads_prompt else kinds
