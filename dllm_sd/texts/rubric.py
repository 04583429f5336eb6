"""Rubrics: the criteria of a good solution, item by item (RCSD, arXiv 2606.19327, Sec. 2.1, 2.3 and App. B.1).

A rubric is a JSON list of objects with a title, a description and a weight, or of plain sentences. The category of a
criterion is the first word of its description, such as ``Essential Criteria: ...``. Weights are text for the teacher;
no score is computed from them.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from dllm_sd.errors import InputError
from dllm_sd.randomness import make_key, permutation
from dllm_sd.texts.thinking import breaks_off, without_thinking

MAX_RUBRIC_TEXT = 100_000
"""Characters after the thinking that are read."""
TRIES = 200
"""Most opening brackets that are tried as the start of the list."""
LARGEST_WEIGHT = 1_000

Category = Literal["essential", "important", "optional", "pitfall", "negative"]
"""The four categories of the paper, and `negative`, which trained generators write for a pitfall."""
RubricRejection = Literal["no_list", "empty", "bad_item"]
"""Why a text is not a rubric: it has no JSON list, the list is empty, or an item is not a criterion."""

CATEGORY_WEIGHTS: dict[Category | None, int] = {
    "essential": 5,
    "important": 3,
    "optional": 1,
    "pitfall": -1,
    "negative": -1,
    None: 1,
}
"""Default weights by category, from the ranges of App. B.1; ``None`` stands for an item without a category."""

_CATEGORY_PREFIX = re.compile(rf"\s*({'|'.join(get_args(Category))})(?:\s+criteri(?:a|on))?\s*:", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?[0-9]{1,9}(?:\.[0-9]{1,9})?")


@dataclass(frozen=True)
class Criterion:
    """One item of a rubric; a plain sentence has an empty title."""

    title: str
    description: str
    weight: int

    @property
    def category(self) -> Category | None:
        """The category, given by the first word of the description."""
        return _category(self.description)


@dataclass(frozen=True)
class Criteria:
    """The criteria for one question, in order."""

    criteria: tuple[Criterion, ...]


RUBRIC_WRITER_PLAIN = """\
You write marking schemes. Below is a question. Set down what a marker should look for in an answer to it.

Question:
{question}

How to go about it:
- Think of what the question asks for, which knowledge it needs, and where people slip.
- Set down 5 to 15 points. A marker must be able to settle each of them with yes or no from the answer alone, and no \
two may ask for the same.
- Begin each description with its kind: "Essential Criteria:" for what must be there, "Important Criteria:" for what \
counts much, "Optional Criteria:" for what is nice to have, "Pitfall Criteria:" for a mistake that costs marks. At \
least one point is a pitfall.
- Weights: 5 for essential points, 3 or 4 for important ones, 1 or 2 for optional ones, -1 or -2 for pitfalls.

Reply with one JSON list and no other text. Every point is an object with the fields "title" (2 to 5 words), \
"description" (up to 40 words) and "weight" (a whole number), as in
[{{"title": "Units converted", "description": "Essential Criteria: Turns the speed into metres per second before it is \
used.", "weight": 5}},
{{"title": "Sign slip", "description": "Pitfall Criteria: Takes the deceleration as positive.", "weight": -1}}]"""
"""The prompt for a rubric from the question alone (Eq. 4): ``{question}``. Stage I trains on it (the default of
`task.prompt` for `task.grader` rubric), and Stage II sends it to the writer (default `prompt` of rubric contexts)."""

_QUESTION_ONLY = "Question:\n{question}\n"
_WITH_REFERENCE = f"""{_QUESTION_ONLY}
A reference answer, to learn from what matters; the points must fit other right answers as well:
{{reference}}
"""

RUBRIC_WRITER = RUBRIC_WRITER_PLAIN.replace(_QUESTION_ONLY, _WITH_REFERENCE)
"""The prompt for a rubric from the question and its reference answer, as in the released code: ``{question}``,
``{reference}``."""

RUBRIC_GOLD = """\
{question}

The marking scheme that is wanted, as a JSON list:
{hint}

Take it as it is, and reply with that JSON list alone."""
"""The teacher's prompt for training on rubric writing (Stage I in the released code). ``{question}`` is the complete
prompt of the student, one of the two above; ``{hint}`` is the rubric of the data."""

RUBRIC_TEACHER = """\
{question}

What a right solution does:
{hint}

Now write such a solution."""
"""The teacher's prompt for training on solutions, with the rubric alone (Eq. 5): ``{question}``, ``{hint}``."""

RUBRIC_TEACHER_REFERENCE = """\
{question}

The reference answer. Only you can see it:
{reference}

What a marker will look for, as a JSON list. Only you can see it, and a point may be mistaken:
{hint}

Keep both in mind, and where they disagree trust the answer. Solve the problem from the start, so that the solution \
stands on its own. Leave the reference and the list unmentioned."""
"""The same prompt with the reference answer, as in the released code: ``{question}``, ``{hint}``, ``{reference}``."""


