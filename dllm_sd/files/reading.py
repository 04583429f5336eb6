"""The one way to read a given file: a regular file, in pieces of bounded size, JSON of bounded depth."""

import errno
import gzip
import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from dllm_sd.errors import InputError, on_one_line, os_reason

LONGEST_LINE = 2**24
"""Bytes of a line, its end included."""
LARGEST_FILE = 2**26
"""Bytes of a file that is read as a whole."""
MAX_JSON_DEPTH = 100
"""Lists and objects of JSON, one within the other; what is deeper could be read, but neither copied nor written."""
_GZIP = b"\x1f\x8b"
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


@contextmanager
def open_unpacked(path: Path) -> Iterator[BinaryIO]:
    """A file to read bytes from, decompressed where its name ends in .gz or its content is a gzip archive.

    Raises:
        OSError: as `open_regular`. Reading a damaged archive raises an OSError, an EOFError or a zlib.error, which
            `why_unread` puts in words.
    """
    with open_regular(path) as file:
        is_packed = file.read(len(_GZIP)) == _GZIP or path.suffix == ".gz"
        file.seek(0)
        if not is_packed:
            yield file
            return
        with gzip.open(file, "rb") as unpacked:  # a binary file, though typeshed does not declare it so
            yield unpacked  # pyright: ignore[reportReturnType]


def why_unread(error: Exception) -> str:
    """Words for an error of `open_unpacked` or of reading its file."""
    return getattr(error, "strerror", None) or f"damaged: {on_one_line(error)}"


def read_whole(path: Path, largest: int = LARGEST_FILE) -> bytes:
    """All of a regular file.

    Raises:
        OSError: as `open_regular`, and if it has more than ``largest`` bytes.
    """
    with open_regular(path) as file:
        content = file.read(largest + 1 if largest < sys.maxsize else -1)
    if len(content) > largest:
        raise OSError(errno.EFBIG, f"larger than {largest >> 20} MiB")
    return content


def damaged_file(file: Path | str, why: BaseException | str, remedy: str) -> InputError:
    """The refusal of a file that the program wrote itself and cannot use: why, and what can be done.

    Args:
        file: its name, or more words with it.
        why: what was met, in words or as it was raised.
        remedy: what to do.
    """
    if isinstance(why, BaseException):
        why = os_reason(why) if isinstance(why, OSError) else on_one_line(why)
    return InputError(f"{file} is missing or damaged ({why:.200}); {remedy}")


def read_own(file: Path, remedy: str, largest: int = LARGEST_FILE) -> bytes:
    """All of a file that the program wrote itself.

    Raises:
        InputError: as `damaged_file`, if it cannot be read or has more than ``largest`` bytes.
    """
    try:
        return read_whole(file, largest)
    except OSError as error:
        raise damaged_file(file, error, remedy) from error


def cut_half_line(file: Path, remedy: str) -> None:
    """Remove the last line of a file of whole lines if a killed process did not finish it; the next is appended there.

    Raises:
        InputError: as `damaged_file`, if it cannot be read.
    """
    content = read_own(file, remedy, sys.maxsize) if os.path.lexists(file) else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)


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


def text_lines(file: BinaryIO, where: Callable[[int], str], whole: str, this: str = "") -> Iterator[str]:
    """The lines of a UTF-8 text file, a byte order mark left out; see `bounded_lines`.

    Args:
        file: open for reading bytes.
        where: names a line, for messages.
        whole: names the file.
        this: stands between the name of a line and what is said of it.

    Raises:
        InputError: if it is no UTF-8 text; a file of a well-known other kind is called by its name.
    """
    for number, line in enumerate(bounded_lines(file, where), 1):
        if number == 1 and (found := next((words for start, words in _OTHERS.items() if line.startswith(start)), None)):
            raise InputError(f"{whole} is {found}")
        if number == 1 and b"\0" in line[:64]:
            raise InputError(f"{whole} is {_UTF_16}")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{where(number)}{this} is not UTF-8 text; save the file as UTF-8") from None


_TABLE = "write its rows as JSON objects, one on each line"
_UTF_16 = "UTF-16 or UTF-32 text, or none at all; save the file as UTF-8"
_OTHERS: dict[bytes, str] = {
    b"PAR1": f"a Parquet file; {_TABLE}, as to_json of the package datasets does",
    **dict.fromkeys((b"ARROW1", b"FEA1", b"\xff\xff\xff\xff"), f"an Arrow file; {_TABLE}, as to_json of datasets does"),
    b"\x1f\x8b": "a gzip archive; unpack it first (gunzip)",
    b"PK\x03\x04": f"a zip archive or a spreadsheet; unpack it first, or {_TABLE}",
    b"BZh": "a bzip2 archive; unpack it first (bunzip2)",
    b"\xfd7zXZ": "an xz archive; unpack it first (unxz)",
    b"(\xb5/\xfd": "a zstd archive; unpack it first (unzstd)",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"), _UTF_16),
    b"SQLite format 3": f"an SQLite database; {_TABLE}",
    b"\x89HDF": f"an HDF5 file; {_TABLE}",
    b"\x93NUMPY": f"a NumPy array; {_TABLE}",
    b"%PDF": f"a PDF; {_TABLE}",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file that it stands for (git lfs pull)",
    **dict.fromkeys((b"<!DOCTYPE", b"<!doctype", b"<html"), "a web page; download the file that it shows"),
}
"""What files begin with that are no text to read line by line; longer beginnings that share a start come first."""


