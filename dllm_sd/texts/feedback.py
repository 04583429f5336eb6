"""Peer feedback that is anchored in the problem and does not contain the answer (OPCoD, arXiv 2606.14368).

Sec. 3.3 and App. C give rules but no regular expressions; the expressions are ours, with options named A to J. All of
them take time linear in the text.
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
"""The prompt of a peer: ``{tutor_domain}``, ``{student_domain}``, ``{question}``, ``{response}``."""

_GENERIC_NOUNS = ("problem", "question", "answer", "value", "calculation", "formula", "student", "peer", "specialist")
GENERIC = frozenset({*_GENERIC_NOUNS, *(f"{word}s" for word in _GENERIC_NOUNS), "formulae"})
"""Words that fit any problem: the nine of App. C, and their plurals."""

_FUNCTION_WORDS = """
about after all an and any are as at be because been before between both but by can could do does each for from had has
have he her his how if in into is it its may more most must no nor not of off on only or other our out over she should
so some such than that the their them then there these they this those through to under up was we were what when where
which while who whose why will with would you your
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""English stop words, which do not anchor the feedback in a problem; single letters count as stop words too."""

MAX_FEEDBACK_TEXT = 20_000
"""Characters of feedback, after its thinking, that are read; a reply of 1024 tokens is far shorter."""
LONGEST_BOX = 400
"""Longest content of a box, in characters, that may be a letter and the option's text."""
LONGEST_ANSWER = 200
"""Most characters after ``Final answer:`` that are deleted if the sentence is longer."""

