"""Arithmetic in LaTeX worked out exactly: the sides of an equation such as ``\\frac{10+4}{2}=7``."""

from fractions import Fraction
from math import comb, factorial, isqrt
from typing import Any

from dllm_sd.tasks.latex import MAX_DEPTH, Node, Nodes, literal

MAX_BITS = 400  # of a value, above and below the line
MAX_POWER = 64
MAX_FACTORIAL = 60


class _NotWorked(Exception):
    """The nodes are no arithmetic within the bounds."""


def worked(nodes: Nodes) -> Fraction | None:
    """The exact value of sums, products, quotients, powers, roots of squares, factorials and binomial coefficients.

    None where there is a letter, a unit or anything else, a division by zero, or a value beyond the bounds.
    """
    value = literal(nodes)
    if value is not None:
        return value
    try:
        worker = _Worker(nodes, 0)
        value = worker.sum()
        return None if worker.rest else value
    except (_NotWorked, ZeroDivisionError):
        return None


class _Worker:
    """Recursive descent over nodes: sum -> product -> power -> atom."""

    def __init__(self, nodes: Nodes, depth: int) -> None:
        if depth > MAX_DEPTH or not nodes:
            raise _NotWorked
        self.rest, self.depth = list(reversed(nodes)), depth

    def sum(self) -> Fraction:
        """Terms with signs between them, and perhaps before the first."""
        sign = -1 if self._takes("-") else 1
        value = sign * self._product()
        while self.rest and self.rest[-1] in ("+", "-"):
            sign = 1 if self.rest.pop() == "+" else -1
            value = _bounded(value + sign * self._product())
        return value

    def _product(self) -> Fraction:
        value, divided = self._power(), False
        while self.rest and self.rest[-1] not in ("+", "-", ")"):
            sign = self.rest.pop() if self.rest[-1] in (r"\cdot", "/") else ""
            if not sign and (divided or (isinstance(self.rest[-1], str) and self.rest[-1] != "(")):
                raise _NotWorked  # numbers side by side, or a slash that binds in doubtful ways
            if not sign and isinstance(self.rest[-1], tuple) and self.rest[-1][0] == "frac":
                raise _NotWorked  # a mixed number or a product
            factor = self._power()
            divided = divided or sign == "/"
            value = _bounded(value / factor if sign == "/" else value * factor)
        return value

    def _power(self) -> Fraction:
        value = self._atom()
        if self._takes("!"):
            if value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
                raise _NotWorked
            value = Fraction(factorial(int(value)))
        if self.rest and isinstance(self.rest[-1], tuple) and self.rest[-1][0] == "^":
            exponent = self._inner(self.rest.pop()[1])
            if exponent.denominator != 1 or abs(exponent) > MAX_POWER or (value == 0 and exponent <= 0):
                raise _NotWorked
            if abs(exponent) * max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
                raise _NotWorked
            value = value ** int(exponent)
        if self.rest and (self.rest[-1] == "!" or self.rest[-1][0] == "^"):
            raise _NotWorked
        return _bounded(value)

    def _atom(self) -> Fraction:
        if not self.rest:
            raise _NotWorked
        node = self.rest.pop()
        if node == "(":
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise _NotWorked
            value = self.sum()
            if not self._takes(")"):
                raise _NotWorked
            self.depth -= 1
            return value
        if isinstance(node, str):
            value = literal([node])
            if value is None:
                raise _NotWorked
            return value
        return self._command(node)

    def _command(self, node: Node) -> Fraction:
        if node[0] == "frac":
            return _bounded(self._inner(node[1]) / self._inner(node[2]))
        if node[0] == "sqrt" and not node[1]:
            return _root(self._inner(node[2]))
        if node[0] == "binom":
            above, below = self._inner(node[1]), self._inner(node[2])
            if above.denominator == below.denominator == 1 and 0 <= below <= above <= MAX_FACTORIAL:
                return Fraction(comb(int(above), int(below)))
        raise _NotWorked

    def _inner(self, nodes: Any) -> Fraction:
        inside = _Worker(nodes, self.depth + 1)
        value = inside.sum()
        if inside.rest:
            raise _NotWorked
        return value

    def _takes(self, token: str) -> bool:
        if self.rest and self.rest[-1] == token:
            self.rest.pop()
            return True
        return False


def _root(value: Fraction) -> Fraction:
    if value < 0:
        raise _NotWorked
    root = Fraction(isqrt(value.numerator), isqrt(value.denominator))
    if root * root != value:
        raise _NotWorked
    return root


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _NotWorked
    return value
