"""The answer parsers of d-OPSD's published evaluation, oddities included, for ``mode: compatible``.

They reproduce the verdicts of the published results, so their errors are not fixed here; ``grading`` holds the
corrected parsers. Unlike the published code, these take linear time and do not evaluate text as code.
"""

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from dllm_sd.tasks.grading import MAX_TEXT

MAX_INTEGER_BITS = 1 << 16  # bits of the largest whole number that arithmetic may produce
MAX_NESTING = 200  # open parentheses, the limit of Python
MAX_SIGNS = 1500  # unary signs before one operand
_MAX_FLOAT_TEXT = 4000  # characters of the longest text that is parsed as a number

PythonNumber = int | float | complex

_LOOSE_NUMBER = re.compile(r"-?\d+\.?\d*")
_GOLD = re.compile(r"####\s*\$?([\d,]+(?:\.\d+)?)")
_BARE_GOLD = re.compile(r"\s*\$?([\d,]+(?:\.\d+)?)")
_BRACE = re.compile(r"[{}]")
_CLAIMED_VALUE = re.compile(r"=(?=[0-9. ])")
_LEFT_SIDE = frozenset("0123456789+-*/() ")
_ALLOWED = re.compile(r"[\d+\-*/().\s]+")
_TOKEN = re.compile(r"([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)|(\*\*|//|[-+*/()])|([ \t\f]+)|([\r\n]+)")
_FENCE = re.compile(r"(?=```)")
_DIGITS = re.compile(r"[\d\s]+")
_STOP = re.compile(r"<\|eot_id\|>|<\|endoftext\|>")
_STOP_OR_CLOSE = re.compile(r"<\|eot_id\|>|<\|endoftext\|>|</answer>")
_GRID_END = re.compile(r"\d{16}")
_GRID_WORD = re.compile(r"\b\d{16}\b")


def gsm8k_gold(answer: Any) -> float | None:
    """Return the gold number of GSM8K as the published evaluation reads it: without a sign; None for negative text."""
    if answer is None or isinstance(answer, bool):
        return None
    if isinstance(answer, int | float):
        return _number(str(answer))
    text = str(answer)[-MAX_TEXT:]
    match = _GOLD.search(text) if "####" in text else _BARE_GOLD.match(text)
    return _number(match.group(1).replace(",", "")) if match else None


def gsm8k_number(text: str) -> float | None:
    """Return the number in the first box that has one, else in the first answer tag."""
    text = text[-MAX_TEXT:]
    for content in _plain_boxes(text):
        content = content.strip()
        if content.strip("."):
            # Commas are removed before the number is parsed, but not in the text after an answer tag.
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
    if number is None and (loose_numbers := _LOOSE_NUMBER.findall(marked)):
        number = _number(loose_numbers[-1])
    return number


def boxed_span(text: str) -> str | None:
    """Return the content of the last ``\\boxed``; the whole text without a box, None if the last one is unclosed."""
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
    """Return the content of the last box, else, if it is empty or unclosed, of the first answer tag."""
    span = boxed_span(text)
    if span:
        return span
    marked = _first_answer(text[-MAX_TEXT:])
    return span if marked is None else marked


def countdown_expression(text: str) -> str:
    """Return the expression in the last box, up to its first equals sign that claims a value.

    If the last box is unclosed, the first answer tag or the whole text is read instead.
    """
    text = text[-MAX_TEXT:]
    expression = boxed_span(text)
    if expression is None:
        marked = _first_answer(text)
        expression = text if marked is None else marked
    expression = expression.replace("\\div", "/").replace("\\times", "*").replace("\\cdot", "*")
    previous_end = 0
    for claim in _CLAIMED_VALUE.finditer(expression):
        start = claim.start()
        while start > previous_end and expression[start - 1] in _LEFT_SIDE:
            start -= 1
        if start < claim.start():
            return expression[start : claim.start()].strip()
        previous_end = claim.end()
    return expression


def uses(expression: str, numbers: Sequence[int]) -> bool:
    """Return whether the runs of digits in ``expression`` are exactly ``numbers``, with anything between them."""
    runs = re.findall(r"\d+", expression)
    if len(runs) != len(numbers) or any(len(digits) > _MAX_FLOAT_TEXT for digits in runs):
        return False
    return sorted(map(int, runs)) == sorted(numbers)


def python_value(expression: str) -> PythonNumber | None:
    """Return the value of an arithmetic expression in Python (``+ - * / // **``, floats), or None.

    None also if a whole number would need more than ``MAX_INTEGER_BITS`` bits.
    """
    if not _ALLOWED.fullmatch(expression):
        return None
    try:
        return _Arithmetic().run(expression.strip())
    except (_NoValue, ArithmeticError, TypeError, ValueError):
        return None


def reaches(value: PythonNumber, target: float) -> bool:
    """Return whether ``value`` is within 1e-5 of ``target``."""
    try:
        return abs(value - target) < 1e-5
    except OverflowError:
        return False


