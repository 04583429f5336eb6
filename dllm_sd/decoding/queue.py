"""The jobs of a decoder: it takes more whenever slots become free, and returns the finished ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dllm_sd.trajectory import Trajectory, concatenate


@dataclass(frozen=True)
class Job:
    """One completion to be decoded."""

    name: tuple[int, ...]
    """Identifies the job within its queue."""
    prompt: Sequence[int]
    key: int
    """Seeds its random numbers (`randomness.make_key`)."""
    given: Tensor | None = None
    """int64 ``[l]``: tokens of the completion that are known from the start, `NEVER` elsewhere; for denoisers alone."""


class Queue(Protocol):
    """Gives a decoder its jobs. No result may depend on the order in which jobs begin or end."""

    longest: int
    """Tokens of the longest prompt in the queue, at most."""
    most: int
    """Most jobs that may be decoded at the same time."""
    patience: int | None
    """Decoding steps between two calls of `take`, where several processes must agree on them; None lets the decoder
    choose."""

    def take(self, room: int) -> list[Job] | None:
        """Return at most ``room`` jobs to begin now; None when the queue is finished for good."""
        ...

    def wanted(self, job: Job) -> bool:
        """Return whether the result of a running job is still needed."""
        ...

    def ended(self, jobs: Sequence[Job], trajectory: Trajectory) -> None:
        """Receive finished jobs and their trajectory, one row per job."""
        ...

    def abandon(self, error: BaseException) -> None:
        """Learn that this decoder cannot go on, so that other processes that share the queue do not wait for it."""
        ...


class Listed:
    """A queue of jobs that are all known beforehand, longest prompts first, so that neighbours have similar lengths."""

    patience: int | None = None

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        finished: Callable[[Tensor, Trajectory], None] | None = None,
        given: Sequence[Tensor] | None = None,
    ) -> None:
        """Queue ``prompts`` with a key each; ``finished`` is called with rows that have ended and their trajectory.

        ``given`` is `Job.given` of each.
        """
        order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), -row))
        self.waiting = [Job((row,), prompts[row], keys[row], given[row] if given else None) for row in order]
        self.longest = max(map(len, prompts), default=0)
        self.most = self.open = len(prompts)
        self.finished = finished
        self._rows: list[int] = []
        self._parts: list[Trajectory] = []

    def take(self, room: int) -> list[Job] | None:
        """Return the next jobs."""
        if not self.open:
            return None
        return [self.waiting.pop() for _ in range(min(room, len(self.waiting)))]

    def wanted(self, job: Job) -> bool:
        """Return True."""
        return True

    def ended(self, jobs: Sequence[Job], trajectory: Trajectory) -> None:
        """Store the trajectory of finished jobs."""
        rows = [job.name[0] for job in jobs]
        self._rows += rows
        self._parts.append(trajectory)
        self.open -= len(rows)
        if self.finished is not None:
            self.finished(torch.tensor(rows), trajectory)

    def abandon(self, error: BaseException) -> None:
        """No other process has a share in the list."""

    def collected(self) -> Trajectory:
        """Return the trajectory of all rows, in the order of the prompts."""
        return concatenate(self._parts).select(torch.tensor(self._rows).argsort())
