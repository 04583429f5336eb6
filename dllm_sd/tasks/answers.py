"""Mathematical answers read from LaTeX: numbers, names, units, lists, sets, intervals and matrices, not mere strings.

Two answers are equal where their parts are: the same numbers, letters, words and signs in the same places, in any order
where order says nothing. Sums, products and powers are compared as they are written and never worked out, so that a
question repeated is no answer to it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from dllm_sd.tasks.latex import (
    MAX_DEPTH,
    OPERATORS,
    Nodes,
    Unreadable,
    cleaned,
    enclosed,
    literal,
    parse,
    spell,
    spell_number,
    split,
    unsigned,
)
from dllm_sd.tasks.number_words import number_of_words
from dllm_sd.tasks.units import unit_of
from dllm_sd.tasks.worked import worked

MAX_ANSWER = 2000  # characters of an answer that is read
MAX_ITEMS = 100  # parts of a list, a set or a tuple

_NAME = re.compile(r"[A-Za-z]|\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|varphi|omega|ell)")
_NO_FORMULA = re.compile(r"\\text|/|[0-9] _\{|[=<>.]|\\(?:in|le|ge|ne)(?![A-Za-z])")
"""Words, slashes that bind in doubtful ways, bases of numbers, relations."""
_WORDED = re.compile(r"^\\(?:text|mathrm|mbox)\s{0,8}\{([^{}]*)\}$")
_COMMAS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")


@dataclass(frozen=True)
class Answer:
    """One answer: ``value``, with the name before its ``=`` and the unit behind it, None where there are none."""

    value: "Fraction | Letters | Body | Several"
    name: str | None = None
    unit: str | None = None


@dataclass(frozen=True)
class Letters:
    """Words or names; ``text`` says that they stood in ``\\text{}`` or the like, where case is no matter."""

    letters: str
    text: bool


@dataclass(frozen=True)
class Body:
    """Any other mathematics, as LaTeX in one spelling."""

    latex: str


@dataclass(frozen=True)
class Several:
    """Answers of a ``kind``: in order in tuples, intervals and matrices, in any order in lists, sets and unions."""

    kind: str
    items: tuple[Answer, ...]


Leaf = Callable[[str, str], bool]


def same_answer(one: str, other: str, leaf: Leaf = lambda one, other: False) -> bool:
    """Whether two answers in LaTeX are equal.

    A unit, or the name before an equals sign, may be left out by one of them; where both have one they must agree.
    ``leaf`` may find numbers or formulas equal that are written differently; it gets LaTeX without words.
    """
    if not one.strip() or not other.strip():
        return False
    if one.split() == other.split():
        return True
    if max(len(one), len(other)) > MAX_ANSWER:
        return False
    return any(_equal(first, second, leaf) for first in readings(one) for second in readings(other))


@lru_cache(maxsize=2**10)  # a gold answer is compared with many
def readings(text: str) -> tuple[Answer, ...]:
    """What an answer may say: none where it cannot be read, two where ``1,234`` may be a number or a list."""
    text = cleaned(text)
    if (number := number_of_words(_WORDED.sub(r"\1", text.strip(" .")))) is not None:
        return (Answer(Fraction(number)),)
    texts = [text]
    if _COMMAS.search(text) and not re.search(r"[(\[]|\\\{", text):
        texts.insert(0, _COMMAS.sub(lambda match: match.group().replace(",", ""), text))
    found = []
    for form in texts:
        try:
            found.append(_answer(parse(form), 0))
        except Unreadable:
            continue
    return tuple(found)


def _equal(one: Answer, other: Answer, leaf: Leaf) -> bool:
    if one.name is not None and other.name is not None and one.name != other.name:
        return False
    if one.unit is not None and other.unit is not None and one.unit != other.unit:
        return False
    first, second = one.value, other.value
    if isinstance(first, Several) or isinstance(second, Several):
        return isinstance(first, Several) and isinstance(second, Several) and _all_equal(first, second, leaf)
    if isinstance(first, Letters) and isinstance(second, Letters):
        left, right = first.letters.replace(" ", ""), second.letters.replace(" ", "")
        words = first.text or second.text or all(len(text) > 2 and text[1:].islower() for text in (left, right))
        return left == right or (words and len(left) > 1 and left.casefold() == right.casefold())
    if first == second:
        return True
    texts = [_formula(value) for value in (first, second)]
    return all(texts) and leaf(*texts)


def _formula(value: Fraction | Letters | Body) -> str:
    """LaTeX of a value; empty where it has words, or what algebra systems read in another way or not at all."""
    if isinstance(value, Fraction):
        return spell_number(value)
    if isinstance(value, Letters):
        return "" if value.text or " " in value.letters else " ".join(value.letters)
    return "" if _NO_FORMULA.search(value.latex) else value.latex


def _all_equal(one: Several, other: Several, leaf: Leaf) -> bool:
    kinds = {one.kind, other.kind}
    if kinds == {"named", "()"}:
        named = one if one.kind == "named" else other
        names = [item.name or "" for item in named.items]
        latin = [name for name in names if name.isalpha() and name.isascii()]
        if latin != sorted(latin):  # whose values come in another order than readers expect
            return False
        return len(one.items) == len(other.items) and all(
            _equal(first, second, leaf) for first, second in zip(one.items, other.items, strict=True)
        )
    if "named" in kinds and kinds <= {"named", "list"}:
        one, other = (Several("list", several.items) for several in (one, other))
        kinds = {"list"}
        if any(item.name is None for several in (one, other) for item in several.items):
            return False
    if (len(kinds) > 1 and kinds != {"list", "set"}) or len(one.items) != len(other.items):
        return False
    if one.kind not in ("list", "set", "union"):
        return all(_equal(first, second, leaf) for first, second in zip(one.items, other.items, strict=True))
    rest = list(other.items)
    for item in one.items:
        place = next((place for place, found in enumerate(rest) if _equal(item, found, leaf)), None)
        if place is None:
            return False
        rest.pop(place)
    return True


def _answer(nodes: Nodes, depth: int) -> Answer:
    nodes = nodes[:-1] if nodes and nodes[-1] in (".", ",") and nodes[-2:-1] != nodes[-1:] else nodes
    if not nodes or depth > MAX_DEPTH:
        raise Unreadable
    nodes = _bracketed(nodes)
    for mark, kind in ((r"\cup", "union"), (",", "list")):
        if len(parts := [part for part in split(nodes, mark) if part]) > 1:
            return Answer(Several(kind, _answers(parts, depth)))
    if enclosed(nodes):
        inner = split(nodes[1:-1], ",")
        if nodes[0] == r"\{":
            return Answer(Several("set", _answers([part for part in inner if part], depth)))
        if len(inner) > 1:
            return Answer(Several(f"{nodes[0]}{nodes[-1]}", _answers(inner, depth)))
        if (nodes[0], nodes[-1]) == ("(", ")"):
            return _answer(nodes[1:-1], depth + 1)
    return _one(nodes, depth)


def _answers(parts: Sequence[Nodes], depth: int) -> tuple[Answer, ...]:
    if len(parts) > MAX_ITEMS:
        raise Unreadable
    return tuple(_answer(part, depth + 1) for part in parts)


def _one(nodes: Nodes, depth: int) -> Answer:
    """An answer that is no list and in no brackets."""
    if nodes[0] == r"\approx":
        nodes = nodes[1:]
    if (equations := _pairs(nodes)) is not None:
        return Answer(Several("named", tuple(_one(equation, depth + 1) for equation in equations)))
    name, nodes = _named(nodes)
    if name is not None and enclosed(nodes):
        return Answer(_answer(nodes, depth + 1).value, name)
    nodes, unit = _measured(nodes)
    if not nodes:
        raise Unreadable
    if r"\pm" in nodes:
        place = nodes.index(r"\pm")
        signed = [[*nodes[:place], sign, *nodes[place + 1 :]] for sign in "+-"]
        return Answer(Several("list", tuple(_one(unsigned(part), depth) for part in signed)), name, unit)
    if len(nodes) == 1 and isinstance(nodes[0], tuple) and nodes[0][0] == "matrix":
        _, kind, rows = nodes[0]
        shape = "x".join(str(len(row)) for row in rows)
        return Answer(Several(f"{kind} {shape}", _answers([cell for row in rows for cell in row], depth)), name, unit)
    number = literal(nodes)
    number = _worked(nodes) if number is None else number
    return Answer(_value(nodes) if number is None else number, name, unit)


def _bracketed(nodes: Nodes) -> Nodes:
    """A matrix whose brackets stand around it as one that has its own."""
    if len(nodes) != 3 or not isinstance(nodes[1], tuple) or nodes[1][:2] != ("matrix", ""):
        return nodes
    kind = {("(", ")"): "p", ("[", "]"): "p", ("|", "|"): "vmatrix"}.get((str(nodes[0]), str(nodes[2])))
    return nodes if kind is None else [("matrix", kind, nodes[1][2])]


def _pairs(nodes: Nodes) -> list[Nodes] | None:
    """The equations that ``(x, y) = (1, 2)`` stands for; None for anything else."""
    sides = split(nodes, "=")
    if len(sides) != 2 or not all(side[:1] == ["("] and enclosed(side) for side in sides):
        return None
    names, values = (split(side[1:-1], ",") for side in sides)
    letters = [name and isinstance(name[0], str) and bool(_NAME.fullmatch(name[0])) for name in names]
    short = all(len(name) == 1 or (len(name) == 2 and name[1][0] == "_") for name in names)
    if not 1 < len(names) == len(values) or not all(letters) or not short or len({*map(spell, names)}) < len(names):
        return None
    return [[*name, "=", *value] for name, value in zip(names, values, strict=True)]


def _is_called(head: Nodes) -> bool:
    """Whether nodes are a value with a name of several signs: ``P(A|B)``, ``f^{-1}(2)``, ``f'(2)``, ``|AB|``."""
    if head[:1] == ["|"] and head[-1:] == ["|"]:
        return len(head) > 2 and all(isinstance(node, str) and "A" <= node <= "Z" for node in head[1:-1])
    if head[:1] in ([r"\angle"], [r"\triangle"]) or (len(head) == 1 and head[0][0] == "over"):
        inside = head[0][1] if head[0][0] == "over" else head[1:]
        return bool(inside) and all(isinstance(node, str) and "A" <= node <= "Z" for node in inside)
    function = bool(head) and (head[0][0] == "words" or (isinstance(head[0], str) and head[0].isalpha()))
    rest = head[1:]
    while rest and (rest[0] in ("'", "\u2032") or rest[0] == ("^", ["-", "1"]) or rest[0][0] == "_"):
        rest = rest[1:]
    return function and len(rest) > 2 and rest[0] in ("(", "[") and enclosed(rest)


