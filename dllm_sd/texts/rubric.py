"""Rubrics: what a good solution must show, item by item (RCSD, arXiv 2606.19327, Sec. 2.1, 2.3 and App. B.1).

A rubric is written as a JSON list of objects with a title, a description and a weight, or of plain sentences. Its
importance is told by the first word of the description, such as ``Essential Criteria: ...``. Weights are words for the
teacher; nothing is computed from them.
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

LONGEST = 100_000
"""Characters behind the thinking that are looked at."""
TRIES = 200
"""Opening brackets that are tried; each may begin the list."""
LARGEST_WEIGHT = 1_000

Category = Literal["essential", "important", "optional", "pitfall", "negative"]
"""The paper's four, and one that trained generators write for a pitfall."""
Reason = Literal["no_list", "empty", "bad_item"]
"""Why a text is no rubric: no JSON list in it, a list of nothing, an item that is no criterion."""

WEIGHTS: dict[Category | None, int] = {
    "essential": 5,
    "important": 3,
    "optional": 1,
    "pitfall": -1,
    "negative": -1,
    None: 1,
}
"""The weight of an item that states none, from the ranges of App. B.1; ``None`` is an item without a category."""

_CATEGORY = re.compile(rf"\s*({'|'.join(get_args(Category))})(?:\s+criteri(?:a|on))?\s*:", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?[0-9]{1,9}(?:\.[0-9]{1,9})?")


@dataclass(frozen=True)
class Criterion:
    """One item of a rubric; a plain sentence has no title."""

    title: str
    description: str
    weight: int

    @property
    def category(self) -> Category | None:
        """Its importance, by the first word of the description."""
        return _category(self.description)


@dataclass(frozen=True)
class Rubric:
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
"""Asks for a rubric by the question alone (Eq. 4): ``{question}``. Stage I learns to answer it (the default of
`task.prompt` under `task.grader` rubric), and Stage II asks its writer so (that of a rubric context's `prompt`)."""

_QUESTION_ONLY = "Question:\n{question}\n"
_WITH_REFERENCE = f"""{_QUESTION_ONLY}
A reference answer, to learn from what matters; the points must fit other right answers as well:
{{reference}}
"""

RUBRIC_WRITER = RUBRIC_WRITER_PLAIN.replace(_QUESTION_ONLY, _WITH_REFERENCE)
"""Asks for a rubric by the question and its reference answer (as the released code does): ``{question}``,
``{reference}``."""

RUBRIC_GOLD = """\
{question}

The marking scheme that is wanted, as a JSON list:
{hint}

Take it as it is, and reply with that JSON list alone."""
"""The teacher's prompt where rubric writing is learnt (Stage I in the released code). ``{question}`` is the whole
prompt of the student, one of the two above; ``{hint}`` is the data's rubric."""

RUBRIC_TEACHER = """\
{question}

What a marker will look for, as a JSON list. Only you can see it, and a point may be mistaken:
{hint}

Keep these points in mind and solve the problem from the start, so that the solution stands on its own. Leave the list \
unmentioned."""
"""The teacher's prompt where solving is learnt, by the rubric alone (Eq. 5): ``{question}``, ``{hint}``."""

RUBRIC_TEACHER_REFERENCE = """\
{question}

The reference answer. Only you can see it:
{reference}

What a marker will look for, as a JSON list. Only you can see it, and a point may be mistaken:
{hint}

Keep both in mind, and where they disagree trust the answer. Solve the problem from the start, so that the solution \
stands on its own. Leave the reference and the list unmentioned."""
"""The same with the reference answer (as the released code does): ``{question}``, ``{hint}``, ``{reference}``."""


def parse_rubric(source: object) -> Rubric | Reason:
    """The rubric in a model's text, or that of a field of the data (a list, or JSON text), or why there is none.

    The first JSON list of a text counts, whatever it holds. A list that breaks off, and all that stands in it, is none.
    An item is a sentence or an object with a description. A title may be missing, and so may a weight (see `WEIGHTS`),
    which may be text or a fraction.
    """
    items = _written_list(source) if isinstance(source, str) else source
    if isinstance(items, str) or not isinstance(items, list | tuple):
        return "no_list"
    if not items:
        return "empty"
    criteria = [_criterion(item) for item in items]
    good = tuple(one for one in criteria if one is not None)
    return Rubric(good) if len(good) == len(criteria) else "bad_item"


def is_unfinished(text: str) -> bool:
    """Whether a text is no rubric since its thinking or its list breaks off, as where the writer's length ends it."""
    return _written_list(text) == "unfinished"


def render_rubric(rubric: Rubric) -> str:
    """The rubric as a JSON list, one item a line; `parse_rubric` reads it back."""
    lines = []
    for one in rubric.criteria:
        title = {"title": one.title} if one.title else {}
        fields = {**title, "description": one.description, "weight": one.weight}
        lines.append(json.dumps(fields, ensure_ascii=False))
    return "[" + ",\n".join(lines) + "]"


def generic() -> Rubric:
    """One rubric for all questions (the variant Generic of Table 6)."""
    items = (
        ("Understand", "Says in its own words what is asked, and asks nothing else."),
        ("Identify", "Picks out the facts and quantities that bear on the question."),
        ("Choose", "Settles on a method that suits the question."),
        ("Execute", "Carries the method through in order, with no step left out."),
        ("Check", "Tests the result against the question, by another way or by its size."),
        ("Answer", "Ends with one clear answer in the form that is asked for."),
    )
    return Rubric(tuple(Criterion(title, description, 1) for title, description in items))


def reduced(own: Rubric, key: int) -> Rubric:
    """Half of the items, rounded up, in their order (Reduced)."""
    count = len(own.criteria)
    return Rubric(_some(own, (count + 1) // 2, make_key(key, "reduced")))


def noisy(own: Rubric, others: Sequence[Rubric], key: int) -> Rubric:
    """Half of the items and as many of another question's as make up for the rest, mixed (Noisy).

    ``others`` are rubrics of other questions; one of them is drawn. It gives one item at least.
    """
    if not others:
        raise InputError("a noisy rubric needs rubrics of other questions; give data with more than one question")
    other = others[make_key(key, "other") % len(others)]
    count = len(own.criteria)
    kept = _some(own, (count + 1) // 2, make_key(key, "own"))
    mixed = kept + _some(other, max(count // 2, 1), make_key(key, "foreign"))
    return Rubric(tuple(mixed[place] for place in permutation(make_key(key, "mixed"), len(mixed))))


def _some(rubric: Rubric, count: int, key: int) -> tuple[Criterion, ...]:
    chosen = sorted(permutation(key, len(rubric.criteria))[:count])
    return tuple(rubric.criteria[place] for place in chosen)


def _written_list(text: str) -> list[object] | Literal["unfinished"] | None:
    """The first JSON list behind the thinking, or that one of the two breaks off."""
    if breaks_off(text):
        return "unfinished"
    return _first_list(without_thinking(text)[:LONGEST])


def _first_list(text: str) -> list[object] | Literal["unfinished"] | None:
    """The first JSON list, in time linear in the text: what a failed try has read is not read again."""
    decoder = json.JSONDecoder(strict=False)  # a line may break within a string
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
        except (ValueError, RecursionError):  # a number of thousands of digits; brackets in brackets without end
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
    weight = _weight(item.get("weight"), WEIGHTS[_category(description)])
    return None if weight is None else Criterion((title or "").strip(), description.strip(), weight)


def _category(description: str) -> Category | None:
    found = _CATEGORY.match(description)
    word = found[1].lower() if found else ""
    return next((one for one in get_args(Category) if one == word), None)


def _weight(value: object, default: int) -> int | None:
    """A weight as a whole number: ``default`` where there is none, None where it is no number of a sane size."""
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
