"""Which option of a multiple-choice question a completion gives: exactly one letter, or none."""

import re
from typing import Any

from dllm_sd.tasks.grading import MAX_TEXT, is_blank, last_answer, last_boxed

_WRAP = re.compile(r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|mbox)\s{0,8}\{([^{}]{0,400})\}")
_LETTER = r"""
    (?:(?i:option|choice|letter)\ {1,4})?
    [$*_(\[{"'`\\]{0,6}
    (?P<letter>[A-Z] | [a-z](?=[)\]*.,;"'`]|\s*$))  # a small one only where it can be no article
    (?![\w'])
    [)\]}*_$"'`\\]{0,6}
"""
_STATED = re.compile(
    r"""
    (?: (?i:\b(?:answer|choice|option)\b) [*_]{0,2} (?i:\s{1,4}(?:is|are|(?:should|must|would|will)\ be)\b)?
      | \bI\ (?i:choose|pick|select|go\ with)\b )
    \s{0,4} [:=]? [*_]{0,2} \s{0,4} [:=]? \s{0,4}
    """
    + _LETTER
    + r"(?=(?P<rest>.{0,80}))",
    re.VERBOSE,
)
"""The answer is C; **Answer:** (C); I choose option C."""
_CALLED = re.compile(
    r"\s(?:is|must\sbe|should\sbe)\s(?:(?:clearly|indeed|therefore|thus)\s)?"
    r"(?:the\s)?(?:only\s)?(?:correct|right|best|(?:final\s)?answer)\b"
)
"""C is correct; option C is the right answer."""
_BEFORE = re.compile(r"(?:^|[\s(\[{*_$\"'`,/])" + _LETTER + r"$", re.VERBOSE)
_DENIED = re.compile(
    r"\s{0,4}(?:(?:is|are|was|looks|seems|can)\b.{0,24}\b(?:wrong|incorrect|false|not|too|ruled|impossible)\b|isn't|cannot)"
)
_ANOTHER = re.compile(
    r"\s{0,4}\(?(?:,|/|\bor\b|\band\b|&)\s{0,4}(?:(?i:option|choice)\s{1,4})?[*(\[]{0,3}[A-Z](?![\w'])"
)
_OR = re.compile(r"(?:\bor|\band|/|,)\s{0,4}(?:(?i:option|choice)\s{1,4})?$")
_ARTICLE = re.compile(
    r"\s{1,4}(?!(?:because|since|as|for|which|that|due|given|with|from|and|but|not|rather|is)\b)[a-z]"
)
_ALONE = re.compile(r"(?i:option\s{1,4})?[*(\[]{0,4}([A-Za-z])[*)\]]{0,4}\.?")
_LED = re.compile(r"[*(\[]{0,4}([A-Z])(?:[*)\]]{1,4}|[:.])(?=[\s*:.]|$)")
_BEHIND = re.compile(r"(?<![\w'])[*(\[]{0,3}([A-Z])(?:[*)\]]{1,4}|[:.](?=[\s*]|$))|\b(?:or|and)\s{1,4}([A-Z])(?![\w'])")


def read_letter(text: str, letters: str, options: Any = None) -> str | None:
    """The letter among ``letters`` that a completion gives, or None where it gives none or several."""
    for read in (last_boxed, last_answer):
        marked = read(text)
        if marked is not None and not is_blank(marked):
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
    match = _ALONE.fullmatch(content) or _LED.match(content)
    if match is None:
        stated = _statements(content)
        return stated[-1] if stated and stated[-1] in {*letters} else None
    letter = match.group(1).upper()
    others = {first or second for first, second in _BEHIND.findall(content[match.end() :])} - {letter}
    return letter if letter in letters and not others & {*letters} else None


def _statements(text: str) -> list[str]:
    """The letters that a text says are right, in its order; a blank where it names several at once."""
    found: list[tuple[int, str]] = []
    for match in _STATED.finditer(text):
        rest = match["rest"]
        bare = text[match.start("letter") - 1] == " "
        if not _DENIED.match(rest) and not (match["letter"] in "AI" and bare and _ARTICLE.match(rest)):
            found.append((match.start("letter"), " " if _ANOTHER.match(rest) else match["letter"]))
    for match in _CALLED.finditer(text):
        before = text[max(match.start() - 30, 0) : match.start()]
        if letter := _BEFORE.search(before):
            several = _OR.search(before[: letter.start() + 1])
            found.append((match.start() - len(before) + letter.start("letter"), " " if several else letter["letter"]))
    return [letter.upper() for _, letter in sorted(found)]
