"""Which option of a multiple-choice question a completion chooses: exactly one letter, or none."""

import re
from collections.abc import Sequence
from typing import Any

from dllm_sd.tasks.grading import MAX_TEXT, filled_mark

_WRAP = re.compile(r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|mbox)\s{0,8}\{([^{}]{0,400})\}")
_LETTER = r"""
    (?:(?i:option|choice|letter)\ {1,4})?
    [$*_(\[{"'`\u2018\u201c\\]{0,6}
    (?P<letter>[A-Z] | [a-z](?=[)\]*.,;"'`]|\s*$))  # a lower-case letter only where it cannot be an article
    (?![\w+\#=^/-]|['\u2019.]\w)
    [)\]}*_$"'`\u2019\u201d\\]{0,6}
"""
_HOW = r"(?:(?i:most\ likely|likely|probably|clearly|definitely|indeed|therefore|thus|simply|then|obviously)\ )?"
_STATED = re.compile(
    r"""
    (?: (?i:\b(?:answer|choice|option)\b) [*_]{0,2}
        (?: (?i:\s{1,4}(?:is|are|(?:should|must|would|will)\ be)\b) \s{0,4}:? | \s{0,4}[:=\u2013\u2014] | \s{1,4}- )
      | (?: \bI(?:'ll|\ will|\ would)?\ (?i:choose|pick|select|go\ with)
          | (?:^|[.:\n]\s{0,4})(?i:choose|pick|select) )\b )
    [*_]{0,2} \s{0,4} """
    + _HOW
    + _LETTER
    + r"(?=(?P<rest>.{0,80}(?:\n\s{0,4}[A-Z](?=\s*(?:\n|$)))?))",
    re.VERBOSE,
)
"""Matches "The answer is C", "**Answer:** (C)" and "I choose option C"."""
_DOUBTED = re.compile(
    r"(?i:\b(?:not|n't|wrong|incorrect|worst|false|bad|least|likely|unlikely|neither|doubt)\b[^.\n]{0,20})$"
)
_CALLED = re.compile(
    r"\s(?:is|must\sbe|should\sbe)\s(?:(?:clearly|indeed|therefore|thus)\s)?"
    r"(?:the\s)?(?:only\s)?(?:correct|right|best|(?:final\s)?answer)\b(?!\s+(?:only|if|unless))"
)
"""Matches "is correct" and "is the right answer" after a letter."""
_BEFORE = re.compile(
    r"(?:^|[.:;,\n!?]\s{0,4})(?:(?i:so|therefore|thus|hence|then|clearly|i\ think|i\ believe),?(?:\ that)?\s{1,4})?"
    r"(?:(?i:the|only)\s{1,4})?" + _LETTER + r"$",
    re.VERBOSE,
)
_DENIED = re.compile(
    r"(?i:\W{0,6}(?:wrong|incorrect|false|no\b|which\ is\ (?:wrong|incorrect|not))"
    r"|\s{0,4}(?:(?:is|are|was|looks|seems|can)\b.{0,24}\b(?:wrong|incorrect|false|not|too|ruled|impossible)\b"
    r"|isn't|cannot|fails))"
)
_REASON = re.compile(r"\b(?:because|since|for|given|due|which|that|where|as(?! well))\b|[.;:]")
_ANOTHER = re.compile(
    r"[\s.,;|+&/()\u2013\u2014-]{0,6}"
    r"(?i:(?:or|and|maybe|perhaps|plus|also|possibly|alternatively|as\ well\ as|then|,)[\s,]{0,4}){0,3}"
    r"(?:(?i:option|choice)\s{1,4})?[*(\[]{0,3}[A-Z](?![\w'])(?!\s+[a-z])"
)
_ANY_LETTER = re.compile(r"(?<![\w'])(?<!not )(?<!than )(?<!over )(?<!of )(?<!unlike )[A-Z](?![\w'+#=^-])(?!\s+[a-z])")
_ARTICLE = re.compile(
    r"\s{1,4}(?!(?:because|since|as|for|which|that|due|given|with|from|and|but|not|rather|is|or|unless|maybe)\b)[a-z]"
)
_SINGLE_LETTER = re.compile(r"(?i:option\s{1,4})?[*(\[]{0,4}([A-Za-z])[*)\]]{0,4}[.?]?")
_LEADING_LETTER = re.compile(r"[*(\[]{0,4}([A-Z])(?:[*)\]]{1,4}|[:.])(?=[\s*:.]|$)")
_LETTER_AND_TEXT = re.compile(
    r"[*(\[]{0,4}([A-Z])[*)\]]{0,4}\s{0,4}[:.)\u2013\u2014-]{0,2}[*]{0,4}\s{1,4}(.{1,400})", re.DOTALL
)
_UNSURE = re.compile(r"(?i:\b(?:not|wrong|incorrect|false|maybe|perhaps|or|either|neither|nor)\b)")


