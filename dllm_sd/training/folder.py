"""The run folder: it holds one configuration and is locked by one run at a time.

Nothing is written outside of it, and a run that is refused leaves it unchanged.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from dllm_sd.config import Config, build_config, to_tree, to_yaml, with_whole_paths
from dllm_sd.errors import InputError, Stopped, shown
from dllm_sd.evaluation.recording import VERDICTS
from dllm_sd.files.checkpoint_files import numbered_checkpoints
from dllm_sd.files.locking import LOCK, FolderLock
from dllm_sd.files.plain_yaml import read_yaml
from dllm_sd.files.reading import read_own
from dllm_sd.files.typed_json import build, own_json, read_json
from dllm_sd.files.writing import MAX_PATH, names_file, remove, writable, write_file
from dllm_sd.parallel.processes import on_main
from dllm_sd.plugins import digest_of
from dllm_sd.tasks.own_grader import file_and_function

CONFIG, REPORT, CODE = "config.yaml", "report.json", "code.json"
TRACKED = "trackers"
"""Folder of trackers, whose libraries put links to their own logs into it."""
CONTENTS = (
    *("metrics.jsonl", "samples.jsonl", "traces.jsonl", REPORT, "nonfinite.json", "bank.json", "checkpoints", "tb"),
    *(TRACKED, "eval", "environment.jsonl", "report.html", "written", "engine", "students", "rounds", "rounds.json"),
    *(VERDICTS, CODE, CONFIG),
)
"""Names that a run may write; the configuration marks the folder as a run and comes last."""
COMPLETIONS = ("engine", CONFIG)
"""What is replaced where completions of servers may be those of other weights than the run is going to have."""
FORMER, DISCARDED = ".former_run", ".discarded_run"
"""What is replaced is moved to the first until the new run exists, then to the second until it is removed."""
LEFT_OVER = {LOCK, f".{CONFIG}.partial", ".config.partial"}
"""Files of a process that was killed before it had written its configuration."""
FREE = (
    *("run", "resume", "log", "checkpoint", "cache", "method.name"),
    *(f"decode.engine.{key}" for key in ("url", "key_variable", "timeout", "retries", "backoff", "concurrency")),
    *(f"decode.engine.{key}" for key in ("checked", "tolerance")),
)
"""Keys that may differ between a run and its continuation."""


class RunFolder:
    """The folder of a run, locked from the first check to the last write; all processes call its methods together."""

    def __init__(self, config: Config) -> None:
        """Lock the folder and check that the run may start or resume there, without changing its content.

        A replacement that was interrupted is completed or undone first.

        Raises:
            InputError: if the folder is in use, cannot be written, holds another configuration (unless `resume` allows
                it) or files of another program.
        """
        self.config, self.run = config, Path(config.run)
        self._stored = replace(with_whole_paths(config), resume="auto")  # a later start with this config continues
        self._lock = FolderLock(self.run, "run folder", "give another run=...")
        self._before: dict[str, bytes | None] | None = None
        self._replaced: Sequence[str] = {"fresh": CONTENTS, "force": COMPLETIONS}.get(config.resume, ())
        self._code = code_of(self._stored)
        self.notes: list[str] = on_main(self._claim)
        """Sentences on code of the user's own that has changed since the run began, and on a run that is extended."""

    def hold(self) -> None:
        """Lock the folder again after `release`."""
        on_main(self._lock.acquire)

    def release(self) -> None:
        """Unlock the folder."""
        self._lock.release()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Context in which the folder has this configuration and, with `resume=fresh`, nothing of a former run.

        An error inside restores the folder. An interrupt, a `Stopped` or a non-finite loss does not: then the run has
        begun, and the changes are kept.
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

    def _claim(self) -> list[str]:
        run = self.run
        with self._writable():
            if run.exists() and not run.is_dir():
                raise InputError(f"run {str(run)!r} is a file; name a folder")
            self._lock.acquire()
            try:
                _refuse_foreign_files(run)
                _settle(run)
                extended = self._check()
                return [] if self.config.resume == "fresh" else [*extended, *code_changes(run, self._code)]
            except BaseException:
                self.release()
                raise

    def _check(self) -> list[str]:
        """Refuse a folder with another run or other files; return what to say of a run that gets more updates."""
        run, config = self.run, self.config
        former: Mapping[str, Any] = read_run_config(run) if (run / CONFIG).exists() else {}
        in_use = any(path.name not in LEFT_OVER for path in run.iterdir())
        if in_use and not {"task", "method"} <= former.keys():
            raise InputError(f"run folder {str(run)!r} is not empty and does not hold a run; give another run=...")
        logs = [run / "metrics.jsonl", *run.glob("students/*/metrics.jsonl")]
        begun = any(file.exists() for file in logs) or bool(numbered_checkpoints(run))  # else nothing is worth keeping
        if config.resume != "auto":
            return []
        former = _with_later_keys(former) if former else former
        if not begun:
            if former and _first_difference(former, to_tree(self._stored)) is not None:
                self._replaced = COMPLETIONS
            return []
        fewer = former.get("updates")
        extended = config.peers is None and isinstance(fewer, int) and fewer < config.updates
        known = {**former, "updates": config.updates} if extended else former
        key = _first_difference(known, to_tree(self._stored))
        if key is not None:
            raise InputError(
                f"run folder {str(run)!r} holds a run with another {key}; give another run=..., "
                "resume=force to continue it anyway, or resume=fresh to discard it"
            )
        if not extended:
            return []
        self._replaced = COMPLETIONS  # the learning rates of updates that are made again are others now
        decays = config.optim.schedule != "constant"
        schedule = f"; the learning rate now follows its {config.optim.schedule} schedule over all of them" * decays
        return [f"the run in {str(run)!r} gets {config.updates} updates instead of {fewer}{schedule}"]

    def _begin(self) -> None:
        run = self.run
        with self._writable():
            before: dict[str, bytes | None] = {name: None for name in CONTENTS if (run / name).exists()}
            self._before = before
            if CONFIG in before:
                before[CONFIG] = (run / CONFIG).read_bytes()
            try:
                if self._replaced:
                    _move(run, run / FORMER, self._replaced)
                if self._code:
                    write_file(run / CODE, json.dumps(self._code, indent=1))
                write_file(run / CONFIG, to_yaml(self._stored))
            except BaseException:
                self._undo(before)
                raise

    def _undo(self, before: Mapping[str, bytes | None]) -> None:
        """Restore what the folder held before `_begin`; files that it held already keep what was appended to them."""
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


