"""What a folder holds, without what may differ between equal runs, and the first things in which two folders differ."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

PASSING = ("time/", "seconds", "writers/cached", "writers/damaged", "occupancy", "files", "logs")
"""Keys that may differ: how long it took, what was on the disk already or damaged there, and checksums of files that
hold such keys."""
UNSEEN = ("tb", ".lock")
"""Names that are not compared: pictures for people, and locks. Nor are texts that were being kept: several runs may
share them, so that none removes what another may be writing."""


def contents(folder: Path) -> dict[str, Any]:
    """Relative path: bytes, or the JSON without the keys that may differ; links and folders are told apart."""
    return dict(_contents(folder, folder))


def _contents(root: Path, folder: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(folder.iterdir()):
        name = str(path.relative_to(root))
        if path.name in UNSEEN or ("written" in path.parts and path.name.startswith(".")):
            continue
        if path.is_symlink():
            yield name, f"link to {path.readlink()}"
        elif path.is_dir():
            yield name, "folder"
            yield from _contents(root, path)
        elif path.is_file():
            yield name, _read(path)


def _read(path: Path) -> Any:
    data = path.read_bytes()
    try:
        if path.name == "config.yaml":
            return _lasting(yaml.safe_load(data))
        if path.suffix == ".json":
            return _lasting(json.loads(data))
        if path.suffix == ".jsonl" and data.endswith(b"\n"):
            return [_lasting(json.loads(line)) for line in data.splitlines()]
    except (ValueError, RecursionError, yaml.YAMLError):
        pass
    return data


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(inner) for key, inner in value.items() if not key.startswith(PASSING)}
    return [_lasting(inner) for inner in value] if isinstance(value, list) else value


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What is missing, left over or different, a phrase each; equal folders give none."""
    words = [f"missing {name}" for name in wanted if name not in found]
    words += [f"left over {name}" for name in found if name not in wanted]
    for name in wanted:
        if name in found and wanted[name] != found[name]:
            words.append(f"{name} differs{_where(wanted[name], found[name])}")
    return words


def _where(wanted: Any, found: Any, path: str = "") -> str:
    """The first place in two JSON values in which they differ."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in {**wanted, **found}:
            if wanted.get(key) != found.get(key):
                return _where(wanted.get(key), found.get(key), f"{path}.{key}")
    if isinstance(wanted, list) and isinstance(found, list):
        if len(wanted) != len(found):
            return f" at {path or 'the top'}: {len(found)} entries, not {len(wanted)}"
        for i, (one, other) in enumerate(zip(wanted, found, strict=True)):
            if one != other:
                return _where(one, other, f"{path}.{i}")
    return f" at {path}: {found!r:.60}, not {wanted!r:.60}" if path else ""
