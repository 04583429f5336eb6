"""The one way to read a file that somebody gave: a regular file, in pieces of bounded size, JSON of bounded depth."""

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from dllm_sd.errors import InputError, on_one_line

LONGEST_LINE = 2**24
"""Bytes of a line, its end included."""
LARGEST_FILE = 2**26
"""Bytes of a file that is read as a whole."""
DEEPEST = 100
"""Lists and objects of JSON, one within the other; what is deeper could be read, but neither copied nor written."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def lone_surrogate(text: str) -> str | None:
    """Words for the first half of a surrogate pair in a text, None if there is none: it stands for no character."""
    found = _SURROGATE.search(text)
    return None if found is None else f"half a surrogate pair (\\u{ord(found[0]):04x})"


def open_regular(path: Path) -> BinaryIO:
    """A file to read bytes from; never waits for a pipe's other end.

    Raises:
        OSError: if there is none, it cannot be read, or it is a device, a pipe or a folder.
    """
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "no file has a NUL character in its name")
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "a device or a pipe, not a regular file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_whole(path: Path, largest: int = LARGEST_FILE) -> bytes:
    """All of a regular file.

    Raises:
        OSError: as `open_regular`, and if it has more than ``largest`` bytes.
    """
    with open_regular(path) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise OSError(errno.EFBIG, f"larger than {largest >> 20} MiB")
    return content


def bounded_lines(file: BinaryIO, where: Callable[[int], str]) -> Iterator[bytes]:
    """The lines of a file with their ends, never more than one of them in memory.

    Args:
        file: open for reading bytes; only a line feed ends a line.
        where: names a line by its number, which counts from 1, for the message.

    Raises:
        InputError: if a line is longer than `LONGEST_LINE`, of which no more is read.
    """
    for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), 1):
        if len(line) > LONGEST_LINE:
            raise InputError(f"{where(number)} is longer than {LONGEST_LINE >> 20} MiB; write one object on each line")
        yield line


def parse_json(text: str, claim: str, remedy: str, *, explain: bool = False, **options: Any) -> Any:
    """The value that a JSON text says.

    Args:
        text: the JSON text.
        claim: begins the message, as in ``FILE, line 3 is not valid JSON``.
        remedy: what to do where it is wrong.
        explain: whether the message says what the parser met.
        **options: hooks of `json.loads`.

    Raises:
        InputError: if it is not JSON, or is nested more than `DEEPEST` levels deep.
    """
    try:
        tree = json.loads(text, **options)
        deep = text.count("[") + text.count("{") > DEEPEST and _is_deep(tree)
    except RecursionError:
        deep, tree = True, None
    except ValueError as error:
        said = f" ({on_one_line(error)})" if explain else ""
        raise InputError(f"{claim}{said}; {remedy}") from None
    if deep:
        raise InputError(f"{claim} (nested more than {DEEPEST} levels deep); {remedy}")
    return tree


def _is_deep(tree: Any) -> bool:
    level = [tree]
    for _ in range(DEEPEST + 1):
        level = [part for part in level if isinstance(part, list | dict)]
        if not level:
            return False
        level = [value for part in level for value in (part.values() if isinstance(part, dict) else part)]
    return True
