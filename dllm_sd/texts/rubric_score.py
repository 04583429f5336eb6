"""How good a written rubric is beside that of the data: by counting, without a judge.

The paper (RCSD, arXiv 2606.19327) has its learned rubrics judged by a larger model. Here a score is the product of two
shares: `form`, how far the rubric keeps what its prompt demands (`texts.rubric.RUBRIC_WRITER_PLAIN`), and `coverage`,
how many criteria of the data's rubric it has. It orders writers; it is no figure of the paper.
"""

import re
from collections import Counter
from collections.abc import Mapping

from dllm_sd.texts.rubric import Category, Criterion, Rubric

FEWEST, MOST, WORDS = 5, 15, 40
"""Criteria of a rubric, and words of a description (App. B.1)."""
RANGES: Mapping[Category, tuple[int, int]] = {
    "essential": (5, 5),
    "important": (3, 4),
    "optional": (1, 2),
    "pitfall": (-2, -1),
    "negative": (-2, -1),
}
"""Least and largest weight of each category (App. B.1)."""
SHARED = 0.5
"""Share of a criterion's words that one written criterion must have to cover it."""
_WORD = re.compile(r"[^\W_]+")
_SHORT = 3
_KINDS = {"criteria", "criterion", *RANGES}


def rubric_score(written: Rubric, reference: Rubric) -> float:
    """From 0 to 1: `form` times `coverage`."""
    return form(written) * coverage(written, reference)


def form(rubric: Rubric) -> float:
    """The mean of three: whether there are 5 to 15 criteria; whether one is a pitfall; the share of sound criteria.

    A criterion is sound if it names its category, weighs what that category may, and is described in up to 40 words.
    """
    criteria = rubric.criteria
    pitfall = any(one.category in ("pitfall", "negative") for one in criteria)
    return ((FEWEST <= len(criteria) <= MOST) + pitfall + sum(map(_sound, criteria)) / len(criteria)) / 3


def coverage(written: Rubric, reference: Rubric) -> float:
    """The share of the reference's criteria of whose own words one written criterion has half.

    Words are of four letters or more; those of more than half of the reference's criteria are no criterion's own.
    """
    have = [_words(one) for one in written.criteria]
    every = [_words(one) for one in reference.criteria]
    spread = Counter(word for words in every for word in words)
    own_of = [{word for word in words if spread[word] <= max(1, len(every) // 2)} for words in every]
    wanted = [words for words in own_of if words]
    covered = sum(max(len(words & own) for own in have) >= SHARED * len(words) for words in wanted)
    return covered / len(wanted) if wanted else 1.0


def _sound(one: Criterion) -> bool:
    if one.category is None or len(one.description.split()) > WORDS:
        return False
    least, most = RANGES[one.category]
    return least <= one.weight <= most


def _words(one: Criterion) -> set[str]:
    found = {word.casefold() for word in _WORD.findall(f"{one.title} {one.description}")}
    return {word for word in found if len(word) > _SHORT and word not in _KINDS}
