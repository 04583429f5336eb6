"""Suffix-conditioned self-teachers: part of the rollout's final tokens is revealed on the teacher's canvas."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dllm_sd.errors import InputError
from dllm_sd.losses.sites import Covers, rank_descending
from dllm_sd.policies.policy import Policy, offsets
from dllm_sd.randomness import fold, key_tensor, make_key, uniform
from dllm_sd.ranges import Natural, Ranged, Share
from dllm_sd.rollouts.rollout import Rollout
from dllm_sd.teachers.context import Context, ContextDefaults, ContextInputs, Hint, TeacherInputs, show
from dllm_sd.teachers.table import HINTS
from dllm_sd.trajectory import NEVER


@dataclass(frozen=True)
class Suffix(Ranged, ContextDefaults):
    """Reveal a share of the positions still masked, with the rollout's final tokens (arXiv 2606.18195, Eq. 8).

    Graded sites are never revealed. The paper draws from all masked positions, the released code from later blocks.
    """

    scope: Literal["later_blocks", "all_masked", "active_block"] = "later_blocks"
    """Which positions may be revealed: the blocks after the active one, all masked positions, or the rest of the active
    block."""
    ratio: Share = 0.25
    """Share of the positions in scope; ``floor(ratio * count)`` are revealed."""
    end_padding: bool = True
    """Whether the padding behind the end token may be revealed too."""
    nested: bool = False
    """True draws one set of positions for the whole trajectory, of which each step reveals those that are still masked;
    False draws a new set at each step."""
    answer_only: bool = False
    """Reveal tokens of the parsed final answer only."""
    stop_at_end: bool = False
    """Reveal nothing once the scope starts at or behind the end token (a rule of the released code)."""
    prompt: Hint | None = field(default=None, metadata={"parts": HINTS})
    """A hint in the teacher's prompt in addition to the suffix, or `no_question` for the suffix without the
    question."""
    needs_steps = True
    reveals = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop_at_end and self.scope != "later_blocks":
            raise InputError("stop_at_end is a rule of scope later_blocks; set it to false for other scopes")

    @property
    def hint(self) -> Hint | None:
        """The hint that makes the teacher's prompt."""
        return self.prompt

    @property
    def needs_answer_span(self) -> bool:
        """True for `answer_only`."""
        return self.answer_only

    @property
    def shows_later_blocks(self) -> bool:
        """False for the scope ``active_block``."""
        return self.scope != "active_block"

    @property
    def reveals_whole_block(self) -> bool:
        """True where the scope holds the active block and is revealed completely."""
        return self.scope != "later_blocks" and self.ratio == 1

    def same_view(self, covers: Covers) -> bool:
        """True without a hint where no position is left to reveal."""
        nothing_left = covers == "masked" or (covers == "block" and self.scope == "active_block")
        return self.prompt is None and (self.ratio == 0 or nothing_left)

    def __call__(self, inputs: ContextInputs) -> TeacherInputs:
        return show(inputs, self.positions(inputs))

    def positions(self, inputs: ContextInputs) -> Tensor:
        """bool ``[n l]``: the positions that are revealed to this teacher."""
        trajectory, rows, steps = inputs.trajectory, inputs.canvases.rows, inputs.canvases.steps
        position = torch.arange(trajectory.tokens.shape[1], device=rows.device)
        eligible = self._eligible(inputs, position)
        keys = key_tensor([make_key(key, "suffix") for key in inputs.keys], rows.device)
        scope = self._scope(inputs, position)
        if self.nested:
            chosen = _draw(eligible, uniform(keys, position.numel()), self.ratio)[rows]
            return chosen & scope & ~inputs.protected
        candidates = eligible[rows] & scope & ~inputs.protected
        return _draw(candidates, uniform(fold(keys[rows], steps), position.numel()), self.ratio)

    def _eligible(self, inputs: ContextInputs, position: Tensor) -> Tensor:
        """bool ``[b l]``: the positions that may be revealed at some step."""
        trajectory = inputs.trajectory
        eligible = trajectory.reveal_step != NEVER
        if self.end_padding:
            eligible |= trajectory.ended[:, None] & (position >= trajectory.length[:, None])
        else:
            eligible &= position < trajectory.length[:, None]
        if self.answer_only:
            assert inputs.answer is not None
            eligible &= inputs.answer
        return eligible

    def _scope(self, inputs: ContextInputs, position: Tensor) -> Tensor:
        """bool ``[n l]``: the positions that may be revealed at this step."""
        trajectory, rows, steps = inputs.trajectory, inputs.canvases.rows, inputs.canvases.steps
        masked = trajectory.masked(rows, steps)
        if self.scope == "all_masked":
            return masked
        active = trajectory.active_block(rows, steps)[:, None]
        block = trajectory.block[rows]
        if self.scope == "active_block":
            return masked & (block == active)
        scope = masked & (block > active)
        if self.stop_at_end:
            end = torch.where(trajectory.ended, trajectory.length - 1, position.numel())[rows]
            scope &= (active + 1) * trajectory.block_length < end[:, None]
        return scope


