"""The JSON schema of a config (draft 7), made from the dataclasses and the docstrings under their fields.

`tools/make_schema.py` writes it to `configs/schema.json`, where editors, `dllm-sd explain` and the messages about
unknown keys read it (`keys.py`), without importing a model library.
"""

import ast
import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from dllm_sd.config import Config
from dllm_sd.decoding.settings import Decoding
from dllm_sd.methods import METHODS
from dllm_sd.methods.differences import abridged
from dllm_sd.methods.method import Method
from dllm_sd.parts import key_of
from dllm_sd.pretrained.families import CAUSAL, FAMILIES
from dllm_sd.ranges import LIMIT, Range, hints_of

_KINDS: Mapping[Any, str] = {int: "integer", float: "number", str: "string", bool: "boolean", NoneType: "null"}


def config_schema() -> dict[str, Any]:
    """The schema of a whole config; `methods`, `families` and `former` (renamed keys of a class) are for `keys.py`."""
    made = _Schema()
    reference = made.of_class(Config, required=True)
    families = [*FAMILIES.values(), CAUSAL]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A config of dllm-sd",
        **reference,
        "definitions": dict(sorted(made.definitions.items())),
        "methods": {name: {"source": row.source, "note": row.note} for name, row in METHODS.items()},
        "families": {
            family.name: {"model_types": list(family.model_types), "checkpoints": family.checkpoints}
            for family in families
        },
    }