def _named(nodes: Nodes) -> tuple[str | None, Nodes]:
    """The name before ``=`` or ``\\in``, such as ``x``, ``x_1``, ``f(x)`` or ``|AB|``, and the rest."""
    depth, place = 0, None
    for at, node in enumerate(nodes):
        depth += (node in ("(", "[")) - (node in (")", "]"))
        if node in ("=", r"\in") and depth <= 0:
            place = at
            break
    if place is None or place + 1 == len(nodes):
        return None, nodes
    head = nodes[:place]
    if "=" in nodes[place + 1 :] and _worked(_measured(nodes[place + 1 :])[0]) is None:
        return None, nodes
    if nodes[place] == "=" and _is_called(head):
        return spell(head), nodes[place + 1 :]
    if nodes[place] == r"\in" and nodes[place + 1] not in ("(", "[", r"\{"):
        return None, nodes
    if len(head) > 1 and all(node[0] == "words" or (isinstance(node, str) and node.isupper()) for node in head):
        return spell(head), nodes[place + 1 :]  # "Area", or the name of a line such as AB
    letter = bool(head) and (head[0][0] == "words" or (isinstance(head[0], str) and bool(_NAME.fullmatch(head[0]))))
    tail = head[2:] if len(head) > 1 and head[1][0] == "_" else head[1:]
    called = len(tail) == 3 and tail[0] == "(" and tail[2] == ")" and isinstance(tail[1], str)
    return (spell(head), nodes[place + 1 :]) if letter and (not tail or called) else (None, nodes)


