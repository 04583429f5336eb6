"""Write docs/config.md, the reference of all config keys, from configs/schema.json: python -m tools.make_config_page"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dllm_sd.cli.explain import type_in_words
from dllm_sd.keys import read_schema

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"
HEAD = """# Configuration reference

Every key of a config with its type, default and meaning. `dllm-sd explain KEY` prints the same, and the shipped configs
that set it; `dllm-sd show CONFIG` prints a config with all of its defaults. How keys are written and overridden:
[concepts](concepts.md#configuration).

A *part* is chosen by `name`, and its other keys depend on the name: `{name: jsd, beta: 0.3}`. Defaults of `method` are
those of `d_opsd`; another named method has [its own](methods.md).

This page is generated from `configs/schema.json`, which is made from the dataclasses and their docstrings, by
`python -m tools.make_config_page`.
"""
LONGEST_DEFAULT = 60
"""Characters of a default that the table shows; longer ones are prompts and blocks."""


def config_page() -> str:
    """The text of docs/config.md."""
    blocks: dict[str, str] = {}
    for name, path in _blocks("Config", ""):
        blocks.setdefault(name, path)
    sections = [
        f"## {f'`{path}`' if path else 'Top level'}\n\n{_body(name, path)}" for name, path in blocks.items() if path
    ]
    slots = [_slot(name) for name in _definitions() if name.startswith("part of ")]
    inner = [f"## `{key}`, inside of parts\n\n{_body(name)}" for name, key in _inner(blocks).items()]
    return "\n".join([HEAD, f"## Top level\n\n{_body('Config')}", *sections, *slots, *inner])


def _definitions() -> Mapping[str, Any]:
    return read_schema()["definitions"]


def _references(node: Mapping[str, Any]) -> Iterator[str]:
    """The definitions that a node refers to directly."""
    if "$ref" in node:
        yield node["$ref"].rpartition("/")[2]
    choices = [*node.get("anyOf", ()), *node.get("allOf", ())]
    choices += [node[name] for name in ("items", "additionalProperties") if isinstance(node.get(name), Mapping)]
    for choice in choices:
        yield from _references(choice)


def _blocks(name: str, path: str) -> Iterator[tuple[str, str]]:
    """The blocks of keys that are no parts, with their dotted keys, from the top level on."""
    yield name, path
    for key, node in _definitions()[name]["properties"].items():
        for inner in _references(node):
            if not inner.startswith("part of "):
                yield from _blocks(inner, f"{path}.{key}".lstrip("."))


def _parts(slot: str) -> Iterator[tuple[str, str]]:
    """The names of a slot's parts, and their definitions."""
    for choice in _definitions()[slot]["anyOf"][1:]:
        yield choice["allOf"][1]["properties"]["name"]["const"], next(_references(choice))


def _inner(blocks: Mapping[str, str]) -> dict[str, str]:
    """The blocks inside of parts: definitions, and the keys that hold them."""
    parts = {inner for slot in _definitions() if slot.startswith("part of ") for _, inner in _parts(slot)}
    found: dict[str, str] = {}
    for definition in _definitions().values():
        for key, node in definition.get("properties", {}).items():
            for name in _references(node):
                if name not in parts and name not in blocks and not name.startswith("part of "):
                    found.setdefault(name, key)
    return found


def _slot(slot: str) -> str:
    text = f"## Parts: {slot.removeprefix('part of ')}\n\n"
    return text + "\n".join(f"### `{name}`\n\n{_body(definition)}" for name, definition in _parts(slot))


def _body(name: str, path: str = "") -> str:
    """The description and the table of keys of a definition."""
    definition = _definitions()[name]
    text = f"{definition['description']}\n" if definition.get("description") else ""
    properties = {key: node for key, node in definition["properties"].items() if key != "name" or "enum" in node}
    if not properties:
        return f"{text}\nNo keys.\n" if text else "No keys.\n"
    rows = [" | ".join(_cell(cell) for cell in _row(key, node, path)) for key, node in properties.items()]
    return f"{text}\n| key | type | default | meaning |\n|---|---|---|---|\n" + "".join(f"| {row} |\n" for row in rows)


def _row(key: str, node: Mapping[str, Any], path: str) -> Iterator[str]:
    yield f"`{path}.{key}`" if path else f"`{key}`"
    yield "a [method](methods.md), or a mapping of keys" if (path, key) == ("", "method") else type_in_words(node)
    yield _default(node)
    yield node.get("description", "")


def _default(node: Mapping[str, Any]) -> str:
    if "default" not in node:
        return ""
    value = node["default"]
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and (len(text) > LONGEST_DEFAULT or "\n" in value):
        return "a prompt"
    return "a block" if len(text) > LONGEST_DEFAULT else f"`{text}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("``", "`").replace("\n", " ")


if __name__ == "__main__":
    PAGE.write_text(config_page(), encoding="utf-8")
