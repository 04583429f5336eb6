"""The run folder: one configuration each, one process at a time, nothing written outside, nothing lost by a refusal."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_sd.config import Config, to_tree, to_yaml
from dllm_sd.errors import InputError, Stopped, shown
from dllm_sd.files.locking import LOCK, FolderLock
from dllm_sd.files.plain_yaml import read_yaml
from dllm_sd.files.reading import read_own
from dllm_sd.files.typed_json import build, own_json
from dllm_sd.files.writing import remove, writable, write_file
from dllm_sd.parallel.processes import on_main

CONFIG, REPORT = "config.yaml", "report.json"
CONTENTS = (
    *("metrics.jsonl", "samples.jsonl", REPORT, "nonfinite.json", "bank.json", "checkpoints", "tb", "eval"),
    *("written", "students", "rounds", "rounds.json", CONFIG),
)
"""What a run may hold; the configuration, which makes the folder a run, comes last."""
FORMER, DISCARDED = ".former_run", ".discarded_run"
"""Where `resume=fresh` puts the former run until the new one is there, and from then on until it is removed."""
LEFT_OVER = {LOCK, f".{CONFIG}.partial", ".config.partial"}
"""What a process that was killed before its first configuration stood there may have left."""
FREE = ("run", "resume", "log", "checkpoint", "cache")
"""Keys that may differ between a run and its continuation."""


class RunFolder:
    """The folder of a run, locked from the first check to the last write; to be used by all processes together."""

    def __init__(self, config: Config) -> None:
        """Lock the folder and see whether the run may go on there; what it holds stays as it is.

        A former run that was interrupted while `resume=fresh` replaced it is put in order first.

        Raises:
            InputError: if it is in use, holds another configuration (unless `resume` says otherwise) or somebody
                else's files, or cannot be written.
        """
        self.config, self.run = config, Path(config.run)
        self._lock = FolderLock(self.run, "run folder", "give another run=...")
        self._before: dict[str, bytes | None] | None = None
        on_main(self._claim)

    def hold(self) -> None:
        """Lock the folder again after `release`."""
        on_main(self._lock.acquire)

    def release(self) -> None:
        """Give the folder back to other processes."""
        self._lock.release()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Inside, the folder has this configuration and, with `resume=fresh`, nothing of a former run.

        What is refused inside leaves the folder as it was; where the run is interrupted or stopped, it has begun.
        """
        on_main(self._begin)
        try:
            yield
        except (KeyboardInterrupt, Stopped, FloatingPointError):
            if self._before is not None:
                _settle(self.run)
            raise
        except BaseException:
            if self._before is not None:
                self._undo(self._before)
            raise
        on_main(lambda: _settle(self.run))

    def _writable(self) -> AbstractContextManager[None]:
        return writable(f"run folder {str(self.run)!r}", "give another run=...")

    def _claim(self) -> None:
        run = self.run
        with self._writable():
            if run.exists() and not run.is_dir():
                raise InputError(f"run {str(run)!r} is a file; name a folder")
            self._lock.acquire()
            try:
                _refuse_strange(run)
                _settle(run)
                self._check()
            except BaseException:
                self.release()
                raise

    def _check(self) -> None:
        run, config = self.run, self.config
        former = read_run_config(run) if (run / CONFIG).exists() else {}
        others = any(path.name not in LEFT_OVER for path in run.iterdir())
        if others and not {"task", "method"} <= former.keys():
            raise InputError(f"run folder {str(run)!r} is not empty and holds no run; give another run=...")
        lines = [run / "metrics.jsonl", *run.glob("students/*/metrics.jsonl")]
        begun = any(file.exists() for file in lines)  # else it was refused before the first, and holds nothing to keep
        if begun and config.resume == "auto":
            key = _first_difference(former, to_tree(config))
            if key is not None:
                raise InputError(
                    f"run folder {str(run)!r} holds a run with another {key}; give another run=..., "
                    "resume=force to continue it all the same, or resume=fresh to discard it"
                )

    def _begin(self) -> None:
        run = self.run
        with self._writable():
            before: dict[str, bytes | None] = {name: None for name in CONTENTS if (run / name).exists()}
            self._before = before
            if CONFIG in before:
                before[CONFIG] = (run / CONFIG).read_bytes()
            try:
                if self.config.resume == "fresh":
                    _move(run, run / FORMER)
                write_file(run / CONFIG, to_yaml(self.config))
            except BaseException:
                self._undo(before)
                raise

    def _undo(self, before: Mapping[str, bytes | None]) -> None:
        """Put back what `_begin` found; of what was there already, only additions remain."""
        former = self.run / FORMER
        for name in CONTENTS:
            if name not in before or (former / name).exists():
                remove(self.run / name)
        if former.is_dir():
            _move_back(self.run, former)
        elif (content := before.get(CONFIG)) is not None:
            write_file(self.run / CONFIG, content)


