"""The named method that a method was made from, or is closest to, and what differs from it."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from dllm_sd.errors import shown
from dllm_sd.methods import METHODS
from dllm_sd.methods.method import Method
from dllm_sd.parts import key_of, to_tree


@dataclass(frozen=True)
class Change:
    """A setting that differs from that of the named method."""

    key: str
    """The key below `method`, such as ``contexts.0.ratio``."""
    former: Any
    """The named method's value, as a plain tree."""
    value: Any
    """The value, as a plain tree; of a part of another kind its name and the settings that are not its defaults."""

    def __str__(self) -> str:
        return f"{self.key} {_told(self.value)} (not {_told(self.former)})"


@dataclass(frozen=True)
class NamedDifferences:
    """A method as a named one with changes; the changes, as overrides of the named method, give the method again."""

    name: str
    changes: tuple[Change, ...]

    @property
    def sentence(self) -> str:
        """The name and the changes in words: ``d_opsd, changed: contexts.0.ratio 1.0 (not 0.25)``."""
        return f"{self.name}, changed: {', '.join(map(str, self.changes))}" if self.changes else self.name


def named_differences(method: Method) -> NamedDifferences:
    """What differs from the method that was named, or, where none was, from the one with the fewest differences."""
    names = [method.name] if method.name in METHODS else list(METHODS)
    candidates = [NamedDifferences(name, tuple(_changes(METHODS[name].method, method))) for name in names]
    return min(candidates, key=lambda named: sum(_leaves(change.value) for change in named.changes))


def _changes(former: Any, now: Any, path: str = "") -> Iterator[Change]:
    """The changes from one object to another of the same class."""
    for f in (f for f in fields(now) if f.compare):
        key = f"{path}{key_of(f)}"
        yield from _change(getattr(former, f.name), getattr(now, f.name), key, f.metadata.get("parts"))


def _change(former: Any, now: Any, key: str, table: Mapping[str, type] | None) -> Iterator[Change]:
    if former == now:
        return
    if isinstance(now, tuple) and isinstance(former, tuple) and len(former) == len(now) and table is not None:
        for i, (one, other) in enumerate(zip(former, now, strict=True)):
            yield from _change(one, other, f"{key}.{i}", table)
    elif is_dataclass(now) and type(now) is type(former):
        yield from _changes(former, now, f"{key}.")
    else:
        yield Change(key, abridged(former, table), abridged(now, table))


def abridged(value: Any, table: Mapping[str, type] | None) -> Any:
    """The plain tree of a value; of a part its name and the settings that are not the part's defaults."""
    if isinstance(value, tuple) and table is not None:
        return [abridged(item, table) for item in value]
    if not is_dataclass(value):
        return to_tree(value, table)
    tree, kept = to_tree(value, table), {}
    for f in fields(value):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if (held := getattr(value, f.name)) != default:
            kept[key_of(f)] = abridged(held, f.metadata.get("parts"))
    return {"name": tree["name"], **kept} if table is not None else kept


def _leaves(tree: Any) -> int:
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return sum(map(_leaves, inner)) if inner else 1


def _told(tree: Any) -> str:
    """A plain tree in a few words: a part by its name, with its settings in brackets."""
    if isinstance(tree, list):
        return " + ".join(map(_told, tree)) or "none"
    if not isinstance(tree, dict):
        return "none" if tree is None else shown(tree) if isinstance(tree, str) and " " in tree else str(tree)
    settings = ", ".join(f"{key} {_told(value)}" for key, value in tree.items() if key != "name")
    name = tree.get("name", "")
    return f"{name} ({settings})" if name and settings else name or settings or "its defaults"
