"""The rows of a file or hub dataset, the splits made from them, and the templates that they fill."""

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
    """One row of data. ``number`` counts from 0 in its source; ``where`` names config key, file and line."""

    where: str
    number: int
    fields: Mapping[str, Any]

    def value(self, name: str) -> Any:
        """Return the field ``name``; raise an InputError that names the line if it is missing."""
        if name not in self.fields:
            names = ", ".join(map(str, self.fields)) or "nothing"
            raise InputError(f"{self.where} has no field {name!r} (it has {names}); add it or name another file.")
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


def read_rows(path: str, key: str) -> list[Row]:
    """Read the rows of a UTF-8 file: CSV with a header line if the name ends in .csv, else JSON Lines.

    ``key`` is the config key that named the file, for error messages. Raises InputError if the file cannot be used.
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
    """Load one split of a dataset from the Hugging Face hub, over the network or from its local cache."""
    where = f"{key}: hub dataset {name}, split {split}"
    try:
        # Imported here, since it is slow and local files do not need it.
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]

        dataset = load_dataset(name, config, split=split)
        rows = [Row(f"{where}, row {number}", number, dict(row)) for number, row in enumerate(dataset)]
    except Exception as error:  # the remedy is the same for every error of the hub client
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


@dataclass(frozen=True)
class Entry:
    """The ``fields`` of a problem, made from a row. Entries with the same ``identity`` never end up in two splits."""

    number: int
    identity: Hashable
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Splits:
    """The train, dev and test problems of the data files, and how many rows of the training file were left out."""

    parts: Mapping[Split, Sequence[Problem]]
    rows: int
    in_test: int
    """Number of rows that were left out because they occur in the test split."""
    size_dev: int
    """Requested size of the dev split."""
    in_dev: int = 0
    """Number of rows that were left out of train because they occur in the dev split."""

    def __getitem__(self, split: Split) -> Sequence[Problem]:
        """Return the problems of a split."""
        return self.parts[split]

    def why_empty(self, split: Split) -> str:
        """Return the reason why a split is empty, and the remedy, as the end of an error message."""
        if split == "test":
            return "set task.data_test to a file"
        if split == "dev" and not self.size_dev:
            return "set task.data to a file and task.size_dev above 0"
        if not self.rows:
            return "set task.data to a file"
        if self.in_test == self.rows:
            return f"all {self.rows} rows of task.data occur in the test split too; set task.data_test to other rows"
        if self.in_dev:
            return (
                f"the dev split takes {len(self['dev'])} of the {self.rows - self.in_test} rows of task.data, and the "
                f"{self.in_dev} others repeat problems of the dev split; give rows that differ, let task.prompt use a "
                "field in which they differ, or set task.size_dev to 0"
            )
        out = f", and {self.in_test} more that occur in the test split too" if self.in_test else ""
        return (
            f"set task.data to a file with more rows than task.size_dev, which is {self.size_dev}, or lower that (the "
            f"file has {self.rows - self.in_test} rows, of which the dev split takes {len(self['dev'])}{out})"
        )


def divide(task: str, train: Iterable[Entry], test: Iterable[Entry], size_dev: int, key: int | None) -> Splits:
    """Hold out ``size_dev`` of the training entries as the dev split, and keep the three splits disjoint.

    The last entries are held out if ``key`` is None, otherwise a permutation with that key chooses them. Entries that
    occur in the test split are removed from train and dev, and entries that occur in dev are removed from train.
    """
    train_entries, test_entries = list(train), list(test)
    identities = {entry.identity for entry in test_entries}
    not_in_test = [entry for entry in train_entries if entry.identity not in identities]
    order = permutation(key, len(not_in_test)) if key is not None else list(range(len(not_in_test)))
    dev_places = set(order[max(len(not_in_test) - size_dev, 0) :])
    dev = [entry for place, entry in enumerate(not_in_test) if place in dev_places]
    identities = {entry.identity for entry in dev}
    train_left = [
        entry for place, entry in enumerate(not_in_test) if place not in dev_places and entry.identity not in identities
    ]

    def named(split: Split, entries: list[Entry]) -> tuple[Problem, ...]:
        return tuple(Problem(f"{task}/{split}/{entry.number}", entry.fields) for entry in entries)

    parts: dict[Split, Sequence[Problem]] = {
        "train": named("train", train_left),
        "dev": named("dev", dev),
        "test": named("test", test_entries),
    }
    return Splits(
        parts,
        len(train_entries),
        len(train_entries) - len(not_in_test),
        size_dev,
        len(not_in_test) - len(dev) - len(train_left),
    )


def chosen_split(splits: Splits, split: Split) -> Sequence[Problem]:
    """Return a split, or raise an InputError that says why it is empty and which key to change."""
    if splits[split]:
        return splits[split]
    raise InputError(f"The {split} split holds no problems; {splits.why_empty(split)}.")


@dataclass(frozen=True)
class Generated(Sequence[Problem]):
    """A lazy sequence of generated problems: problem i is ``make(places[i])``. Nothing is stored."""

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
    """Return the split of a generated problem, by a hash of its content: 1/16 dev, 1/16 test, otherwise train."""
    remainder = make_key("split", *parts) % 16
    return "dev" if remainder == 0 else "test" if remainder == 1 else "train"


def render(template: str, fields: Mapping[str, Any], key: str) -> str:
    """Fill each ``{name}`` of a template from ``fields``; ``{{`` and ``}}`` are literal braces.

    Only plain names are allowed: no attribute, index, conversion or format. ``key`` is the template's config key, for
    error messages. Text and numbers are inserted unchanged, and a list of them is joined with commas. Values that have
    no unique text form (null, true, false, objects, nested lists) are refused.
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
            names = ", ".join(f"{{{field}}}" for field in fields)
            raise InputError(f"{key} asks for {{{name}}}; use plain fields only, of which there are: {names}.")
        value = fields[name]
        parts = value if isinstance(value, list | tuple) else [value]
        if (refused := next((part for part in parts if not _is_plain(part)), parts)) is not parts:
            if is_conversation(value):
                raise InputError(
                    f"{key} asks for {{{name}}}, which holds a list of messages; leave all but {{{name}}} out of the "
                    "template, so that the prompt is that conversation."
                )
            quoted = (
                _JSON_NAMES.get(refused, shown(value)) if refused is None or isinstance(refused, bool) else shown(value)
            )
            raise InputError(
                f"{key} asks for {{{name}}}, which holds {quoted}; give it text or a number, or a list of these, or "
                "leave the row out."
            )
        text += ", ".join(map(str, parts))
    return text


def fields_of(template: str) -> list[str]:
    """Return the field names that a template uses, in order."""
    try:
        return [name for _, name, *_ in Formatter().parse(template) if name is not None]
    except ValueError:  # `render` reports the error in the template
        return []


_JSON_NAMES = {None: "null", True: "true", False: "false"}


def _is_plain(value: Any) -> bool:
    """Return whether a value has a unique text form: text, or a finite number."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    number = number and (isinstance(value, int) or math.isfinite(value))
    return isinstance(value, str) or number


def chat(system: str | None, prompt: str) -> list[dict[str, str]]:
    """Return chat messages: the system message, if there is one, then the prompt as the user's message."""
    system_messages = [{"role": "system", "content": system}] if system is not None else []
    return [*system_messages, {"role": "user", "content": prompt}]


def needed(fields: Mapping[str, Any], name: str) -> Any:
    """Return a field that a grader needs; raise an InputError if the problem does not have it."""
    if name not in fields:
        raise InputError(f"The problem has no field {name!r}, which its grader needs; add it.")
    return fields[name]
