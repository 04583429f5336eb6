"""Shell completion of commands, options, configs, keys and their choices, by argcomplete (extra `completion`)."""

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dllm_sd.config_files import shipped_configs
from dllm_sd.keys import all_keys, part_names, read_schema


def complete(parser: argparse.ArgumentParser) -> None:
    """Print what may follow the words that a shell asks about, and end the process.

    Raises:
        SystemExit: always; the status is 1 if argcomplete is not installed.
    """
    try:
        # Imported here, since it is an extra that only a shell's question needs.
        import argcomplete  # pyright: ignore[reportMissingImports]
        from argcomplete.completers import FilesCompleter  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise SystemExit(1) from None
    files: Any = FilesCompleter()
    for action in _actions(parser):
        if (offered := COMPLETERS.get(action.dest)) is not None:
            action.completer = _completer(offered, files if action.dest == "config" else None)  # pyright: ignore[reportAttributeAccessIssue]
    argcomplete.autocomplete(parser, always_complete_options=False)
    raise SystemExit(1)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of all commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from command._actions


def _completer(offered: Callable[[str], list[str]], files: Any) -> Callable[..., list[str]]:
    """The function that argcomplete calls, which passes other things than the prefix, too."""

    def completions(prefix: str, **given: Any) -> list[str]:
        return [*offered(prefix), *(files(prefix, **given) if files else [])]

    return completions


def keys(prefix: str) -> list[str]:
    """Dotted keys that begin with ``prefix``: of lists the first entry, and none under a name that the user chooses."""
    paths = (key.path.replace("method.contexts.*", "method.contexts.0") for key in all_keys())
    return [path for path in dict.fromkeys(paths) if path.startswith(prefix) and "*" not in path]


def settings(prefix: str) -> list[str]:
    """``key=`` for all keys, and after the equals sign the values that the key may have."""
    key, equals, value = prefix.partition("=")
    if not equals:
        return [f"{path}=" for path in keys(prefix)]
    nodes = [one.node for one in all_keys() if one.path.replace("method.contexts.*", "method.contexts.0") == key]
    values = dict.fromkeys(choice for node in nodes for choice in _choices(node))
    return [f"{key}={choice}" for choice in values if choice.startswith(value)]


def _choices(node: Mapping[str, Any]) -> Iterator[str]:
    """The values that a key may have, as far as they can be listed."""
    yield from ("null" if value is None else str(value) for value in node.get("enum", ()))
    yield from part_names(node)
    if node.get("type") == "boolean":
        yield from ("true", "false")
    if node.get("type") == "null":
        yield "null"
    for inner in (*node.get("anyOf", ()), *node.get("allOf", ())):
        yield from _choices(inner)


def _beginning(names: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    return lambda prefix: [name for name in names() if name.startswith(prefix)]


COMPLETERS: Mapping[str, Callable[[str], list[str]]] = {
    "config": _beginning(lambda: list(shipped_configs())),
    "overrides": settings,
    "key": keys,
    "method": _beginning(lambda: list(read_schema()["methods"])),
    "task": _beginning(lambda: part_names({"$ref": "#/definitions/part of task"})),
}
"""What is offered for an argument, by its name in the parsers; for a config files are, too."""
