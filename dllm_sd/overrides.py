"""``key=value`` overrides of a config that is still a plain tree."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from dllm_sd.errors import InputError, shown
from dllm_sd.files.plain_yaml import MAX_YAML_DEPTH, parse_yaml


def apply_overrides(
    tree: Mapping[str, Any], overrides: Sequence[str], say: Callable[[str], object] = lambda sentence: None
) -> dict[str, Any]:
    """Return a copy of a plain tree with ``key=value`` overrides applied; another `method` starts from its defaults.

    Keys are dotted, with indices into lists (``method.contexts.0.ratio``); values are YAML. An override that names
    another part removes the keys of the former part, but not those that were overridden before it. The keys of
    `method` stay, since all methods have the same. What is removed from another task's block is told to ``say``.
    """
    changed = deepcopy(dict(tree))
    overridden: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        steps = key.split(".")
        if not equals or not all(steps):
            raise InputError(f"override {shown(override)} is not of the form key=value")
        if len(steps) > MAX_YAML_DEPTH:
            raise InputError(f"override {shown(override)} has a key of {len(steps)} parts; no key has that many")
        value = parse_yaml(text, f"override {shown(override)}") if text else ""
        if steps[-1] == "name" and key != "method.name":
            _remove_former_keys(changed, steps[:-1], value, overridden)
        _put(changed, steps, value)
        overridden.append(f"{key}.")
    _tell_of_dropped(tree.get("task"), changed.get("task"), say)
    return changed


def _tell_of_dropped(former: Any, task: Any, say: Callable[[str], object]) -> None:
    """Say which keys of a config's task block do not count any more, because another task was named."""
    names = [part.get("name") if isinstance(part, dict) else part for part in (former, task)]
    if not isinstance(former, dict) or names[0] == names[1]:
        return
    left = task if isinstance(task, dict) else {}
    if dropped := [str(key) for key in former if key not in left and key != "name"]:
        say(f"the task is {names[1]} instead of the config's {names[0]}, whose keys are dropped: {', '.join(dropped)}")


def _remove_former_keys(tree: dict[str, Any], steps: Sequence[str], name: Any, overridden: Sequence[str]) -> None:
    """If the part at ``steps`` has another name, remove its keys that no override has set."""
    part: Any = tree
    for step in steps:
        index = int(step) if isinstance(part, list) and step.isdecimal() and int(step) < len(part) else step
        part = part[index] if isinstance(index, int) else part.get(step) if isinstance(part, dict) else None
    if isinstance(part, dict) and part.get("name", name) != name:
        path = ".".join(steps)
        for key in [key for key in part if not any(other.startswith(f"{path}.{key}.") for other in overridden)]:
            del part[key]


def _put(tree: dict[str, Any], steps: Sequence[str], value: Any) -> None:
    """Set the value at ``steps``, creating mappings where they are missing; a part given by name becomes a mapping."""
    node: Any = tree
    for i, step in enumerate(steps):
        index: Any = _list_index(node, step, ".".join(steps[:i])) if isinstance(node, list) else step
        if i == len(steps) - 1:
            node[index] = value
            return
        inner = node[index] if isinstance(node, list) else node.get(index)
        if isinstance(inner, str):  # `method: name`
            inner = {"name": inner}
        elif not isinstance(inner, dict | list):
            inner = {}
        node[index] = node = inner


def _list_index(entries: list[Any], step: str, path: str) -> int:
    """The index of a list entry that an override names; the index after the last one appends an entry."""
    index = parse_index(step, path)
    if index > len(entries):
        raise InputError(
            f"{path}.{index} does not exist in a list of {len(entries)} entries; number them from 0 without gaps"
        )
    if index == len(entries):
        entries.append(None)
    return index


def parse_index(key: Any, path: str) -> int:
    """Parse a key as the index of a list entry."""
    if str(key).isascii() and str(key).isdigit() and len(str(key)) < 10 and str(int(key)) == str(key):
        return int(key)
    raise InputError(f"{path} is a list; number its entries from 0, as in {path}.0, instead of {shown(key)}")
