"""Reading answers from model output: marked spans, numbers and arithmetic. Never raises, exact, linear in the text."""

import re
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from dllm_sd.errors import InputError
from dllm_sd.tasks.number_words import number_of_words
from dllm_sd.tasks.units import changes_value

MAX_TEXT = 100_000  # characters at the end of a completion that are read
MAX_DIGITS = 40  # digits of the longest number that is converted
MAX_EXPRESSION = 200  # characters of an arithmetic expression
MAX_EXPRESSION_DEPTH = 20  # nested parentheses and signs of an arithmetic expression

DASHES = "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"
"""Characters that stand for a minus sign."""
FULL_WIDTH = {chr(0xFEE0 + ord(sign)): sign for sign in "0123456789().,%+=/"}
"""Full-width characters and their ASCII equivalents."""
SINGLE_FRACTIONS = {
    "\u00bd": "1/2",
    "\u2153": "1/3",
    "\u2154": "2/3",
    "\u00bc": "1/4",
    "\u00be": "3/4",
    "\u215b": "1/8",
}
"""Single characters for fractions, and their values."""

_LONGEST_BLANK = 200  # longest answer that can count as blank, in characters
_BLANK_CONTENT = re.compile(
    r"\\(?:text|mathrm|mbox)(?=\s*\{)|\\(?:quad|qquad|ldots|dots|_|[,;:! ])|(?<!\\)[{}]|[\s$?._\u2026~-]+"
)
_BRACES = re.compile(r"\\boxed\s{0,8}\{|\\[{}]|[{}]")
_DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+])?"  # a sign belongs to the number only if no operand precedes it
    r"(?<!\w)(?<![0-9]\.)"
    r"(?:[0-9]{1,12} {1,3}(?=[0-9]{1,12}/[0-9]))?"  # the whole part of a mixed number
    + _DIGITS
    + r"(?:/[0-9]+|[eE][-+]?[0-9]{1,2}(?![\w.]))?(?!\d)"
)
_FRACTION = re.compile(
    r"\\[dt]?frac\s{0,8}"
    r"(?:\{\s{0,8}(-?[0-9]+)\s{0,8}\}\s{0,8}\{\s{0,8}(-?[0-9]+)\s{0,8}\}"
    r"|([0-9])([0-9])|\{([0-9]+)\}([0-9])|([0-9])\{([0-9]+)\})"
)
_POWER_OF_UNIT = re.compile(
    r"(\\(?:text|mathrm|mbox)\s{0,8}\{[^{}]*\}|(?<![A-Za-z])(?:[cmk]?m|ft|in|yd))\s{0,2}\^\{?[0-9]\}?"
)
_BROKEN_BOX = re.compile(r"(?:\\\W?)?(?<!\w)boxed\{")  # a box whose backslash is missing or misplaced
_GROUP = re.compile(r"[({]\s{0,8}([-+]?[0-9][0-9.,/]{0,40})\s{0,8}[)}]")
_IGNORED_MARKUP = re.compile(
    r"\\(?:text|math|m)(?:bf|it|rm|sf|tt|box|normal)?(?![A-Za-z])|</?[a-z]{1,20}>?"
    r"|\\(?:boxed|fbox|displaystyle|q?quad|approx|circ)(?![A-Za-z])"
    r"|\^\s{0,2}\{?\s{0,2}\\circ\s{0,2}\}?|\\[,;:!%() \[\]]|\\(?=[%\s]|$)|[{}~]"
)
_SYMBOL = re.compile(
    r"[\\^_!<>|+?\u2260\u2264\u2265\u221a\u03c0]|#\s{0,3}[-*/x\u00d7\u00b7(]\s{0,3}[#(a-z0-9]"
    r"|[A-Za-z)]\s{0,3}[-/*]\s{0,3}#|#\s{0,2}\("
)
_ALL_WORDS = re.compile(r"\s*\\(?:text|mathrm|mbox)\s{0,8}\{([^{}]*)\}\s*")
_TEN_TO_THE = re.compile(
    r"(?<=[0-9])\s{0,3}(?:\\times|\\cdot|[x*\u00d7\u00b7])\s{0,3}10\s{0,3}\^\s{0,3}"
    r"(?:\{\s{0,3}([-+]?[0-9]{1,2})\s{0,3}\}|(-?[0-9]{1,2}))(?![0-9])"
)
_MAGNITUDE = re.compile(
    r"(?<=[0-9])(?:[ -]{0,2}|\s{0,2}\\text\{\s{0,2})(hundred|thousand|million|billion|trillion)s?\b", re.IGNORECASE
)
_NEGATIVE = re.compile(r"(?<![0-9)] )\b(?:minus|negative)\s{1,3}(?=[$0-9.])", re.IGNORECASE)
_POWERS_OF_TEN = {"hundred": "e2", "thousand": "e3", "million": "e6", "billion": "e9", "trillion": "e12"}
_TOKEN = re.compile(r"[ \t\r\n]*(?:([0-9]+)|([-+*/()]))")
_THOUSANDS = re.compile(r"(?<=[0-9,])(?:\\[,!]|\{,\})(?=[0-9]{3})")
_SPACED_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(?: [0-9]{3})+")
_REMOVED = ("$", "%", "\\,", "\\!", "\\;", "\\left", "\\right")  # replaced by spaces, so that no two numbers are joined
_SIGNS = str.maketrans(
    {
        **dict.fromkeys(DASHES, "-"),
        **FULL_WIDTH,
        **{character: f" {value}" for character, value in SINGLE_FRACTIONS.items()},
    }
)
_LATEX_FRACTION = re.compile(
    r"(?<![0-9])(?<![0-9] )\\[dtc]?frac\s{0,8}"
    r"(?:\{([^{}]{1,200})\}|([0-9]))\s{0,8}(?:\{([^{}]{1,200})\}|([0-9])(?![0-9]))"
)
_IMPLICIT_PRODUCT = re.compile(r"(?<=[0-9)])\s{0,3}(?=\()|(?<=\))\s{0,3}(?=[0-9])")  # as in 2(3)
_FENCE = re.compile(r"```[a-z]{0,10}\s{0,4}\n([^`]*)```|`([^`]*)`|\*\*((?:[^*]|\*(?!\*))*)\*\*")
_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s{0,8}\{([^{}]*)\}")
_INTRODUCTION = re.compile(
    r"(?:(?:the|an?|my|this|that|it|answer|final|finally|arithmetic|expression|equation|solution|result|is|so|thus"
    r"|therefore|hence|we|get|have|here)\b[\s:,*]{0,4})+",
    re.IGNORECASE,
)
_EQUALS = re.compile(r",?\s(?:which\s)?(?:equals|is equal to)\s", re.IGNORECASE)
_TIMES = re.compile(r"(?<=[0-9)]) ?x ?(?=[0-9(])")
_OPERATORS = (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("×", "*"), ("·", "*"), ("⋅", "*"), ("÷", "/"))  # noqa: RUF001


