"""``dllm-sd explain``: what a config key means."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from rich.console import Console
from rich.text import Text

from dllm_sd.config_files import shipped_configs
from dllm_sd.files.plain_yaml import read_yaml
from dllm_sd.keys import Key, all_keys, find_keys, part_names

MOST = 12
"""How many keys are explained at once."""


def run(options: argparse.Namespace) -> int:
    """Explain a key, all keys with an end, or list the keys at the top."""
    found = [key for key in all_keys() if "." not in key.path] if options.key is None else find_keys(options.key)
    groups: dict[str, list[Key]] = {}
    for key in found:  # a setting of a part is explained once, wherever the part may stand
        same = [key.name, key.node] if len(found) > MOST else [key.path, key.parts]
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(key)
    entries = [_entry(keys, options.key is not None) for keys in groups.values()]
    if options.json:
        json.dump(entries, sys.stdout, indent=1, ensure_ascii=False)
        sys.stdout.write("\n")
        return 0
    console = Console(highlight=False)
    for entry in entries:
        console.print(Text(entry["key"], style="bold") + Text(f"  {entry['type']}" + _default(entry)))
        for line in ("where", "meaning", "keys", "set_in"):
            if value := entry.get(line):
                words = ", ".join(value) if isinstance(value, list) else value
                console.print(Text(f"  {_LABELS[line]}{words}".replace("``", "`")))
    return 0


_LABELS = {"where": "of ", "meaning": "", "keys": "keys: ", "set_in": "set in: "}


def _default(entry: Mapping[str, Any]) -> str:
    if "default" not in entry:
        return ""
    return f"; default {json.dumps(entry['default'], ensure_ascii=False)}"


def _entry(keys: Sequence[Key], in_configs: bool) -> dict[str, Any]:
    """The explanation of a key, which may occur in several places."""
    key = min(keys, key=lambda other: len(other.path))
    entry: dict[str, Any] = {"key": key.path, "type": type_in_words(key.node)}
    if "default" in key.node:
        entry["default"] = key.node["default"]
    if key.parts:
        entry["where"] = " in ".join(reversed(key.parts)) + (f", and {len(keys) - 1} other places" if keys[1:] else "")
    entry["meaning"] = key.node.get("description", "")
    entry["keys"] = sorted(
        {other.path.removeprefix(key.path) for other in all_keys() if _is_inside(other.path, key.path)}
    )
    entry["keys"] = [name.lstrip(".*") for name in entry["keys"]]
    entry["set_in"] = _settings(key) if in_configs else []
    return entry


def _settings(key: Key) -> list[str]:
    """The shipped configs that set a key, with the value where it is a plain one."""
    found = []
    for name, tree in _shipped_trees().items():
        for value in _values(tree, key.path.split(".")):
            plain = not isinstance(value, Mapping | list) and len(str(value)) < 30
            found.append(f"{name} ({value})" if plain else name)
    found = list(dict.fromkeys(found))
    return [*found[:6], f"{len(found) - 6} more"] if len(found) > 7 else found


@cache
def _shipped_trees() -> dict[str, Any]:
    return {name: read_yaml(path, name) for name, path in shipped_configs().items()}


def _is_inside(path: str, section: str) -> bool:
    return path.startswith(f"{section}.") and "." not in path.removeprefix(f"{section}.").removeprefix("*.")


def _values(tree: Any, steps: Sequence[str]) -> Iterator[Any]:
    """The values at a key with wildcards in a plain tree."""
    if not steps:
        yield tree
    elif steps[0] == "*":
        inner = tree if isinstance(tree, list) else tree.values() if isinstance(tree, Mapping) else ()
        for item in inner:
            yield from _values(item, steps[1:])
    elif isinstance(tree, Mapping) and steps[0] in tree:
        yield from _values(tree[steps[0]], steps[1:])


def type_in_words(node: Mapping[str, Any]) -> str:
    """The type of a key, with its bounds or choices."""
    if "enum" in node:
        return "one of " + ", ".join("null" if value is None else str(value) for value in node["enum"])
    if "const" in node:
        return str(node["const"])
    if parts := part_names(node):
        several = any("items" in choice for choice in node.get("anyOf", ()))
        return f"{'a list of parts' if several else 'a part'}: {', '.join(parts)}"
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(type_in_words(choice) for choice in node["anyOf"]))
    if "allOf" in node or "$ref" in node:
        return "a mapping of keys"
    kind = _NAMES.get(node.get("type", ""), "a mapping")
    bounds = [f"{words} {node[name]}" for name, words in _BOUNDS.items() if name in node]
    if node.get("type") == "array":
        items = node["items"]
        inner = type_in_words(items if isinstance(items, Mapping) else items[0]).removeprefix("a ")
        return f"a list of {node['minItems']} of: {inner}" if "minItems" in node else f"a list of: {inner}"
    return f"{kind} {' and '.join(bounds)}".strip()


_NAMES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
}
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
