"""Rollouts: graded completions of problems, and the batch of them for one update."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dllm_sd.randomness import make_key
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.trajectory import Trajectory, concatenate


def key_parts(problem: Problem, occurrence: int) -> tuple[str, ...]:
    """The parts of the random keys of one occurrence of a problem in a batch; the first has the problem's id alone."""
    return (problem.id, f"occurrence {occurrence}") if occurrence else (problem.id,)


@dataclass(frozen=True)
class Prompted:
    """A problem with its prompt tokens."""

    problem: Problem
    prompt: tuple[int, ...]
    occurrence: int = 0
    """Number of earlier problems of the same id in the batch."""

    @property
    def key_parts(self) -> tuple[str, ...]:
        """Unique in the batch (`key_parts`)."""
        return key_parts(self.problem, self.occurrence)


def with_occurrences(prompted: Iterable[Prompted]) -> list[Prompted]:
    """Number the repeated problems of a batch, so that no two have the same random numbers."""
    seen = Counter[str]()
    numbered = []
    for item in prompted:
        numbered.append(replace(item, occurrence=seen[item.problem.id]))
        seen[item.problem.id] += 1
    return numbered


@dataclass(frozen=True)
class TeacherBrief:
    """The privileged context of one teacher for one rollout: what it reads beyond the student's input."""

    prompt: tuple[int, ...] | None = None
    """Tokens that the teacher reads instead of the student's prompt; None where it reads the student's."""
    weight: float = 1.0
    """Weight of this context relative to the others."""
    text: str | None = None
    """The hint in its prompt, as text."""


@dataclass(frozen=True)
class Rollout:
    """One graded completion; its trajectory is a batch of one."""

    problem: Problem
    attempt: int
    text: str
    grade: Grade
    trajectory: Trajectory
    counted: bool = True
    """False for an attempt that a serial loop would not have made, because it began `ahead` of the first correct
    one."""
    briefs: tuple[TeacherBrief, ...] = ()
    """One for each teacher context; empty where no context has a hint, and all weigh the same."""
    occurrence: int = 0
    """`Prompted.occurrence`: a data set may be smaller than a batch, and an epoch may end within one."""

    @property
    def key_parts(self) -> tuple[str, ...]:
        """Equal for the attempts at one occurrence of a problem, a group (`key_parts`)."""
        return key_parts(self.problem, self.occurrence)


@dataclass(frozen=True)
class Rollouts:
    """``b`` kept rollouts of one update, and the counts over everything that was decoded for them."""

    kept: tuple[Rollout, ...]
    counts: Mapping[str, float]
    """Sums over problems: problems, attempts, decoded, solved, first_try, tokens, steps, generated, kept, rejected;
    problems lost because their reference is longer than `decode.length`: long_reference (of demonstrations); and
    rollouts that have no hint, or one that is too long: no_hint, long_hint. Of the kept ones, cut_hint are
    those whose teacher reads a hint without its end. Every lost rollout is counted: kept + rejected + no_hint +
    long_hint are all counted attempts where `keep` is all, else one for each problem without a long_reference. Where
    hints are written: written (texts asked for), cached (of them, not written again), and dropped/REASON."""
    chosen: tuple[Rollout, ...] = ()
    """The kept rollouts and those that the gate rejected: for logs, and for hints from siblings."""

    @property
    def are_references(self) -> bool:
        """Whether they are the data's references, which count as correct without being graded."""
        return "long_reference" in self.counts

    @property
    def size(self) -> int:
        """``b``."""
        return len(self.kept)

    @property
    def trajectory(self) -> Trajectory:
        """All kept trajectories as one batch."""
        return concatenate([rollout.trajectory for rollout in self.kept])

    @property
    def reward(self) -> Tensor:
        """float64 ``[b]``, the score of each."""
        return torch.tensor([rollout.grade.score for rollout in self.kept], dtype=torch.float64)

    @property
    def group(self) -> Tensor:
        """int64 ``[b]``, equal for rollouts of one occurrence of a problem."""
        number = {parts: i for i, parts in enumerate(dict.fromkeys(rollout.key_parts for rollout in self.kept))}
        return torch.tensor([number[rollout.key_parts] for rollout in self.kept], dtype=torch.int64)

    def keys(self, seed: int, update: int) -> list[int]:
        """One key a rollout for the random choices of teachers and masks."""
        return [make_key(seed, update, *rollout.key_parts, rollout.attempt, "canvases") for rollout in self.kept]


@dataclass(frozen=True)
class Batch:
    """All attempts of a batch, before any is chosen."""

    number: int
    """Batches before it."""
    version: int
    """Number of updates of the weights that decoded it."""
    attempts: tuple[tuple[Rollout, ...], ...]
    """Those at each problem, in order."""
    cursor: int
    """Position in the stream of problems behind it."""
    too_long: int
    """Problems that were left out on the way, because their prompt is too long."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What is logged of the engine that decoded it."""


@dataclass(frozen=True)
class UnfinishedBatch:
    """A batch that servers did not complete; it is begun again, with the weights that began it."""

    number: int
    """`Batch.number`."""
    version: int
    """`Batch.version`."""
    cursor: int
    """Position in the stream of problems before it."""
    weights: Mapping[str, Tensor]
    """The trained weights that decode it, by name."""