# All repetitions are bounded, which bounds the time of a match at any position. Phrases match in either case.
_GOOD = r"(?:correct|right|true|best|final|actual|only)"
_MARK = r"[*_$\"'\u2018\u2019\u201c\u201d]"
_LETTER = (  # a single lower-case letter may be an article
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
_CONTINUES = re.compile(r"[^\W_]|[.,/^][0-9]")
_BRACES = re.compile(r"\$?\\(?:boxed|fbox)\s{0,8}\{|\\[{}]|[{}]")
_MARKUP = re.compile(
    r"\\(?:boxed|fbox|text|textbf|textit|textrm|mathrm|mathbf|mbox|bf|rm)(?![A-Za-z])|\\[ ,;:!]|[{}$*~]"
)
_OPTION_IN_BOX = re.compile(
    r"(?i:(?:option|choice|answer)\s+)?(?:[A-Ja-j]|(?:\([A-Ja-j]\)|[A-Ja-j][.)])(?:\s.*)?)", re.DOTALL
)
_BOLD_OPTION = re.compile(
    r"\*\*\s{0,4}(?:\([A-Ja-j]\)[^*\n]{0,200}|[A-Ja-j][.):](?:\s[^*\n]{0,200})?|[A-Ja-j]\s{0,4})\*\*",
)
_CONCEPT = re.compile(r"<(/?)concept>", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+")

Span = tuple[int, int]


def sanitise(text: str, problem: str, answer: str | None = None) -> tuple[str | None, str]:
    """Return the part of a peer's feedback that a teacher may read, and the outcome (App. C.2).

    First everything that reveals the answer is deleted, then the concept tag is checked, then the tag is removed.

    Args:
        text: the reply of the peer; its thinking is dropped.
        problem: the problem as the student reads it.
        answer: the right answer of a free-form problem; statements that the answer is this one are deleted too.

    Returns:
        The text and ``match:WORD``, where WORD is the word of the problem that the tag names, in lower case; or None
        and the reason: ``fb_none`` the text is empty, or becomes empty without the tag; ``no_concept_tag``; ``empty``
        the tag has no word; ``all_generic`` all words are in `GENERIC` or `FUNCTION_WORDS`; ``no_match`` none of the
        remaining words occurs in the problem.
    """
    text = without_thinking(text)[:MAX_FEEDBACK_TEXT]
    if not text:
        return None, "fb_none"
    text = without_answer(text, answer)
    concept, remaining = _split(text)
    if concept is None:
        return None, "no_concept_tag"
    words = _words(concept)
    if not words:
        return None, "empty"
    specific = [word for word in words if len(word) > 1 and word not in GENERIC and word not in FUNCTION_WORDS]
    if not specific:
        return None, "all_generic"
    problem_words = set(_words(problem))
    match = next((word for word in specific if word in problem_words), None)
    if match is None:
        return None, "no_match"
    return (remaining, f"match:{match}") if remaining else (None, "fb_none")


def without_answer(text: str, answer: str | None = None) -> str:
    """Remove everything that reveals the answer from a text; the rest is unchanged.

    Deleted are: ``Final answer: ...`` to the end of the sentence; the part of a sentence that calls an option right
    (``the correct option is B``, ``option B is correct``); a box or bold text with the letter of an option, with or
    without the option's text; and, if ``answer`` is given, ``the answer is ANSWER`` and a box with exactly this answer.
    Other boxes (numbers, formulas) and options that are merely mentioned stay.
    """
    answer = answer.strip() if answer else None
    text = _without_spans(text, _final_answers(text))
    for pattern in (_OPTION_IS, _OPTION_COLON, _OPTION_IS_RIGHT, _LETTER_IS_RIGHT):
        text = pattern.sub("", text)
    if answer:
        text = _without_spans(text, _stated_answers(text, answer))
    text = _without_spans(text, _boxes(text, answer))
    return _BOLD_OPTION.sub("", text)


def _final_answers(text: str) -> Iterator[Span]:
    for match in _FINAL.finditer(text):
        end = _SENTENCE_END.search(text, match.end(), match.end() + LONGEST_ANSWER)
        yield match.start(), end.end() if end else match.end() + LONGEST_ANSWER


def _stated_answers(text: str, answer: str) -> Iterator[Span]:
    for match in _ANSWER_IS.finditer(text):
        end = match.end() + len(answer)
        if text.startswith(answer, match.end()) and not _CONTINUES.match(text, end):
            closers = _CLOSERS.match(text, end)
            yield match.start(), closers.end() if closers else end


def _boxes(text: str, answer: str | None) -> list[Span]:
    """Return the spans of boxes with an option's letter or the answer, and their dollar signs; the last may be open."""
    spans: list[Span] = []
    stack: list[re.Match[str] | None] = []
    for match in _BRACES.finditer(text):
        brace = match[0]
        if brace == "}":
            box = stack.pop() if stack else None
            if box is not None and _reveals(text, box.end(), match.start(), answer):
                dollar = box[0].startswith("$") and text.startswith("$", match.end())
                spans.append((box.start() + (box[0].startswith("$") and not dollar), match.end() + dollar))
        elif brace[-1] == "{" and brace != "\\{":
            stack.append(match if len(brace) > 1 else None)
    spans += [(box.start(), len(text)) for box in stack if box and _reveals(text, box.end(), len(text), answer)]
    return sorted(spans)


def _reveals(text: str, start: int, end: int, answer: str | None) -> bool:
    size = end - start
    if answer and len(answer) <= size <= len(answer) + 8 and text[start:end].strip() == answer:
        return True
    content = " ".join(_MARKUP.sub(" ", text[start:end]).split()) if size <= LONGEST_BOX else ""
    return _OPTION_IN_BOX.fullmatch(content) is not None


def _without_spans(text: str, spans: Iterator[Span] | list[Span]) -> str:
    """Remove spans from a text; the spans are sorted and may overlap."""
    pieces, position = [], 0
    for start, end in spans:
        pieces.append(text[position : max(start, position)])
        position = max(end, position)
    return "".join([*pieces, text[position:]])


def _split(text: str) -> tuple[str | None, str]:
    """Return the content of the first closed concept tag, or None, and the text without all concept tags."""
    concept: str | None = None
    pieces, position = [], 0
    opened: re.Match[str] | None = None
    for tag in _CONCEPT.finditer(text):
        if opened is None:
            pieces.append(text[position : tag.start()])
            position = tag.end()
            opened = None if tag[1] else tag
        elif tag[1]:
            concept = text[opened.end() : tag.start()] if concept is None else concept
            opened, position = None, tag.end()
    return concept, "".join([*pieces, text[position:]]).strip()


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