@dataclass(frozen=True)
class LaterStep(Ranged, ContextDefaults):
    """The canvas of a later step of the same trajectory, where graded sites are masked again (after arXiv
    2607.04428)."""

    ahead: Natural | None = 8
    """How many decoding steps later; None shows the finished completion."""
    prompt: Hint | None = field(default=None, metadata={"parts": HINTS})
    """A hint in the teacher's prompt."""
    reveals = True
    needs_steps = True

    @property
    def reveals_whole_block(self) -> bool:
        """True where the finished completion is shown."""
        return self.ahead is None

    @property
    def hint(self) -> Hint | None:
        """The hint that makes the teacher's prompt."""
        return self.prompt

    def same_view(self, covers: Covers) -> bool:
        """True without a hint where the steps in between commit only graded sites."""
        nothing_left = covers == "masked" or self.ahead == 0 or (self.ahead == 1 and covers != "none")
        return self.prompt is None and nothing_left

    def __call__(self, inputs: ContextInputs) -> TeacherInputs:
        canvases, trajectory = inputs.canvases, inputs.trajectory
        later = trajectory.num_steps[canvases.rows] if self.ahead is None else canvases.steps + self.ahead
        shown = canvases.masked & ~trajectory.masked(canvases.rows, later) & ~inputs.protected
        return show(inputs, shown)


def answer_spans(policy: Policy, contexts: Sequence[Context], rollouts: Sequence[Rollout]) -> Tensor | None:
    """bool ``[b l]``: the `answer_span` of each rollout; None if there is no rollout or no context needs it."""
    if not rollouts or not any(context.needs_answer_span for context in contexts):
        return None
    return torch.stack([answer_span(policy, rollout) for rollout in rollouts])


def answer_span(policy: Policy, rollout: Rollout) -> Tensor:
    """bool ``[l]``: the tokens that spell the last occurrence of the rollout's parsed answer; none if it has none."""
    tokens = rollout.trajectory.tokens[0].tolist()
    span = torch.zeros(len(tokens), dtype=torch.bool)
    parsed = rollout.grade.parsed
    start = rollout.text.rfind(parsed) if parsed else -1
    if parsed is None or start < 0:
        return span
    length = int(rollout.trajectory.length)
    ends = offsets(policy, tokens[:length])
    for i in range(length):
        span[i] = ends[i] < start + len(parsed) and ends[i + 1] > start
    return span


def _draw(candidates: Tensor, noise: Tensor, ratio: float) -> Tensor:
    """A uniformly random ``floor(ratio * count)`` of each row's candidates, bool ``[n l]``."""
    # 1e-9 corrects products such as 0.29 * 100 = 28.999999999999996, whose floor would lose a position.
    count = (candidates.sum(1).double() * ratio + 1e-9).floor()
    rank = rank_descending(noise.masked_fill(~candidates, -1.0))
    return candidates & (rank < count[:, None])
