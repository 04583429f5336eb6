"""Mathematical answers parsed from LaTeX: numbers, names, units, lists, sets, intervals and matrices.

Two answers are equal if their parts are: the same numbers, letters, words and signs in the same places, in any order
where order has no meaning. Sums, products and powers are compared as they are written and not evaluated, so that
repeating the question does not count as an answer.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from dllm_sd.tasks.latex import (
    MAX_LATEX_DEPTH,
    OPERATORS,
    Nodes,
    Unreadable,
    cleaned,
    enclosed,
    literal,
    parse,
    spell,
    spell_number,
    split_nodes,
    unsigned,
)
from dllm_sd.tasks.number_words import number_of_words
from dllm_sd.tasks.units import unit_of
from dllm_sd.tasks.worked import worked

MAX_ANSWER = 2000  # characters of the longest answer that is parsed
MAX_ITEMS = 100  # most parts of a list, a set or a tuple

_NAME = re.compile(r"[A-Za-z]|\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|varphi|omega|ell)")
_NOT_A_FORMULA = re.compile(r"\\text|/|[0-9] _\{|[=<>.]|\\(?:in|le|ge|ne)(?![A-Za-z])")
"""Words, ambiguous slashes, bases of numbers, and relations."""
_TEXT_ONLY = re.compile(r"^\\(?:text|mathrm|mbox)\s{0,8}\{([^{}]*)\}$")
_COMMAS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")


@dataclass(frozen=True)
class Answer:
    """One answer: the ``value``, the name before its ``=``, and the unit after it; None for a missing name or unit."""

    value: "Fraction | Letters | Body | Several"
    name: str | None = None
    unit: str | None = None


@dataclass(frozen=True)
class Letters:
    """Words or variables; ``text`` is true if they stood in ``\\text{}`` or the like, where case is ignored."""

    letters: str
    text: bool


@dataclass(frozen=True)
class Body:
    """Any other mathematics, as LaTeX in one spelling."""

    latex: str


@dataclass(frozen=True)
class Several:
    """A compound answer of a ``kind``: ordered in tuples, intervals and matrices, unordered in lists and sets."""

    kind: str
    items: tuple[Answer, ...]


Leaf = Callable[[str, str], bool]


def same_answer(gold: str, answer: str, leaf: Leaf = lambda a, b: False) -> bool:
    """Return whether two answers in LaTeX are equal.

    One of them may leave out a unit, or the name before an equals sign; if both have one, they must agree. ``leaf`` may
    declare differently written numbers or formulas equal; its arguments are LaTeX without words.
    """
    if not gold.strip() or not answer.strip():
        return False
    if gold.split() == answer.split():
        return True
    if max(len(gold), len(answer)) > MAX_ANSWER:
        return False
    return any(_equal(gold_reading, reading, leaf) for gold_reading in readings(gold) for reading in readings(answer))


@lru_cache(maxsize=2**10)  # a gold answer is compared with many completions
def readings(text: str) -> tuple[Answer, ...]:
    """Return the ways to read an answer: none if it cannot be parsed, two if ``1,234`` is a number or a list."""
    text = cleaned(text)
    if (number := number_of_words(_TEXT_ONLY.sub(r"\1", text.strip(" .")))) is not None:
        return (Answer(Fraction(number)),)
    texts = [text]
    if _COMMAS.search(text) and not re.search(r"[(\[]|\\\{", text):
        texts.insert(0, _COMMAS.sub(lambda match: match.group().replace(",", ""), text))
    answers = []
    for form in texts:
        try:
            answers.append(_answer(parse(form), 0))
        except Unreadable:
            continue
    return tuple(answers)


def _equal(a: Answer, b: Answer, leaf: Leaf) -> bool:
    if a.name is not None and b.name is not None and a.name != b.name:
        return False
    if a.unit is not None and b.unit is not None and a.unit != b.unit:
        return False
    value_a, value_b = a.value, b.value
    if isinstance(value_a, Several) or isinstance(value_b, Several):
        return isinstance(value_a, Several) and isinstance(value_b, Several) and _all_equal(value_a, value_b, leaf)
    if isinstance(value_a, Letters) and isinstance(value_b, Letters):
        left, right = value_a.letters.replace(" ", ""), value_b.letters.replace(" ", "")
        ignores_case = (
            value_a.text or value_b.text or all(len(text) > 2 and text[1:].islower() for text in (left, right))
        )
        return left == right or (ignores_case and len(left) > 1 and left.casefold() == right.casefold())
    if value_a == value_b:
        return True
    texts = [_formula(value) for value in (value_a, value_b)]
    return all(texts) and leaf(*texts)


def _formula(value: Fraction | Letters | Body) -> str:
    """Return a value as LaTeX; empty if it has words or notation that computer algebra systems read differently."""
    if isinstance(value, Fraction):
        return spell_number(value)
    if isinstance(value, Letters):
        return "" if value.text or " " in value.letters else " ".join(value.letters)
    return "" if _NOT_A_FORMULA.search(value.latex) else value.latex


def _all_equal(a: Several, b: Several, leaf: Leaf) -> bool:
    kinds = {a.kind, b.kind}
    if kinds == {"named", "()"}:
        named = a if a.kind == "named" else b
        names = [item.name or "" for item in named.items]
        latin = [name for name in names if name.isalpha() and name.isascii()]
        if latin != sorted(latin):  # the names are not in alphabetical order, so the order of values is ambiguous
            return False
        return len(a.items) == len(b.items) and all(
            _equal(first, second, leaf) for first, second in zip(a.items, b.items, strict=True)
        )
    if "named" in kinds and kinds <= {"named", "list"}:
        a, b = (Several("list", several.items) for several in (a, b))
        kinds = {"list"}
        if any(item.name is None for several in (a, b) for item in several.items):
            return False
    if (len(kinds) > 1 and kinds != {"list", "set"}) or len(a.items) != len(b.items):
        return False
    if a.kind not in ("list", "set", "union"):
        return all(_equal(first, second, leaf) for first, second in zip(a.items, b.items, strict=True))
    unmatched = list(b.items)
    for item in a.items:
        index = next((index for index, candidate in enumerate(unmatched) if _equal(item, candidate, leaf)), None)
        if index is None:
            return False
        unmatched.pop(index)
    return True


def _answer(nodes: Nodes, depth: int) -> Answer:
    nodes = nodes[:-1] if nodes and nodes[-1] in (".", ",") and nodes[-2:-1] != nodes[-1:] else nodes
    if not nodes or depth > MAX_LATEX_DEPTH:
        raise Unreadable
    nodes = _merged_matrix(nodes)
    for mark, kind in ((r"\cup", "union"), (",", "list")):
        if len(parts := [part for part in split_nodes(nodes, mark) if part]) > 1:
            return Answer(Several(kind, _answers(parts, depth)))
    if enclosed(nodes):
        inner = split_nodes(nodes[1:-1], ",")
        if nodes[0] == r"\{":
            return Answer(Several("set", _answers([part for part in inner if part], depth)))
        if len(inner) > 1:
            return Answer(Several(f"{nodes[0]}{nodes[-1]}", _answers(inner, depth)))
        if (nodes[0], nodes[-1]) == ("(", ")"):
            return _answer(nodes[1:-1], depth + 1)
    return _single_answer(nodes, depth)


def _answers(parts: Sequence[Nodes], depth: int) -> tuple[Answer, ...]:
    if len(parts) > MAX_ITEMS:
        raise Unreadable
    return tuple(_answer(part, depth + 1) for part in parts)


def _single_answer(nodes: Nodes, depth: int) -> Answer:
    """Parse an answer that is neither a list nor in brackets."""
    if nodes[0] == r"\approx":
        nodes = nodes[1:]
    if (equations := _paired_equations(nodes)) is not None:
        return Answer(Several("named", tuple(_single_answer(equation, depth + 1) for equation in equations)))
    name, nodes = _named(nodes)
    if name is not None and enclosed(nodes):
        return Answer(_answer(nodes, depth + 1).value, name)
    nodes, unit = _without_unit(nodes)
    if not nodes:
        raise Unreadable
    if r"\pm" in nodes:
        index = nodes.index(r"\pm")
        signed = [[*nodes[:index], sign, *nodes[index + 1 :]] for sign in "+-"]
        return Answer(Several("list", tuple(_single_answer(unsigned(part), depth) for part in signed)), name, unit)
    if len(nodes) == 1 and isinstance(nodes[0], tuple) and nodes[0][0] == "matrix":
        _, kind, rows = nodes[0]
        shape = "x".join(str(len(row)) for row in rows)
        return Answer(Several(f"{kind} {shape}", _answers([cell for row in rows for cell in row], depth)), name, unit)
    number = literal(nodes)
    number = _checked_equation(nodes) if number is None else number
    return Answer(_value(nodes) if number is None else number, name, unit)


def _merged_matrix(nodes: Nodes) -> Nodes:
    """Merge brackets around a plain matrix into the matrix."""
    if len(nodes) != 3 or not isinstance(nodes[1], tuple) or nodes[1][:2] != ("matrix", ""):
        return nodes
    kind = {("(", ")"): "p", ("[", "]"): "p", ("|", "|"): "vmatrix"}.get((str(nodes[0]), str(nodes[2])))
    return nodes if kind is None else [("matrix", kind, nodes[1][2])]


def _paired_equations(nodes: Nodes) -> list[Nodes] | None:
    """Return the equations that ``(x, y) = (1, 2)`` abbreviates; None for anything else."""
    sides = split_nodes(nodes, "=")
    if len(sides) != 2 or not all(side[:1] == ["("] and enclosed(side) for side in sides):
        return None
    names, values = (split_nodes(side[1:-1], ",") for side in sides)
    are_names = [name and isinstance(name[0], str) and bool(_NAME.fullmatch(name[0])) for name in names]
    are_single = all(len(name) == 1 or (len(name) == 2 and name[1][0] == "_") for name in names)
    if (
        not 1 < len(names) == len(values)
        or not all(are_names)
        or not are_single
        or len({*map(spell, names)}) < len(names)
    ):
        return None
    return [[*name, "=", *value] for name, value in zip(names, values, strict=True)]


def _is_compound_name(head: Nodes) -> bool:
    """Return whether nodes name a value by several symbols: ``P(A|B)``, ``f^{-1}(2)``, ``f'(2)``, ``|AB|``."""
    if head[:1] == ["|"] and head[-1:] == ["|"]:
        return len(head) > 2 and all(isinstance(node, str) and "A" <= node <= "Z" for node in head[1:-1])
    if head[:1] in ([r"\angle"], [r"\triangle"]) or (len(head) == 1 and head[0][0] == "over"):
        letters = head[0][1] if head[0][0] == "over" else head[1:]
        return bool(letters) and all(isinstance(node, str) and "A" <= node <= "Z" for node in letters)
    is_function = bool(head) and (head[0][0] == "words" or (isinstance(head[0], str) and head[0].isalpha()))
    arguments = head[1:]
    while arguments and (
        arguments[0] in ("'", "\u2032") or arguments[0] == ("^", ["-", "1"]) or arguments[0][0] == "_"
    ):
        arguments = arguments[1:]
    return is_function and len(arguments) > 2 and arguments[0] in ("(", "[") and enclosed(arguments)


