"""The formats of data files: JSON Lines, CSV and Parquet, each of which may be packed with gzip."""

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from io import BytesIO
from typing import Any, BinaryIO
from uuid import UUID

from dllm_sd.errors import InputError, on_one_line, shown
from dllm_sd.files.reading import LONGEST_LINE, parse_json, text_lines, why_broken, why_no_object

_PARQUET = b"PAR1"


@dataclass(frozen=True)
class Row:
    """One row of data. ``number`` counts from 0 in its source; ``where`` names config key, file and line."""

    where: str
    number: int
    fields: Mapping[str, Any]

    def value(self, name: str, key: str | None = None) -> Any:
        """Return the field ``name``; raise an InputError that names the line, and ``key`` if that can name a field."""
        if name not in self.fields:
            names = ", ".join(map(str, self.fields)) or "nothing"
            remedy = f"set {key} to another field" if key else "name another file"
            raise InputError(f"{self.where} has no field {name!r} (it has {names}); add it or {remedy}.")
        return self.fields[name]

    def text(self, name: str) -> str:
        """Return the field ``name``, which must be a non-empty string."""
        value = self.value(name)
        if not isinstance(value, str):
            raise InputError(f"{self.where}: field {name!r} must be a string, not {value!r:.80}; quote it.")
        if not value.strip():
            raise InputError(f"{self.where}: field {name!r} is empty; fill it, or leave the row out.")
        return value

    def has(self, name: str) -> bool:
        """Return whether the field ``name`` has a value; null and the empty cell of a table do not count as one."""
        return self.fields.get(name) not in (None, "")


def rows_in(file: BinaryIO, name: str, where: str) -> Iterator[Row]:
    """Yield the rows of an open file, after decompression.

    Parquet is recognised by its content. Other files are UTF-8 text: CSV with a header line if the ``name`` ends in
    .csv (or .csv.gz), otherwise JSON Lines. ``where`` names key and file in error messages.

    Raises:
        InputError: naming the line, or the row of a Parquet file.
    """
    is_parquet = file.read(len(_PARQUET)) == _PARQUET
    file.seek(0)
    if is_parquet:
        return _parquet_rows(file, where)
    is_csv = name.lower().removesuffix(".gz").endswith(".csv")
    return (_csv_rows if is_csv else _json_rows)(file, where)


def plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a row of a typed table as JSON values.

    Dates, times, decimals and UUIDs become text. A number that is not finite becomes None, as libraries for tables
    write a missing number. Columns of bytes, images and other objects are left out.
    """
    plain = {str(name): _plain(value) for name, value in fields.items()}
    return {name: value for name, value in plain.items() if value is not _NO_TEXT}


_NO_TEXT = object()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal | timedelta | UUID):
        return str(value)
    if isinstance(value, Mapping):
        return plain_fields(value)
    if isinstance(value, list | tuple):
        return [None if (item := _plain(part)) is _NO_TEXT else item for part in value]
    return _NO_TEXT


def _parquet_rows(file: BinaryIO, where: str) -> Iterator[Row]:
    # Imported here, since it is slow and other files do not need it.
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    count = 0
    try:
        table = ParquetFile(BytesIO(file.read()))
        names = table.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{where} has the column {shown(twice[0])} twice; give every column a different name.")
        for batch in table.iter_batches():
            for fields in batch.to_pylist():
                yield Row(f"{where}, row {count}", count, plain_fields(fields))
                count += 1
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{where} is a Parquet file that cannot be read ({on_one_line(error):.100}); write it again, or as .jsonl."
        ) from None


def _lines(file: BinaryIO, where: str) -> Iterator[str]:
    return text_lines(file, lambda number: f"{where}, line {number}", where)


def _json_rows(file: BinaryIO, where: str) -> Iterator[Row]:
    count = 0
    for number, line in enumerate(_lines(file, where), 1):
        if not line.strip():
            continue
        line_name, problem = f"{where}, line {number}", why_no_object(line)
        if problem and not line.lstrip().startswith("["):
            raise InputError(f"{line_name} is not valid JSON: {problem}.")
        try:
            fields = parse_json(
                line, f"{line_name} is not valid JSON", f"{problem or 'write one JSON object on each line'}."
            )
        except InputError:
            if reason := why_broken(line):
                raise InputError(f"{line_name} is not valid JSON: {reason}.") from None
            raise
        if not isinstance(fields, dict):
            remedy = problem or 'write one as in {"field": value} on each line'
            raise InputError(f"{line_name} is not a JSON object; {remedy}.")
        yield Row(line_name, count, fields)
        count += 1


def _csv_rows(file: BinaryIO, where: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_LINE)  # the default of the csv module is 128 KiB
    reader = csv.reader(_lines(file, where), strict=True)
    header: list[str] | None = None
    count = 0
    try:
        for cells in reader:
            if not cells:
                continue
            line_name = f"{where}, line {reader.line_num}"
            if header is None:
                header = _header(cells, line_name)
                continue
            if len(cells) != len(header):
                raise InputError(
                    f"{line_name} has {len(cells)} cells, the header {len(header)}; give each line one cell per column."
                )
            yield Row(line_name, count, dict(zip(header, cells, strict=True)))
            count += 1
    except csv.Error as error:
        remedy = next(
            (remedy for message, remedy in _CSV_REMEDIES.items() if message in str(error)), "correct its quotes"
        )
        raise InputError(f"{where}, line {reader.line_num} is not valid CSV ({error}); {remedy}.") from None


_CSV_REMEDIES = {
    "field larger": "a cell has more characters than that, or the quote that opens it is never closed",
    "new-line character": "its lines end with carriage returns alone, or a cell contains one: end lines with line "
    "feeds, and put quotes around a cell of several lines",
    "unexpected end": "the quote that opens the last cell is never closed",
}
"""The remedy for an error of the csv module, by words that occur in its message."""


def _header(cells: list[str], line_name: str) -> list[str]:
    if cells[0].lstrip().startswith(("{", "[")):
        raise InputError(
            f"{line_name} holds JSON and not the names of columns; give the file a name that ends in .jsonl."
        )
    if len(cells) == 1 and (mark := next((mark for mark in ";\t|" if mark in cells[0]), None)):
        raise InputError(f"{line_name} separates its columns by {mark!r}; save the file with commas between them.")
    if twice := [name for name in cells if cells.count(name) > 1]:
        raise InputError(f"{line_name} has the column {shown(twice[0])} twice; give every column a different name.")
    return cells
