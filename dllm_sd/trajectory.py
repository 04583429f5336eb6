"""Trajectory = tokens + the order in which they were revealed.

Unmasking is monotone, so `tokens` and `reveal_step` describe a decoding completely: the canvas before any step, the
tokens that a step committed, its active block, and every shorter horizon follow from them. No tensor has the shape
``[k l]``. An autoregressive sequence is the case ``reveal_step = 0, 1, 2, ...``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dllm_sd.errors import InputError

NEVER = -1
"""`reveal_step` of a position that the decoder did not reveal, since it stopped early or at the horizon."""

NO_MASK = -1
"""`mask_id` of an autoregressive trajectory; the embedding has no row for it."""

Unit = Literal["blocks", "steps"]


@dataclass(frozen=True)
class StopAfter:
    """Decoding stops after the first ``count`` blocks or steps; both are tokens if the model is autoregressive."""

    unit: Unit
    count: int


@dataclass(frozen=True)
class Trajectory:
    """``b`` completions of ``l`` positions with the step at which each position was committed.

    Length and padding: `length` counts tokens up to and including the first end token, and is ``l`` if there is none. A
    position that was never revealed has `reveal_step` `NEVER` and holds `pad_id`. After the end token it is end
    padding, which every canvas shows masked.
    """

    prompt_ids: Tensor
    """int64 ``[b p]``, padded on the left with `pad_id`."""
    prompt_mask: Tensor
    """bool ``[b p]``, true at real prompt tokens."""
    tokens: Tensor
    """int64 ``[b l]``, the final completion."""
    reveal_step: Tensor
    """int64 ``[b l]``: the step that committed each position; the canvas before that step shows it masked."""
    length: Tensor
    """int64 ``[b]``, tokens up to and including the first end token."""
    block_length: int
    mask_id: int
    end_ids: tuple[int, ...]
    pad_id: int
    blocks_of_prompt: bool = False
    """Whether blocks are counted from the first prompt token, as in block-causal models, where the first block of the
    completion may begin with the end of the prompt; else they are counted from the first completion position."""
    causal: bool = False
    """Whether the model is autoregressive: one forward pass over the sequence then gives the logits of every step, and
    there is no mask token."""
    logp: Tensor | None = None
    """float ``[b l]``: log-probability of each token under the decoder, at the sampling temperature (1 if greedy) and
    before top-k and top-p; NaN at positions without one, None if they were not recorded."""

    @property
    def size(self) -> int:
        """``b``, the number of completions."""
        return self.tokens.shape[0]

    @property
    def num_steps(self) -> Tensor:
        """int64 ``[b]``: decoding steps up to the last one that committed something."""
        return self.reveal_step.amax(1) + 1

    @property
    def written(self) -> Tensor:
        """int64 ``[b]``: revealed tokens up to the end token; fewer than `length` if decoding stopped at a horizon."""
        return self.is_written.sum(1)

    @property
    def is_written(self) -> Tensor:
        """bool ``[b l]``: the tokens that `written` counts."""
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (self.reveal_step != NEVER) & (position < self.length[:, None])

    @property
    def ended(self) -> Tensor:
        """bool ``[b]``: whether the completion holds an end token."""
        last = (self.length - 1).clamp(min=0)[:, None]
        known = self.reveal_step.gather(1, last) != NEVER
        return (is_any_of(self.tokens.gather(1, last), self.end_ids) & known)[:, 0]

    @property
    def is_behind_end(self) -> Tensor:
        """bool ``[b l]``: positions after a revealed end token; some may have been revealed before it."""
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return self.ended[:, None] & (position >= self.length[:, None])

    @property
    def block(self) -> Tensor:
        """int64 ``[b l]``: the block of each position; the completion begins in block 0."""
        return block_index(self.prompt_mask, self.tokens.shape[1], self.block_length, self.blocks_of_prompt)

    def masked(self, rows: Tensor, steps: Tensor) -> Tensor:
        """bool ``[n l]``: positions still masked before step ``steps[n]`` of completion ``rows[n]``."""
        reveal_step = self.reveal_step[rows]
        return (reveal_step == NEVER) | (reveal_step >= steps[:, None])

    def canvas(self, rows: Tensor, steps: Tensor) -> Tensor:
        """int64 ``[n l]``: the completion side of the decoder's canvas before step ``steps[n]``."""
        return self.tokens[rows].masked_fill(self.masked(rows, steps), self.mask_id)

    def revealed(self, rows: Tensor, steps: Tensor) -> Tensor:
        """bool ``[n l]``: positions that step ``steps[n]`` committed."""
        return self.reveal_step[rows] == steps[:, None]

    def active_block(self, rows: Tensor, steps: Tensor) -> Tensor:
        """int64 ``[n]``: index of the block that holds the first masked position (0 if nothing is masked)."""
        first = self.masked(rows, steps).int().argmax(1)
        return self.block[rows].gather(1, first[:, None])[:, 0]

    def within(self, stop_after: StopAfter) -> "Trajectory":
        """The trajectory of a decoder that stops after ``stop_after``: later positions are not revealed."""
        unit_index = self.reveal_step if stop_after.unit == "steps" else self.block
        keep = (self.reveal_step >= 0) & (unit_index < stop_after.count)
        tokens = self.tokens.masked_fill(~keep, self.pad_id)
        length = completion_length(tokens, self.end_ids, keep)
        logp = None if self.logp is None else self.logp.masked_fill(~keep, torch.nan)
        reveal_step = self.reveal_step.masked_fill(~keep, NEVER)
        return replace(self, tokens=tokens, reveal_step=reveal_step, length=length, logp=logp)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name; the first axis of each is ``b``."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def select(self, rows: Tensor) -> "Trajectory":
        """The completions ``rows`` (indices or bool ``[b]``), with prompt padding trimmed to the longest prompt."""
        selected = {name: value[rows] for name, value in self.tensors().items()}
        width = int(selected["prompt_mask"].sum(1).max()) if len(selected["tokens"]) else 0
        start = self.prompt_ids.shape[1] - width
        selected |= {name: selected[name][:, start:] for name in ("prompt_ids", "prompt_mask")}
        return replace(self, **selected)

    def unstack(self) -> list["Trajectory"]:
        """Each completion as a batch of one."""
        return [self.select(torch.tensor([row])) for row in range(self.size)]

    def to(self, device: torch.device | str) -> "Trajectory":
        """All tensors on ``device``."""
        return replace(self, **{name: value.to(device) for name, value in self.tensors().items()})


