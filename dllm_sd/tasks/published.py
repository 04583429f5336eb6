"""The answer readers of d-OPSD's published evaluation, verdict by verdict, oddities included: ``mode: compatible``.

What they read is fixed by the results that were published with them, so nothing here is mended; ``grading`` holds the
readers that are. Unlike the published ones these are linear in the text and never evaluate it as code.
"""

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from dllm_sd.tasks.grading import MAX_TEXT

MAX_BITS = 1 << 16  # largest whole number that arithmetic may make
MAX_NESTING = 200  # open parentheses, as in Python
MAX_SIGNS = 1500  # signs before one operand
_MAX_FLOAT_TEXT = 4000  # characters that are tried as a number

Number = int | float | complex

_LOOSE_NUMBER = re.compile(r"-?\d+\.?\d*")
_GOLD = re.compile(r"####\s*\$?([\d,]+(?:\.\d+)?)")
_BARE_GOLD = re.compile(r"\s*\$?([\d,]+(?:\.\d+)?)")
_BRACE = re.compile(r"[{}]")
_CLAIM = re.compile(r"=(?=[0-9. ])")
_LEFT_SIDE = frozenset("0123456789+-*/() ")
_ALLOWED = re.compile(r"[\d+\-*/().\s]+")
_PIECE = re.compile(r"([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)|(\*\*|//|[-+*/()])|([ \t\f]+)|([\r\n]+)")
_FENCE = re.compile(r"(?=```)")
_DIGITS = re.compile(r"[\d\s]+")
_STOP = re.compile(r"<\|eot_id\|>|<\|endoftext\|>")
_STOP_OR_CLOSE = re.compile(r"<\|eot_id\|>|<\|endoftext\|>|</answer>")
_GRID_END = re.compile(r"\d{16}")
_GRID_WORD = re.compile(r"\b\d{16}\b")


def gsm8k_gold(answer: Any) -> float | None:
    """The gold number of GSM8K as the published evaluation reads it: a sign is not read, so negative text has none."""
    if answer is None or isinstance(answer, bool):
        return None
    if isinstance(answer, int | float):
        return _number(str(answer))
    text = str(answer)[-MAX_TEXT:]
    match = _GOLD.search(text) if "####" in text else _BARE_GOLD.match(text)
    return _number(match.group(1).replace(",", "")) if match else None


def gsm8k_number(text: str) -> float | None:
    """The first box that yields a number, else the first answer tag."""
    text = text[-MAX_TEXT:]
    for content in _plain_boxes(text):
        content = content.strip()
        if content.strip("."):
            # Commas go before the number is tried, but not in what follows an answer tag.
            content = content.replace(",", "")
            number = _number(content)
            if number is None and (loose := _LOOSE_NUMBER.search(content)):
                number = _number(loose.group())
            if number is not None:
                return number
    marked = _first_answer(text)
    if not marked:
        return None
    number = _number(marked)
    if number is None and (found := _LOOSE_NUMBER.findall(marked)):
        number = _number(found[-1])
    return number


def boxed_span(text: str) -> str | None:
    """What the last ``\\boxed`` holds; the whole text where there is no box, None where the last one is unclosed."""
    text = text[-MAX_TEXT:]
    if "\\boxed " in text:
        return text.rpartition("\\boxed ")[2].partition("$")[0]
    start = text.rfind("\\boxed")
    start = text.rfind("\\fbox") if start < 0 else start
    if start < 0:
        return text
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if brace.group() == "}" and not depth:
            span = text[start : brace.end()]
            return span[len("\\boxed{") : -1] if span.startswith("\\boxed{") else span
    return None


def math_answer(text: str) -> str | None:
    """The last box, else (where it is empty or unclosed) the first answer tag."""
    span = boxed_span(text)
    if span:
        return span
    marked = _first_answer(text[-MAX_TEXT:])
    return span if marked is None else marked


def countdown_expression(text: str) -> str:
    """The last box (the first answer tag or the whole text where it is unclosed), left of its first claimed value."""
    text = text[-MAX_TEXT:]
    expression = boxed_span(text)
    if expression is None:
        marked = _first_answer(text)
        expression = text if marked is None else marked
    expression = expression.replace("\\div", "/").replace("\\times", "*").replace("\\cdot", "*")
    past = 0
    for claim in _CLAIM.finditer(expression):
        start = claim.start()
        while start > past and expression[start - 1] in _LEFT_SIDE:
            start -= 1
        if start < claim.start():
            return expression[start : claim.start()].strip()
        past = claim.end()
    return expression


def uses(expression: str, numbers: Sequence[int]) -> bool:
    """Whether the runs of digits in ``expression`` are exactly ``numbers``, whatever stands between them."""
    found = re.findall(r"\d+", expression)
    if len(found) != len(numbers) or any(len(digits) > _MAX_FLOAT_TEXT for digits in found):
        return False
    return sorted(map(int, found)) == sorted(numbers)


def python_value(expression: str) -> Number | None:
    """The value that Python gives to an arithmetic expression (``+ - * / // **``, floats), or None where it has none.

    None also where a whole number would need more than ``MAX_BITS`` bits.
    """
    if not _ALLOWED.fullmatch(expression):
        return None
    try:
        return _Arithmetic().run(expression.strip())
    except (_NoValue, ArithmeticError, TypeError, ValueError):
        return None


def reaches(value: Number, target: float) -> bool:
    """Whether ``value`` is within 1e-5 of ``target``."""
    try:
        return abs(value - target) < 1e-5
    except OverflowError:
        return False


