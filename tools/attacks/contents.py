"""The contents of a folder without values that differ between equal runs, and the differences of two folders."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

VOLATILE = ("time/", "seconds", "writers/cached", "writers/damaged", "occupancy", "files", "logs")
"""Keys that may differ: durations, counts of cached and damaged texts, and checksums of files with such keys."""
NOT_COMPARED = ("tb", ".lock")
"""Names that are not compared: TensorBoard files and locks. Partial files of cached texts are not compared either: runs
share the cache, so that no run removes what another one may be writing.
"""

DATED = ("environment.jsonl", "report.html")
"""Files that say when a run was started, once for each start; only that they are there is compared."""


def contents(folder: Path) -> dict[str, Any]:
    """By relative path: the bytes of a file, or its JSON without `VOLATILE` keys; links and folders as text."""
    return dict(_contents(folder, folder))


def _contents(root: Path, folder: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(folder.iterdir()):
        name = str(path.relative_to(root))
        if path.name in NOT_COMPARED or ("written" in path.parts and path.name.startswith(".")):
            continue
        if path.is_symlink():
            yield name, f"link to {path.readlink()}"
        elif path.is_dir():
            yield name, "folder"
            yield from _contents(root, path)
        elif path.is_file():
            yield name, "dated" if path.name in DATED else _read(path)


def _read(path: Path) -> Any:
    data = path.read_bytes()
    try:
        if path.name == "config.yaml":
            return _without_volatile(yaml.safe_load(data))
        if path.suffix == ".json":
            return _without_volatile(json.loads(data))
        if path.suffix == ".jsonl" and data.endswith(b"\n"):
            return [_without_volatile(json.loads(line)) for line in data.splitlines()]
    except (ValueError, RecursionError, yaml.YAMLError):
        pass
    return data


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_volatile(inner) for key, inner in value.items() if not key.startswith(VOLATILE)}
    return [_without_volatile(inner) for inner in value] if isinstance(value, list) else value


def differences(wanted: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """A phrase for each file that is missing, left over or different; empty for equal folders."""
    phrases = [f"missing {name}" for name in wanted if name not in actual]
    phrases += [f"left over {name}" for name in actual if name not in wanted]
    for name in wanted:
        if name in actual and wanted[name] != actual[name]:
            phrases.append(f"{name} differs{_first_difference(wanted[name], actual[name])}")
    return phrases


def _first_difference(wanted: Any, actual: Any, path: str = "") -> str:
    """Describe the first difference of two JSON values."""
    if isinstance(wanted, dict) and isinstance(actual, dict):
        for key in {**wanted, **actual}:
            if wanted.get(key) != actual.get(key):
                return _first_difference(wanted.get(key), actual.get(key), f"{path}.{key}")
    if isinstance(wanted, list) and isinstance(actual, list):
        if len(wanted) != len(actual):
            return f" at {path or 'the top'}: {len(actual)} entries, not {len(wanted)}"
        for i, (wanted_item, item) in enumerate(zip(wanted, actual, strict=True)):
            if wanted_item != item:
                return _first_difference(wanted_item, item, f"{path}.{i}")
    return f" at {path}: {actual!r:.60}, not {wanted!r:.60}" if path else ""
