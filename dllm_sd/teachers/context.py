"""What a teacher sees beyond the student: the protocol of a context, and the context that adds nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dllm_sd.canvases import Canvases
from dllm_sd.trajectory import Trajectory


@dataclass(frozen=True)
class Scene:
    """All that a context may look at when it turns the student's canvases into what the teacher reads."""

    canvases: Canvases
    trajectory: Trajectory
    protected: Tensor
    """bool ``[n l]``: graded sites, which no teacher may see revealed."""
    answer: Tensor | None
    """bool ``[b l]``: tokens of the parsed final answer; None unless a context asks for it."""
    keys: Sequence[int]
    """One key a rollout, for random choices."""


@dataclass(frozen=True)
class Reading:
    """What a teacher reads: its last ``l`` columns are the completion side, aligned with the student's."""

    ids: Tensor
    """int64 ``[n s]``; prompts may be longer or shorter than the student's."""
    mask: Tensor
    """bool ``[n s]``."""
    shown: Tensor
    """bool ``[n l]``: positions masked for the student and revealed here."""


class Context(Protocol):
    """A teacher's extra knowledge."""

    needs_steps: ClassVar[bool]
    """Whether it needs canvases that the decoder really saw."""
    needs_answer_span: bool
    """Whether it needs `Scene.answer`."""
    shows_later_blocks: bool
    """Whether what it reveals may stand behind the active block, where a block-causal model cannot look."""

    def __call__(self, scene: Scene) -> Reading:
        """The teacher's reading of every canvas."""
        ...


@dataclass(frozen=True)
class Nothing:
    """The student's own canvas: a teacher that differs in its weights at most."""

    needs_steps: ClassVar[bool] = False
    needs_answer_span: ClassVar[bool] = False
    shows_later_blocks: ClassVar[bool] = False

    def __call__(self, scene: Scene) -> Reading:
        return show(scene.canvases, torch.zeros_like(scene.protected))


def show(canvases: Canvases, positions: Tensor) -> Reading:
    """Reveal the rollout's own final tokens at ``positions``, bool ``[n l]``."""
    length = positions.shape[1]
    ids = canvases.ids.clone()
    ids[:, -length:] = torch.where(positions, canvases.tokens, ids[:, -length:])
    return Reading(ids, canvases.mask, positions)