def last_boxed(text: str) -> str | None:
    """Return the content of the last filled ``\\boxed{...}`` with balanced braces; unclosed boxes do not count.

    The result is blank if all boxes are blank, and None if there is no box.
    """
    text = text[-MAX_TEXT:]
    stack: list[tuple[bool, int]] = []
    start = end = -1
    filled = False
    for match in _BRACES.finditer(text):
        brace = match.group()
        if brace == "}":
            is_box, content_start = stack.pop() if stack else (False, 0)
            if is_box and (content_start > start or not filled):
                is_filled = match.start() - content_start > _LONGEST_BLANK or not is_blank(
                    text[content_start : match.start()]
                )
                if is_filled or start < 0:
                    start, end, filled = content_start, match.start(), is_filled
        elif brace[-1] == "{" and brace != "\\{":
            stack.append((brace != "{", match.end()))
    return None if start < 0 else text[start:end]


def last_answer(text: str) -> str | None:
    """Return the content of the last filled ``<answer>...</answer>``; blank if all are blank, None without one."""
    text = text[-MAX_TEXT:]
    blank: str | None = None
    end = text.rfind("</answer>")
    while end >= 0:
        start = text.rfind("<answer>", 0, end)
        if start < 0:
            break
        content = text[start + len("<answer>") : end]
        if len(content) > _LONGEST_BLANK or not is_blank(content):
            return content
        blank = content if blank is None else blank
        end = text.rfind("</answer>", 0, start)
    return blank


