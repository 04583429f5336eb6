"""When two mathematical answers are the same: by the published rules on strings, by their parts, or by value."""

import logging
import re
from functools import cache
from typing import Any

from dllm_sd.errors import InputError
from dllm_sd.limits import TooLong, limited
from dllm_sd.tasks.grading import MAX_DIGITS, MAX_TEXT, filled_mark

MAX_SYMBOLIC = 300  # characters of an answer that is handed to the algebra system
MAX_GROWTH = 1000  # product of all exponents in such an answer
SECONDS = 1.0  # of processor time that the algebra system may take for a comparison
MEMORY = 2**28  # bytes that it may ask for

_ROOT = re.compile(r"\\sqrt(?!\{)(.)", re.DOTALL)
_UNBRACED = re.compile(r"\\boxed +([^\s${}][^$\n]{0,200})")
_DIGITS = re.compile(r"[0-9]+")
_EXPONENT = re.compile(
    r"\s*(?:\{\s*-?\s*(?:[0-9]{1,2}|[0-9]{0,2}[A-Za-z]|[0-9]/[0-9]|\\d?frac\s*\{-?[0-9]\}\s*\{[0-9]\}|\\circ|\\pi)\s*\}"
    r"|[0-9]{1,2}(?![0-9])|[A-Za-z]|\\circ|\\pi)(?!\s*[\^!])"
)
_FACTORIAL = re.compile(r"(?<![0-9])(?:[0-9]{1,2}|[A-Za-z])!(?!\s*[\^!])")


def marked_answer(text: str) -> str | None:
    """The last filled box, else the last filled answer tag, else a box without braces, else all of a short text."""
    if (marked := filled_mark(text)) is not None:
        return marked.strip()
    text = text[-MAX_TEXT:].strip()
    if found := _UNBRACED.findall(text):
        return found[-1].strip()
    return text if 0 < len(text) <= MAX_DIGITS and "\n" not in text and "\\boxed" not in text else None


def same_published(one: str, other: str) -> bool:
    """Equality of the strings after the published normalisation of MATH; of the raw strings where that gives up."""
    first, second = normalised(one), normalised(other)
    return one == other if first is None or second is None else first == second


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


def same_value(one: str, other: str) -> bool:
    """Equality by math-verify, within bounds of size, processor time and memory; False for what is beyond them."""
    algebra = _algebra()
    if not (_is_tame(one) and _is_tame(other)):
        return False
    try:
        with limited(SECONDS, MEMORY):
            gold, found = (algebra.parse(f"${text}$", parsing_timeout=None) for text in (one, other))
            return bool(algebra.verify(gold, found, timeout_seconds=None))
    except TooLong:
        return False
    except Exception:  # an algebra system fails in every way there is, and a text that it cannot read equals nothing
        return False


def need_algebra() -> None:
    """Refuse a symbolic comparison where math-verify is not installed."""
    _algebra()


@cache
def _algebra() -> Any:
    """math-verify, ready: its first comparison would pay for imports and grammars within the limits of one answer."""
    try:
        import math_verify  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "task.equality symbolic needs math-verify, which is not installed; run pip install 'dllm-sd[math]'."
        ) from None
    for name in ("math_verify.parser", "math_verify.grader"):  # they warn that they bound no time, which is done here
        logging.getLogger(name).setLevel(logging.ERROR)
    one, other = (math_verify.parse(f"${text}$", parsing_timeout=None) for text in ("\\frac{x}{2}", "x/2"))
    math_verify.verify(one, other, timeout_seconds=None)
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
