"""Attempts at problems as a decoder's queue: a problem is tried again only while it is unsolved.

Several processes share one queue. Whenever their decoders ask for work, the processes exchange which attempts have
ended and how many slots are free, and each computes the same assignment of the next attempts, so that no process waits
for the retries of another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dllm_sd.decoding.queue import Job
from dllm_sd.errors import sendable
from dllm_sd.rollouts.rollout import Prompted, Rollout
from dllm_sd.tasks.task import Grade
from dllm_sd.trajectory import Trajectory

STEPS_PER_EXCHANGE = 4
"""Decoding steps between two exchanges of several processes."""


@dataclass(frozen=True)
class Workers:
    """The processes that share the work."""

    rank: int = 0
    size: int = 1
    gather: Callable[[list[Any]], list[Any]] = list
    """From the list of each process to the lists of all, joined in the order of the ranks."""


class AttemptQueue:
    """A `Queue` of attempts: fewest attempts first, then longest prompt first, so that neighbours have like length."""

    def __init__(
        self,
        prompted: Sequence[Prompted],
        key: Callable[[int, int], int],
        grade: Callable[[int, Trajectory], tuple[str, Grade]],
        *,
        limit: int,
        until_solved: bool = True,
        ahead: int = 0,
        workers: Workers | None = None,
    ) -> None:
        """Make a queue of which no attempt has begun.

        Args:
            prompted: all problems with their prompts, on every process.
            key: seed of an attempt, from problem and number.
            grade: text and verdict of a batch of one.
            limit: most attempts at a problem.
            until_solved: False makes all of them, solved or not.
            ahead: attempts at an unsolved problem that may run beside the one that is due, where slots would
                stay free.
            workers: the processes; None for this process alone.
        """
        prompts = [item.prompt for item in prompted]
        self.prompted, self.key, self.grade, self.limit = prompted, key, grade, limit
        self.until_solved, self.workers = until_solved, workers or Workers()
        self.ahead = ahead if until_solved else limit
        self.longest = max(map(len, prompts), default=0)
        self.order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        self.most = len(prompts) * min(limit, 1 + self.ahead)
        self.patience = STEPS_PER_EXCHANGE if self.workers.size > 1 else None
        self.begun = [0] * len(prompts)
        """Attempts at each problem that have begun; this and the fields below are equal on all processes."""
        self.failed = [0] * len(prompts)
        """Number of first attempts at each problem that have all ended."""
        self.solved: dict[int, int] = {}
        """The first correct attempt at each solved problem."""
        self.open: set[tuple[int, int]] = set()
        """Attempts that run, as (problem, number)."""
        self.over: set[tuple[int, int]] = set()
        """Attempts that have ended, as (problem, number)."""
        self._unreported: list[tuple[int, int, bool]] = []
        self._abandoned = False
        self._ended: list[tuple[int, Rollout]] = []

    def take(self, room: int) -> list[Job] | None:
        """The attempts that this process is to begin now.

        Raises:
            Exception: with which the decoder of another process cannot go on (`errors.sendable`), so that all of them
                end alike.
        """
        free_slots = [0] * self.workers.size
        for rank, free, ended, failure in self.workers.gather([(self.workers.rank, room, self._unreported, None)]):
            if failure is not None:
                self._abandoned = True
                raise failure
            free_slots[rank] = free
            for problem, number, correct in ended:
                self._settle(problem, number, correct)
        self._unreported = []
        mine = self._deal(free_slots)[self.workers.rank]
        return [Job(name, self.prompted[name[0]].prompt, self.key(*name)) for name in mine] if self.open else None

    def wanted(self, job: Job) -> bool:
        """False where an earlier attempt has solved the problem meanwhile."""
        return job.name in self.open

    def ended(self, jobs: Sequence[Job], trajectory: Trajectory) -> None:
        """Grade the completions, and keep their outcome for the next exchange between the processes."""
        for job, single in zip(jobs, trajectory.unstack(), strict=True):
            problem, number = job.name
            item, (text, grade) = self.prompted[problem], self.grade(problem, single)
            rollout = Rollout(item.problem, number, text, grade, single, occurrence=item.occurrence)
            self._ended.append((problem, rollout))
            self._unreported.append((problem, number, grade.correct))

    def abandon(self, error: BaseException) -> None:
        """Let the other processes stop at the exchange for which they wait, as ``error`` stops this one."""
        if self.workers.size > 1 and not self._abandoned:
            self._abandoned = True
            self.workers.gather([(self.workers.rank, 0, [], sendable(error))])

    def collected(self) -> list[list[Rollout]]:
        """Each problem's attempts that have ended, in order, on every process (`counted`: see `Rollout`)."""
        tried: list[list[Rollout]] = [[] for _ in self.prompted]
        for problem, rollout in sorted(self.workers.gather(self._ended), key=lambda pair: pair[1].attempt):
            counted = rollout.attempt <= self.solved.get(problem, self.limit)
            tried[problem].append(replace(rollout, counted=counted))
        return tried

    def _settle(self, problem: int, number: int, correct: bool) -> None:
        self.open.discard((problem, number))
        self.over.add((problem, number))
        while (problem, self.failed[problem]) in self.over:
            self.failed[problem] += 1
        if correct and self.until_solved:
            self.solved[problem] = min(number, self.solved.get(problem, number))
            self.open -= {(problem, later) for later in range(number + 1, self.begun[problem])}

    def _deal(self, free_slots: list[int]) -> list[list[tuple[int, int]]]:
        """The attempts that each process begins: the next one always goes to the process with most free slots."""
        assigned: list[list[tuple[int, int]]] = [[] for _ in free_slots]
        for level in range(1 + self.ahead):
            for problem in sorted(self.order, key=lambda i: self.begun[i]):
                number = self.begun[problem]
                due = number <= self.failed[problem] + level and number < self.limit and problem not in self.solved
                if due and max(free_slots) > 0:
                    rank = free_slots.index(max(free_slots))
                    free_slots[rank] -= 1
                    assigned[rank].append((problem, number))
                    self.open.add((problem, number))
                    self.begun[problem] += 1
        return assigned
