"""YAML without its surprises: text, numbers, lists and mappings as they are written, in bounded time and memory.

Text stays text: nothing is interpolated, and neither dates nor times of day nor tags are known. A key stands once.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from dllm_sd.errors import InputError, on_one_line, shown
from dllm_sd.files.reading import lone_surrogate, read_whole

MAX_YAML_BYTES = 2**20
"""Bytes of a file."""
MAX_YAML_VALUES = 30_000
"""Keys and values of a document, with a copy for every alias."""
MAX_YAML_CHARACTERS = 2**22
"""Characters of them."""
MAX_YAML_DEPTH = 64
"""Levels of lists and mappings inside each other."""
_DIGITS = 400
_SCALARS = {
    "bool": r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF",
    "null": r"~|null|Null|NULL|",
    "int": r"[-+]?(?:0b_*[01][01_]*|0[0-7_]+|0|[1-9][0-9_]*|0x_*[0-9a-fA-F][0-9a-fA-F_]*)",
    "float": r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
"""What is no text when it stands without quotes: YAML 1.1 without its dates and numbers to the base 60."""


def read_yaml(path: Path, name: str, remedy: str = "correct it, or give another file") -> Any:
    """The document of a file.

    Args:
        path: the file.
        name: what a message calls it, such as ``config mine.yaml``.
        remedy: ends such a message.

    Raises:
        InputError: naming the file, the line where there is one, and the remedy.
    """
    try:
        text = read_whole(path, MAX_YAML_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else on_one_line(error)
        raise InputError(f"{name} cannot be read ({said}); {remedy}") from error
    return parse_yaml(text, name, remedy)


def parse_yaml(text: str, name: str, remedy: str = "correct it") -> Any:
    """The one document of ``text``, in which no two places share a list or a mapping.

    Raises:
        InputError: naming what was read by ``name``, the line, and what is wrong there.
    """
    try:
        return _Copy(name).of(_document(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f" in line {mark.line + 1}"
        raise InputError(f"{name} is not valid YAML: {on_one_line(_Said(error))}{line}; {remedy}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{name} is not valid YAML: {on_one_line(error)}; {remedy}") from error


@lru_cache(maxsize=128)
def _document(text: str) -> Any:
    """The document as it is read; a process reads the same configs again and again, and each reader gets a copy."""
    return _Reader(text).get_single_data()


def write_yaml(tree: Any) -> str:
    """A tree as a document that `parse_yaml` reads as the same tree."""
    return yaml.dump(tree, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=100)


class _Writer(yaml.SafeDumper):
    """Writes text between double quotes where YAML would fold or drop some of its characters."""

    def text(self, value: str) -> yaml.ScalarNode:
        """A text, which must come back as it is."""
        plain = all(character.isprintable() or character == "\n" for character in value)
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')

    def ignore_aliases(self, data: Any) -> bool:
        """Lists that are one object are written out."""
        return True


_Writer.add_representer(str, _Writer.text)


class _Said(Exception):
    """What the parser found wrong, in words for people who write configs."""

    def __init__(self, error: yaml.MarkedYAMLError) -> None:
        said = ", ".join(words for words in (error.context, error.problem) if words)
        super().__init__(next((plain for jargon, plain in _PLAINLY.items() if jargon in said), said))


_PLAINLY = {
    "while parsing a flow mapping": "a { is not closed by }, or a comma is missing between its keys",
    "while parsing a flow sequence": "a [ is not closed by ], or a comma is missing between its entries",
    "mapping values are not allowed": "a second ': ' on one line; put the text after the first one in quotes",
    "cannot start any token": "a tab or a sign such as @ begins a word; indent with spaces, and put the text in quotes",
    "could not find expected ':'": "a key is not followed by ': '",
    "expected <block end>": "a line is indented otherwise than the lines that it belongs to",
    "while scanning a quoted scalar": "a quotation mark is not closed",
}
"""What the parser says, and what it means."""


class _Reader(yaml.SafeLoader):
    """Refuses what a config never needs before it costs anything."""

    depth = count = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()
        if self.depth > MAX_YAML_DEPTH:
            raise ComposerError(
                None, None, f"lists and mappings go more than {MAX_YAML_DEPTH} levels deep", event.start_mark
            )
        if getattr(event, "tag", None) is not None:
            raise ComposerError(None, None, f"leave out the tag {shown(event.tag)}", event.start_mark)
        self.count += 1
        if self.count > MAX_YAML_VALUES:
            raise ComposerError(None, None, f"there are more than {MAX_YAML_VALUES} keys and values", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode) or key.tag.rpartition(":")[2] not in ("str", "int"):
                raise ConstructorError(None, None, "a key is not text; put it in quotes", key.start_mark)
            if key.value in mapping:
                raise ConstructorError(None, None, f"the key {shown(key.value)} is given twice", key.start_mark)
            mapping[key.value] = self.construct_object(value, deep=deep)
        return mapping

    def whole_number(self, node: ScalarNode) -> int:
        """A whole number, if it is not too long to be one."""
        if len(node.value) > _DIGITS:
            raise ConstructorError(None, None, f"a number has {len(node.value)} digits", node.start_mark)
        return self.construct_yaml_int(node)


_Reader.yaml_implicit_resolvers = {}
for _kind, _pattern in _SCALARS.items():
    _Reader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})$"), None)
_Reader.add_constructor("tag:yaml.org,2002:int", _Reader.whole_number)


class _Copy:
    """Copies a document with its aliases written out; ends where that would never end."""

    def __init__(self, name: str) -> None:
        self.name, self.values, self.characters = name, 0, 0

    def of(self, value: Any, depth: int = 0) -> Any:
        self.values += 1
        self.characters += len(value) if isinstance(value, str) else 0
        if self.values > MAX_YAML_VALUES or self.characters > MAX_YAML_CHARACTERS or depth > MAX_YAML_DEPTH + 1:
            raise InputError(
                f"{self.name} refers to itself, or is too large with a copy for each of its aliases; write them out"
            )
        if isinstance(value, str) and (half := lone_surrogate(value)) is not None:
            raise InputError(f"{self.name} holds {half}, which is not a character: take it out")
        if isinstance(value, dict):
            return {self.of(key, depth): self.of(item, depth + 1) for key, item in value.items()}
        return [self.of(item, depth + 1) for item in value] if isinstance(value, list) else value