def _measured(nodes: Nodes) -> tuple[Nodes, str | None]:
    """An answer without its unit, and the unit."""
    sign, rest = (nodes[:1], nodes[1:]) if nodes[:1] in (["-"], ["+"]) else ([], nodes)
    if rest[:1] == [r"\$"]:
        return sign + rest[1:], "$"
    last = nodes[-1]
    power = (
        last[1] if len(nodes) > 2 and isinstance(last, tuple) and last[0] == "^" and nodes[-2][0] == "words" else None
    )
    place = len(nodes) - (1 if power is None else 2)
    if place < 1 or nodes[place - 1] in OPERATORS or nodes[0][0] == "words":
        return nodes, None
    last = nodes[place]
    if last in ("%", "°"):
        return nodes[:place], str(last)
    worded = isinstance(last, tuple) and last[0] == "words"
    unit = unit_of(last[1], spell(power) if power else "") if worded else None
    return (nodes, None) if unit is None else (nodes[:place], unit or None)


def _worked(nodes: Nodes) -> Fraction | None:
    """The number of an equation that holds, such as ``12 \\cdot 6 = 72``; None for any other."""
    sides = split(nodes, "=")
    if len(sides) < 2 or all(literal(side) is None for side in sides):
        return None
    values = {worked(side) for side in sides}
    return values.pop() if len(values) == 1 else None


def _value(nodes: Nodes) -> Fraction | Letters | Body:
    if all((isinstance(node, str) and node.isalpha()) or node[0] == "words" for node in nodes):
        text = "".join(node if isinstance(node, str) else f" {node[1]} " for node in nodes)
        if (number := number_of_words(text)) is not None:
            return Fraction(number)
        return Letters(" ".join(text.split()), any(len(node[1]) > 1 for node in nodes if not isinstance(node, str)))
    return Body(spell(nodes))