def filled_mark(text: str) -> str | None:
    """Return the content of the last filled box, else of the last filled answer tag; None if neither is filled."""
    for read_mark in (last_boxed, last_answer):
        marked = read_mark(text)
        if marked is not None and not is_blank(marked):
            return marked
    return None


def is_blank(content: str) -> bool:
    """Return whether a mark holds nothing but space, dots, question marks, underscores and empty text commands."""
    return not _BLANK_CONTENT.sub("", content)


def final_number(text: str) -> Fraction | None:
    """Return the number that a completion ends with, exactly.

    It is read from the last box, else from the last closed answer tag, else from the line after the last ``####``;
    otherwise it is the last number of the text. If there is a filled mark, its content alone decides.
    """
    if (marked := filled_mark(text)) is not None:
        return only_number(marked)
    text = text[-MAX_TEXT:]
    lines = text.rpartition("####")[2].strip().splitlines() if "####" in text else []
    if lines and (number := only_number(lines[0])) is not None:
        return number
    numbers = deque(_NUMBER.finditer(_plain(text)), maxlen=1)
    return _fraction(numbers[0]) if numbers else None


def only_number(text: str) -> Fraction | None:
    """Return the only number of ``text``, ignoring words and symbols that do not change its value.

    Reads ``1,200``, ``$-5``, ``12.5%``, ``1e3``, ``3/4``, ``\\frac{3}{4}``, ``5 1/2``, ``2 million``. Of an equation,
    it is the value of a side that is a number, the right one first, unless another side is a different number; of
    ``72=12*6`` it is the left side if the equation holds. None if there is no number, or several that differ.
    """
    text = text[-MAX_TEXT:]
    if words := _ALL_WORDS.fullmatch(text):
        text = words.group(1)
    if (spelled := number_of_words(text)) is not None:
        return Fraction(spelled)
    if "\\pm" in text or "\u00b1" in text:
        return None
    *left_sides, right_side = text.split("=")
    number = _number_of(right_side)
    if not left_sides:
        return number
    if number is None:
        number, evaluated = _number_of(left_sides[-1]), evaluate_expression(_arithmetic(right_side))
        return number if evaluated is not None and evaluated[0] == number else None
    return (
        number
        if all(value == number for left_side in left_sides if (value := _worked(left_side)) is not None)
        else None
    )


def _worked(text: str) -> Fraction | None:
    """Return the value of a side of an equation that is a number or arithmetic."""
    value = _literal(text)
    evaluated = evaluate_expression(_arithmetic(text)) if value is None else None
    return value if evaluated is None else evaluated[0]


def _number_of(text: str) -> Fraction | None:
    """Return the only number of a text without operators, symbols or words that change the value."""
    text = _plain(_POWER_OF_UNIT.sub(r"\1", _BROKEN_BOX.sub("{", text))).strip()
    text = _GROUP.sub(r"\1", _IGNORED_MARKUP.sub(" ", _GROUP.sub(r"\1", text))).strip()
    text = re.sub(
        r"(?<![\w.)] )(?<![\w.)])([-+])\s*(?:(?:[$\u20ac\u00a3\u00a5]|USD|EUR)\s*)?(?=[0-9.])", r" \1", text
    ).strip()
    if _SPACED_THOUSANDS.fullmatch(text):
        text = text.replace(" ", "")
    values = {_fraction(match) for match in _NUMBER.finditer(text)}
    outline = _NUMBER.sub("#", text)
    before, after = outline.partition("#")[0], outline.rpartition("#")[2]
    ambiguous = len(values) != 1 or _SYMBOL.search(outline) or changes_value(before, after)
    return None if ambiguous else values.pop()


