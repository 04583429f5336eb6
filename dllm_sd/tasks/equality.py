"""When two mathematical answers are the same: by published string rules, by mended ones, or by value."""

import re
from fractions import Fraction
from functools import cache
from typing import Any

from dllm_sd.errors import InputError
from dllm_sd.tasks.grading import MAX_DIGITS, MAX_TEXT, last_answer, last_boxed

MAX_ANSWER = 2000  # characters of a marked answer that are compared by the mended rules
MAX_SYMBOLIC = 300  # characters of an answer that is handed to the algebra system
MAX_GROWTH = 1000  # product of all exponents in such an answer
SECONDS = 1  # that the algebra system may take for each of its steps

_ROOT = re.compile(r"\\sqrt(?!\{)(.)", re.DOTALL)
_WORDS = re.compile(r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|mbox)\s{0,8}\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[0-9}])\s*\\(?:text|mathrm|mbox)\s{0,8}\{[^{}]*\}(?:\^\{?[0-9]\}?)?\s*$")
_SPACING = re.compile(r"\\[,;:!]|\\ |~|\\q?quad(?![a-zA-Z])|\\displaystyle(?![a-zA-Z])|\\[()\[\]]")
_NAME = re.compile(r"^[A-Za-z](?:_\{?\w\}?)?\s*(?:=|\\in(?![a-zA-Z]))\s*")
_SHORTER = re.compile(r"\\(le|ge|ne)q(?![a-zA-Z])")
_EXACT = re.compile(
    r"([-+]?)(?:([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(\.[0-9]+)?|(\.[0-9]+)"
    r"|([0-9]+)/([0-9]+)|\\frac\{(-?[0-9]+)\}\{([0-9]+)\})"
)
_UNBRACED = re.compile(r"\\boxed +([^\s${}][^$\n]{0,200})")
_DIGITS = re.compile(r"[0-9]+")
_EXPONENT = re.compile(
    r"\s*(?:\{\s*-?\s*(?:[0-9]{1,2}|[0-9]{0,2}[A-Za-z]|[0-9]/[0-9]|\\d?frac\s*\{-?[0-9]\}\s*\{[0-9]\}|\\circ|\\pi)\s*\}"
    r"|[0-9]{1,2}(?![0-9])|[A-Za-z]|\\circ|\\pi)(?!\s*[\^!])"
)
_FACTORIAL = re.compile(r"(?<![0-9])(?:[0-9]{1,2}|[A-Za-z])!(?!\s*[\^!])")


def marked_answer(text: str) -> str | None:
    """The last closed box, else the last closed answer tag, else a box without braces, else all of a short text."""
    for read in (last_boxed, last_answer):
        marked = read(text)
        if marked is not None and marked.strip():
            return marked.strip()
    text = text[-MAX_TEXT:].strip()
    if found := _UNBRACED.findall(text):
        return found[-1].strip()
    return text if 0 < len(text) <= MAX_DIGITS and "\n" not in text and "\\boxed" not in text else None


def same_published(one: str, other: str) -> bool:
    """Equality of the strings after the published normalisation of MATH; of the raw strings where that gives up."""
    first, second = normalised(one), normalised(other)
    return one == other if first is None or second is None else first == second


def same(one: str, other: str) -> bool:
    """Equality by the published rules, or after tidying, or as exact numbers."""
    if same_published(one, other):
        return True
    if max(len(one), len(other)) > MAX_ANSWER:
        return False
    first, second = tidied(one), tidied(other)
    if not first or not second:
        return False
    number = _exact(first)
    return first == second or (number is not None and number == _exact(second))


