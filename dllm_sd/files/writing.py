"""Files and their names. A file is written whole or not at all, and never through a symbolic link."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated
from uuid import uuid4

from dllm_sd.errors import InputError, on_one_line, shown

PLACE = "a path"
MAX_PATH_DEPTH = 200
"""Folders in a path, one within the other; making more is nobody's wish."""
Place = Annotated[str, PLACE]
"""A file or folder in a config; a ``~`` at its start is the home folder."""
FUNCTION = "a function in a file"
Function = Annotated[str, FUNCTION]
"""A function in a file of the user's own, ``FILE.py:NAME``, or another text."""
MAX_PATH = 4096
"""Characters of a path."""


def write_file(path: Path, content: str | bytes, alone: bool = True) -> None:
    """Replace ``path`` by ``content`` (text as UTF-8); a reader, or a crash, sees the former file or the new one.

    ``alone`` is that of `replacing`.

    Raises:
        OSError: if it cannot be written; the former file is as it was.
    """
    with replacing(path, alone) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path, alone: bool = True) -> Iterator[IO[bytes]]:
    """A file to write to (and read back), which takes the place of ``path`` when the block ends without an exception.

    It is written beside ``path`` as ``.{name}.partial``, flushed to disk and renamed. Whatever has that name already,
    such as the leftover of a crash or a symbolic link, is removed and not followed. Unless the writer is ``alone``,
    another thread or process may replace the same file at the same time: then the name beside it is one of its own.

    Raises:
        OSError: if it cannot be written; the former file is as it was.
    """
    partial = path.with_name(f".{path.name}.partial" if alone else f".{path.name}.{uuid4().hex}.partial")
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Remove a file, a folder with all that it holds, or a symbolic link and not what it names; or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def writable(folder: str, remedy: str) -> Iterator[None]:
    """Inside, the folder that the user named is made ready: what the system refuses is the user's to correct.

    Raises:
        InputError: naming the ``folder``, as in ``run folder 'runs/x'``, and the ``remedy``.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a ValueError: a name that no file can have
        words = (isinstance(error, OSError) and error.strerror) or on_one_line(error)
        raise InputError(f"cannot write to {folder}: {words}; {remedy}") from error


def at_home(name: str, key: str) -> str:
    """The path ``name``, where a ``~`` at its start is the home folder.

    Raises:
        InputError: naming the ``key``, if there is no such home, or no file can have that name.
    """
    try:
        path = str(Path(name).expanduser()) if name.startswith("~") else name
        parts = path.split("/")
        possible = "\0" not in path and all(len(os.fsencode(part)) < 256 for part in parts) and len(path) < MAX_PATH
        possible = possible and len(parts) <= MAX_PATH_DEPTH
    except (RuntimeError, UnicodeEncodeError):
        possible, path = False, name
    if not possible:
        raise InputError(f"{key} is {shown(name)}, which no file can be named; give another path")
    return path


def whole_path(name: str) -> str:
    """The absolute path of a file or folder that is there; other names, such as those of a hub, as they are.

    What may follow a colon (a function in a file, a configuration and a split of a data set) is kept.
    """
    path, colon, rest = name.partition(":")
    try:
        there = bool(path) and os.path.exists(path)
    except ValueError:
        there = False
    return f"{os.path.abspath(path)}{colon}{rest}" if there else name


def names_file(name: str) -> bool:
    """Whether ``name`` is the path of a regular file; a name that no path can have is none."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False
