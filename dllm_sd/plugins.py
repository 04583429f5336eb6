"""Plugins: files of the user's own with parts, methods or tasks, imported because a config or a command names them."""

import hashlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_sd.errors import InputError, on_one_line, os_reason, shown
from dllm_sd.files.reading import read_whole
from dllm_sd.files.writing import at_home, names_file

_imported: dict[str, str] = {}
"""The hash of each file that this process has imported, by its path."""


def with_plugins(
    tree: Mapping[str, Any], folders: Sequence[Path] = (Path(),), not_in: Path | None = None
) -> dict[str, Any]:
    """Return a config tree in which `plugins` are absolute paths.

    Args:
        tree: the tree; `plugins` may be one path or a list of them.
        folders: where relative paths are looked for, in this order.
        not_in: the folder of a run whose config this is; it may have come from somebody else together with files, so
            none of these is taken.

    Raises:
        InputError: if a file is not there, or what is given is no path.
    """
    if "plugins" not in tree:
        return dict(tree)
    named = tree["plugins"]
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list | tuple) or not all(isinstance(name, str) for name in named):
        raise InputError(f"plugins must be a list of files, not {shown(named)}")
    found = [_found(name, folders, f"plugins.{i}") for i, name in enumerate(named)]
    for path in found:
        if not_in is not None and not_in.resolve() in Path(path).resolve().parents:
            raise InputError(
                f"the run {str(not_in)!r} names the plugin {shown(path)} in its own folder, and code that comes along "
                "with a run is not imported; move the file out, and name it with plugins=[FILE.py]"
            )
    return {**tree, "plugins": found}


def import_plugins(paths: Sequence[str]) -> None:
    """Import files; one that this process has imported is imported again only if its content has changed since.

    Raises:
        InputError: naming the file and the line, if it cannot be imported.
    """
    for path in paths:
        digest = digest_of(path)
        if _imported.get(path) != digest:
            _import(Path(path), digest)
            _imported[path] = digest


def digest_of(path: str) -> str:
    """Return the SHA-256 of a file with code.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        return hashlib.sha256(read_whole(Path(path))).hexdigest()
    except OSError as error:
        raise InputError(f"{shown(path)} (plugins) cannot be read ({os_reason(error)}); name another file") from error


def _found(name: str, folders: Sequence[Path], key: str) -> str:
    path = Path(at_home(name, key))
    for folder in folders:
        if path.suffix == ".py" and names_file(str(folder / path)):
            return str((folder / path).absolute())
    raise InputError(f"{key} is {shown(name)}, which is no file of Python; name one, as in plugins=[FILE.py]")


def _import(path: Path, digest: str) -> None:
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, so that what lies there replaces no installed module
    name = f"plugin_{path.stem}_{digest[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the file does, the user reads one sentence
        del sys.modules[name]
        raise InputError(f"plugin {shown(str(path))} cannot be imported ({_words(error, path)}); correct it") from error


def _words(error: BaseException, path: Path) -> str:
    """The type and message of an exception, and the last line of the file that it passed."""
    trace, line = error.__traceback__, getattr(error, "lineno", None)
    while trace is not None:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(path) else line
        trace = trace.tb_next
    return f"{type(error).__name__}: {on_one_line(error):.200}{'' if line is None else f' in line {line}'}"