def code_of(config: Config) -> dict[str, str]:
    """The hashes of the files of the user's own that a config names (plugins, a grader), by their path."""
    grader = file_and_function(str(getattr(config.task, "grader", "")))
    files = [*config.plugins, *([grader[0]] if grader and names_file(grader[0]) else [])]
    return {file: digest_of(file) for file in files}


def code_changes(run: Path, code: Mapping[str, str]) -> list[str]:
    """Say which files of ``code`` had another content when the run began.

    Raises:
        InputError: if the run's record of them cannot be read.
    """
    if not (run / CODE).exists():
        return []
    former = read_json(run / CODE, dict[str, str], "remove it")
    changed = [file for file, digest in code.items() if former.get(file, digest) != digest]
    return [f"{file} has changed since the run in {str(run)!r} began, so its parts may differ" for file in changed]


def read_report(run: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the report of a finished run; None where the file is missing, is not a report, or is an outdated one.

    Args:
        run: the run folder.
        facts: entries that the report must contain. ``before`` also gives the keys that its test reports must have.

    Raises:
        InputError: naming the file, if it exists and cannot be read.
    """
    file = run / REPORT
    if not os.path.lexists(file):
        return None
    content = read_own(file, "make it readable, or remove it to have it written again")
    try:
        tree = build(dict[str, Any], own_json(content))
        build(_Notes, {name: tree.get(name, default) for name, default in vars(_Notes((), {}, "learnt")).items()})
    except ValueError:
        return None
    if any(key not in tree or tree[key] != value for key, value in facts.items()):
        return None
    if not all(_same_layout(tree.get(name), facts["before"]) for name in ("after", "best")):
        return None
    final = tree["best"].get("trained", {})
    return tree if all(tree.get(key) == final[key] for key in FINAL if key in final) else None


FINAL = ("n", "accuracy", "ci95", "pass_at_k")
"""Top-level keys of a report: test results of the best weights under the decoding settings of the run."""


@dataclass(frozen=True)
class _Notes:
    """Entries of a report beside its figures; reports of earlier versions lack them."""

    warnings: tuple[str, ...]
    left_out: Mapping[str, int]
    outcome: str


def _same_layout(value: Any, model: Any) -> bool:
    """Whether two JSON values have the same keys, lengths and types."""
    if isinstance(model, Mapping):
        return (
            isinstance(value, Mapping)
            and value.keys() == model.keys()
            and all(_same_layout(value[k], model[k]) for k in model)
        )
    if isinstance(model, list):
        return isinstance(value, list) and len(value) == len(model) and all(map(_same_layout, value, model))
    return type(value) is type(model)


def _refuse_foreign_files(run: Path) -> None:
    """Refuse symbolic links where a run writes, since they lead out of its folder, and files where it needs folders."""
    for name in (*CONTENTS, FORMER, DISCARDED):
        path, is_file = run / name, bool(Path(name).suffix)
        _refuse_link(path)
        if path.exists() and path.is_file() != is_file:
            kinds = ("a folder", "a file") if is_file else ("a file", "a folder")
            raise InputError(
                f"{str(path)!r} is {kinds[0]} where a run has {kinds[1]}; move it away, or give another run=..."
            )
        for folder, folders, files in os.walk(path) if name != TRACKED else ():
            for name in (*folders, *files):
                _refuse_link(Path(folder, name))


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise InputError(
            f"{str(path)!r} is a symbolic link, and a run writes inside its folder only; replace the link by what "
            "it points to, or give another run=..."
        )


def _move(run: Path, former: Path, names: Sequence[str]) -> None:
    """Move files of a run to ``former``, its configuration last."""
    former.mkdir()
    for name in names:
        if (run / name).exists():
            (run / name).rename(former / name)


def _settle(run: Path) -> None:
    """Finish a replacement: remove what was replaced if the new run exists, else move it back."""
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


def _with_later_keys(former: Mapping[str, Any]) -> Mapping[str, Any]:
    """A stored config with the defaults of keys that did not exist when it was written; unchanged if it is refused."""
    try:
        return to_tree(build_config(former))
    except InputError:
        return former  # the first key that differs is named


def _first_difference(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> str | None:
    for key in [*new, *(key for key in old if key not in new)]:
        if f"{path}{key}" in FREE:
            continue
        before, after = old.get(key), new.get(key)
        if _are_parts(before) and _are_parts(after) and len(before) == len(after):
            before, after = ({str(i): part for i, part in enumerate(parts)} for parts in (before, after))
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            inner = _first_difference(before, after, f"{path}{key}.")
            if inner is not None:
                return inner
        elif before != after and not _same_place(before, after):
            return f"{path}{key} ({before!r:.80}, not {after!r:.80})"
    return None


def _are_parts(value: Any) -> TypeGuard[list[Mapping[str, Any]]]:
    return isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value)


def _same_place(before: Any, after: Any) -> bool:
    """Whether a stored path is one that earlier versions stored as it was given, or the files have moved since."""
    if not isinstance(before, str) or not isinstance(after, str) or not after.startswith("/"):
        return False
    if not before.startswith("/"):
        return os.path.abspath(before) == after
    file = before.partition(":")[0]  # a function, a configuration or a split may follow
    return len(file) < MAX_PATH and not os.path.exists(file) and Path(before).name == Path(after).name
