"""Gates: which rollouts of a problem are trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dllm_sd.parts import Part
from dllm_sd.ranges import Ranged, Share
from dllm_sd.rollouts.rollout import Rollout


class Gate(Part, Protocol):
    """Protocol of a gate; `GateDefaults` implements all but `count_rejected` and the call."""

    @property
    def count_rejected(self) -> bool:
        """Whether rejected rollouts count in the denominator of the loss."""
        ...

    @property
    def needs_outcome(self) -> bool:
        """Whether it needs the outcome of a rollout, which only a complete rollout has."""
        ...

    @property
    def needs_group(self) -> bool:
        """Whether it compares all rollouts of a problem."""
        ...

    @property
    def mixes(self) -> bool:
        """Whether correct and wrong rollouts of a problem can pass together."""
        ...

    def __call__(self, attempts: Sequence[Rollout]) -> list[Rollout]:
        """The attempts that pass, of the kept attempts at a problem."""
        ...


class GateDefaults:
    """Defaults of a gate that judges each rollout alone and without its outcome."""

    needs_outcome: bool = False
    needs_group: bool = False
    mixes: bool = False


@dataclass(frozen=True)
class All(GateDefaults):
    """Every rollout passes."""

    count_rejected = False
    mixes = True

    def __call__(self, attempts: Sequence[Rollout]) -> list[Rollout]:
        return list(attempts)


@dataclass(frozen=True)
class Correct(GateDefaults):
    """Only correct rollouts pass."""

    count_rejected: bool = False
    """True lets rejected rollouts count in the denominator, as the released d-OPSD does (its ``loss * 0``)."""
    needs_outcome = True

    def __call__(self, attempts: Sequence[Rollout]) -> list[Rollout]:
        return [rollout for rollout in attempts if rollout.grade.correct]


@dataclass(frozen=True)
class Score(Ranged, GateDefaults, key="method.gate"):
    """Rollouts pass that score at least `at_least` (partial credit)."""

    at_least: Share = 0.25
    """Score from which a rollout passes."""
    count_rejected: bool = False
    """Whether rejected rollouts count in the denominator of the loss."""
    needs_outcome = True

    def __call__(self, attempts: Sequence[Rollout]) -> list[Rollout]:
        return [rollout for rollout in attempts if rollout.grade.score >= self.at_least]


@dataclass(frozen=True)
class Mixed(GateDefaults):
    """Whole groups pass whose scores differ; where all scores are equal, the group advantage is zero."""

    count_rejected: bool = False
    """Whether rejected rollouts count in the denominator of the loss."""
    needs_outcome = True
    needs_group = True
    mixes = True

    def __call__(self, attempts: Sequence[Rollout]) -> list[Rollout]:
        return list(attempts) if len({rollout.grade.score for rollout in attempts}) > 1 else []


GATES: dict[str, type] = {"all": All, "correct": Correct, "score": Score, "mixed": Mixed}
