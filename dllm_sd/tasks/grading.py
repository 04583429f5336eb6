"""Reading answers out of model output: marked spans, numbers, arithmetic. Total, exact, and linear in the text."""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from dllm_sd.errors import InputError

MAX_TEXT = 100_000  # characters at the end of a completion that are looked at
MAX_DIGITS = 40  # longest number that is converted
MAX_EXPRESSION = 200  # characters of an arithmetic expression
MAX_DEPTH = 20  # nested parentheses and signs of an arithmetic expression

_BRACES = re.compile(r"\\boxed\s{0,8}\{|\\[{}]|[{}]")
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?"  # a sign is a minus only where nothing is there to subtract from
    r"(?<!\w)(?<![0-9]\.)"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:/[0-9]+)?(?!\d)"
)
_FRACTION = re.compile(
    r"\\[dt]?frac\s{0,8}(?:\{\s{0,8}(-?[0-9]+)\s{0,8}\}\s{0,8}\{\s{0,8}([0-9]+)\s{0,8}\}|([0-9])([0-9]))"
)
_UNIT = re.compile(r"\\(?:text|mathrm|mbox)\s{0,8}\{[^{}]*\}(?:\^\{?[0-9]\}?)?")
_ALL_WORDS = re.compile(r"\s*\\(?:text|mathrm|mbox)\s{0,8}\{([^{}]*)\}\s*")
_POWER_OF_TEN = re.compile(r"[-+]?[0-9]{1,20}(?:\.[0-9]{1,20})?[eE][-+]?[0-9]{1,2}")
_TOKEN = re.compile(r"[ \t\r\n]*(?:([0-9]+)|([-+*/()]))")
_THOUSANDS = re.compile(r"(?<=[0-9,])(?:\\[,!]|\{,\})(?=[0-9]{3})")
_BLANK = ("$", "%", "\\,", "\\!", "\\;", "\\left", "\\right")  # become spaces, which never join two numbers
_OPERATORS = (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("×", "*"), ("·", "*"), ("⋅", "*"), ("÷", "/"))  # noqa: RUF001


def last_boxed(text: str) -> str | None:
    """What the last ``\\boxed{...}`` with balanced braces holds; an unclosed box does not count."""
    text = text[-MAX_TEXT:]
    stack: list[tuple[bool, int]] = []
    start = end = -1
    for match in _BRACES.finditer(text):
        mark = match.group()
        if mark == "}":
            is_box, inside = stack.pop() if stack else (False, 0)
            if is_box and inside > start:
                start, end = inside, match.start()
        elif mark[-1] == "{" and mark != "\\{":
            stack.append((mark != "{", match.end()))
    return None if start < 0 else text[start:end]


def last_answer(text: str) -> str | None:
    """What the last closed ``<answer>...</answer>`` holds."""
    text = text[-MAX_TEXT:]
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else text[start + len("<answer>") : end]


def final_number(text: str) -> Fraction | None:
    """The number a completion ends with, exactly.

    It is read from the last box, else the last closed answer tag, else the line after the last ``####``, else it is
    the last number of the text. Where a mark is there its content decides; blank marks do not count.
    """
    for read in (last_boxed, last_answer):
        marked = read(text)
        if marked is not None and marked.strip():
            return only_number(marked)
    text = text[-MAX_TEXT:]
    lines = text.rpartition("####")[2].strip().splitlines() if "####" in text else []
    if lines and (number := only_number(lines[0])) is not None:
        return number
    last = ""
    for match in _NUMBER.finditer(_plain(text)):
        last = match.group()
    return _fraction(last)


def only_number(text: str) -> Fraction | None:
    """The one number of ``text`` (right of its last ``=``), whatever words and signs stand around it.

    Reads ``1,200``, ``$-5``, ``12.5%``, ``1e3``, ``3/4``, ``\\frac{3}{4}``. None where there is none, or
    several that differ.
    """
    text = text[-MAX_TEXT:].rpartition("=")[2]
    if words := _ALL_WORDS.fullmatch(text):
        text = words.group(1)
    text = _UNIT.sub(" ", _plain(text)).strip()
    if _POWER_OF_TEN.fullmatch(text):
        return Fraction(text)
    text = re.sub(r"\\[A-Za-z]+", " ", text).strip()
    text = re.sub(r"^([-+])\s+(?=[0-9.])", r"\1", text)
    values = {_fraction(match.group()) for match in _NUMBER.finditer(text)}
    return values.pop() if len(values) == 1 else None


