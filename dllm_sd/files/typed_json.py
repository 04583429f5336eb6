"""JSON files that anything may have happened to: read strictly, and built into the dataclass that they must hold."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from dllm_sd.files.reading import MAX_JSON_DEPTH, damaged_file, json_value, read_own

WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number of 64 bits",
    float: "a finite number",
    str: "text",
    NoneType: "null",
}
"""What a value must be, by the type that it is declared with."""


def own_json(content: bytes) -> Any:
    """The tree of JSON that the program wrote: as `reading.json_value`, with whatever a problem may have brought in.

    Half of a surrogate pair and NaN may stand in it, and the fields of a problem lie some levels deeper than in the
    data that they are from.

    Raises:
        ValueError: saying in a few words what is wrong.
    """
    return json_value(content, surrogates=True, deepest=2 * MAX_JSON_DEPTH, parse_constant=float)


def read_json(file: Path, kind: Any, remedy: str) -> Any:
    """A JSON file that the program wrote, as what the type ``kind`` says (`build`).

    Raises:
        InputError: naming the file, why it cannot be used, and the ``remedy``.
    """
    content = read_own(file, remedy)
    try:
        return build(kind, own_json(content))
    except ValueError as error:
        raise damaged_file(file, error, remedy) from error


def build(kind: Any, tree: Any, where: str = "it") -> Any:
    """``tree`` as what the type ``kind`` says: a dataclass of an object, a tuple of a list, or the plain value itself.

    Numbers must be finite and fit into 64 bits; ``Any`` takes everything. An object must have every field of its
    dataclass and no other key; where the dataclass says ``partial = True``, other keys are passed over. What is an
    instance of ``kind`` already, such as a tensor, stays.

    Args:
        kind: a dataclass, ``tuple[X, ...]``, a mapping from text, a union, or a plain type.
        tree: what `own_json` gave.
        where: what the value is called in an error.

    Raises:
        ValueError: saying which value is wrong, and what it should be.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or (kind not in WORDS and isinstance(kind, type) and isinstance(tree, kind)):
        return tree
    if is_dataclass(kind):
        return _dataclass(kind, tree, where)
    if origin in (Union, UnionType):
        return _union(inner, tree, where)
    if origin is tuple:
        if not isinstance(tree, list | tuple):
            raise ValueError(f"{where} must be a list, not {tree!r:.60}")
        return tuple(build(inner[0], value, f"{where}[{i}]") for i, value in enumerate(tree))
    if origin in (dict, Mapping):
        return {key: build(inner[1], value, f"{where}.{key:.60}") for key, value in _object(tree, where).items()}
    if not _fits(kind, tree):
        raise ValueError(f"{where} must be {WORDS.get(kind, kind.__name__)}, not {tree!r:.60}")
    return tree


def all_finite(tree: Any) -> bool:
    """Whether no number anywhere in a tree is NaN or infinite."""
    if isinstance(tree, Mapping):
        return all(map(all_finite, tree.values()))
    if isinstance(tree, list):
        return all(map(all_finite, tree))
    return not isinstance(tree, float) or math.isfinite(tree)


def _fits(kind: Any, value: Any) -> bool:
    if kind is float:
        return (type(value) is float and math.isfinite(value)) or _fits(int, value)
    return type(value) is kind and (kind is not int or -(2**63) <= value < 2**63)


def _union(options: tuple[Any, ...], tree: Any, where: str) -> Any:
    if tree is None and NoneType in options:
        return None
    *others, last = (one for one in options if one is not NoneType)
    for one in others:
        try:
            return build(one, tree, where)
        except ValueError:
            continue
    return build(last, tree, where)


def _object(tree: Any, where: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ValueError(f"{where} must be an object, not {tree!r:.60}")
    return tree


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {one.name: hints[one.name] for one in fields(kind)}


def _dataclass(kind: Any, tree: Any, where: str) -> Any:
    hints, values = _hints(kind), _object(tree, where)
    prefix = "" if where == "it" else f"{where}."
    if missing := [name for name in hints if name not in values]:
        raise ValueError(f"{where} lacks {missing[0]!r}")
    if (unknown := [name for name in values if name not in hints]) and not getattr(kind, "partial", False):
        raise ValueError(f"{where} holds {unknown[0]!r:.60}, which is unknown")
    return kind(**{name: build(hint, values[name], f"{prefix}{name}") for name, hint in hints.items()})
