"""LaTeX of answers as a list of nodes: commands hold their arguments, words are separate, spelling is unified."""

import re
from fractions import Fraction
from typing import Any

from dllm_sd.tasks.grading import DASHES, FULL_WIDTH, MAX_DIGITS, SINGLE_FRACTIONS
from dllm_sd.tasks.units import MEASURE

MAX_LATEX_DEPTH = 20  # nested groups

Node = str | tuple[Any, ...]  # a token; or a command with its arguments: ("frac", over, under), ("words", text), ...
Nodes = list[Node]
OPERATORS = ("+", "-", "/", "=", "<", ">", r"\cdot", r"\le", r"\ge")

_WORDS = r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mathrm|mathbf|mathit|mathsf|mbox|operatorname)\s{0,8}\{([^{}]*)\}"
_TOKEN = re.compile(_WORDS + r"|(\\[A-Za-z]+|\\.|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[^\s])", re.DOTALL)
_IN_WORDS = re.compile(r"[0-9]+(?:\.[0-9]+)?|[^\W\d_]+(?:[.'\u2019-][^\W\d_]+)*\.?|[^\s]")
_WORD_QUOTIENT = re.compile(
    r"\s*([0-9]+(?:\.[0-9]+)?)?\s*([A-Za-z]+(?: [A-Za-z]+)?)\s*/\s*([A-Za-z]+)\s*(?:\^([23]))?\s*"
)
_NUMBER = re.compile(r"[0-9]*\.?[0-9]+")
_IGNORED = re.compile(
    r"(\\\\)|\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|bm|boldsymbol|underline|fbox|q?quad)(?![A-Za-z])\.?"
    r"|\\[,;:!> ]|\\[()\[\]]|(?<!\\)[~$]"
)
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\\[,!]|,\s*\\!\s*|\{,\})(?=[0-9]{3}(?![0-9]))")
_POWER = re.compile(r"\*\*\s{0,4}(-?[0-9]{1,12}|[A-Za-z])")
_SPACED_THOUSANDS = re.compile(r"-?[0-9]{1,3}(?: [0-9]{3})+")
_MIXED = re.compile(r"(?<![0-9.])([0-9]{1,12}) +([0-9]{1,12})/([0-9]{1,12})(?![0-9])")
_MEASURED = re.compile(
    rf"(?<=[0-9}}])\s+((?:square |cubic |sq )?(?:{MEASURE})(?:/(?:{MEASURE}|[hsml]))?|[mg]/(?:{MEASURE}|[hsml]))"
    r"(\^\{?[23]\}?)?\s*\.?\s*$",
    re.IGNORECASE,
)
_UNIT_QUOTIENT = re.compile(
    r"\\frac\s{0,4}\{\s{0,4}\\(?:text|mathrm)\{([ A-Za-z]{1,30})\}\s{0,4}\}"
    r"\s{0,4}\{\s{0,4}\\(?:text|mathrm)\{([ A-Za-z]{1,30})\}\s{0,4}(\^\{?[23]\}?)?\s{0,4}\}"
)
_CANONICAL: dict[str, str] = {
    **{rf"\{name}frac": r"\frac" for name in "dtc"},
    **{r"\leq": r"\le", r"\leqslant": r"\le", r"\geq": r"\ge", r"\geqslant": r"\ge", r"\neq": r"\ne"},
    **{r"\lt": "<", r"\gt": ">", r"\varnothing": r"\emptyset", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\ast": "*"},
    **{r"\times": r"\cdot", "*": r"\cdot", r"\%": "%", r"\degree": "°", r"\lvert": "|", r"\rvert": "|", r"\mid": "|"},
    **{r"\lparen": "(", r"\rparen": ")", r"\lbrack": "[", r"\rbrack": "]", r"\div": "/", ";": ","},
}
_SIGNS = str.maketrans(
    {
        **dict.fromkeys(DASHES, "-"),
        **FULL_WIDTH,
        **{sign: rf" \frac{{{text[0]}}}{{{text[2]}}}" for sign, text in SINGLE_FRACTIONS.items()},
        **{"\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u00f7": "/", "\u03c0": r"\pi "},
        **{"\u221e": r"\infty ", "\u221a": r"\sqrt ", "\u222a": r"\cup ", "\u2205": r"\emptyset ", "\u2264": r"\le "},
        **{"\u2265": r"\ge ", "\u2260": r"\ne ", "\u00b1": r"\pm ", "\u00b2": "^{2}", "\u00b3": "^{3}"},
    }
)
_OPEN, _CLOSE = ("(", "[", r"\{"), (")", "]", r"\}")


class Unreadable(Exception):
    """The input nests too deeply, has too many parts, or has braces that do not match."""


def cleaned(text: str) -> str:
    """Remove math delimiters, spacing and sizes from LaTeX, map characters to commands, and join thousands."""
    text = text.strip().removeprefix("**").removesuffix("**")
    text = re.sub(r"\\\\\[[^\]]{0,10}\]", r"\\\\", text)
    if _SPACED_THOUSANDS.fullmatch(text):
        text = text.replace(" ", "")
    text = _POWER.sub(r"^{\1}", _THOUSANDS.sub("", text.translate(_SIGNS)))
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", _IGNORED.sub(lambda match: match.group(1) or " ", text))
    text = _UNIT_QUOTIENT.sub(r"\\text{\1/\2}\3", text)
    return _MEASURED.sub(r"\\text{\1}\2", text)


def parse(text: str) -> Nodes:
    """Parse cleaned LaTeX into nodes.

    Raises:
        Unreadable: if braces do not match, or nest too deeply.
    """
    return _Parser(text).nodes(0, None)


class _Parser:
    """Parses text into nodes: commands hold their arguments, words are separate, braces are removed."""

    def __init__(self, text: str) -> None:
        self.tokens: list[Node] = []
        for text_content, token in _TOKEN.findall(text):
            self.tokens += [_canonical(token)] if token else _from_words(text_content)
        self.tokens.reverse()

    def nodes(self, depth: int, end: str | None) -> Nodes:
        """Parse all nodes up to the token ``end``."""
        if depth > MAX_LATEX_DEPTH:
            raise Unreadable
        nodes: Nodes = []
        while self.tokens:
            token = self.tokens.pop()
            if token == end:
                return nodes
            nodes += self._node(token, depth)
        if end is not None:
            raise Unreadable
        return nodes

    def _node(self, token: Node, depth: int) -> Nodes:
        if token == "{":
            return self.nodes(depth + 1, "}")
        if token == "}":
            raise Unreadable
        if token == r"\frac":
            return [("frac", self._argument(depth), self._argument(depth))]
        if token == r"\sqrt":
            index: Nodes = []
            if self.tokens and self.tokens[-1] == "[":
                self.tokens.pop()
                index = self.nodes(depth + 1, "]")
            return [("sqrt", [] if index == ["2"] else index, self._argument(depth))]
        if token in (r"\binom", r"\dbinom", r"\tbinom"):
            return [("binom", self._argument(depth), self._argument(depth))]
        if token in ("^", "_"):
            content = self._argument(depth)
            return ["°"] if token == "^" and content in ([r"\circ"], ["°"]) else [(token, content)]
        if token in (r"\overline", r"\bar"):
            return [("over", self._argument(depth))]
        if token == r"\begin":
            return [self._matrix(depth)]
        return [token]

    def _argument(self, depth: int) -> Nodes:
        """Parse an argument: a group, a command with its arguments, or one character."""
        if not self.tokens or depth > MAX_LATEX_DEPTH:
            raise Unreadable
        token = self.tokens.pop()
        if isinstance(token, str) and _NUMBER.fullmatch(token) and len(token) > 1:
            self.tokens.append(token[1:])
            token = token[0]
        return self._node(token, depth + 1)

    def _name(self) -> str:
        if not self.tokens or self.tokens.pop() != "{" or "}" not in self.tokens:
            raise Unreadable
        letters = []
        while (token := self.tokens.pop()) != "}":
            letters.append(str(token))
        return "".join(letters)

    def _matrix(self, depth: int) -> Node:
        name = self._name()
        if not name.endswith("matrix") and name != "array":
            raise Unreadable
        if name == "array":
            self._name()  # the column specification
        content = [node for node in self.nodes(depth + 1, r"\end") if node != r"\hline"]
        if self._name() != name:
            raise Unreadable
        rows = [split_nodes(row, "&") for row in split_nodes(content, r"\\")]
        kind = "p" if name in ("pmatrix", "bmatrix") else "" if name in ("array", "matrix", "smallmatrix") else name
        return ("matrix", kind, [row for row in rows if row != [[]]])


def _canonical(token: str) -> str:
    """Return the canonical spelling of a token."""
    return _CANONICAL.get(token, token)


def _from_words(text: str) -> Nodes:
    """Parse the content of ``\\text{}``: numbers, signs and words; "and" and "or" become separators."""
    nodes: Nodes = []
    if quotient := _WORD_QUOTIENT.fullmatch(text):
        number, over, under, power = quotient.groups()
        unit: Nodes = [("words", f"{over.strip()} per {under.strip()}")]
        return [*([number] if number else []), *unit, *([("^", [power])] if power else [])]
    for token in _IN_WORDS.findall(text):
        if token in ("and", "or"):
            nodes.append(",")
        elif not token[0].isalpha():
            nodes.append(_canonical(token))
        else:
            earlier_words = f"{nodes.pop()[1]} " if nodes and nodes[-1][0] == "words" else ""
            nodes.append(("words", earlier_words + token.replace(".", "")))
    return nodes


def split_nodes(nodes: Nodes, mark: str) -> list[Nodes]:
    """Split nodes at marks outside brackets."""
    parts: list[Nodes] = [[]]
    depth = 0
    for node in nodes:
        depth += (node in _OPEN) - (node in _CLOSE)
        if node == mark and depth <= 0:
            parts.append([])
        else:
            parts[-1].append(node)
    return parts


def enclosed(nodes: Nodes) -> bool:
    """Return whether the first node is a bracket that the last node closes."""
    depth = 0
    for index, node in enumerate(nodes):
        depth += (node in _OPEN) - (node in _CLOSE)
        if depth == 0:
            return index > 0 and index == len(nodes) - 1
    return False


def unsigned(nodes: Nodes) -> Nodes:
    """Return nodes without a leading plus sign."""
    return nodes[1:] if nodes[:1] == ["+"] else nodes


def _plain(node: Node) -> Fraction | None:
    return Fraction(node) if isinstance(node, str) and len(node) <= MAX_DIGITS and _NUMBER.fullmatch(node) else None


def literal(nodes: Nodes) -> Fraction | None:
    """Return the value of a literal number: decimal, fraction, mixed, repeating or scientific."""
    if nodes[:1] in (["-"], ["+"]):
        value = literal(nodes[1:]) if nodes[1:2] not in (["-"], ["+"]) else None
        return None if value is None else -value if nodes[0] == "-" else value
    if not nodes or len(nodes) > 4:
        return None
    first = _plain(nodes[0])
    if len(nodes) == 1:
        return _quotient(nodes[0]) if nodes[0][0] == "frac" else first
    if first is None:
        return None
    if len(nodes) == 2 and nodes[1][0] == "frac":
        part = _quotient(nodes[1])
        return first + part if part is not None and first.denominator == 1 and 0 < part < 1 else None
    if len(nodes) == 3 and nodes[1] == "/":
        under = _plain(nodes[2])
        return first / under if under else None
    return _scientific(nodes, first) if nodes[1] == r"\cdot" else _repeating(nodes)


def _scientific(nodes: Nodes, first: Fraction) -> Fraction | None:
    power = nodes[-1]
    if len(nodes) == 4 and nodes[2] == "10" and isinstance(power, tuple) and power[0] == "^":
        exponent = literal(power[1])
        if exponent is not None and exponent.denominator == 1 and abs(exponent) <= MAX_DIGITS:
            return first * Fraction(10) ** int(exponent)
    return None


def _repeating(nodes: Nodes) -> Fraction | None:
    """Return the value of a repeating decimal such as ``0.\\overline{3}`` or ``0.1\\overline{6}``."""
    *digits, last = nodes
    text = "".join(node if isinstance(node, str) else "?" for node in digits)
    if not isinstance(last, tuple) or last[0] != "over" or len(last[1]) != 1 or not isinstance(last[1][0], str):
        return None
    period = last[1][0]
    if not re.fullmatch(r"[0-9]{1,20}\.[0-9]{0,20}", text) or not re.fullmatch(r"[0-9]{1,20}", period):
        return None
    places = len(text.partition(".")[2])
    return Fraction(text.rstrip(".")) + Fraction(int(period), 10**places * (10 ** len(period) - 1))


def _quotient(node: Node) -> Fraction | None:
    if isinstance(node, str):
        return None
    over, under = literal(node[1]), literal(node[2])
    return over / under if over is not None and under else None


def spell_number(value: Fraction) -> str:
    """Write a number as LaTeX in one spelling."""
    sign = "- " if value < 0 else ""
    numerator = abs(value.numerator)
    return f"{sign}{numerator}" if value.denominator == 1 else f"{sign}\\frac{{{numerator}}}{{{value.denominator}}}"


def spell(nodes: Nodes) -> str:
    """Write nodes as LaTeX in one spelling."""
    nodes = unsigned(nodes)
    if (value := literal(nodes)) is not None:
        return spell_number(value)
    slashes = [index for index, node in enumerate(nodes) if node == "/"]
    if len(slashes) == 1 and slashes[0] == len(nodes) - 2 and not {"+", "-", ",", "=", "<", ">"} & _tokens(nodes[1:]):
        sign, over = (["-"], nodes[1:-2]) if nodes[0] == "-" else ([], nodes[:-2])
        nodes = [*sign, ("frac", over, nodes[-1:])] if over else nodes
    parts: list[str] = []
    index = 0
    while index < len(nodes):
        node = nodes[index]
        pair = nodes[index : index + 2]
        if len(pair) == 2 and pair[1][0] == "frac" and (mixed := literal(pair)) is not None:
            parts.append(spell_number(mixed))
            index += 2
        elif node == "(" and nodes[index + 2 : index + 3] == [")"]:  # brackets around a single node
            parts.append(_spell_node(nodes[index + 1]))
            index += 3
        else:
            if node != r"\cdot" or not _is_omissible(nodes, index):
                parts.append(_spell_node(node))
            index += 1
    return " ".join(parts)


def _is_omissible(nodes: Nodes, index: int) -> bool:
    """Return whether a product sign can be omitted: between operands that are not both numbers."""
    neighbours = nodes[index - 1 : index + 2 : 2] if index else []
    return (
        len(neighbours) == 2
        and not any(operand in OPERATORS for operand in neighbours)
        and None in map(_plain, neighbours)
    )


def _tokens(nodes: Nodes) -> set[str]:
    return {node for node in nodes if isinstance(node, str)}


def _spell_node(node: Node) -> str:
    if isinstance(node, str):
        number = _plain(node)
        return node if number is None else spell_number(number)
    if node[0] == "frac":
        if (value := _quotient(node)) is not None:
            return spell_number(value)
        signs = [part[:1] == ["-"] and not {"+", "-"} & _tokens(part[1:]) for part in node[1:]]
        over, under = (spell(part[1:] if sign else part) for part, sign in zip(node[1:], signs, strict=True))
        return f"{'- ' if sum(signs) == 1 else ''}\\frac{{{over}}}{{{under}}}"
    if node[0] == "sqrt":
        return f"\\sqrt{f'[{spell(node[1])}]' if node[1] else ''}{{{spell(node[2])}}}"
    if node[0] == "words":
        return node[1] if len(node[1]) == 1 else f"\\text{{{node[1].casefold()}}}"
    if node[0] == "over":
        return f"\\overline{{{spell(node[1])}}}"
    if node[0] == "binom":
        return f"\\binom{{{spell(node[1])}}}{{{spell(node[2])}}}"
    if node[0] == "matrix":
        rows = (" & ".join(map(spell, row)) for row in node[2])
        return f"\\begin{{{node[1]}}} {' ; '.join(rows)} \\end{{{node[1]}}}"
    return f"{node[0]}{{{spell(node[1])}}}"