def gold_number(answer: Any, where: str) -> Fraction:
    """The number of a data row's ``answer``: a number, or text that is one or ends in ``#### N``."""
    text = answer if isinstance(answer, str) else "" if isinstance(answer, bool) else str(answer)
    text = _plain(text[-MAX_TEXT:].rpartition("####")[2]).strip().replace(",", "")
    number = _fraction(text) if _NUMBER.fullmatch(text) else None
    if number is None:
        raise InputError(f"{where}: the answer {answer!r:.60} is not a number; correct it.")
    return number


def _plain(text: str) -> str:
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("-$", "-")
    text = _blanked(_THOUSANDS.sub("", text))
    return _FRACTION.sub(_slashed, text)


def _blanked(text: str) -> str:
    for mark in _BLANK:
        text = text.replace(mark, " ")
    return text


def _slashed(match: re.Match[str]) -> str:
    before = match.string[match.start() - 1 : match.start()] if match.start() else ""
    over, under = match.group(1) or match.group(3), match.group(2) or match.group(4)
    return f"{' ' if before.isalnum() else ''}{over}/{under}"


def _fraction(text: str) -> Fraction | None:
    return None if not text or len(text) > MAX_DIGITS else _short_fraction(text)


@lru_cache(maxsize=2**12)  # answers are often the same few numbers, and a fraction takes long to make
def _short_fraction(text: str) -> Fraction | None:
    over, _, under = text.replace(",", "").partition("/")
    if under and not int(under):
        return None
    return Fraction(over) / int(under) if under else Fraction(over)


def marked_expression(text: str) -> str | None:
    """The expression a completion answers with: from the last box, else the last closed tag, else all of a short text.

    Only the left side of the first ``=`` is kept, operators are mapped to ``+ - * /``. None where nothing fits.
    """
    marked = last_boxed(text)
    marked = last_answer(text) if marked is None else marked
    marked = text if marked is None else marked
    if len(marked) > 4 * MAX_EXPRESSION:
        return None
    expression = _blanked(marked.partition("=")[0].replace("\u2212", "-"))
    for mark, operator in _OPERATORS:
        expression = expression.replace(mark, operator)
    expression = expression.strip()
    return expression if 0 < len(expression) <= MAX_EXPRESSION else None


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    """The exact value of an arithmetic expression and the numbers that occur in it, in order.

    Whole numbers, ``+ - * /``, unary minus and parentheses are all there is. None for anything else, for a division
    by zero, and beyond ``MAX_EXPRESSION`` characters, ``MAX_DEPTH`` levels or ``MAX_DIGITS`` digits.
    """
    if len(expression) > MAX_EXPRESSION:
        return None
    tokens: list[str] = []
    place, text = 0, expression.rstrip(" \t\r\n")
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            return None
        tokens.append(match.group(1) or match.group(2))
        place = match.end()
    try:
        parser = _Parser(tokens)
        value = parser.sum(0)
        parser.expect("")
    except (_NotArithmetic, ZeroDivisionError):
        return None
    return value, parser.numbers


class _NotArithmetic(Exception):
    """The tokens are not an expression within the bounds."""


class _Parser:
    """Recursive descent over tokens: sum -> product -> factor. ``numbers`` are those read so far."""

    def __init__(self, tokens: list[str]) -> None:
        self.rest = ["", *reversed(tokens)]  # the next token is the last; the empty one ends the input
        self.numbers: list[int] = []

    def sum(self, depth: int) -> Fraction:
        return self._chain("+", "-", self.product, depth)

    def product(self, depth: int) -> Fraction:
        return self._chain("*", "/", self.factor, depth)

    def factor(self, depth: int) -> Fraction:
        token = self.rest[-1]
        if depth > MAX_DEPTH or not token:
            raise _NotArithmetic
        self.rest.pop()
        if token == "-":
            return -self.factor(depth + 1)
        if token == "(":
            value = self.sum(depth + 1)
            self.expect(")")
            return value
        if not token.isdigit() or len(token) > MAX_DIGITS:
            raise _NotArithmetic
        self.numbers.append(int(token))
        return Fraction(self.numbers[-1])

    def expect(self, token: str) -> None:
        if self.rest.pop() != token:
            raise _NotArithmetic

    def _chain(self, direct: str, inverse: str, part: Callable[[int], Fraction], depth: int) -> Fraction:
        value = part(depth)
        while self.rest[-1] in (direct, inverse):
            operator = self.rest.pop()
            other = part(depth)
            if operator == "+":
                value += other
            elif operator == "-":
                value -= other
            elif operator == "*":
                value *= other
            else:
                value /= other
        return value