def _literal(text: str) -> Fraction | None:
    """Return the value of a text that is a number and nothing else."""
    match = _NUMBER.fullmatch(_plain(text).strip())
    return None if match is None else _fraction(match)


def gold_number(answer: Any, where: str) -> Fraction:
    """Return the number in the ``answer`` of a row: a number, or text that is one or ends with ``#### N``."""
    text = answer if isinstance(answer, str) else "" if isinstance(answer, bool) else str(answer)
    number = _literal(text[-MAX_TEXT:].rpartition("####")[2].replace(",", ""))
    if number is None:
        raise InputError(f"{where}: the answer {answer!r:.60} is not a number; correct it.")
    return number


def _plain(text: str) -> str:
    text = text.translate(_SIGNS).replace("\\$", "$").replace("-$", "-")
    text = _TEN_TO_THE.sub(lambda match: f"e{match.group(1) or match.group(2)}", _THOUSANDS.sub("", text))
    text = _NEGATIVE.sub("-", text)
    text = _MAGNITUDE.sub(lambda match: _POWERS_OF_TEN[match.group(1).lower()], _without_removed(text))
    return _FRACTION.sub(_as_quotient, text)


def _without_removed(text: str) -> str:
    for mark in _REMOVED:
        text = text.replace(mark, " ")
    return text


def _as_quotient(match: re.Match[str]) -> str:
    before = match.string[match.start() - 1 : match.start()] if match.start() else ""
    over, under = (part for part in match.groups() if part is not None)
    if under.startswith("-"):
        over, under = over.removeprefix("-") if over.startswith("-") else f"-{over}", under[1:]
    return f"{' ' if before.isalnum() else ''}{over}/{under}"


def _fraction(match: re.Match[str]) -> Fraction | None:
    text = match.group()
    return None if len(text) > MAX_DIGITS else _short_fraction(text)


@lru_cache(maxsize=2**12)  # answers repeat the same few numbers, and constructing a Fraction is slow
def _short_fraction(text: str) -> Fraction | None:
    head, _, under = text.replace(",", "").partition("/")
    *whole, over = head.split()
    if under and not int(under):
        return None
    if not under:
        return Fraction(over)
    value = Fraction(over) / int(under)
    if whole and 0 < value < 1:
        value += abs(int(whole[0]))
        return -value if whole[0].startswith("-") else value
    return value


def marked_expression(text: str) -> str | None:
    """Return the expression that a completion gives: the last box, else the last closed tag, else a short text.

    Operators are mapped to ``+ - * /``. Of an equation, it is the first side, or the second if the first is a number
    alone. None if there is no expression, or if the sides of an equation have different values.
    """
    mark = filled_mark(text)
    content = text if mark is None else mark
    if len(content) > 4 * MAX_EXPRESSION:
        return None
    content = _unfenced(content) if mark is None else _without_introduction(_unfenced(content))
    sides = [_arithmetic(side) for side in content.removesuffix(".").split("=")]
    if len(sides) > 1:
        sides = sides[1:] if sides[0].isalpha() and len(sides[0]) == 1 else sides
        values = [evaluate_expression(side) for side in sides]
        if None in values or len({value for value, _ in filter(None, values)}) > 1:
            return None
    expression = next((side for side in sides if not side.isdigit()), sides[0])
    return expression if 0 < len(expression) <= MAX_EXPRESSION else None