def field_docs(cls: type) -> dict[str, str]:
    """The meanings of the fields of a class and its bases, by the name of the field, each as one line.

    A meaning is the docstring under a field, or the paragraph of its name in the section "Fields" of the class's.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        docs |= _section(base) | _module_docs(base.__module__).get(base.__qualname__, {})
    return docs


def _section(cls: type) -> dict[str, str]:
    """The paragraphs of the section "Fields" of a class's own docstring, by the names before their colons."""
    _, _, section = inspect.cleandoc(vars(cls).get("__doc__") or "").partition("\nFields:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section.partition("\n\n")[0], flags=re.MULTILINE)
    return {name: f"{text[0].upper()}{text[1:]}" for name, text in ((name, _line(text)) for name, text in entries)}


@cache
def _module_docs(module: str) -> dict[str, dict[str, str]]:
    """For each class of a module the strings that stand under an annotated name."""
    source = sys.modules.get(module)
    if source is None or not module.startswith("dllm_sd"):
        return {}
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(source)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            named = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if named and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found.setdefault(node.name, {})[field.target.id] = _line(str(text.value.value))  # pyright: ignore[reportAttributeAccessIssue]
    return found


def _line(text: str | None) -> str:
    """The first paragraph of a docstring as one line."""
    return " ".join((text or "").strip().split("\n\n")[0].split())


def _class_doc(hint: Any) -> str | None:
    """The docstring of the first class of the package in a type, such as the protocol of a slot."""
    if isinstance(hint, type) and hint.__module__.startswith("dllm_sd"):
        return hint.__doc__
    return next((text for inner in get_args(hint) if (text := _class_doc(inner))), None)


class _Schema:
    """Collects the definitions of classes and tables while a config's fields are walked."""

    def __init__(self) -> None:
        self.definitions: dict[str, Any] = {}
        self._tables: list[tuple[Mapping[str, type], str]] = []

    def of_class(self, cls: type, required: bool = False) -> dict[str, Any]:
        """A reference to the definition of a dataclass; ``required`` asks for the fields without a default."""
        name = cls.__name__
        if name not in self.definitions:
            self.definitions[name] = {}  # it may hold itself
            docs, hints = field_docs(cls), hints_of(cls)
            known = {key_of(f): f for f in fields(cls) if f.init}
            self.definitions[name] = {
                "type": "object",
                "description": _line(cls.__doc__),
                "properties": {key: self._field(cls, f, hints[f.name], docs) for key, f in known.items()},
                "additionalProperties": False,
            }
            if former := getattr(cls, "former_keys", None):
                self.definitions[name]["former"] = dict(former)
            missing = [key for key, f in known.items() if f.default is f.default_factory is MISSING]
            if required and missing:
                self.definitions[name]["required"] = missing
        return {"$ref": f"#/definitions/{name}"}

    def _field(self, cls: type, f: Field[Any], hint: Any, docs: Mapping[str, str]) -> dict[str, Any]:
        parts = f.metadata.get("parts")
        node = self._slot(f, hint, parts) if parts else self._type(hint)
        if (cls.__name__, f.name) == ("Method", "name"):
            node = {"enum": [*METHODS, None]}
        elif (cls.__name__, f.name) == ("Evaluation", "decode"):
            node = self.of_class(Decoding)
        elif (cls.__name__, f.name) == ("Evaluation", "schedules"):
            node = {"type": "object", "additionalProperties": self.of_class(Decoding)}
        node = {"allOf": [node]} if "$ref" in node else node  # draft 7 ignores what stands beside $ref
        if text := docs.get(f.name) or _line(_class_doc(hint)):
            node = {**node, "description": text}
        if f.default is f.default_factory is MISSING:
            return node
        default = f.default if f.default is not MISSING else f.default_factory()  # pyright: ignore[reportCallIssue]
        if is_dataclass(default) and not parts:
            return node  # each of its keys has its own
        return {**node, "default": abridged(default, parts)}

    def _slot(self, f: Field[Any], hint: Any, table: Mapping[str, type]) -> dict[str, Any]:
        one = {"$ref": f"#/definitions/{self._table(f.name, table)}"}
        if get_origin(hint) is tuple:
            by_index = {"type": "object", "patternProperties": {"^[0-9]+$": one}, "additionalProperties": False}
            return {"anyOf": [one, {"type": "array", "items": one}, by_index]}
        return {"anyOf": [one, {"type": "null"}]} if NoneType in get_args(hint) else one

    def _table(self, slot: str, table: Mapping[str, type]) -> str:
        """The name of the definition that lists the parts of a table."""
        for other, name in self._tables:
            if other is table:
                return name
        name = f"part of {slot}"
        while name in self.definitions:
            name += "'"
        self._tables.append((table, name))
        self.definitions[name] = {}
        choices = []
        for part, cls in table.items():
            reference = self.of_class(cls, required=slot == "task")
            self.definitions[cls.__name__]["properties"].setdefault("name", {"type": "string"})
            named: dict[str, Any] = {"properties": {"name": {"const": part}}}
            choices.append({"allOf": [reference, {**named, "required": ["name"]} if slot == "task" else named]})
        self.definitions[name] = {"anyOf": [{"enum": list(table)}, *choices]}
        return name

    def _type(self, hint: Any) -> dict[str, Any]:
        """The schema of a type."""
        origin, arguments = get_origin(hint), get_args(hint)
        if origin is Annotated:
            declared = next((extra for extra in arguments[1:] if isinstance(extra, Range)), None)
            schema = {**self._type(arguments[0]), **(_bounds(declared) if declared else {})}
            also = declared and declared.also
            return schema if also is None else {"anyOf": [{"const": also}, schema]}
        if origin is Literal:
            return {"enum": list(arguments)}
        if origin in (Union, UnionType):
            return {"anyOf": [self._type(argument) for argument in arguments]}
        if origin is tuple:
            if arguments[-1] is ...:
                return {"type": "array", "items": self._type(arguments[0])}
            size = {"minItems": len(arguments), "maxItems": len(arguments)}
            return {"type": "array", "items": [self._type(argument) for argument in arguments], **size}
        if hint is Method:
            return {"anyOf": [{"enum": list(METHODS)}, self.of_class(Method)]}
        if is_dataclass(hint) and isinstance(hint, type):
            return self.of_class(
                hint, required=hint.__module__ == Config.__module__ or hint.__name__.startswith("Peer")
            )
        return {"type": _KINDS[hint]} if hint in _KINDS else {"type": "object"}


def _bounds(declared: Range) -> dict[str, Any]:
    bounds = {"minimum": (declared.least, -LIMIT), "maximum": (declared.most, LIMIT)}
    bounds |= {"exclusiveMinimum": (declared.above, -float("inf")), "exclusiveMaximum": (declared.below, float("inf"))}
    return {key: value for key, (value, none) in bounds.items() if value != none}
