"""The protocol of a task: problems, prompt, reference answer, grader, and metrics computed from the grades."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from dllm_sd.errors import InputError

Split = Literal["train", "dev", "test"]
Mode = Literal["default", "compatible"]


@dataclass(frozen=True)
class Problem:
    """One problem. ``id`` is unique and stable over all splits; ``fields`` feed prompt template and grader."""

    id: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Grade:
    """The verdict on one completion; ``score`` is in [0, 1], ``parsed`` is the answer that was read."""

    correct: bool
    score: float
    parsed: str | None
    failed: bool = False
    """Whether the grader itself failed, as a user's function may; then the completion counts as wrong."""


@runtime_checkable
class Task(Protocol):
    """A task is a frozen dataclass whose fields are its configuration; it loads data when a split is requested."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """Return the problems of a split in a fixed order. Splits are disjoint, maybe lazy, and cheap to count."""
        ...

    def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
        """Return the chat messages (``role``, ``content``) that ask the problem; a policy applies its chat template.

        With ``question`` false the fields of the problem are left out; the instructions on the form of the answer stay.
        """
        ...

    def reference(self, problem: Problem) -> str | None:
        """Return the reference completion that supervised training imitates, or None if the data has none."""
        ...

    def final_answer(self, problem: Problem) -> str | None:
        """Return the gold answer alone, without its derivation, or None if the data has none."""
        ...

    def grade(self, problem: Problem, completion: str) -> Grade:
        """Judge a completion in bounded time, without raising on model output and without evaluating it as code."""
        ...

    @property
    def rubric_prompt(self) -> str | None:
        """The template that asks for a rubric, if completions are rubrics (Stage I of RCSD); otherwise None."""
        ...

    @property
    def reference_remedy(self) -> str:
        """The end of an error message: what to do if the data has no reference."""
        ...

    def chance(self, problems: Sequence[Problem]) -> float | None:
        """Return the expected share of ``problems`` that blind guessing solves, or None if guessing has no meaning."""
        ...

    def summary(self, graded: Sequence[tuple[Problem, Grade]]) -> dict[str, float]:
        """Return metrics other than the accuracy, by name; empty if the task has none."""
        ...


@runtime_checkable
class LocatesMistakes(Protocol):
    """A task that knows where a completion first goes wrong; a task need not."""

    def first_mistake(self, problem: Problem, completion: str) -> tuple[int, int] | None:
        """Return start and end of the first wrong step, in characters; None if there is none, or no steps are read."""
        ...


class NoChanceLevel:
    """Defaults of most tasks: no chance level, no metric other than the accuracy, and data that can be replaced."""

    @property
    def rubric_prompt(self) -> str | None:
        """None, since completions are not rubrics."""
        return None

    @property
    def reference_remedy(self) -> str:
        """The remedy is other data."""
        return "name other data"

    def chance(self, problems: Sequence[Problem]) -> float | None:
        """Return None."""
        return None

    def summary(self, graded: Sequence[tuple[Problem, Grade]]) -> dict[str, float]:
        """Return no metrics."""
        return {}


def mean(values: Sequence[float]) -> float:
    """Return the mean, or 0 for an empty sequence."""
    return sum(values) / len(values) if values else 0.0


def check_mode(mode: str) -> None:
    """Refuse an unknown ``task.mode``."""
    if mode not in ("default", "compatible"):
        raise InputError(f"task.mode is {mode!r}; choose default or compatible.")
