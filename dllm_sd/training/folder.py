"""The run folder: one configuration each, nothing written outside."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_sd.config import Config, to_tree, to_yaml
from dllm_sd.errors import InputError, shown
from dllm_sd.plain_yaml import read_yaml

CONTENTS = (
    *("config.yaml", "metrics.jsonl", "samples.jsonl", "report.json", "nonfinite.json"),
    *("checkpoints", "tb", "eval", "students", "rounds", "rounds.json"),
)
FREE = ("run", "resume", "log", "checkpoint", "cache")
"""Keys that may differ between a run and its continuation."""


def prepare_folder(config: Config) -> None:
    """Make the run folder, or make sure that it holds a run of this configuration.

    Raises:
        InputError: if it holds another configuration (unless `resume` says otherwise) or somebody else's files.
    """
    run = Path(config.run)
    if run.exists() and not run.is_dir():
        raise InputError(f"run {config.run!r} is a file; name a folder")
    former = read_tree(run) if (run / "config.yaml").exists() else {}
    if run.is_dir() and any(run.iterdir()) and not {"task", "method"} <= former.keys():
        raise InputError(f"run folder {config.run!r} is not empty and holds no run; give another run=...")
    if config.resume == "fresh":
        for name in CONTENTS:
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    lines = [run / "metrics.jsonl", *run.glob("students/*/metrics.jsonl")]
    begun = any(file.exists() for file in lines)  # else it was refused before the first, and holds nothing to keep
    if begun and config.resume == "auto":
        key = _first_difference(former, to_tree(config))
        if key is not None:
            raise InputError(
                f"run folder {config.run!r} holds a run with another {key}; give another run=..., "
                "resume=force to continue it all the same, or resume=fresh to discard it"
            )
    try:
        run.mkdir(parents=True, exist_ok=True)
        partial = run / ".config.partial"
        partial.write_text(to_yaml(config), encoding="utf-8")
        partial.replace(run / "config.yaml")
    except OSError as error:
        raise InputError(
            f"cannot write to run folder {config.run!r}: {error.strerror}; give another run=..."
        ) from error


def read_tree(run: Path, name: str = "config.yaml") -> dict[str, Any]:
    """The config of a run as a plain tree."""
    tree = read_yaml(run / name, shown(str(run / name)), "give another folder")
    if not isinstance(tree, dict):
        raise InputError(f"{shown(str(run / name))} is not the config of a run; give another folder")
    return tree


def _first_difference(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> str | None:
    for key in [*new, *(key for key in old if key not in new)]:
        if not path and key in FREE:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            inner = _first_difference(before, after, f"{path}{key}.")
            if inner is not None:
                return inner
        elif before != after:
            return f"{path}{key} ({before!r}, not {after!r})"
    return None
