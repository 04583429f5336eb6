"""Equality of mathematical answers: by the published rules on strings, and by value with math-verify."""

import logging
import re
from functools import cache
from typing import Any

from dllm_sd.errors import InputError
from dllm_sd.limits import TooLong, limited
from dllm_sd.tasks.grading import MAX_DIGITS, MAX_TEXT, filled_mark

MAX_SYMBOLIC = 300  # characters of an answer that math-verify may parse
MAX_GROWTH = 1000  # bound on the product of all exponents in such an answer
ALGEBRA_SECONDS = 1.0  # of processor time for one comparison by math-verify
ALGEBRA_MEMORY = 2**28  # bytes that math-verify may allocate

_ROOT = re.compile(r"\\sqrt(?!\{)(.)", re.DOTALL)
_UNBRACED = re.compile(r"\\boxed +([^\s${}][^$\n]{0,200})")
_DIGITS = re.compile(r"[0-9]+")
_EXPONENT = re.compile(
    r"\s*(?:\{\s*-?\s*(?:[0-9]{1,2}|[0-9]{0,2}[A-Za-z]|[0-9]/[0-9]|\\d?frac\s*\{-?[0-9]\}\s*\{[0-9]\}|\\circ|\\pi)\s*\}"
    r"|[0-9]{1,2}(?![0-9])|[A-Za-z]|\\circ|\\pi)(?!\s*[\^!])"
)
_FACTORIAL = re.compile(r"(?<![0-9])(?:[0-9]{1,2}|[A-Za-z])!(?!\s*[\^!])")


def marked_answer(text: str) -> str | None:
    """Return the last filled box, else the last filled answer tag, else a box without braces, else a short text."""
    if (marked := filled_mark(text)) is not None:
        return marked.strip()
    text = text[-MAX_TEXT:].strip()
    if boxes := _UNBRACED.findall(text):
        return boxes[-1].strip()
    return text if 0 < len(text) <= MAX_DIGITS and "\n" not in text and "\\boxed" not in text else None


def same_published(a: str, b: str) -> bool:
    """Compare the strings after the published normalisation of MATH, or the raw strings if it fails."""
    normalised_a, normalised_b = normalised(a), normalised(b)
    return a == b if normalised_a is None or normalised_b is None else normalised_a == normalised_b


def normalised(text: str) -> str | None:
    """Normalise a LaTeX answer (after Hendrycks et al., 2021); None if the published rules fail.

    The rules, in order: remove line ends, negative spaces and doubled backslashes; write every fraction as ``\\frac``;
    remove sizes of delimiters, degrees, dollars, a unit in ``\\text{ ...}`` and per cents; add the zero before a
    leading point; remove a name of at most two characters before the only ``=``; add the braces of roots and fractions;
    remove spaces; write 0.5 and quotients a/b of whole numbers as ``\\frac``.
    """
    for old, new in (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")):
        text = text.replace(old, new)
    for removed in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(removed, "")
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


def same_value(a: str, b: str) -> bool:
    """Compare by math-verify within bounds of size, processor time and memory; beyond them the result is False."""
    algebra = _algebra()
    if not (_is_tame(a) and _is_tame(b)):
        return False
    try:
        with limited(ALGEBRA_SECONDS, ALGEBRA_MEMORY):
            parsed_a, parsed_b = (algebra.parse(f"${text}$", parsing_timeout=None) for text in (a, b))
            return bool(algebra.verify(parsed_a, parsed_b, timeout_seconds=None))
    except TooLong:
        return False
    except Exception:  # math-verify raises many types, and unreadable text equals nothing
        return False


def need_algebra() -> None:
    """Raise an InputError if math-verify, which a symbolic comparison needs, is not installed."""
    _algebra()


@cache
def _algebra() -> Any:
    """Import math-verify and run one comparison, so that its start-up does not count in the limits of an answer."""
    try:
        import math_verify  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "task.equality symbolic needs math-verify, which is not installed; run pip install 'dllm-sd[math]'."
        ) from None
    for name in ("math_verify.parser", "math_verify.grader"):  # they warn that time is not bounded; `limited` bounds it
        logging.getLogger(name).setLevel(logging.ERROR)
    half, quotient = (math_verify.parse(f"${text}$", parsing_timeout=None) for text in ("\\frac{x}{2}", "x/2"))
    math_verify.verify(half, quotient, timeout_seconds=None)
    return math_verify


def _is_tame(text: str) -> bool:
    """Return whether a text is short and has no long numbers, large powers or nested factorials."""
    text = text.replace("**", "^")
    if not 0 < len(text) <= MAX_SYMBOLIC or any(len(digits) > 12 for digits in _DIGITS.findall(text)):
        return False
    growth = 1
    for power in re.finditer(r"\^", text):
        exponent = _EXPONENT.match(text, power.end())
        if exponent is None:
            return False
        for digits in _DIGITS.findall(exponent.group()):
            growth *= max(int(digits), 1)
    return growth <= MAX_GROWTH and text.count("!") == len(_FACTORIAL.findall(text)) <= 4


def _braced_fractions(text: str) -> str | None:
    """Add braces to the one-character arguments of ``\\frac12``; return the text unchanged if one is missing."""
    first, *rest = text.split("\\frac")
    pieces = [first]
    for part in rest:
        if not part:
            return None
        if part[0] == "{":
            pieces.append(part)
        elif len(part) < 2:
            return text
        else:
            over, under = part[0], part[1]
            pieces.append(f"{{{over}}}" + (part[1:] if under == "{" else f"{{{under}}}{part[2:]}"))
    return "\\frac".join(pieces)


def _whole_quotient(text: str) -> str | None:
    """Write a/b of whole numbers as ``\\frac``; None, as published, for a single slash between anything else."""
    if text.count("/") != 1:
        return text
    over, under = text.split("/")
    try:
        numbers = int(over), int(under)
    except ValueError:
        return None
    return f"\\frac{{{numbers[0]}}}{{{numbers[1]}}}" if text == f"{numbers[0]}/{numbers[1]}" else text
