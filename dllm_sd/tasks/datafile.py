"""The rows of a file or dataset, the splits made from them, and the templates that they fill."""

import math
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from string import Formatter
from typing import Any, overload

from dllm_sd.errors import EmptySplit, InputError, on_one_line, shortened, shown
from dllm_sd.files.reading import open_unpacked, why_unread
from dllm_sd.hub import why_offline
from dllm_sd.randomness import make_key, permutation
from dllm_sd.tasks.conversations import is_conversation
from dllm_sd.tasks.formats import Row, plain_fields, rows_in
from dllm_sd.tasks.task import Problem, Split


def read_rows(path: str, key: str) -> list[Row]:
    """Read the rows of a file in any of `formats`, also if it is packed with gzip.

    ``key`` is the config key that named the file, for error messages. Raises InputError if the file cannot be used.
    """
    where = f"{key}: {path}"
    try:
        with open_unpacked(Path(path).expanduser()) as file:
            rows = list(rows_in(file, path, where))
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{where} cannot be read ({why_unread(error)}); give the path of a readable file.") from None
    if not rows:
        raise InputError(f"{where} holds no problems; give a file with at least one.")
    return rows


def hub_rows(name: str, config: str | None, split: str, key: str) -> list[Row]:
    """Load one split of a dataset from the Hugging Face hub (over the network or from its local cache) or a folder."""
    where = f"{key}: dataset {name}, split {split}"
    offline = None if Path(name).is_dir() else why_offline()
    try:
        # Imported here, since it is slow and local files do not need it.
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]

        dataset: Any = load_dataset(name, config, split=split)
        rows = [Row(f"{where}, row {number}", number, plain_fields(row)) for number, row in enumerate(dataset)]
    except Exception as error:  # the remedy is the same for every error of the hub client
        if offline is not None:
            raise InputError(
                f"{where} is not in the local cache of the hub, and {offline}, or set {key} to the path of a local file"
            ) from error
        reason = shortened(f"{type(error).__name__}: {on_one_line(error)}".removesuffix(": "), 160)
        raise InputError(f"{where} cannot be loaded ({reason}); set {key} to the path of a local file.") from error
    if not rows:
        raise InputError(f"{where} holds no problems; choose another dataset.")
    return rows


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
    """Size of the dev split, as it was given, or chosen for these rows."""
    in_dev: int = 0
    """Number of rows that were left out of train because they occur in the dev split."""

    def __getitem__(self, split: Split) -> Sequence[Problem]:
        """Return the problems of a split."""
        return self.parts[split]

    def check_size(self, given: int | None) -> None:
        """Refuse a ``task.size_dev`` that was given and is more than there are rows."""
        available = self.rows - self.in_test
        if given is not None and given > available > 0:  # `why_empty` says why there are none
            also = f" ({self.in_test} more occur in the test split too)" if self.in_test else ""
            raise InputError(
                f"task.size_dev is {given}, but task.data has {available} rows{also}; lower it, or leave it out, "
                "which holds out a tenth of the rows"
            )

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


def divide(
    task: str, train: Iterable[Entry], test: Iterable[Entry], size_dev: int | None, key: int | None, usual: int = 0
) -> Splits:
    """Hold out ``size_dev`` of the training entries as the dev split, and keep the three splits disjoint.

    If ``size_dev`` is None, a tenth of the entries is held out, but at least one and at most ``usual``.
    The last entries are held out if ``key`` is None, otherwise a permutation with that key chooses them. Entries that
    occur in the test split are removed from train and dev, and entries that occur in dev are removed from train.
    """
    train_entries, test_entries = list(train), list(test)
    identities = {entry.identity for entry in test_entries}
    not_in_test = [entry for entry in train_entries if entry.identity not in identities]
    if size_dev is None:
        size_dev = min(usual, max(1, len(not_in_test) // 10))
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
    raise EmptySplit(f"The {split} split holds no problems; {splits.why_empty(split)}.")


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