def read_letter(text: str, letters: str, options: Any = None) -> str | None:
    """Return the letter among ``letters`` that a completion chooses, or None if it chooses none or several."""
    if (marked := filled_mark(text)) is not None:
        return _read_marked(marked, letters, options)
    text = text[-MAX_TEXT:].strip()
    if stated := _statements(text):
        return stated[-1] if stated[-1] in letters else None
    lines = text.splitlines()
    if len({match.group(1) for line in lines if (match := _LEADING_LETTER.match(line.strip()))}) > 1:
        return None  # a list of options does not choose one of them
    return _read_marked(lines[-1], letters, None) if lines else None


def _read_marked(content: str, letters: str, options: Any) -> str | None:
    """Return the letter that a marked answer consists of or begins with, or whose option it repeats."""
    content = _WRAP.sub(r"\1", content[:MAX_TEXT].replace("$", " ")).strip()
    if isinstance(options, list | tuple):
        texts = [str(option).strip() for option in options]
        if texts.count(content) == 1 and texts.index(content) < len(letters):
            return letters[texts.index(content)]
        if (
            (text := _LETTER_AND_TEXT.fullmatch(content))
            and text[1] in letters
            and text[2].strip() == _option_text(texts, letters, text[1])
        ):
            return text[1]
    match = _SINGLE_LETTER.fullmatch(content) or _LEADING_LETTER.match(content)
    if match is None:
        stated = _statements(content)
        return stated[-1] if stated and stated[-1] in {*letters} else None
    letter, rest = match.group(1).upper(), content[match.end() :]
    other_letters = {*re.findall(r"(?<![\w'])([A-Z])(?![\w'])(?!\s+[a-z])", rest)} & {*letters} - {letter}
    return letter if letter in letters and not other_letters and not _UNSURE.search(rest) else None


def _option_text(texts: Sequence[str], letters: str, letter: str) -> str | None:
    """Return the text of the option with a letter."""
    index = letters.index(letter)
    return texts[index] if index < len(texts) else None


def _statements(text: str) -> list[str]:
    """Return the letters that a text states to be right, in order; a blank stands for several letters at once."""
    statements: list[tuple[int, str]] = []
    for match in _STATED.finditer(text):
        rest = match["rest"]
        bare = text[match.start("letter") - 1] == " "
        article = match["letter"] in "AI" and bare and _ARTICLE.match(rest)
        if (
            not article
            and not _DENIED.match(rest)
            and not _DOUBTED.search(text[max(match.start() - 30, 0) : match.start()])
        ):
            claim = _REASON.split(rest, maxsplit=1)[0]
            several = _ANOTHER.match(rest) or any(
                mentioned != match["letter"] for mentioned in _ANY_LETTER.findall(claim)
            )
            statements.append((match.start("letter"), " " if several else match["letter"]))
    for match in _CALLED.finditer(text):
        before = text[max(match.start() - 40, 0) : match.start()]
        if letter := _BEFORE.search(before):
            statements.append((match.start() - len(before) + letter.start("letter"), letter["letter"]))
    return [letter.upper() for _, letter in sorted(statements)]
