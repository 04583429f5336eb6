"""Exact evaluation of arithmetic in LaTeX: the sides of an equation such as ``\\frac{10+4}{2}=7``."""

from fractions import Fraction
from math import comb, factorial, isqrt
from typing import Any

from dllm_sd.tasks.latex import MAX_LATEX_DEPTH, Node, Nodes, literal

MAX_FRACTION_BITS = 400  # of numerator and denominator of a value
MAX_POWER = 64
MAX_FACTORIAL = 60


class _Unsupported(Exception):
    """The nodes are not arithmetic within the bounds."""


def worked(nodes: Nodes) -> Fraction | None:
    """Evaluate sums, products, quotients, powers, roots of squares, factorials and binomial coefficients exactly.

    None if there is a letter, a unit or anything else, a division by zero, or a value beyond the bounds.
    """
    value = literal(nodes)
    if value is not None:
        return value
    try:
        evaluator = _Evaluator(nodes, 0)
        value = evaluator.sum()
        return None if evaluator.rest else value
    except (_Unsupported, ZeroDivisionError):
        return None


class _Evaluator:
    """Recursive descent over nodes: sum -> product -> power -> atom."""

    def __init__(self, nodes: Nodes, depth: int) -> None:
        if depth > MAX_LATEX_DEPTH or not nodes:
            raise _Unsupported
        self.rest, self.depth = list(reversed(nodes)), depth

    def sum(self) -> Fraction:
        """Evaluate terms joined by plus and minus signs, with an optional leading minus."""
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
                raise _Unsupported  # adjacent numbers, or a product after a slash, are ambiguous
            if not sign and isinstance(self.rest[-1], tuple) and self.rest[-1][0] == "frac":
                raise _Unsupported  # ambiguous: a mixed number or a product
            factor = self._power()
            divided = divided or sign == "/"
            value = _bounded(value / factor if sign == "/" else value * factor)
        return value

    def _power(self) -> Fraction:
        value = self._atom()
        if self._takes("!"):
            if value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
                raise _Unsupported
            value = Fraction(factorial(int(value)))
        if self.rest and isinstance(self.rest[-1], tuple) and self.rest[-1][0] == "^":
            exponent = self._inner(self.rest.pop()[1])
            if exponent.denominator != 1 or abs(exponent) > MAX_POWER or (value == 0 and exponent <= 0):
                raise _Unsupported
            if abs(exponent) * max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_FRACTION_BITS:
                raise _Unsupported
            value = value ** int(exponent)
        if self.rest and (self.rest[-1] == "!" or self.rest[-1][0] == "^"):
            raise _Unsupported
        return _bounded(value)

    def _atom(self) -> Fraction:
        if not self.rest:
            raise _Unsupported
        node = self.rest.pop()
        if node == "(":
            self.depth += 1
            if self.depth > MAX_LATEX_DEPTH:
                raise _Unsupported
            value = self.sum()
            if not self._takes(")"):
                raise _Unsupported
            self.depth -= 1
            return value
        if isinstance(node, str):
            value = literal([node])
            if value is None:
                raise _Unsupported
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
        raise _Unsupported

    def _inner(self, nodes: Any) -> Fraction:
        evaluator = _Evaluator(nodes, self.depth + 1)
        value = evaluator.sum()
        if evaluator.rest:
            raise _Unsupported
        return value

    def _takes(self, token: str) -> bool:
        if self.rest and self.rest[-1] == token:
            self.rest.pop()
            return True
        return False


def _root(value: Fraction) -> Fraction:
    if value < 0:
        raise _Unsupported
    root = Fraction(isqrt(value.numerator), isqrt(value.denominator))
    if root * root != value:
        raise _Unsupported
    return root


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_FRACTION_BITS:
        raise _Unsupported
    return value