def parse_rubric(source: object) -> Criteria | RubricRejection:
    """Parse the rubric in a model's text, or in a field of the data (a list, or JSON text).

    The first JSON list of a text counts, whatever it contains; a truncated list, and everything in it, is not a rubric.
    An item is a sentence or an object with a description. The title may be missing. The weight may be missing (see
    `CATEGORY_WEIGHTS`), text or a fraction. Returns the reason if the source is not a rubric.
    """
    items = _written_list(source) if isinstance(source, str) else source
    if isinstance(items, str) or not isinstance(items, list | tuple):
        return "no_list"
    if not items:
        return "empty"
    criteria = [_criterion(item) for item in items]
    parsed = tuple(criterion for criterion in criteria if criterion is not None)
    return Criteria(parsed) if len(parsed) == len(criteria) else "bad_item"


def is_unfinished(text: str) -> bool:
    """Return whether a text has no rubric because its thinking or its list is truncated, as by a length limit."""
    return _written_list(text) == "unfinished"


def render_rubric(rubric: Criteria) -> str:
    """Write the rubric as a JSON list, one item per line; `parse_rubric` reads it back."""
    lines = []
    for criterion in rubric.criteria:
        title = {"title": criterion.title} if criterion.title else {}
        fields = {**title, "description": criterion.description, "weight": criterion.weight}
        lines.append(json.dumps(fields, ensure_ascii=False))
    return "[" + ",\n".join(lines) + "]"


def generic() -> Criteria:
    """Return one rubric for all questions (the variant Generic of Table 6)."""
    items = (
        ("Understand", "Says in its own words what is asked, and asks nothing else."),
        ("Identify", "Picks out the facts and quantities that bear on the question."),
        ("Choose", "Settles on a method that suits the question."),
        ("Execute", "Carries the method through in order, with no step left out."),
        ("Check", "Tests the result against the question, by another way or by its size."),
        ("Answer", "Ends with one clear answer in the form that is asked for."),
    )
    return Criteria(tuple(Criterion(title, description, 1) for title, description in items))


def reduced(rubric: Criteria, key: int) -> Criteria:
    """Return half of the items, rounded up, in their order (the variant Reduced)."""
    count = len(rubric.criteria)
    return Criteria(_subset(rubric, (count + 1) // 2, make_key(key, "reduced")))


def noisy(rubric: Criteria, others: Sequence[Criteria], key: int) -> Criteria:
    """Return half of the items, shuffled with as many items of another question's rubric as are missing (Noisy).

    ``others`` are rubrics of other questions, one of which is drawn; it contributes at least one item.
    """
    if not others:
        raise InputError("a noisy rubric needs rubrics of other questions; give data with more than one question")
    foreign = others[make_key(key, "other") % len(others)]
    count = len(rubric.criteria)
    kept = _subset(rubric, (count + 1) // 2, make_key(key, "own"))
    mixed = kept + _subset(foreign, max(count // 2, 1), make_key(key, "foreign"))
    return Criteria(tuple(mixed[index] for index in permutation(make_key(key, "mixed"), len(mixed))))


def _subset(rubric: Criteria, count: int, key: int) -> tuple[Criterion, ...]:
    chosen = sorted(permutation(key, len(rubric.criteria))[:count])
    return tuple(rubric.criteria[index] for index in chosen)


def _written_list(text: str) -> list[object] | Literal["unfinished"] | None:
    """Return the first JSON list after the thinking; ``unfinished`` if the list or the thinking is truncated."""
    if breaks_off(text):
        return "unfinished"
    return _first_list(without_thinking(text)[:MAX_RUBRIC_TEXT])


def _first_list(text: str) -> list[object] | Literal["unfinished"] | None:
    """Return the first JSON list, in time linear in the text: text that a failed attempt has read is skipped."""
    decoder = json.JSONDecoder(strict=False)  # strings may contain line breaks
    text = text.rstrip()
    start = text.find("[")
    for _ in range(TRIES):
        if start < 0:
            return None
        try:
            return decoder.raw_decode(text, start)[0]
        except json.JSONDecodeError as error:
            if error.pos >= len(text) or error.msg.startswith("Unterminated string"):
                return "unfinished"
            start = text.find("[", max(error.pos, start + 1))
        except (ValueError, RecursionError):  # a number of thousands of digits, or too many nested brackets
            return None
    return None


def _criterion(item: object) -> Criterion | None:
    if isinstance(item, str):
        item = {"description": item}
    if not isinstance(item, dict):
        return None
    description, title = item.get("description"), item.get("title")
    if not isinstance(description, str) or not description.strip() or not isinstance(title, str | None):
        return None
    weight = _weight(item.get("weight"), CATEGORY_WEIGHTS[_category(description)])
    return None if weight is None else Criterion((title or "").strip(), description.strip(), weight)


def _category(description: str) -> Category | None:
    match = _CATEGORY_PREFIX.match(description)
    word = match[1].lower() if match else ""
    return next((category for category in get_args(Category) if category == word), None)


def _weight(value: object, default: int) -> int | None:
    """Return a weight as a whole number; ``default`` without a value, None if it is not a number within bounds."""
    if value is None:
        return default
    if isinstance(value, str):
        text = value.replace("\u2212", "-").strip()
        value = float(text) if _NUMBER.fullmatch(text) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value) or abs(value) > LARGEST_WEIGHT:
        return None
    return round(value)
