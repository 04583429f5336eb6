"""A peer's feedback: anchored in the problem, and without the answer (OPCoD, arXiv 2606.14368, Sec. 3.3 and App. C).

The paper gives its rules and not its expressions; those are ours, with options named A to J. All of them take time
linear in the text.
"""

import re
from collections.abc import Iterator

from dllm_sd.texts.thinking import without_thinking

FEEDBACK = """\
Your field is {tutor_domain}. A colleague whose field is {student_domain} has worked on the problem below and wants to \
hear what you think of it.

The problem:
{question}

The colleague's work:
{response}

Your reply has two parts.
First, and before anything else, one term of one to three words that the problem turns on, written as it stands in the \
problem: <concept>term</concept>. A word that would fit any problem, such as "answer" or "formula", is no good.
Then three to five sentences, no more than 80 words. Look at the work as somebody from {tutor_domain} does: what \
holds, what does not, what is left out, and in which step. Do not work the problem out, and say neither the answer nor \
the letter of an option."""
"""Asks a peer: ``{tutor_domain}``, ``{student_domain}``, ``{question}``, ``{response}``."""

_NAMED = ("problem", "question", "answer", "value", "calculation", "formula", "student", "peer", "specialist")
GENERIC = frozenset({*_NAMED, *(f"{word}s" for word in _NAMED), "formulae"})
"""Words that fit any problem: the nine that App. C names, and their plurals."""

_FUNCTION_WORDS = """
about after all an and any are as at be because been before between both but by can could do does each for from had has
have he her his how if in into is it its may more most must no nor not of off on only or other our out over she should
so some such than that the their them then there these they this those through to under up was we were what when where
which while who whose why will with would you your
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""English words that stand in nearly every text and so anchor nothing; single letters count as such too."""

LONGEST = 20_000
"""Characters of feedback, behind its thinking, that are read; a reply of 1024 tokens is far shorter."""
LONGEST_BOX = 400
"""Characters in a box that may be a letter and the option's text."""
LONGEST_ANSWER = 200
"""Characters behind ``Final answer:`` that are deleted where the sentence goes on longer."""

