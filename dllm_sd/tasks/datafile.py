"""Where problems come from: the rows of a file or hub dataset, the splits made of them, the templates they fill."""

import csv
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from string import Formatter
from typing import Any, BinaryIO, overload

from dllm_sd.errors import InputError, os_reason, shown
from dllm_sd.files.reading import LONGEST_LINE, open_regular, parse_json, text_lines, why_broken, why_no_object
from dllm_sd.randomness import make_key, permutation
from dllm_sd.tasks.conversations import is_conversation
from dllm_sd.tasks.task import Problem, Split


@dataclass(frozen=True)
class Row:
    """One row of data: ``number`` counts from 0 in its source; ``where`` names the config key, file and line."""

    where: str
    number: int
    fields: Mapping[str, Any]

    def value(self, name: str) -> Any:
        """The field ``name``; an InputError that names the line where it is absent."""
        if name not in self.fields:
            there = ", ".join(map(str, self.fields)) or "nothing"
            raise InputError(f"{self.where} has no field {name!r} (it has {there}); add it or name another file.")
        return self.fields[name]

    def text(self, name: str) -> str:
        """The field ``name``, which must be a string that says something."""
        value = self.value(name)
        if not isinstance(value, str):
            raise InputError(f"{self.where}: field {name!r} must be a string, not {value!r:.80}; quote it.")
        if not value.strip():
            raise InputError(f"{self.where}: field {name!r} is empty; fill it, or leave the row out.")
        return value

    def has(self, name: str) -> bool:
        """Whether the field ``name`` holds anything; an empty cell of a table holds nothing."""
        return self.fields.get(name) not in (None, "")


def read_rows(path: str, key: str) -> list[Row]:
    """The rows of a UTF-8 file: CSV with a header line if the name ends in .csv, else JSON objects line by line.

    ``key`` is the config key that named the file, for messages. Raises InputError for whatever is wrong with it.
    """
    where = f"{key}: {path}"
    try:
        with open_regular(Path(path).expanduser()) as file:
            read = _csv_rows if path.lower().endswith(".csv") else _json_rows
            rows = list(read(file, where))
    except OSError as error:
        raise InputError(f"{where} cannot be read ({os_reason(error)}); give the path of a readable file.") from None
    if not rows:
        raise InputError(f"{where} holds no problems; give a file with at least one.")
    return rows


def hub_rows(name: str, config: str | None, split: str, key: str) -> list[Row]:
    """The rows of one split of a dataset on the Hugging Face hub (needs the network or its local cache)."""
    where = f"{key}: hub dataset {name}, split {split}"
    try:
        # Imported here: it is slow, and of no use to whoever reads local files.
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]

        dataset = load_dataset(name, config, split=split)
        rows = [Row(f"{where}, row {number}", number, dict(row)) for number, row in enumerate(dataset)]
    except Exception as error:  # whatever the hub client stumbles over, the remedy is the same
        reason = type(error).__name__
        raise InputError(f"{where} cannot be loaded ({reason}); set {key} to the path of a local file.") from error
    if not rows:
        raise InputError(f"{where} holds no problems; choose another dataset.")
    return rows


def _lines(file: BinaryIO, where: str) -> Iterator[str]:
    return text_lines(file, lambda number: f"{where}, line {number}", where)


def _json_rows(file: BinaryIO, where: str) -> Iterator[Row]:
    count = 0
    for number, line in enumerate(_lines(file, where), 1):
        if not line.strip():
            continue
        here, seen = f"{where}, line {number}", why_no_object(line)
        if seen and not line.lstrip().startswith("["):
            raise InputError(f"{here} is not valid JSON: {seen}.")
        try:
            fields = parse_json(line, f"{here} is not valid JSON", f"{seen or 'write one JSON object on each line'}.")
        except InputError:
            if words := why_broken(line):
                raise InputError(f"{here} is not valid JSON: {words}.") from None
            raise
        if not isinstance(fields, dict):
            remedy = seen or 'write one as in {"field": value} on each line'
            raise InputError(f"{here} is not a JSON object; {remedy}.")
        yield Row(here, count, fields)
        count += 1