def block_index(prompt_mask: Tensor, length: int, block_length: int, blocks_of_prompt: bool) -> Tensor:
    """int64 ``[b l]``: `Trajectory.block` of ``length`` completion positions after prompts ``prompt_mask [b p]``."""
    position = torch.arange(length, device=prompt_mask.device).expand(len(prompt_mask), -1)
    if blocks_of_prompt:
        position = position + prompt_mask.sum(1, keepdim=True) % block_length
    return position // block_length


def is_any_of(ids: Tensor, wanted: Sequence[int]) -> Tensor:
    """bool, the shape of ``ids``: whether each id is one of ``wanted``."""
    return torch.isin(ids, torch.tensor(list(wanted), dtype=ids.dtype, device=ids.device))


def completion_length(tokens: Tensor, end_ids: Sequence[int], revealed: Tensor | None = None) -> Tensor:
    """int64 ``[b]``: tokens up to and including the first (revealed) end token of ``tokens [b l]``, else ``l``."""
    is_end = is_any_of(tokens, end_ids)
    if revealed is not None:
        is_end &= revealed
    first = is_end.int().argmax(1) + 1
    return torch.where(is_end.any(1), first, tokens.shape[1])


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts of unequal length as ``(ids int64 [b p], mask bool [b p])``, padded on the left."""
    width = max((len(prompt) for prompt in prompts), default=0)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        if prompt:
            ids[row, -len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
            mask[row, -len(prompt) :] = True
    return ids, mask


def left_to_right(
    prompt: tuple[Tensor, Tensor],
    written: Tensor,
    length: int,
    *,
    end_ids: tuple[int, ...],
    pad_id: int,
    logp: Tensor | None = None,
) -> Trajectory:
    """The trajectory of an autoregressive model, one token a step.

    Args:
        prompt: ids and mask of the prompts (`left_pad`).
        written: int64 ``[b w]``, the tokens; those after the first end token are ignored.
        length: ``l``, at least ``w``.
        end_ids: stop ids.
        pad_id: fills the positions after the tokens.
        logp: float ``[b w]``, `Trajectory.logp`.
    """
    step = torch.arange(length).expand(len(written), -1)
    known = step < completion_length(written, end_ids)[:, None]

    def on_canvas(x: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(x, (0, length - x.shape[1]), value=value).masked_fill(~known, value)

    tokens = on_canvas(written, pad_id)
    return Trajectory(
        prompt_ids=prompt[0],
        prompt_mask=prompt[1],
        tokens=tokens,
        reveal_step=step.masked_fill(~known, NEVER),
        length=completion_length(tokens, end_ids, known),
        block_length=1,
        mask_id=NO_MASK,
        end_ids=end_ids,
        pad_id=pad_id,
        causal=True,
        logp=None if logp is None else on_canvas(logp.cpu(), torch.nan),
    )


def concatenate(parts: Sequence[Trajectory]) -> Trajectory:
    """Stack trajectories of the same policy and canvas layout; prompts are padded to the longest.

    Raises:
        ValueError: if there are no trajectories, or their layouts (``l``, blocks, token ids) differ.
    """
    if not parts:
        raise ValueError("nothing to concatenate")
    layouts = {
        (t.tokens.shape[1], t.block_length, t.mask_id, t.end_ids, t.pad_id, t.blocks_of_prompt, t.causal) for t in parts
    }
    if len(layouts) > 1:
        raise ValueError(f"trajectories of different layouts cannot be stacked: {sorted(layouts)}")
    width = max(t.prompt_ids.shape[1] for t in parts)

    def padded(x: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(x, (width - x.shape[1], 0), value=value)

    logp = [t.logp for t in parts if t.logp is not None]
    return replace(
        parts[0],
        logp=torch.cat(logp) if len(logp) == len(parts) else None,
        prompt_ids=torch.cat([padded(t.prompt_ids, t.pad_id) for t in parts]),
        prompt_mask=torch.cat([padded(t.prompt_mask, 0) for t in parts]),
        **{name: torch.cat([getattr(t, name) for t in parts]) for name in ("tokens", "reveal_step", "length")},
    )


def reveal_steps(canvases: Tensor, mask_id: int) -> Tensor:
    """Compute `reveal_step` from the canvases of another decoder.

    Args:
        canvases: int64 ``[k+1 b l]``, the completion side before each step, and at the end.
        mask_id: id of the mask token.

    Returns:
        int64 ``[b l]``.

    Raises:
        InputError: if the decoder masked or changed a revealed position, or a position was revealed from the start,
            since a trajectory cannot represent that.
    """
    masked = canvases == mask_id
    if not bool(masked[0].all()):
        row, position = (~masked[0]).nonzero()[0].tolist()
        raise InputError(f"position {position} of completion {row} was never masked; start from an empty canvas")
    kept = masked[:-1] | (canvases[1:] == canvases[:-1])
    if not bool(kept.all()):
        step, row, position = (~kept).nonzero()[0].tolist()
        raise InputError(
            f"the decoder changed position {position} of completion {row} at step {step} after revealing it; "
            "use a decoder that neither re-masks nor edits"
        )
    return masked.sum(0).sub(1).masked_fill(masked[-1], NEVER)