def _unfenced(text: str) -> str:
    """Return an answer without the code fence or the bold markup around it."""
    text = text.strip()
    fenced = _FENCE.fullmatch(text.removesuffix("."))
    return next(filter(None, fenced.groups()), "").strip() if fenced else text


def _without_introduction(text: str) -> str:
    """Remove the introductory words of a marked answer, such as ``The answer is``."""
    text = _TEXT.sub(r" \1 ", text).strip()
    if introduced := _INTRODUCTION.match(text):
        text = text[introduced.end() :]
    return _EQUALS.sub(" = ", text).strip()


def _multiplied(text: str) -> str:
    """Insert signs into implicit products; return an empty text if a preceding slash makes them ambiguous."""
    spans = [match.span() for match in _IMPLICIT_PRODUCT.finditer(text)]
    for start, end in reversed(spans):
        if _before_operand(text, start) == "/":
            return ""
        text = f"{text[:start]}*{text[end:]}"
    return text


def _before_operand(text: str, end: int) -> str:
    """Return the operator before the operand that ends at ``end``, including operands multiplied implicitly."""
    depth, position = 0, end - 1
    while position >= 0:
        character = text[position]
        depth += (character == ")") - (character == "(")
        if depth < 0 or (depth == 0 and character in "+-*/"):
            return character
        position -= 1
    return ""


def _arithmetic(text: str) -> str:
    """Convert mathematics into an arithmetic expression, as far as possible."""
    text = text.translate(_SIGNS)
    for _ in range(
        MAX_EXPRESSION_DEPTH if len(text) <= 4 * MAX_EXPRESSION else 1
    ):  # nested fractions, from the innermost
        replaced = _LATEX_FRACTION.sub(lambda match: "(({})/({}))".format(*filter(None, match.groups())), text)
        if replaced == text:
            break
        text = replaced
    for mark, sign in (*_OPERATORS, ("[", "("), ("]", ")"), *((blank, " ") for blank in _REMOVED if blank != "%")):
        text = text.replace(mark, sign)
    text = _TIMES.sub("*", text).strip()
    return _multiplied(text) if len(text) <= 4 * MAX_EXPRESSION else text


def evaluate_expression(expression: str) -> tuple[Fraction, list[int]] | None:
    """Return the exact value of an arithmetic expression and the numbers that occur in it, in order.

    The grammar has whole numbers, ``+ - * /``, unary minus and parentheses. None for anything else, for a division by
    zero, and beyond ``MAX_EXPRESSION`` characters, ``MAX_EXPRESSION_DEPTH`` levels or ``MAX_DIGITS`` digits.
    """
    if len(expression) > MAX_EXPRESSION:
        return None
    tokens: list[str] = []
    position, text = 0, expression.rstrip(" \t\r\n")
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        tokens.append(match.group(1) or match.group(2))
        position = match.end()
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
    """Recursive descent over tokens: sum -> product -> factor. ``numbers`` are the numbers read so far."""

    def __init__(self, tokens: list[str]) -> None:
        self.rest = ["", *reversed(tokens)]  # the next token is the last; the empty one ends the input
        self.numbers: list[int] = []

    def sum(self, depth: int) -> Fraction:
        return self._chain("+", "-", self.product, depth)

    def product(self, depth: int) -> Fraction:
        return self._chain("*", "/", self.factor, depth)

    def factor(self, depth: int) -> Fraction:
        token = self.rest[-1]
        if depth > MAX_EXPRESSION_DEPTH or not token:
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

    def _chain(self, direct: str, inverse: str, parse_operand: Callable[[int], Fraction], depth: int) -> Fraction:
        value = parse_operand(depth)
        while self.rest[-1] in (direct, inverse):
            operator = self.rest.pop()
            operand = parse_operand(depth)
            if operator == "+":
                value += operand
            elif operator == "-":
                value -= operand
            elif operator == "*":
                value *= operand
            else:
                value /= operand
        return value