def sudoku_cells(text: str) -> str:
    """The 16 characters that count as the answer, cut or filled with zeros; empty where nothing is found."""
    text = text[-MAX_TEXT:]
    for read in (_fenced, _tagged, _after_tag, _before_close, _word):
        found = read(text).strip()
        if found:
            return "".join(found.split())[:16].ljust(16, "0")
    return ""


def _number(text: str) -> float | None:
    if len(text) > _MAX_FLOAT_TEXT:
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _plain_boxes(text: str) -> list[str]:
    """From each ``\\boxed{`` to the first closing brace, where both are on one line."""
    boxes: list[str] = []
    place, close, line = text.find("\\boxed{"), -1, -1
    while place >= 0:
        start = place + len("\\boxed{")
        close = text.find("}", start) if close < start else close
        if close < 0:
            break
        if line < start:
            found = text.find("\n", start)
            line = len(text) if found < 0 else found
        if close < line:
            boxes.append(text[start:close])
            start = close + 1
        place = text.find("\\boxed{", start)
    return boxes


def _first_answer(text: str) -> str | None:
    start = text.find("<answer>")
    end = text.find("</answer>", start) if start >= 0 else -1
    return None if end < 0 else text[start + len("<answer>") : end].strip()


def _fenced(text: str) -> str:
    start = text.find("<answer>")
    for fence in _FENCE.finditer(text, start) if start >= 0 else ():
        digits = _DIGITS.match(text, fence.start() + 3)
        if digits and text.startswith("```", digits.end()):
            return digits.group()
    return ""


def _tagged(text: str) -> str:
    start = text.find("<answer>")
    stop = _STOP_OR_CLOSE.search(text, start) if start >= 0 else None
    return "" if stop is None else text[start + len("<answer>") : stop.start()]


def _after_tag(text: str) -> str:
    start = text.find("</answer>")
    if start < 0:
        return ""
    stop = _STOP.search(text, start)
    return text[start + len("</answer>") : stop.start() if stop else len(text)]


def _before_close(text: str) -> str:
    past, close = 0, text.find("</answer>")
    while close >= 0:
        end = close
        while end > past and text[end - 1].isspace():
            end -= 1
        if end >= 16 and (match := _GRID_END.fullmatch(text, end - 16, end)):
            return match.group()
        past, close = close, text.find("</answer>", close + 1)
    return ""


def _word(text: str) -> str:
    match = _GRID_WORD.search(text)
    return match.group() if match else ""


class _NoValue(Exception):
    """Python would refuse the expression, or it is beyond the limits."""


def _size(value: Number) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _multiply(a: Number, b: Number) -> Number:
    if _size(a) + _size(b) > MAX_BITS:
        raise _NoValue
    return a * b


def _power(a: Number, b: Number) -> Number:
    if isinstance(a, int) and isinstance(b, int) and abs(a) > 1 and b * _size(a) > MAX_BITS:
        raise _NoValue
    return a**b


_BINARY: dict[str, tuple[int, Callable[[Any, Any], Number]]] = {
    "+": (1, operator.add),
    "-": (1, operator.sub),
    "*": (2, _multiply),
    "/": (2, operator.truediv),
    "//": (2, operator.floordiv),
    "**": (4, _power),
}
_SIGN = 3  # a sign binds tighter than a product and looser than a power


class _Arithmetic:
    """Two stacks, values and waiting operators, so that depth costs no recursion."""

    def __init__(self) -> None:
        self.values: list[Number] = []
        self.waiting: list[str] = []
        self.open = 0
        self.signs = 0  # since the last operand
        self.after_operand = False

    def run(self, text: str) -> Number:
        """The value of ``text``; ``_NoValue`` or what its arithmetic raises."""
        place = 0
        while place < len(text):
            match = _PIECE.match(text, place)
            if match is None:
                raise _NoValue
            place = match.end()
            number, symbol, _, line = match.groups()
            if number:
                self._operand(number)
            elif symbol:
                self._symbol(symbol)
            elif line and not self.open:
                raise _NoValue
        if self.open or not self.after_operand:
            raise _NoValue
        self._reduce(0)
        return self.values.pop()

    def _operand(self, digits: str) -> None:
        whole = digits.isdigit()
        if self.after_operand or len(digits) > _MAX_FLOAT_TEXT or (whole and digits[0] == "0" and digits.strip("0")):
            raise _NoValue
        self.values.append(int(digits) if whole else float(digits))
        self.after_operand, self.signs = True, 0

    def _symbol(self, symbol: str) -> None:
        if symbol == "(":
            self.open += 1
            if self.after_operand or self.open > MAX_NESTING:
                raise _NoValue
            self.waiting.append(symbol)
            self.signs = 0
        elif symbol == ")":
            if not self.after_operand or not self.open:
                raise _NoValue
            self._reduce(0)
            self.waiting.pop()
            self.open -= 1
        elif self.after_operand:
            level = _BINARY[symbol][0]
            self._reduce(level + (symbol == "**"))  # a power groups from the right
            self.waiting.append(symbol)
            self.after_operand = False
        else:
            self.signs += 1
            if symbol not in "+-" or self.signs > MAX_SIGNS:
                raise _NoValue
            self.waiting.append("u" + symbol)

    def _reduce(self, level: int) -> None:
        """Apply waiting operators down to the last open parenthesis while they bind at least as tightly."""
        while self.waiting and self.waiting[-1] != "(":
            symbol = self.waiting[-1]
            if (_SIGN if symbol[0] == "u" else _BINARY[symbol][0]) < level:
                return
            self.waiting.pop()
            last = self.values.pop()
            if symbol == "u-":
                last = -last
            elif symbol[0] != "u":
                last = _BINARY[symbol][1](self.values.pop(), last)
            if isinstance(last, float) and math.isnan(last):
                raise _NoValue
            self.values.append(last)
