"""``dllm-sd list``: methods, tasks, configs, parts and families of checkpoints, as the schema describes them."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dllm_sd.arguments.listing import KINDS
from dllm_sd.config_files import shipped_configs
from dllm_sd.keys import read_schema

ListRow = dict[str, str]


def run(options: argparse.Namespace) -> int:
    """Print a table, or JSON."""
    rows = list(_kinds() if options.what is None else _LISTS[options.what]())
    if options.json:
        json.dump(rows, sys.stdout, indent=1, ensure_ascii=False)
        sys.stdout.write("\n")
        return 0
    table = Table(*rows[0], title=options.what or "dllm-sd list ...")
    for row in rows:
        table.add_row(*(escape(text.replace("``", "`")) for text in row.values()))
    Console().print(table)
    return 0


def _kinds() -> Iterator[ListRow]:
    for name, what in KINDS.items():
        yield {"name": name, "number": str(len(list(_LISTS[name]()))), "what": what}


def _methods() -> Iterator[ListRow]:
    for name, row in read_schema()["methods"].items():
        yield {"name": name, "source": row["source"], "what": row["note"]}


def _tasks() -> Iterator[ListRow]:
    yield from ({"name": row["name"], "what": row["what"]} for row in _parts() if row["slot"] == "task")


def _configs() -> Iterator[ListRow]:
    for name, path in shipped_configs().items():
        yield {"name": name, "what": " ".join(_head(path)[1:2]), "command": _head(path)[0]}


def _head(path: Path) -> list[str]:
    """The first comment of a shipped config: its command, then what it shows."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# yaml-language")]
    return [line.removeprefix("# ") for line in lines if line.startswith("# ")]


def _parts() -> Iterator[ListRow]:
    for name, node in read_schema()["definitions"].items():
        if not name.startswith("part of "):
            continue
        for choice in node["anyOf"][1:]:
            reference, named = choice["allOf"]
            definition: Mapping[str, str] = read_schema()["definitions"][reference["$ref"].rpartition("/")[2]]
            part = named["properties"]["name"]["const"]
            yield {"slot": name.removeprefix("part of "), "name": part, "what": definition["description"]}


def _families() -> Iterator[ListRow]:
    for name, family in read_schema()["families"].items():
        yield {"name": name, "checkpoints": family["checkpoints"], "model_type": ", ".join(family["model_types"])}


_LISTS: Mapping[str, Callable[[], Iterator[ListRow]]] = {
    "methods": _methods,
    "tasks": _tasks,
    "configs": _configs,
    "parts": _parts,
    "families": _families,
}