def _csv_rows(file: BinaryIO, where: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_LINE)  # its own bound is 128 KiB
    reader = csv.reader(_lines(file, where), strict=True)
    header: list[str] | None = None
    count = 0
    try:
        for cells in reader:
            if not cells:
                continue
            here = f"{where}, line {reader.line_num}"
            if header is None:
                header = _header(cells, here)
                continue
            if len(cells) != len(header):
                raise InputError(
                    f"{here} has {len(cells)} cells, the header {len(header)}; give every line one per column."
                )
            yield Row(here, count, dict(zip(header, cells, strict=True)))
            count += 1
    except csv.Error as error:
        remedy = next((words for said, words in _CSV.items() if said in str(error)), "correct its quotes")
        raise InputError(f"{where}, line {reader.line_num} is not valid CSV ({error}); {remedy}.") from None


_CSV = {
    "field larger": "a cell has more characters than that, or the quote that opens it is never closed",
    "new-line character": "its lines end with carriage returns alone, or one stands in a cell: end lines with line "
    "feeds, and put quotes around a cell of several lines",
    "unexpected end": "the quote that opens the last cell is never closed",
}
"""What to do about an error of the module csv, by words of its message."""


def _header(cells: list[str], here: str) -> list[str]:
    if cells[0].lstrip().startswith(("{", "[")):
        raise InputError(f"{here} holds JSON and not the names of columns; give the file a name that ends in .jsonl.")
    if len(cells) == 1 and (mark := next((mark for mark in ";\t|" if mark in cells[0]), None)):
        raise InputError(f"{here} parts its columns by {mark!r}; save the file with commas between them.")
    if twice := [name for name in cells if cells.count(name) > 1]:
        raise InputError(f"{here} has the column {shown(twice[0])} twice; give every column a name of its own.")
    return cells


@dataclass(frozen=True)
class Entry:
    """A row made into a problem's ``fields``; entries of the same ``identity`` never lie in two splits."""

    number: int
    identity: Hashable
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Splits:
    """The three splits that files were divided into, and what became of the ``rows`` of the training file."""

    parts: Mapping[Split, Sequence[Problem]]
    rows: int
    tested: int
    """Rows that were left out because they occur in the test split."""
    size_dev: int
    """Rows that were to be held out for the dev split."""
    held: int = 0
    """Rows that were left out because they occur in the dev split."""

    def __getitem__(self, split: Split) -> Sequence[Problem]:
        """The problems of a split."""
        return self.parts[split]

    def why_empty(self, split: Split) -> str:
        """Why a split holds no problems, and the remedy."""
        if split == "test":
            return "set task.data_test to a file"
        if split == "dev" and not self.size_dev:
            return "set task.data to a file and task.size_dev above 0"
        if not self.rows:
            return "set task.data to a file"
        if self.tested == self.rows:
            return f"all {self.rows} rows of task.data occur in the test split too; set task.data_test to other rows"
        if self.held:
            return (
                f"the dev split takes {len(self['dev'])} of the {self.rows - self.tested} rows of task.data, and the "
                f"{self.held} others ask the same as one of these; give rows that differ, let task.prompt ask for a "
                "field in which they differ, or set task.size_dev to 0"
            )
        out = f", and {self.tested} more that occur in the test split too" if self.tested else ""
        return (
            f"set task.data to a file with more rows than task.size_dev, which is {self.size_dev}, or lower that (the "
            f"file has {self.rows - self.tested} rows, of which the dev split takes {len(self['dev'])}{out})"
        )


def divide(task: str, train: Iterable[Entry], test: Iterable[Entry], size_dev: int, key: int | None) -> Splits:
    """Hold ``size_dev`` of the training entries out as the dev split and keep the three splits disjoint.

    The held-out rows are the last ones where ``key`` is None, else chosen by a permutation with that key.
    An entry that occurs in test is left out of train and dev, one that occurs in dev is left out of train.
    """
    given, tested = list(train), list(test)
    seen = {entry.identity for entry in tested}
    rest = [entry for entry in given if entry.identity not in seen]
    order = permutation(key, len(rest)) if key is not None else list(range(len(rest)))
    held = set(order[max(len(rest) - size_dev, 0) :])
    dev = [entry for place, entry in enumerate(rest) if place in held]
    seen = {entry.identity for entry in dev}
    kept = [entry for place, entry in enumerate(rest) if place not in held and entry.identity not in seen]

    def named(split: Split, entries: list[Entry]) -> tuple[Problem, ...]:
        return tuple(Problem(f"{task}/{split}/{entry.number}", entry.fields) for entry in entries)

    parts: dict[Split, Sequence[Problem]] = {
        "train": named("train", kept),
        "dev": named("dev", dev),
        "test": named("test", tested),
    }
    return Splits(parts, len(given), len(given) - len(rest), size_dev, len(rest) - len(dev) - len(kept))