def sudoku_cells(text: str) -> str:
    """Return the 16 characters that count as the answer, cut or padded with zeros; empty if there is none."""
    text = text[-MAX_TEXT:]
    for read_cells in (_fenced, _tagged, _after_tag, _before_close, _grid_word):
        cells = read_cells(text).strip()
        if cells:
            return "".join(cells.split())[:16].ljust(16, "0")
    return ""


def _number(text: str) -> float | None:
    if len(text) > _MAX_FLOAT_TEXT:
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _plain_boxes(text: str) -> list[str]:
    """Return the spans from each ``\\boxed{`` to the first closing brace, if both are on one line."""
    boxes: list[str] = []
    position, close, line_end = text.find("\\boxed{"), -1, -1
    while position >= 0:
        start = position + len("\\boxed{")
        close = text.find("}", start) if close < start else close
        if close < 0:
            break
        if line_end < start:
            newline = text.find("\n", start)
            line_end = len(text) if newline < 0 else newline
        if close < line_end:
            boxes.append(text[start:close])
            start = close + 1
        position = text.find("\\boxed{", start)
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
    previous_close, close = 0, text.find("</answer>")
    while close >= 0:
        end = close
        while end > previous_close and text[end - 1].isspace():
            end -= 1
        if end >= 16 and (match := _GRID_END.fullmatch(text, end - 16, end)):
            return match.group()
        previous_close, close = close, text.find("</answer>", close + 1)
    return ""


def _grid_word(text: str) -> str:
    match = _GRID_WORD.search(text)
    return match.group() if match else ""


class _NoValue(Exception):
    """Python would reject the expression, or it exceeds the limits."""


def _size(value: PythonNumber) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _multiply(a: PythonNumber, b: PythonNumber) -> PythonNumber:
    if _size(a) + _size(b) > MAX_INTEGER_BITS:
        raise _NoValue
    return a * b


def _power(a: PythonNumber, b: PythonNumber) -> PythonNumber:
    if isinstance(a, int) and isinstance(b, int) and abs(a) > 1 and b * _size(a) > MAX_INTEGER_BITS:
        raise _NoValue
    return a**b


_BINARY: dict[str, tuple[int, Callable[[Any, Any], PythonNumber]]] = {
    "+": (1, operator.add),
    "-": (1, operator.sub),
    "*": (2, _multiply),
    "/": (2, operator.truediv),
    "//": (2, operator.floordiv),
    "**": (4, _power),
}
_SIGN = 3  # a sign binds tighter than a product and looser than a power


class _Arithmetic:
    """Evaluates with two stacks, of values and of pending operators, so that depth needs no recursion."""

    def __init__(self) -> None:
        self.values: list[PythonNumber] = []
        self.pending: list[str] = []
        self.open = 0
        self.signs = 0  # unary signs since the last operand
        self.after_operand = False

    def run(self, text: str) -> PythonNumber:
        """Return the value of ``text``; raise ``_NoValue`` or an arithmetic error."""
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise _NoValue
            position = match.end()
            number, symbol, _, line_break = match.groups()
            if number:
                self._operand(number)
            elif symbol:
                self._symbol(symbol)
            elif line_break and not self.open:
                raise _NoValue
        if self.open or not self.after_operand:
            raise _NoValue
        self._reduce(0)
        return self.values.pop()

    def _operand(self, digits: str) -> None:
        is_whole = digits.isdigit()
        if self.after_operand or len(digits) > _MAX_FLOAT_TEXT or (is_whole and digits[0] == "0" and digits.strip("0")):
            raise _NoValue
        self.values.append(int(digits) if is_whole else float(digits))
        self.after_operand, self.signs = True, 0

    def _symbol(self, symbol: str) -> None:
        if symbol == "(":
            self.open += 1
            if self.after_operand or self.open > MAX_NESTING:
                raise _NoValue
            self.pending.append(symbol)
            self.signs = 0
        elif symbol == ")":
            if not self.after_operand or not self.open:
                raise _NoValue
            self._reduce(0)
            self.pending.pop()
            self.open -= 1
        elif self.after_operand:
            precedence = _BINARY[symbol][0]
            self._reduce(precedence + (symbol == "**"))  # powers are right-associative
            self.pending.append(symbol)
            self.after_operand = False
        else:
            self.signs += 1
            if symbol not in "+-" or self.signs > MAX_SIGNS:
                raise _NoValue
            self.pending.append("u" + symbol)

    def _reduce(self, precedence: int) -> None:
        """Apply pending operators of at least a precedence, back to the last open parenthesis."""
        while self.pending and self.pending[-1] != "(":
            symbol = self.pending[-1]
            if (_SIGN if symbol[0] == "u" else _BINARY[symbol][0]) < precedence:
                return
            self.pending.pop()
            value = self.values.pop()
            if symbol == "u-":
                value = -value
            elif symbol[0] != "u":
                value = _BINARY[symbol][1](self.values.pop(), value)
            if isinstance(value, float) and math.isnan(value):
                raise _NoValue
            self.values.append(value)
