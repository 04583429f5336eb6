"""What a task is: problems, a prompt, a reference answer, a grader, and what the grades add up to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from dllm_sd.errors import InputError

Split = Literal["train", "dev", "test"]
Mode = Literal["default", "compatible"]


@dataclass(frozen=True)
class Problem:
    """One problem. ``id`` is unique and stable over all splits; ``fields`` feed the prompt template and the grader."""

    id: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Grade:
    """Verdict on one completion: ``score`` in [0, 1] (partial credit where the task has it), what was ``parsed``."""

    correct: bool
    score: float
    parsed: str | None


@runtime_checkable
class Task(Protocol):
    """A task is a frozen dataclass whose fields are its configuration; it loads nothing until asked for a split."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split, in a fixed order; splits are disjoint. May be lazy: cheap to count and index."""
        ...

    def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
        """The chat messages (``role``, ``content``) that ask the problem; a policy renders them with its template.

        Without the ``question`` nothing of the problem is in them; what they ask of an answer's form stays.
        """
        ...

    def reference(self, problem: Problem) -> str | None:
        """The reference completion that supervised training imitates, or None where the data has none."""
        ...

    def final_answer(self, problem: Problem) -> str | None:
        """The right answer alone, without the way to it, or None where the data has none."""
        ...

    def grade(self, problem: Problem, completion: str) -> Grade:
        """Judge a completion. Never raises on model output, never evaluates it as code, bounded in time."""
        ...

    @property
    def rubric_prompt(self) -> str | None:
        """The template that asks for a rubric, where completions are rubrics (Stage I of RCSD); None elsewhere."""
        ...

    @property
    def reference_remedy(self) -> str:
        """What to do where the data has no reference, as the end of a message."""
        ...

    def chance(self, problems: Sequence[Problem]) -> float | None:
        """The expected share of ``problems`` that blind guessing solves, or None where guessing has no meaning."""
        ...

    def summary(self, graded: Sequence[tuple[Problem, Grade]]) -> dict[str, float]:
        """Measures beyond the accuracy, by name; empty where the task has none."""
        ...


class NoChanceLevel:
    """What most tasks say: there is no chance level and nothing beside the accuracy, and data may be named."""

    @property
    def rubric_prompt(self) -> str | None:
        """None: completions are no rubrics."""
        return None

    @property
    def reference_remedy(self) -> str:
        """Other data."""
        return "name others"

    def chance(self, problems: Sequence[Problem]) -> float | None:
        """None."""
        return None

    def summary(self, graded: Sequence[tuple[Problem, Grade]]) -> dict[str, float]:
        """Nothing."""
        return {}


def mean(values: Sequence[float]) -> float:
    """The mean, 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def check_mode(mode: str) -> None:
    """Refuse a ``task.mode`` that there is not."""
    if mode not in ("default", "compatible"):
        raise InputError(f"task.mode is {mode!r}; choose default or compatible.")