def choose(splits: Splits, split: Split) -> Sequence[Problem]:
    """One of the splits that files gave; an InputError that says why it is empty, with the key to change."""
    if splits[split]:
        return splits[split]
    raise InputError(f"The {split} split holds no problems; {splits.why_empty(split)}.")


@dataclass(frozen=True)
class Generated(Sequence[Problem]):
    """Problems that are made when they are looked at: ``make(i)`` for each i of ``places``. Nothing is stored."""

    places: range
    make: Callable[[int], Problem]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> "Generated": ...
    def __getitem__(self, index: int | slice) -> "Problem | Generated":
        if isinstance(index, slice):
            return Generated(self.places[index], self.make)
        return self.make(self.places[index])


def split_of(*parts: int | str) -> Split:
    """The one split that a generated problem belongs to, by a hash of what it is: 1/16 dev, 1/16 test, else train."""
    remainder = make_key("split", *parts) % 16
    return "dev" if remainder == 0 else "test" if remainder == 1 else "train"


def render(template: str, fields: Mapping[str, Any], key: str) -> str:
    """Fill ``{name}`` from ``fields``; ``{{`` and ``}}`` are literal braces; a list is joined with commas.

    Only plain names are allowed (no attribute, index, conversion or format). ``key`` is the template's config key.
    Texts and numbers are written as they are; what has no one way to be written (null, true and false, objects, lists
    of these) is refused.
    """
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"{key} is not a template ({error}); double the braces that are meant literally.") from None
    text = ""
    for literal, name, spec, conversion in pieces:
        text += literal
        if name is None:
            continue
        if name not in fields or spec or conversion:
            there = ", ".join(f"{{{field}}}" for field in fields)
            raise InputError(f"{key} asks for {{{name}}}; use plain fields only, of which there are: {there}.")
        value = fields[name]
        parts = value if isinstance(value, list | tuple) else [value]
        if (wrong := next((part for part in parts if not _is_plain(part)), parts)) is not parts:
            if is_conversation(value):
                raise InputError(
                    f"{key} asks for {{{name}}}, which holds a list of messages; leave all but {{{name}}} out of the "
                    "template, so that the prompt is that conversation."
                )
            words = _JSON.get(wrong, shown(value)) if wrong is None or isinstance(wrong, bool) else shown(value)
            raise InputError(
                f"{key} asks for {{{name}}}, which holds {words}; give it text or a number, or a list of these, or "
                "leave the row out."
            )
        text += ", ".join(map(str, parts))
    return text


def fields_of(template: str) -> list[str]:
    """The names that a template asks for, in order."""
    try:
        return [name for _, name, *_ in Formatter().parse(template) if name is not None]
    except ValueError:  # `render` says what is wrong with it
        return []


_JSON = {None: "null", True: "true", False: "false"}


def _is_plain(value: Any) -> bool:
    """Whether there is one way to write a value: text, or a finite number."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    number = number and (isinstance(value, int) or math.isfinite(value))
    return isinstance(value, str) or number


def chat(system: str | None, prompt: str) -> list[dict[str, str]]:
    """Chat messages: the system text, where there is one, then the prompt."""
    opening = [{"role": "system", "content": system}] if system is not None else []
    return [*opening, {"role": "user", "content": prompt}]


def needed(fields: Mapping[str, Any], name: str) -> Any:
    """The field ``name`` of a problem that is to be graded; an InputError where it is absent."""
    if name not in fields:
        raise InputError(f"The problem has no field {name!r}, which its grader needs; add it.")
    return fields[name]
