"""The quality of a written rubric compared with that of the data, by counting and without a judge.

The paper (RCSD, arXiv 2606.19327) has learned rubrics judged by a larger model. Here the score is the product of two
shares: `form`, how well the rubric follows its prompt (`texts.rubric.RUBRIC_WRITER_PLAIN`), and `coverage`, how many
criteria of the data's rubric it contains. It ranks writers; it is not a metric of the paper.
"""

import re
from collections import Counter
from collections.abc import Mapping

from dllm_sd.texts.rubric import Category, Criteria, Criterion

FEWEST, MOST, WORDS = 5, 15, 40
"""Fewest and most criteria of a rubric, and most words of a description (App. B.1)."""
RANGES: Mapping[Category, tuple[int, int]] = {
    "essential": (5, 5),
    "important": (3, 4),
    "optional": (1, 2),
    "pitfall": (-2, -1),
    "negative": (-2, -1),
}
"""Smallest and largest weight of each category (App. B.1)."""
SHARED = 0.5
"""Share of a criterion's specific words that a written criterion must contain to cover it."""
_WORD = re.compile(r"[^\W_]+")
_LONGEST_IGNORED = 3
_CATEGORY_WORDS = {"criteria", "criterion", *RANGES}


def rubric_score(written: Criteria, reference: Criteria) -> float:
    """Return `form` times `coverage`, from 0 to 1."""
    return form(written) * coverage(written, reference)


def form(rubric: Criteria) -> float:
    """Return the mean of three values: 5 to 15 criteria; at least one pitfall; the share of sound criteria.

    A criterion is sound if it names its category, has a weight of that category, and is described in up to 40 words.
    """
    criteria = rubric.criteria
    pitfall = any(criterion.category in ("pitfall", "negative") for criterion in criteria)
    return ((FEWEST <= len(criteria) <= MOST) + pitfall + sum(map(_sound, criteria)) / len(criteria)) / 3


def coverage(written: Criteria, reference: Criteria) -> float:
    """Return the share of the reference's criteria that a written criterion covers, with half of the specific words.

    Only words of four letters or more count. Words in more than half of the reference's criteria are not specific.
    """
    written_words = [_words(criterion) for criterion in written.criteria]
    reference_words = [_words(criterion) for criterion in reference.criteria]
    counts = Counter(word for words in reference_words for word in words)
    specific_words = [
        {word for word in words if counts[word] <= max(1, len(reference_words) // 2)} for words in reference_words
    ]
    specific = [words for words in specific_words if words]
    covered = sum(
        max(len(words & candidate) for candidate in written_words) >= SHARED * len(words) for words in specific
    )
    return covered / len(specific) if specific else 1.0


def _sound(criterion: Criterion) -> bool:
    if criterion.category is None or len(criterion.description.split()) > WORDS:
        return False
    least, most = RANGES[criterion.category]
    return least <= criterion.weight <= most


def _words(criterion: Criterion) -> set[str]:
    words = {word.casefold() for word in _WORD.findall(f"{criterion.title} {criterion.description}")}
    return {word for word in words if len(word) > _LONGEST_IGNORED and word not in _CATEGORY_WORDS}
