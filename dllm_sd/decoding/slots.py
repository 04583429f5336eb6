"""The rows that are being denoised: a fixed number of slots, each at its own block and step, on the device.

The host keeps its own record of which slots are taken and how long their prompts are, so that a step never waits for
the device. Only `Slots.finished` reads from the device, to learn which rows have ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_sd.decoding.queue import Job
from dllm_sd.decoding.settings import Decoding
from dllm_sd.randomness import key_tensor
from dllm_sd.trajectory import NEVER, StopAfter, Trajectory, completion_length, left_pad

POSITIONS_PER_FORWARD = {"cpu": 1024}
"""Positions per forward pass, by kind of device; few on a CPU, so that activations stay in its cache."""
POSITIONS_PER_FORWARD_ELSEWHERE = 2**15


@dataclass(frozen=True)
class CanvasLayout:
    """The special token ids of a denoiser, and how it counts blocks."""

    mask_id: int
    """The mask token, which stands at positions without a token; never committed."""
    end_ids: tuple[int, ...]
    """Stop ids: each of them ends a completion."""
    pad_id: int
    """Fills positions that an early end leaves open."""
    blocks_of_prompt: bool = False
    """Count blocks from the first prompt token, as block-causal models do."""


@dataclass(frozen=True)
class SlotGroup:
    """Slots that one forward pass reads together."""

    slots: Tensor
    """int64 ``[n]``."""
    prompt: int
    """Columns of the longest prompt."""


class Slots:
    """State of ``r`` rows, one per slot; completions have one extra column for writes outside the completion."""

    def __init__(
        self,
        count: int,
        longest: int,
        settings: Decoding,
        layout: CanvasLayout,
        device: torch.device,
        stop_after: StopAfter | None,
    ) -> None:
        """Make ``count`` free slots for prompts of at most ``longest`` tokens."""
        self.settings, self.layout, self.device, self.stop_after = settings, layout, device, stop_after
        length = settings.length
        self.prompt_ids = torch.full((count, longest), layout.pad_id, device=device)
        self.prompt_mask = torch.zeros((count, longest), dtype=torch.bool, device=device)
        self.tokens = torch.full((count, length + 1), layout.mask_id, device=device)
        self.reveal_step = torch.full((count, length + 1), NEVER, device=device)
        self.logp = torch.full((count, length + 1), torch.nan, device=device)
        self.active = torch.zeros(count, dtype=torch.bool, device=device)
        """Whether the row of a slot is still being decoded."""
        self.row_steps = torch.zeros((), dtype=torch.int64, device=device)
        """Decoding steps so far, summed over rows."""
        self.keys, self.block, self.step_in_block, self.step, self.prompt_tail = (
            torch.zeros(count, dtype=torch.int64, device=device) for _ in range(5)
        )
        """Key; active block; step inside it; steps so far; prompt tokens in the block where the completion begins."""
        self.ends = torch.tensor(layout.end_ids, device=device)
        self.schedule = torch.tensor(settings.schedule, device=device)
        self.jobs: list[Job | None] = [None] * count

    @property
    def taken(self) -> list[int]:
        """Slots with a row."""
        return [slot for slot, job in enumerate(self.jobs) if job is not None]

    @property
    def vacant(self) -> list[int]:
        """Slots without a row."""
        return [slot for slot, job in enumerate(self.jobs) if job is None]

    def begin(self, jobs: Sequence[Job]) -> Tensor:
        """Put jobs into free slots; return these slots, int64 ``[j]``."""
        free = self.vacant[: len(jobs)]
        slots = torch.tensor(free, device=self.device)
        ids, mask = (x.to(self.device) for x in left_pad([job.prompt for job in jobs], self.layout.pad_id))
        start = self.prompt_ids.shape[1] - ids.shape[1]
        self.prompt_ids[slots], self.prompt_mask[slots] = self.layout.pad_id, False
        self.prompt_ids[slots, start:], self.prompt_mask[slots, start:] = ids, mask
        self.tokens[slots], self.reveal_step[slots] = self.layout.mask_id, NEVER
        self.logp[slots], self.active[slots] = torch.nan, True
        self.keys[slots] = key_tensor([job.key for job in jobs], self.device)
        self.block[slots], self.step_in_block[slots], self.step[slots] = 0, 0, 0
        if self.layout.blocks_of_prompt:
            self.prompt_tail[slots] = mask.sum(1) % self.settings.block_length
        for slot, job in zip(free, jobs, strict=True):
            self.jobs[slot] = job
            if job.given is not None:
                given = job.given.to(self.device)
                self.tokens[slot, :-1] = torch.where(given == NEVER, self.layout.mask_id, given)
                self.reveal_step[slot, :-1] = torch.where(given == NEVER, NEVER, 0)
        return slots

    def groups(self, static_shapes: bool, remembered: bool = False) -> list[SlotGroup]:
        """Group the taken slots by prompt length; each group is one forward pass.

        Args:
            static_shapes: use few shapes: a group is filled up to a power of two with free slots, which do nothing.
            remembered: whether a KV cache holds finished blocks, so that only active blocks are read.
        """
        taken = self.taken
        if static_shapes:
            rows = min(len(self.jobs), 1 << max(0, len(taken) - 1).bit_length())
            chosen = (taken + self.vacant)[:rows]
            return [SlotGroup(torch.tensor(chosen, device=self.device), self.prompt_ids.shape[1])] if taken else []
        sizes = {slot: len(job.prompt) for slot, job in enumerate(self.jobs) if job is not None}
        order = sorted(taken, key=lambda slot: -sizes[slot])
        budget = POSITIONS_PER_FORWARD.get(self.device.type, POSITIONS_PER_FORWARD_ELSEWHERE)
        read = [self.settings.block_length if remembered else sizes[x] + self.settings.length for x in order]
        ranges = split_by_budget(read, budget)
        return [SlotGroup(torch.tensor(order[a:b], device=self.device), sizes[order[a]]) for a, b in ranges]

    def commit(
        self, group: SlotGroup, columns: Tensor, commit: Tensor, token: Tensor, logp: Tensor, still: Tensor
    ) -> None:
        """Commit the tokens of one step, and advance each row.

        Args:
            group: the rows ``[n]``.
            columns: int64 ``[n i]``, columns of the completion; the extra last column for positions outside it.
            commit: bool ``[n i]``, the positions that are committed now.
            token: int64 ``[n i]``.
            logp: ``[n i]``.
            still: bool ``[n i]``, the positions of the active block that stay masked.
        """
        rows, settings = group.slots, self.settings
        step, step_in_block, block = self.step[rows], self.step_in_block[rows], self.block[rows]
        for state, new in (
            (self.tokens, token),
            (self.logp, logp),
            (self.reveal_step, step[:, None].expand_as(columns)),
        ):
            former = state[rows]
            state[rows] = former.scatter(
                1, columns, torch.where(commit, new.to(state.dtype), former.gather(1, columns))
            )
        full = ~still.any(1)  # the row goes to its next block, past steps that would commit nothing
        skip_ahead = settings.threshold is None and not self.layout.blocks_of_prompt
        self.step[rows] = step = step + torch.where(full, len(self.schedule) - step_in_block if skip_ahead else 1, 1)
        self.step_in_block[rows] = torch.where(full | (settings.threshold is not None), 0, step_in_block + 1)
        self.block[rows] = block = block + full.long()
        done = block > (settings.length - 1 + self.prompt_tail[rows]) // settings.block_length
        if self.stop_after is not None:
            done |= (block if self.stop_after.unit == "blocks" else step) >= self.stop_after.count
        if settings.early_end:
            known = (self.reveal_step[rows, :-1] != NEVER).cumprod(1).bool()
            done |= (torch.isin(self.tokens[rows, :-1], self.ends) & known).any(1)  # nothing before it can change
        self.active[rows] = self.active[rows] & ~done

    def finished(self) -> list[int]:
        """Return the taken slots whose rows have ended. Waits for the device."""
        active = self.active.tolist()
        return [slot for slot in self.taken if not active[slot]]

    def free(self, slots: Sequence[int]) -> list[Job]:
        """Remove the rows of some slots; return their jobs."""
        jobs = [job for slot in slots if (job := self.jobs[slot]) is not None]
        for slot in slots:
            self.jobs[slot] = None
        self.active[torch.tensor(slots, dtype=torch.int64, device=self.device)] = False
        return jobs

    def trajectory(self, slots: Sequence[int]) -> Trajectory:
        """Return the trajectory of the rows in some slots, on the CPU."""
        rows = torch.tensor(slots, device=self.device)
        layout, settings = self.layout, self.settings
        tokens, reveal_step, logp = (x[rows, :-1].cpu() for x in (self.tokens, self.reveal_step, self.logp))
        known = reveal_step != NEVER
        tokens = tokens.masked_fill(~known, layout.pad_id)
        ids, mask = left_pad([job.prompt for slot in slots if (job := self.jobs[slot]) is not None], layout.pad_id)
        return Trajectory(
            prompt_ids=ids,
            prompt_mask=mask,
            tokens=tokens,
            reveal_step=reveal_step,
            length=completion_length(tokens, layout.end_ids, known),
            block_length=settings.block_length,
            mask_id=layout.mask_id,
            end_ids=layout.end_ids,
            pad_id=layout.pad_id,
            blocks_of_prompt=layout.blocks_of_prompt,
            logp=logp,
        )


def split_by_budget(widths: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Split rows of descending ``widths`` into ranges of at most ``budget`` padded positions, or of a single row."""
    ranges: list[tuple[int, int]] = []
    for row in range(len(widths)):
        start = ranges[-1][0] if ranges else 0
        if ranges and (row + 1 - start) * widths[start] <= budget:
            ranges[-1] = (start, row + 1)
        else:
            ranges.append((row, row + 1))
    return ranges