def read_run_config(run: Path, name: str = CONFIG) -> dict[str, Any]:
    """The config of a run as a plain tree."""
    tree = read_yaml(run / name, shown(str(run / name)), "give another folder")
    if not isinstance(tree, dict):
        raise InputError(f"{shown(str(run / name))} is not the config of a run; give another folder")
    return tree


def read_report(run: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of a finished run; None where the file holds something else, or the report of an earlier end.

    Args:
        run: its folder.
        facts: what the report must say of the run; ``before`` also shows what the reports of the test split look like.

    Raises:
        InputError: naming it, if it is there and cannot be read.
    """
    file = run / REPORT
    if not os.path.lexists(file):
        return None
    content = read_own(file, "make it readable, or remove it to have it written anew")
    try:
        tree = build(dict[str, Any], own_json(content))
        build(_Said, {name: tree.get(name, missing) for name, missing in vars(_Said((), {})).items()})
    except ValueError:
        return None
    if any(key not in tree or tree[key] != value for key, value in facts.items()):
        return None
    if not all(_alike(tree.get(name), facts["before"]) for name in ("after", "best")):
        return None
    final = tree["best"].get("trained", {})
    return tree if all(tree.get(key) == final[key] for key in FINAL if key in final) else None


FINAL = ("n", "accuracy", "ci95", "pass_at_k")
"""What a report says at its top of the best weights under the run's own decoding."""


@dataclass(frozen=True)
class _Said:
    """What a report says beside its figures; reports of former versions lack it."""

    warnings: tuple[str, ...]
    left_out: Mapping[str, int]


def _alike(value: Any, model: Any) -> bool:
    """Whether two JSON values have the same keys, lengths and types."""
    if isinstance(model, Mapping):
        return (
            isinstance(value, Mapping)
            and value.keys() == model.keys()
            and all(_alike(value[k], model[k]) for k in model)
        )
    if isinstance(model, list):
        return isinstance(value, list) and len(value) == len(model) and all(map(_alike, value, model))
    return type(value) is type(model)


def _refuse_strange(run: Path) -> None:
    """Refuse links in the place of what a run writes, for they lead out of its folder, and files in that of folders."""
    for name in (*CONTENTS, FORMER, DISCARDED):
        path, is_file = run / name, bool(Path(name).suffix)
        _refuse_link(path)
        if path.exists() and path.is_file() != is_file:
            kinds = ("a folder", "a file") if is_file else ("a file", "a folder")
            raise InputError(
                f"{str(path)!r} is {kinds[0]} where a run has {kinds[1]}; move it away, or give another run=..."
            )
        for folder, folders, files in os.walk(path):
            for one in (*folders, *files):
                _refuse_link(Path(folder, one))


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise InputError(
            f"{str(path)!r} is a symbolic link, and a run writes inside its folder only; put what it names there, "
            "or give another run=..."
        )


def _move(run: Path, former: Path) -> None:
    """Put a run aside, its configuration last."""
    former.mkdir()
    for name in CONTENTS:
        if (run / name).exists():
            (run / name).rename(former / name)


def _settle(run: Path) -> None:
    """End a replacement by `resume=fresh`: the former run is removed if the new one is there, else it comes back."""
    former, discarded = run / FORMER, run / DISCARDED
    if discarded.is_dir():
        shutil.rmtree(discarded)
    if not former.is_dir():
        return
    if (former / CONFIG).exists() and (run / CONFIG).exists():
        former.rename(discarded)
        shutil.rmtree(discarded)
        return
    _move_back(run, former)


def _move_back(run: Path, former: Path) -> None:
    for path in former.iterdir():
        path.rename(run / path.name)
    former.rmdir()


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
            return f"{path}{key} ({before!r:.80}, not {after!r:.80})"
    return None