def _named(nodes: Nodes) -> tuple[str | None, Nodes]:
    """Split off the name before ``=`` or ``\\in``, such as ``x``, ``x_1``, ``f(x)`` or ``|AB|``."""
    depth, equals = 0, None
    for index, node in enumerate(nodes):
        depth += (node in ("(", "[")) - (node in (")", "]"))
        if node in ("=", r"\in") and depth <= 0:
            equals = index
            break
    if equals is None or equals + 1 == len(nodes):
        return None, nodes
    head = nodes[:equals]
    if "=" in nodes[equals + 1 :] and _checked_equation(_without_unit(nodes[equals + 1 :])[0]) is None:
        return None, nodes
    if nodes[equals] == "=" and _is_compound_name(head):
        return spell(head), nodes[equals + 1 :]
    if nodes[equals] == r"\in" and nodes[equals + 1] not in ("(", "[", r"\{"):
        return None, nodes
    if len(head) > 1 and all(node[0] == "words" or (isinstance(node, str) and node.isupper()) for node in head):
        return spell(head), nodes[equals + 1 :]  # "Area", or the name of a line such as AB
    is_name = bool(head) and (head[0][0] == "words" or (isinstance(head[0], str) and bool(_NAME.fullmatch(head[0]))))
    tail = head[2:] if len(head) > 1 and head[1][0] == "_" else head[1:]
    is_function = len(tail) == 3 and tail[0] == "(" and tail[2] == ")" and isinstance(tail[1], str)
    return (spell(head), nodes[equals + 1 :]) if is_name and (not tail or is_function) else (None, nodes)


