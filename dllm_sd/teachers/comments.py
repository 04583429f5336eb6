"""A peer's feedback as text: anchored in the problem, and without the answer (OPCoD, arXiv 2606.14368, App. C).

The paper names its rules and not its expressions; these are ours. Letters of options are A to J.
"""

import re

LONGEST = 20_000
"""Characters of feedback that are read."""
GENERIC = frozenset(
    {"problem", "question", "answer", "value", "calculation", "formula", "student", "peer", "specialist"}
    | {"a", "an", "and", "as", "at", "by", "for", "from", "in", "is", "it", "of", "on", "or", "the", "to", "with"}
)
"""Words that anchor nothing: the nine that the paper names, and such as stand in any text."""

_CONCEPT = re.compile(r"<concept>([^<]{0,400})</concept>", re.IGNORECASE)
_LETTER = r"\(?[A-Ja-j]\)?"
_REVEALS = (
    re.compile(r"\$?\\boxed\{\s*(?:\\text\{\s*)?" + _LETTER + r"\s*\}{1,2}\$?"),
    re.compile(r"\*\*\s*" + _LETTER + r"[.:]?\s*\*\*"),
    re.compile(r"\bfinal answer\s*(?:is|:)\s*[^\n]{0,200}", re.IGNORECASE),
    re.compile(
        r"\bthe (?:correct|right) (?:option|answer|choice) is\s*:?\s*" + _LETTER + r"(?![A-Za-z])[.]?", re.IGNORECASE
    ),
)
_WORD = re.compile(r"[^\W_]+")


def sanitise(text: str, problem: str) -> tuple[str | None, str]:
    """What the student's teacher may read of feedback, and what became of it.

    Args:
        text: as the peer wrote it, without thinking.
        problem: the problem as the student reads it.

    Returns:
        The text and ``match:WORD`` (the word of the problem that it names); or None and the reason: fb_none (nothing
        was written), no_concept_tag, all_generic, no_match, empty (nothing is left beside the tag).
    """
    text = text[:LONGEST]
    if not text.strip():
        return None, "fb_none"
    for pattern in _REVEALS:
        text = pattern.sub("", text)
    tag = _CONCEPT.search(text)
    if tag is None:
        return None, "no_concept_tag"
    words = [word for word in _WORD.findall(tag[1].lower()) if word not in GENERIC]
    if not words:
        return None, "all_generic"
    known = set(_WORD.findall(problem.lower()))
    named = next((word for word in words if word in known), None)
    if named is None:
        return None, "no_match"
    rest = _CONCEPT.sub("", text).strip()
    return (rest, f"match:{named}") if rest else (None, "empty")
