"""Where a rollout first departs from the reference, and where its first wrong step is.

Axes: ``b`` rollouts, ``l`` completion positions, ``m`` sites.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dllm_sd.policies.policy import Policy, offsets
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.tasks.task import LocatesMistakes, Task
from dllm_sd.teachers.context import Context
from dllm_sd.trajectory import NEVER

Position = Literal["before", "at", "after"]
PLACES: tuple[Position, ...] = ("before", "at", "after")
"""Of a site, relative to the first deviation of its rollout, in the order of decoding."""
UNKNOWN = -1
_NONE = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Deviations:
    """The references of the rollouts, and where these leave them."""

    reference: Tensor
    """int64 ``[b l]``: the token of the data's reference at each position, `NEVER` where there is none."""
    wrong: Tensor
    """bool ``[b l]``: written tokens that are not those of the reference."""
    order: Tensor
    """int64 ``[b l]``: the step that committed each token."""
    first: Tensor
    """int64 ``[b]``: the step of the first wrong token; the largest number where the rollout is the reference."""
    wrong_step: Tensor
    """bool ``[b l]``: tokens of the first wrong step, as the hint or the task locates it; else all false."""
    causal: bool

    def place(self, rows: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
        """Index in `PLACES` of each site, int64 ``[m]``; `UNKNOWN` where the problem has no reference.

        Args:
            rows: int64 ``[m]``, the rollout.
            steps: int64 ``[m]``, the decoding step of the canvas, -1 where no decoder saw it.
            positions: int64 ``[m]``.

        A canvas of a denoiser is from before the first deviation up to the step that makes it; of this step, the sites
        that depart are ``at`` it. Canvases that no decoder saw are ordered by the step that committed the site.
        """
        committed = self.order[rows, positions]
        step = committed if self.causal else torch.where(steps == NEVER, committed, steps)
        first, wrong = self.first[rows], self.wrong[rows, positions]
        place = torch.where(step > first, 2, torch.where((step == first) & wrong, 1, 0))
        return place.masked_fill(~(self.reference[rows] != NEVER).any(1), UNKNOWN)


def find_deviations(policy: Policy, task: Task, contexts: Sequence[Context], rollouts: Rollouts) -> Deviations:
    """Compare the kept rollouts with the references of their problems, token by token."""
    trajectory = rollouts.trajectory
    reference = torch.full_like(trajectory.tokens, NEVER)
    wrong_step = torch.zeros_like(trajectory.tokens, dtype=torch.bool)
    for row, rollout in enumerate(rollouts.kept):
        if (text := task.reference(rollout.problem)) is not None:
            tokens = policy.encode_completion(text)[: reference.shape[1]]
            reference[row, : len(tokens)] = torch.tensor(tokens)
        for start, end in _wrong_spans(task, contexts, rollout):
            wrong_step[row] |= _tokens_of(policy, rollout, start, end)
    known = (reference != NEVER).any(1, keepdim=True)
    wrong = trajectory.is_written & (trajectory.tokens != reference) & known
    order = trajectory.reveal_step
    first = order.masked_fill(~wrong, _NONE).amin(1)
    return Deviations(reference, wrong, order, first, wrong_step, trajectory.causal)


def _wrong_spans(task: Task, contexts: Sequence[Context], rollout: Rollout) -> list[tuple[int, int]]:
    """The first wrong step of a wrong rollout, in characters: from the first context's hint, else from the task."""
    hint = contexts[0].hint if contexts else None
    if rollout.grade.correct:
        return []
    if hint is not None and hint.marks_regions:
        note = (rollout.briefs[0].text if rollout.briefs else None) or ""
        return [(start, end) for start, end, region in hint.marks(rollout.text, note) if region == "error"]
    span = task.first_mistake(rollout.problem, rollout.text) if isinstance(task, LocatesMistakes) else None
    return [] if span is None else [span]


def _tokens_of(policy: Policy, rollout: Rollout, start: int, end: int) -> Tensor:
    """bool ``[l]``: the tokens that begin within these characters of the rollout's text."""
    trajectory = rollout.trajectory
    found = torch.zeros(trajectory.tokens.shape[1], dtype=torch.bool)
    tokens = trajectory.tokens[0, : int(trajectory.length)].tolist()
    for position, begin in enumerate(offsets(policy, tokens)[:-1]):
        found[position] = start <= begin < end
    return found