def _without_unit(nodes: Nodes) -> tuple[Nodes, str | None]:
    """Split an answer into the nodes without the unit, and the unit."""
    sign, rest = (nodes[:1], nodes[1:]) if nodes[:1] in (["-"], ["+"]) else ([], nodes)
    if rest[:1] == [r"\$"]:
        return sign + rest[1:], "$"
    last = nodes[-1]
    power = (
        last[1] if len(nodes) > 2 and isinstance(last, tuple) and last[0] == "^" and nodes[-2][0] == "words" else None
    )
    unit_index = len(nodes) - (1 if power is None else 2)
    if unit_index < 1 or nodes[unit_index - 1] in OPERATORS or nodes[0][0] == "words":
        return nodes, None
    last = nodes[unit_index]
    if last in ("%", "°"):
        return nodes[:unit_index], str(last)
    has_word = isinstance(last, tuple) and last[0] == "words"
    unit = unit_of(last[1], spell(power) if power else "") if has_word else None
    return (nodes, None) if unit is None else (nodes[:unit_index], unit or None)


def _checked_equation(nodes: Nodes) -> Fraction | None:
    """Return the value of an equation that holds, such as ``12 \\cdot 6 = 72``; None for any other equation."""
    sides = split_nodes(nodes, "=")
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