class _Wrong(ValueError):
    """What is wrong with a JSON text that its parser would let pass."""


def json_value(
    content: str | bytes, *, surrogates: bool = False, deepest: int = MAX_JSON_DEPTH, **options: Callable[..., Any]
) -> Any:
    """The value that a JSON text says.

    Args:
        content: the text, or its bytes in UTF-8.
        surrogates: whether half a surrogate pair may stand in a string, though it is no character.
        deepest: lists and objects that may stand one within the other.
        **options: hooks of `json.loads`, instead of those that refuse a key twice, NaN, and numbers beyond floats.

    Raises:
        ValueError: saying in a few words what is wrong: it is no UTF-8 or no JSON, is nested too deeply, or holds what
            no file can mean.
    """
    hooks: dict[str, Any] = {"object_pairs_hook": _once, "parse_constant": _no_number, "parse_float": _finite}
    too_deep = _Wrong(f"nested more than {deepest} levels deep")
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        tree = json.loads(text, **{**hooks, "parse_int": _whole, **options})
    except UnicodeDecodeError:
        raise _Wrong("no UTF-8 text") from None
    except RecursionError:
        raise too_deep from None
    if text.count("[") + text.count("{") > deepest and _is_deep(tree, deepest):
        raise too_deep
    if not surrogates and _ESCAPED.search(text):
        _refuse_halves(tree)
    return tree


def parse_json(
    text: str, claim: str, remedy: str, *, explain: bool = False, surrogates: bool = False, **options: Any
) -> Any:
    """The value that a JSON text says, or one sentence on what is wrong with it.

    Args:
        text: the JSON text.
        claim: begins the message, as in ``FILE, line 3 is not valid JSON``.
        remedy: what to do where it is wrong.
        explain: whether the message says what the parser met.
        surrogates: as in `json_value`.
        **options: as in `json_value`.

    Raises:
        InputError: where `json_value` refuses it.
    """
    try:
        return json_value(text, surrogates=surrogates, **options)
    except ValueError as error:
        said = f" ({on_one_line(error)})" if explain or isinstance(error, _Wrong) else ""
        raise InputError(f"{claim}{said}; {remedy}") from None


_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
MOST_DIGITS = 4000
"""Digits of a whole number."""


def repeated_key(pairs: list[tuple[str, Any]]) -> str | None:
    """The first key of a JSON object that is there again, None where all differ."""
    keys = [key for key, _ in pairs]
    return next((key for key in keys if keys.count(key) > 1), None) if len({*keys}) < len(keys) else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (key := repeated_key(pairs)) is not None:
        raise _Wrong(f"{key!r:.60} occurs twice")
    return dict(pairs)


def _no_number(word: str) -> Any:
    raise _Wrong(f"{word} is no JSON number")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise _Wrong(f"the number {digits:.60} is beyond all measure")
    return value


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise _Wrong(f"a number has {len(digits)} digits")
    return int(digits)


def _refuse_halves(tree: Any) -> None:
    if isinstance(tree, str) and (half := lone_surrogate(tree)) is not None:
        raise _Wrong(f"{half}, which is not a character: take it out")
    if isinstance(tree, dict | list):
        for part in [*tree.keys(), *tree.values()] if isinstance(tree, dict) else tree:
            _refuse_halves(part)


def why_no_object(line: str) -> str | None:
    """What a line that is no JSON object looks like, and the remedy; None where nothing is to be seen."""
    start = line.strip()[:200]
    if start.startswith("["):
        return "a JSON array begins there; write its objects one on each line, as jq -c '.[]' FILE does"
    if start in ("{", ""):
        return "an object begins there that goes on below; write each one on a line of its own, as jq -c . FILE does"
    if "}\r{" in line:
        return "its lines end with carriage returns alone; end them with line feeds"
    if start[0] not in '{"' and "," in start:
        return "it looks like CSV; give the file a name that ends in .csv, with the columns' names in its first line"
    return "it looks like a table with tabs; save it as CSV" if start[0] not in '{"' and "\t" in start else None


def why_broken(line: str) -> str | None:
    """What is wrong with a line that begins as an object and is no JSON, and the remedy; None where it cannot be said.

    It takes as long as reading the line does, which `why_no_object` does not.
    """
    line = line.strip()
    inside = line.removesuffix("}").rstrip()
    if inside.endswith(",") and _reads(inside[:-1] + "}"):
        return "there is a comma after the last field; remove it"
    try:
        _, end = json.JSONDecoder().raw_decode(line)
    except (ValueError, RecursionError):
        return None
    rest = line[end:].strip()
    if rest.lstrip(", \t").startswith("{"):
        return "there are two objects on one line; write each one on a line of its own, as jq -c . FILE does"
    return "there is a comma after the object; remove it" if rest == "," else None


def _reads(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_deep(tree: Any, deepest: int) -> bool:
    level = [tree]
    for _ in range(deepest + 1):
        level = [part for part in level if isinstance(part, list | dict)]
        if not level:
            return False
        level = [value for part in level for value in (part.values() if isinstance(part, dict) else part)]
    return True