def normalised(text: str) -> str | None:
    """One form for the ways to write a LaTeX answer (after Hendrycks et al., 2021); None where their rules give up.

    In order: line ends, negative spaces and doubled backslashes go; every fraction is ``\\frac``; sizes of delimiters,
    degrees, dollars, a unit in ``\\text{ ...}`` and per cents go; a bare point gets its zero; a name of at most two
    characters before the only ``=`` goes; roots and fractions get their braces; spaces go; 0.5 and whole a/b become
    ``\\frac``.
    """
    for old, new in (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")):
        text = text.replace(old, new)
    for gone in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(gone, "")
    text, unit, rest = text.partition("\\text{ ")
    if unit and "\\text{ " in rest:
        return None
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return ""
    text = "0" + text if text[0] == "." else text
    if text.count("=") == 1 and text.index("=") <= 2:
        text = text.partition("=")[2]
    if text.endswith("\\sqrt") or "\\sqrt\\sqrt" in text:
        return None
    text = _ROOT.sub(r"\\sqrt{\1}", text).replace(" ", "")
    braced = _braced_fractions(text)
    if braced is None:
        return None
    return _whole_quotient("\\frac{1}{2}" if braced == "0.5" else braced)


def tidied(text: str) -> str:
    """``normalised`` for what it overlooks: math marks, spacing, words, units, long names, other relation signs."""
    text = _SPACING.sub(" ", text.replace("{,}", ",").replace("\\$", "").replace("$", "").replace("\u2212", "-"))
    text = _WORDS.sub(r"\1", _UNIT.sub("", text)).strip().rstrip(".").strip()
    text = _NAME.sub("", _SHORTER.sub(r"\\\1", text))
    form = normalised(text)
    return "".join((text if form is None else form).split())


def same_value(one: str, other: str) -> bool:
    """Equality by math-verify, within bounds of size and time; False for what is beyond them."""
    algebra = _algebra()
    if not (_is_tame(one) and _is_tame(other)):
        return False
    try:
        gold, found = (algebra.parse(f"${text}$", parsing_timeout=SECONDS) for text in (one, other))
        return bool(algebra.verify(gold, found, timeout_seconds=SECONDS))
    except Exception:  # an algebra system fails in every way there is, and a text that it cannot read equals nothing
        return False


def need_algebra() -> None:
    """Refuse a symbolic comparison where math-verify is not installed."""
    _algebra()


@cache
def _algebra() -> Any:
    try:
        import math_verify  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "task.equality symbolic needs math-verify, which is not installed; run pip install 'dllm-sd[math]'."
        ) from None
    return math_verify


def _is_tame(text: str) -> bool:
    """Short, without long numbers, and without room for towers of powers or factorials."""
    text = text.replace("**", "^")
    if not 0 < len(text) <= MAX_SYMBOLIC or any(len(digits) > 12 for digits in _DIGITS.findall(text)):
        return False
    grown = 1
    for power in re.finditer(r"\^", text):
        exponent = _EXPONENT.match(text, power.end())
        if exponent is None:
            return False
        for digits in _DIGITS.findall(exponent.group()):
            grown *= max(int(digits), 1)
    return grown <= MAX_GROWTH and text.count("!") == len(_FACTORIAL.findall(text)) <= 4


def _braced_fractions(text: str) -> str | None:
    """Braces around the one-character parts of ``\\frac12``; the text itself where a part is missing."""
    first, *rest = text.split("\\frac")
    done = [first]
    for part in rest:
        if not part:
            return None
        if part[0] == "{":
            done.append(part)
        elif len(part) < 2:
            return text
        else:
            over, under = part[0], part[1]
            done.append(f"{{{over}}}" + (part[1:] if under == "{" else f"{{{under}}}{part[2:]}"))
    return "\\frac".join(done)


def _whole_quotient(text: str) -> str | None:
    """a/b of whole numbers as ``\\frac``; None, as published, where there is one slash between anything else."""
    if text.count("/") != 1:
        return text
    over, under = text.split("/")
    try:
        numbers = int(over), int(under)
    except ValueError:
        return None
    return f"\\frac{{{numbers[0]}}}{{{numbers[1]}}}" if text == f"{numbers[0]}/{numbers[1]}" else text


def _exact(text: str) -> Fraction | None:
    match = _EXACT.fullmatch(text) if len(text) <= MAX_DIGITS else None
    if match is None:
        return None
    sign, whole, decimals, point, over, under, top, bottom = match.groups()
    if int(under or bottom or 1) == 0:
        return None
    if whole or point:
        value = Fraction((whole or "0").replace(",", "") + (decimals or point or ""))
    else:
        value = Fraction(int(over or top), int(under or bottom))
    return -value if sign == "-" else value
