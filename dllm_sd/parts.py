"""Tables of parts: the table of a slot is the only registry of its parts."""

from collections.abc import Mapping
from dataclasses import Field
from typing import Any, ClassVar, Protocol


class Part(Protocol):
    """A frozen dataclass whose fields are config keys; the protocol of its slot adds further members."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def name_of(table: Mapping[str, type], part: object) -> str:
    """The name of a part in its table."""
    return next(name for name, kind in table.items() if kind is type(part))


def names_with(table: Mapping[str, type], capability: str, value: object) -> list[str]:
    """The names of the parts whose class declares this value of a capability."""
    return [name for name, kind in table.items() if getattr(kind, capability, None) is value]
