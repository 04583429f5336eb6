"""Tables of parts: the table of a slot is the only registry of its parts. Parts as plain trees."""

from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
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


def key_of(f: Field[Any]) -> str:
    """The config key of a field; it differs from the field's name where that is a Python keyword."""
    return f.metadata.get("key", f.name)


def to_tree(value: Any, table: Mapping[str, type] | None = None) -> Any:
    """The plain tree of a config or part; `dllm_sd.config.build_config` turns it back into an equal object."""
    if is_dataclass(value) and not isinstance(value, type):
        tree = {key_of(f): to_tree(getattr(value, f.name), f.metadata.get("parts")) for f in fields(value)}
        if table is not None:
            tree = {"name": name_of(table, value), **tree}
        return tree
    if isinstance(value, tuple | list):
        return [to_tree(item, table) for item in value]
    if isinstance(value, Mapping):
        return {key: to_tree(item) for key, item in value.items()}
    return value