# Repeats are bounded, so that no text can make one of these look far from any place. Phrases are read in either case.
_GOOD = r"(?:correct|right|true|best|final|actual|only)"
_MARK = r"[*_$\"'\u2018\u2019\u201c\u201d]"
_LETTER = (  # a lone small letter may be an article
    r"(?:(?i:option|choice|letter)\s{1,4})?"
    rf"(?:{_MARK}{{0,3}}(?:\(?[A-J]\)?|\([a-j]\))|{_MARK}{{1,3}}[a-j](?={_MARK})){_MARK}{{0,3}}(?![\w-])\.?"
)
_OPTION_IS = re.compile(
    rf"(?i:(?:\bthe\s{{1,4}}(?:{_GOOD}\s{{1,4}}){{0,2}}|\b(?:{_GOOD}\s{{1,4}}){{1,2}})(?:option|answer|choice|letter)"
    rf"\s{{1,4}}(?:is|was|(?:should|must|would)\s{{1,4}}be)\s{{0,4}}:?)\s{{0,4}}{_LETTER}"
)
_OPTION_COLON = re.compile(rf"(?i:\b(?:{_GOOD}\s{{1,4}})?(?:option|answer|choice)\s{{0,4}}[:=])\s{{0,4}}{_LETTER}")
_OPTION_IS_RIGHT = re.compile(
    r"(?i:\b(?:option|choice|answer)\s{1,4}\*{0,2}\(?[A-J]\)?\*{0,2}\s{1,4}(?:is|was)\s{1,4}(?:the\s{1,4})?"
    r"(?:correct|right|best)(?:\s{1,4}(?:option|answer|choice|one))?\b)\.?"
)
_LETTER_IS_RIGHT = re.compile(
    r"(?<![\w'-])\*{0,2}\(?[A-J]\)?\*{0,2}\s{1,4}(?i:(?:is|was)\s{1,4}the\s{1,4}(?:correct|right|best)\s{1,4}"
    r"(?:option|answer|choice|one)\b)\.?"
)
_FINAL = re.compile(r"(?:\*\*)?\bfinal\s{1,4}answer\s{0,4}(?:\*\*)?\s{0,4}:\s{0,4}(?:\*\*)?\s{0,8}", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s{1,8}[A-Z]|\s{0,8}\Z)|(?=\n)|\Z")
_ANSWER_IS = re.compile(
    rf"(?i:(?:\bthe\s{{1,4}})?(?:\b{_GOOD}\s{{1,4}}){{0,2}}\banswer\s{{0,4}}"
    r"(?:=|:|(?:\bis\b|\bwas\b|\bequals\b|\b(?:should|must|would)\s{1,4}be\b)\s{0,4}:?))"
    r"\s{0,4}[*$(\"'\u201c]{0,4}(?:\\boxed\{\s{0,4})?"
)
_CLOSERS = re.compile(r"[*$)\"'\u201d}]{0,4}(?:\.(?=\s|\Z))?")
_GOES_ON = re.compile(r"[^\W_]|[.,/^][0-9]")
_BRACES = re.compile(r"\$?\\(?:boxed|fbox)\s{0,8}\{|\\[{}]|[{}]")
_MARKUP = re.compile(
    r"\\(?:boxed|fbox|text|textbf|textit|textrm|mathrm|mathbf|mbox|bf|rm)(?![A-Za-z])|\\[ ,;:!]|[{}$*~]"
)
_BOXED = re.compile(r"(?i:(?:option|choice|answer)\s+)?(?:[A-Ja-j]|(?:\([A-Ja-j]\)|[A-Ja-j][.)])(?:\s.*)?)", re.DOTALL)
_BOLD = re.compile(
    r"\*\*\s{0,4}(?:\([A-Ja-j]\)[^*\n]{0,200}|[A-Ja-j][.):](?:\s[^*\n]{0,200})?|[A-Ja-j]\s{0,4})\*\*",
)
_CONCEPT = re.compile(r"<(/?)concept>", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+")

Span = tuple[int, int]


def sanitise(text: str, problem: str, answer: str | None = None) -> tuple[str | None, str]:
    """What a teacher may read of a peer's feedback, and what became of it (App. C.2).

    First whatever gives the answer away is deleted, then the concept tag is checked, then it is taken out.

    Args:
        text: as the peer wrote it; its thinking is dropped.
        problem: the problem as the student reads it.
        answer: the right answer of a free-form problem; where the text says that the answer is this, it is deleted too.

    Returns:
        The text and ``match:WORD``, the word of the problem that the tag names, in lower case; or None and why not:
        ``fb_none`` nothing is written, or nothing is left beside the tag; ``no_concept_tag``; ``empty`` no word in the
        tag; ``all_generic`` none but `GENERIC` and `FUNCTION_WORDS`; ``no_match`` none of the others is in the problem.
    """
    text = without_thinking(text)[:LONGEST]
    if not text:
        return None, "fb_none"
    text = without_answer(text, answer)
    concept, rest = _split(text)
    if concept is None:
        return None, "no_concept_tag"
    words = _words(concept)
    if not words:
        return None, "empty"
    telling = [word for word in words if len(word) > 1 and word not in GENERIC and word not in FUNCTION_WORDS]
    if not telling:
        return None, "all_generic"
    known = set(_words(problem))
    named = next((word for word in telling if word in known), None)
    if named is None:
        return None, "no_match"
    return (rest, f"match:{named}") if rest else (None, "fb_none")


def without_answer(text: str, answer: str | None = None) -> str:
    """The text without what gives the answer away; all else is as it was.

    Deleted are: ``Final answer: ...`` to the end of the sentence; a sentence's part that calls an option the right one
    (``the correct option is B``, ``option B is correct``); a box or bold type that holds the letter of an option, with
    the option's text or without; and, where ``answer`` is given, ``the answer is ANSWER`` and a box that holds it, to
    the letter. Other boxes (numbers, formulas) and options that are merely mentioned stay.
    """
    answer = answer.strip() if answer else None
    text = _cut(text, _finals(text))
    for pattern in (_OPTION_IS, _OPTION_COLON, _OPTION_IS_RIGHT, _LETTER_IS_RIGHT):
        text = pattern.sub("", text)
    if answer:
        text = _cut(text, _stated(text, answer))
    text = _cut(text, _boxes(text, answer))
    return _BOLD.sub("", text)


def _finals(text: str) -> Iterator[Span]:
    for match in _FINAL.finditer(text):
        end = _SENTENCE_END.search(text, match.end(), match.end() + LONGEST_ANSWER)
        yield match.start(), end.end() if end else match.end() + LONGEST_ANSWER


def _stated(text: str, answer: str) -> Iterator[Span]:
    for match in _ANSWER_IS.finditer(text):
        end = match.end() + len(answer)
        if text.startswith(answer, match.end()) and not _GOES_ON.match(text, end):
            closers = _CLOSERS.match(text, end)
            yield match.start(), closers.end() if closers else end


def _boxes(text: str, answer: str | None) -> list[Span]:
    """Boxes with an option's letter or with the answer, and the dollar signs at them; the last may break off."""
    found: list[Span] = []
    stack: list[re.Match[str] | None] = []
    for match in _BRACES.finditer(text):
        mark = match[0]
        if mark == "}":
            box = stack.pop() if stack else None
            if box is not None and _reveals(text, box.end(), match.start(), answer):
                dollar = box[0].startswith("$") and text.startswith("$", match.end())
                found.append((box.start() + (box[0].startswith("$") and not dollar), match.end() + dollar))
        elif mark[-1] == "{" and mark != "\\{":
            stack.append(match if len(mark) > 1 else None)
    found += [(box.start(), len(text)) for box in stack if box and _reveals(text, box.end(), len(text), answer)]
    return sorted(found)


def _reveals(text: str, start: int, end: int, answer: str | None) -> bool:
    size = end - start
    if answer and len(answer) <= size <= len(answer) + 8 and text[start:end].strip() == answer:
        return True
    content = " ".join(_MARKUP.sub(" ", text[start:end]).split()) if size <= LONGEST_BOX else ""
    return _BOXED.fullmatch(content) is not None


def _cut(text: str, spans: Iterator[Span] | list[Span]) -> str:
    """The text without the spans, which come in order and may overlap."""
    pieces, done = [], 0
    for start, end in spans:
        pieces.append(text[done : max(start, done)])
        done = max(end, done)
    return "".join([*pieces, text[done:]])


def _split(text: str) -> tuple[str | None, str]:
    """What the first closed concept tag holds, None without one, and the text without all such tags."""
    concept: str | None = None
    pieces, done = [], 0
    opened: re.Match[str] | None = None
    for tag in _CONCEPT.finditer(text):
        if opened is None:
            pieces.append(text[done : tag.start()])
            done = tag.end()
            opened = None if tag[1] else tag
        elif tag[1]:
            concept = text[opened.end() : tag.start()] if concept is None else concept
            opened, done = None, tag.end()
    return concept, "".join([*pieces, text[done:]]).strip()


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
