"""Ranges of numeric fields, declared in their types and checked whenever an object is built.

A field is declared as ``cap: Annotated[float, Range(above=0)] = 2.0``, or with one of the names below. A number without
a range must be finite and at most 2^53 in absolute value.
"""

import math
from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

from dllm_sd.errors import InputError, shown

LIMIT = 2**53
"""Largest absolute value of a number; 64-bit floats represent all whole numbers up to it."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers from `least` to `most` that are larger than `above` and smaller than `below`, and `also`."""

    least: float = -LIMIT
    most: float = LIMIT
    above: float = -math.inf
    below: float = math.inf
    also: float | None = None
    """One number outside of the range that is allowed too."""

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is in the range."""
        return value == self.also or (self.least <= value <= self.most and self.above < value < self.below)

    def description(self, value: Any) -> str:
        """The range as it follows "a number" in the message that refuses ``value``.

        `LIMIT` is mentioned only if ``value`` exceeds it.
        """
        low = f"above {_plain(self.above)}" if self.above >= self.least else ""
        if not low and (self.least > -LIMIT or value < -LIMIT):
            low = f"of at least {_plain(self.least)}"
        high = f"below {_plain(self.below)}" if self.below <= self.most else ""
        if not high and (self.most < LIMIT or value > LIMIT):
            high = f"at most {_plain(self.most)}"
        if low.startswith("of") and high.startswith("at most"):
            also = "" if self.also is None else f", or {_plain(self.also)}"
            return f"from {_plain(self.least)} to {_plain(self.most)}{also}"
        if not low and high.startswith("at most"):
            return f"of {high}"
        return " and ".join(bound for bound in (low, high) if bound) or "that is finite"


Natural = Annotated[int, Range(least=0)]
"""A count that may be 0."""
Count = Annotated[int, Range(least=1)]
"""A count of at least 1 that does not determine time or memory, such as an interval."""
Size = Annotated[int, Range(least=1, most=2**20)]
"""A count with which time and memory grow: of positions, rows, problems or draws."""
SplitSize = Annotated[int, Range(least=0, most=2**28)]
"""Number of training problems; their order takes 8 bytes each, at most 2 GiB."""
Seed = Annotated[int, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, most=1)]
ShareBelowOne = Annotated[float, Range(least=0, below=1)]
PositiveShare = Annotated[float, Range(above=0, most=1)]
Temperature = Annotated[float, Range(least=0.001, most=1000, also=0)]
"""A sampling temperature; 0 is greedy. Logits divided by much smaller ones overflow, and nothing is left to sample."""


class Ranged:
    """A dataclass whose numbers are checked when it is built; a subclass's ``__post_init__`` must call this one first.

    ``class Decoding(Ranged, key="decode")`` gives the config key that messages put before the names of its fields;
    without a ``key`` they use the name of the class.
    """

    _key: ClassVar[str | None] = None

    def __init_subclass__(cls, key: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if key is not None:
            cls._key = key

    def __post_init__(self) -> None:
        hints, key = hints_of(type(self)), type(self).__name__ if self._key is None else self._key
        for f in fields(self):  # pyright: ignore[reportArgumentType]
            check(hints[f.name], getattr(self, f.name), f"{key}.{f.name}".lstrip("."))


def check(hint: Any, value: Any, key: str, optional: bool = False) -> None:
    """Refuse a ``value`` with a number outside the range that ``hint`` declares.

    Args:
        hint: the annotated type of a field: a number, an optional number, or a tuple of numbers. Other types are not
            checked.
        value: the value of the field.
        key: the config key of the field.
        optional: whether None is allowed too, which the message then mentions.

    Raises:
        InputError: naming the key, or that of a tuple's entry, such as ``optim.betas.1``.
    """
    origin, arguments = _taken_apart(hint)
    if origin is Annotated and arguments[0] in (int, float):
        declared = next((extra for extra in arguments[1:] if isinstance(extra, Range)), Range())
        _check_number(arguments[0], declared, value, key, optional)
    elif origin is Annotated:
        check(arguments[0], value, key, optional)
    elif hint in (int, float):
        _check_number(hint, Range(), value, key, optional)
    elif origin in (Union, UnionType):
        options = [option for option in arguments if option is not NoneType]
        for option in options if value is not None and (len(options) == 1 or isinstance(value, Real)) else ():
            check(option, value, key, NoneType in arguments)
    elif origin is tuple and isinstance(value, tuple | list):
        for i, item in enumerate(value):
            check(arguments[0 if arguments[-1] is ... else i], item, f"{key}.{i}")


@cache
def _taken_apart(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(hint), get_args(hint)


def _check_number(number: type, declared: Range, value: Any, key: str, optional: bool) -> None:
    noun, kind = ("a whole number", Integral) if number is int else ("a number", Real)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise InputError(f"{key} must be {noun}{' or null' if optional else ''}, not {shown(value)}")
    if not declared.holds(value):
        description = declared.description(value)
        raise InputError(f"{key} is {_plain(value)}; give {noun} {description}{', or null' if optional else ''}")


def _plain(value: Any) -> str:
    return shown(value).removesuffix(".0")


@cache
def hints_of(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, with their annotations."""
    return get_type_hints(cls, include_extras=True)
