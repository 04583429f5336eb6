"""What a decoder is to complete: it asks for more whenever slots fall free, and hands back what has ended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dllm_sd.trajectory import Trajectory, concatenate


@dataclass(frozen=True)
class Job:
    """One completion that is asked for."""

    name: tuple[int, ...]
    """What the queue knows it by."""
    prompt: Sequence[int]
    key: int
    """Seeds its random numbers (`randomness.make_key`)."""


class Queue(Protocol):
    """Where the jobs of a decoder come from. The order in which they come and end must not matter to anybody."""

    longest: int
    """Tokens of the longest prompt that may come."""
    most: int
    """Jobs that may be under way at the same time, at most."""
    patience: int | None
    """Decoding steps between two calls of `take`, where several processes must agree; else the decoder chooses."""

    def take(self, room: int) -> list[Job] | None:
        """At most ``room`` jobs to begin now; None when all is done, so that none will ever come again."""
        ...

    def wanted(self, job: Job) -> bool:
        """Whether a job that has begun still matters."""
        ...

    def ended(self, jobs: Sequence[Job], trajectory: Trajectory) -> None:
        """Take what has ended, a row a job."""
        ...


class Listed:
    """Jobs that are all known beforehand: the longest prompts first, so that neighbours are of like length."""

    patience: int | None = None

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        finished: Callable[[Tensor, Trajectory], None] | None = None,
    ) -> None:
        """For ``prompts`` with a key each; ``finished`` is told the rows that have just ended, and their trajectory."""
        order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), -row))
        self.waiting = [Job((row,), prompts[row], keys[row]) for row in order]
        self.longest = max(map(len, prompts), default=0)
        self.most = self.open = len(prompts)
        self.finished = finished
        self._rows: list[int] = []
        self._parts: list[Trajectory] = []

    def take(self, room: int) -> list[Job] | None:
        """The next ones."""
        if not self.open:
            return None
        return [self.waiting.pop() for _ in range(min(room, len(self.waiting)))]

    def wanted(self, job: Job) -> bool:
        """Always."""
        return True

    def ended(self, jobs: Sequence[Job], trajectory: Trajectory) -> None:
        """Keep it."""
        rows = [job.name[0] for job in jobs]
        self._rows += rows
        self._parts.append(trajectory)
        self.open -= len(rows)
        if self.finished is not None:
            self.finished(torch.tensor(rows), trajectory)

    def collected(self) -> Trajectory:
        """Everything, in the order of the prompts."""
        return concatenate(self._parts).select(torch.tensor(self._rows).argsort())


def complete_in_batches(
    decode: Callable[[Sequence[Sequence[int]], Sequence[int]], Trajectory], queue: Queue, batch_size: int
) -> None:
    """For decoders without slots: ``decode(prompts, keys)`` what the queue has, a batch at a time."""
    while (jobs := queue.take(batch_size)) is not None:
        if jobs:
            queue.ended(jobs, decode([job.prompt for job in jobs], [job.key for job in jobs]))
