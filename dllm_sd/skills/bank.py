"""Banks of skills and mistakes: content, files, and de-duplication of entries.

Source: SGSD (arXiv 2605.28791), section on the skill bank; released code walawalagoose/SGSD, commit f296a91,
`skill/merge_math_skills.py` (fields, exact de-duplication, ids) and `skill/artifacts/` (published banks).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from dllm_sd.errors import InputError, os_reason
from dllm_sd.files.reading import parse_json, read_whole
from dllm_sd.files.writing import write_file

DYNAMIC = "dyn"
"""Prefix of the ids of entries that training added; only these entries are ever replaced."""


@dataclass(frozen=True)
class Skill:
    """A helpful way of working, phrased so that it applies to more than one problem."""

    id: str
    title: str
    principle: str
    when_to_apply: str
    prefix: ClassVar[str] = "gen"


@dataclass(frozen=True)
class Mistake:
    """A mistake, and how to avoid it."""

    id: str
    description: str
    why_it_happens: str
    how_to_avoid: str
    prefix: ClassVar[str] = "err"


EntryT = TypeVar("EntryT", Skill, Mistake)


@dataclass(frozen=True)
class Bank:
    """Skills, mistakes, and metadata about their origin (JSON values)."""

    skills: tuple[Skill, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def tree(self) -> dict[str, Any]:
        """Return the bank as a plain tree, from which `build_bank` makes an equal bank."""
        entries = {"skills": self.skills, "mistakes": self.mistakes}
        plain = {name: [dict(vars(item)) for item in items] for name, items in entries.items()}
        return {**plain, "metadata": dict(self.metadata)}


def text_names(kind: type[Skill] | type[Mistake]) -> tuple[str, ...]:
    """Return the names of the three texts of an entry, in order."""
    return tuple(entry_field.name for entry_field in fields(kind) if entry_field.name != "id")


def texts(item: Skill | Mistake) -> tuple[str, ...]:
    """Return the three texts of an entry, in order."""
    return tuple(getattr(item, name) for name in text_names(type(item)))


def is_dynamic(item: Skill | Mistake) -> bool:
    """Return whether training added the entry."""
    return item.id.startswith(f"{DYNAMIC}_")


def distinct(items: Iterable[EntryT]) -> tuple[EntryT, ...]:
    """Return the entries without duplicates; the first of each stays.

    Two entries are equal if their three texts are, in lower case and with every run of white space as one space.
    Source: released code, `dedupe_exact_items`.
    """
    first: dict[tuple[str, ...], EntryT] = {}
    for item in items:
        first.setdefault(tuple(" ".join(text.split()).lower() for text in texts(item)), item)
    return tuple(first.values())


def numbered(items: Iterable[EntryT], prefix: str | None = None) -> tuple[EntryT, ...]:
    """Return the entries with new consecutive ids such as gen_001; the default ``prefix`` is that of their kind."""
    return tuple(replace(item, id=f"{prefix or item.prefix}_{number:03d}") for number, item in enumerate(items, 1))


def read_bank(path: str | Path) -> Bank:
    """Read a bank from a JSON file: one of ours (`write_bank`), or a published one, merged or raw candidates.

    Raises:
        InputError: naming the file, the entry and the remedy.
    """
    where = f"Skill bank {path}"
    try:
        text = read_whole(Path(path).expanduser()).decode("utf-8-sig")
        remedy = "correct it or take another copy."
        tree = parse_json(text, f"{where} is not valid JSON", remedy, explain=True, surrogates=True)
        json.dumps(tree, ensure_ascii=False).encode()  # a lone surrogate could not be written again
    except OSError as error:
        raise InputError(f"{where} cannot be read ({os_reason(error)}); give the path of a readable file.") from None
    except UnicodeError:
        raise InputError(f"{where} is not UTF-8 text; save the file as UTF-8.") from None
    return build_bank(tree, where)


def write_bank(bank: Bank, path: str | Path) -> None:
    """Write a bank as JSON, which `read_bank` reads back exactly; an existing file is replaced atomically."""
    path = Path(path).expanduser()
    text = json.dumps(bank.tree(), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)
    except OSError as error:
        raise InputError(f"Skill bank {path} cannot be written ({os_reason(error)}); give another path.") from None


def build_bank(tree: Any, where: str) -> Bank:
    """Build a bank from a plain tree in the format of `Bank.tree` or the published one; ``where`` is for messages.

    Raises:
        InputError: naming the entry and the remedy.
    """
    if not isinstance(tree, Mapping):
        raise InputError(f"{where} is not a JSON object; give one with the lists 'skills' and 'mistakes'.")
    if tree.get("task_specific_skills"):
        raise InputError(
            f"{where} has task_specific_skills, which are not supported; move them to general_skills or take them out."
        )
    published = "general_skills" in tree or "common_mistakes" in tree
    keys = ("general_skills", "common_mistakes") if published else ("skills", "mistakes")
    ids = ("skill_id", "mistake_id") if published else ("id", "id")
    metadata = tree.get("metadata", {})
    if not isinstance(metadata, Mapping):
        raise InputError(f"{where}: 'metadata' must be an object; correct it or take it out.")
    skills = _entries(_listed(tree, keys[0], where), Skill, ids[0], f"{where}, {keys[0]}")
    mistakes = _entries(_listed(tree, keys[1], where), Mistake, ids[1], f"{where}, {keys[1]}")
    return Bank(skills, mistakes, dict(metadata))


def _listed(tree: Mapping[str, Any], key: str, where: str) -> Sequence[Any]:
    if key not in tree:
        keys = ", ".join(map(str, tree))[:80] or "nothing"
        raise InputError(f"{where} has no {key!r} (it has {keys}); add the list.")
    if not isinstance(tree[key], list):
        raise InputError(f"{where}: {key!r} must be a list, not {tree[key]!r:.60}; correct it.")
    if not tree[key]:
        raise InputError(f"{where}: {key!r} is empty, and a hint needs a skill and a mistake; add at least one.")
    return tree[key]


def _entries(rows: Sequence[Any], kind: type[EntryT], id_key: str, where: str) -> tuple[EntryT, ...]:
    items: dict[str, EntryT] = {}
    for number, row in enumerate(rows, 1):
        entry_name = f"{where}, entry {number}"
        if not isinstance(row, Mapping):
            raise InputError(f"{entry_name} is not an object; give it {', '.join((id_key, *text_names(kind)))}.")
        item = kind(*(_text(row, name, entry_name) for name in (id_key, *text_names(kind))))
        if item.id in items:
            raise InputError(
                f"{entry_name} has the {id_key} {item.id!r:.60} of an earlier entry; give it one of its own."
            )
        items[item.id] = item
    return tuple(items.values())


def _text(row: Mapping[str, Any], name: str, entry_name: str) -> str:
    if name not in row:
        raise InputError(f"{entry_name} has no {name!r}; add it or take the entry out.")
    value = row[name]
    if not isinstance(value, str):
        raise InputError(f"{entry_name}: {name!r} must be text, not {value!r:.60}; correct it or take the entry out.")
    if not value.strip():
        raise InputError(f"{entry_name}: {name!r} is empty; fill it in or take the entry out.")
    return value
