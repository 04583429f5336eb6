"""Which option of a multiple-choice question a completion gives: exactly one letter, or none."""

import re
from collections.abc import Sequence
from typing import Any

from dllm_sd.tasks.grading import MAX_TEXT, filled_mark

_WRAP = re.compile(r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|mbox)\s{0,8}\{([^{}]{0,400})\}")
_LETTER = r"""
    (?:(?i:option|choice|letter)\ {1,4})?
    [$*_(\[{"'`\u2018\u201c\\]{0,6}
    (?P<letter>[A-Z] | [a-z](?=[)\]*.,;"'`]|\s*$))  # a small one only where it can be no article
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
"""The answer is C; **Answer:** (C); I choose option C."""
_DOUBTED = re.compile(
    r"(?i:\b(?:not|n't|wrong|incorrect|worst|false|bad|least|likely|unlikely|neither|doubt)\b[^.\n]{0,20})$"
)
_CALLED = re.compile(
    r"\s(?:is|must\sbe|should\sbe)\s(?:(?:clearly|indeed|therefore|thus)\s)?"
    r"(?:the\s)?(?:only\s)?(?:correct|right|best|(?:final\s)?answer)\b(?!\s+(?:only|if|unless))"
)
"""C is correct; option C is the right answer."""
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
_OTHER = re.compile(r"(?<![\w'])(?<!not )(?<!than )(?<!over )(?<!of )(?<!unlike )[A-Z](?![\w'+#=^-])(?!\s+[a-z])")
_ARTICLE = re.compile(
    r"\s{1,4}(?!(?:because|since|as|for|which|that|due|given|with|from|and|but|not|rather|is|or|unless|maybe)\b)[a-z]"
)
_ALONE = re.compile(r"(?i:option\s{1,4})?[*(\[]{0,4}([A-Za-z])[*)\]]{0,4}[.?]?")
_LED = re.compile(r"[*(\[]{0,4}([A-Z])(?:[*)\]]{1,4}|[:.])(?=[\s*:.]|$)")
_TEXT = re.compile(r"[*(\[]{0,4}([A-Z])[*)\]]{0,4}\s{0,4}[:.)\u2013\u2014-]{0,2}[*]{0,4}\s{1,4}(.{1,400})", re.DOTALL)
_UNSURE = re.compile(r"(?i:\b(?:not|wrong|incorrect|false|maybe|perhaps|or|either|neither|nor)\b)")


def read_letter(text: str, letters: str, options: Any = None) -> str | None:
    """The letter among ``letters`` that a completion gives, or None where it gives none or several."""
    if (marked := filled_mark(text)) is not None:
        return _marked(marked, letters, options)
    text = text[-MAX_TEXT:].strip()
    if stated := _statements(text):
        return stated[-1] if stated[-1] in letters else None
    lines = text.splitlines()
    if len({match.group(1) for line in lines if (match := _LED.match(line.strip()))}) > 1:
        return None  # a list of options is no choice among them
    return _marked(lines[-1], letters, None) if lines else None


def _marked(content: str, letters: str, options: Any) -> str | None:
    """The letter that a marked answer is, or that it begins with, or whose option it repeats."""
    content = _WRAP.sub(r"\1", content[:MAX_TEXT].replace("$", " ")).strip()
    if isinstance(options, list | tuple):
        texts = [str(option).strip() for option in options]
        if texts.count(content) == 1 and texts.index(content) < len(letters):
            return letters[texts.index(content)]
        if (
            (text := _TEXT.fullmatch(content))
            and text[1] in letters
            and text[2].strip() == _at(texts, letters, text[1])
        ):
            return text[1]
    match = _ALONE.fullmatch(content) or _LED.match(content)
    if match is None:
        stated = _statements(content)
        return stated[-1] if stated and stated[-1] in {*letters} else None
    letter, rest = match.group(1).upper(), content[match.end() :]
    others = {*re.findall(r"(?<![\w'])([A-Z])(?![\w'])(?!\s+[a-z])", rest)} & {*letters} - {letter}
    return letter if letter in letters and not others and not _UNSURE.search(rest) else None


def _at(texts: Sequence[str], letters: str, letter: str) -> str | None:
    """The text of the option with a letter."""
    place = letters.index(letter)
    return texts[place] if place < len(texts) else None


def _statements(text: str) -> list[str]:
    """The letters that a text says are right, in its order; a blank where it names several at once."""
    found: list[tuple[int, str]] = []
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
            several = _ANOTHER.match(rest) or any(other != match["letter"] for other in _OTHER.findall(claim))
            found.append((match.start("letter"), " " if several else match["letter"]))
    for match in _CALLED.finditer(text):
        before = text[max(match.start() - 40, 0) : match.start()]
        if letter := _BEFORE.search(before):
            found.append((match.start() - len(before) + letter.start("letter"), letter["letter"]))
    return [letter.upper() for _, letter in sorted(found)]
