"""Rubrics as text: what a good solution must show, item by item (RCSD, arXiv 2606.19327).

A rubric is a JSON list of objects with a title, a description and a weight, or of plain sentences. Weights are words
for the teacher; nothing is computed from them.
"""

import json
from dataclasses import dataclass
from typing import Any

from dllm_sd.randomness import make_key, permutation
from dllm_sd.tasks.grading import without_thinking

LONGEST = 40_000
"""Characters of a written rubric that are read."""
MOST = 40
"""Items of a rubric that are read."""


@dataclass(frozen=True)
class Criterion:
    """One item; the description often begins with its importance, such as ``Essential Criteria:``."""

    description: str
    title: str = ""
    weight: int | None = None

    def tree(self) -> Any:
        """As JSON: a plain sentence where there is nothing else."""
        extra = {"title": self.title} if self.title else {}
        weight = {} if self.weight is None else {"weight": self.weight}
        return {**extra, "description": self.description, **weight} if extra or weight else self.description


Rubric = tuple[Criterion, ...]

GENERIC: Rubric = tuple(
    Criterion(description, title, 1)
    for title, description in (
        ("The question", "Says rightly what is asked for."),
        ("The givens", "Uses what is given, all of it and nothing else."),
        ("The way", "Chooses an approach that fits the question."),
        ("The steps", "Carries the approach out step by step, without a gap."),
        ("The check", "Looks back at the steps for mistakes."),
        ("The answer", "States the final answer clearly."),
    )
)
"""One for all questions: the paper's first degraded variant, in other words."""


def parse_rubric(text: str) -> tuple[Rubric, str]:
    """The rubric in a model's text and "kept"; or nothing and the reason: no_list, empty, bad_item.

    It is the first JSON list of the text after any thinking. An item needs a description.
    """
    text = without_thinking(text)[:LONGEST]
    decoder, start = json.JSONDecoder(), text.find("[")
    for _ in range(MOST):  # brackets that begin no list, such as those of a formula
        if start < 0:
            break
        try:
            found = decoder.raw_decode(text, start)[0]
            if not found or isinstance(found[0], dict | str):
                return read_rubric(found)
        except (ValueError, RecursionError):
            pass
        start = text.find("[", start + 1)
    return (), "no_list"


def read_rubric(items: Any) -> tuple[Rubric, str]:
    """A rubric from JSON values, such as a field of the data, with the reasons of `parse_rubric`."""
    if not isinstance(items, list):
        return parse_rubric(items) if isinstance(items, str) else ((), "no_list")
    found = [_criterion(item) for item in items[:MOST]]
    if not found:
        return (), "empty"
    rubric = tuple(one for one in found if one is not None)
    return (rubric, "kept") if len(rubric) == len(found) else ((), "bad_item")


def _criterion(item: Any) -> Criterion | None:
    if isinstance(item, str):
        return Criterion(item.strip()) if item.strip() else None
    description = item.get("description") if isinstance(item, dict) else None
    if not isinstance(description, str) or not description.strip():
        return None
    title, weight = item.get("title"), item.get("weight")
    if isinstance(weight, str) and weight.strip().lstrip("+-").isdecimal() and len(weight) < 8:
        weight = int(weight)
    whole = weight if isinstance(weight, int) and not isinstance(weight, bool) else None
    return Criterion(description.strip(), title.strip() if isinstance(title, str) else "", whole)


def render_rubric(rubric: Rubric, lines: bool = False) -> str:
    """As a JSON list, or one description a line."""
    if lines:
        return "\n".join(one.description for one in rubric)
    return json.dumps([one.tree() for one in rubric], ensure_ascii=False, indent=1)


def reduced(rubric: Rubric, key: int) -> Rubric:
    """Half of the items, at least one, in their order (the paper's variant Reduced)."""
    chosen = sorted(permutation(make_key(key, "reduced"), len(rubric))[: max(1, len(rubric) // 2)])
    return tuple(rubric[i] for i in chosen)


def noisy(rubric: Rubric, other: Rubric, key: int) -> Rubric:
    """Half of the items and half of another question's, mixed (the paper's variant Noisy)."""
    mixed = [*reduced(rubric, key), *reduced(other, make_key(key, "other"))]
    return tuple(mixed[i] for i in permutation(make_key(key, "noisy"), len(mixed)))
