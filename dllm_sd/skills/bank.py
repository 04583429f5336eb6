"""Banks of skills and mistakes: what they hold, how they are read and written, and when two entries are the same.

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
"""Ids of entries that training added begin with this and an underscore; only they are ever replaced."""


@dataclass(frozen=True)
class Skill:
    """A way of working that helped, in words that fit more than one problem."""

    id: str
    title: str
    principle: str
    when_to_apply: str
    prefix: ClassVar[str] = "gen"


@dataclass(frozen=True)
class Mistake:
    """A mistake that was made, and how to stay clear of it."""

    id: str
    description: str
    why_it_happens: str
    how_to_avoid: str
    prefix: ClassVar[str] = "err"


Item = TypeVar("Item", Skill, Mistake)


@dataclass(frozen=True)
class Bank:
    """Skills, mistakes, and whatever is to be remembered about where they came from (JSON values)."""

    skills: tuple[Skill, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def tree(self) -> dict[str, Any]:
        """The bank as a plain tree; `build_bank` makes an equal bank of it."""
        entries = {"skills": self.skills, "mistakes": self.mistakes}
        plain = {name: [dict(vars(item)) for item in items] for name, items in entries.items()}
        return {**plain, "metadata": dict(self.metadata)}


def text_names(kind: type[Skill] | type[Mistake]) -> tuple[str, ...]:
    """The names of the three texts of an entry, in order."""
    return tuple(one.name for one in fields(kind) if one.name != "id")


def texts(item: Skill | Mistake) -> tuple[str, ...]:
    """The three texts of an entry, in order."""
    return tuple(getattr(item, name) for name in text_names(type(item)))


def is_dynamic(item: Skill | Mistake) -> bool:
    """Whether training added the entry."""
    return item.id.startswith(f"{DYNAMIC}_")


def distinct(items: Iterable[Item]) -> tuple[Item, ...]:
    """The entries without repetitions; the first of each stays.

    Two are the same if their three texts are, in lower case and with every run of white space as one space.
    Source: released code, `dedupe_exact_items`.
    """
    first: dict[tuple[str, ...], Item] = {}
    for item in items:
        first.setdefault(tuple(" ".join(text.split()).lower() for text in texts(item)), item)
    return tuple(first.values())


def numbered(items: Iterable[Item], prefix: str | None = None) -> tuple[Item, ...]:
    """The entries with new ids in order, as in gen_001; ``prefix`` is that of their kind unless given."""
    return tuple(replace(item, id=f"{prefix or item.prefix}_{number:03d}") for number, item in enumerate(items, 1))


def read_bank(path: str | Path) -> Bank:
    """A bank from a JSON file: one of ours (`write_bank`), or one of the published ones, merged or raw candidates.

    Raises:
        InputError: naming the file, the entry and the remedy.
    """
    where = f"Skill bank {path}"
    try:
        text = read_whole(Path(path).expanduser()).decode("utf-8-sig")
        remedy = "correct it or take another copy."
        tree = parse_json(text, f"{where} is not valid JSON", remedy, explain=True, surrogates=True)
        json.dumps(tree, ensure_ascii=False).encode()  # half of a surrogate pair could not be written again
    except OSError as error:
        raise InputError(f"{where} cannot be read ({os_reason(error)}); give the path of a readable file.") from None
    except UnicodeError:
        raise InputError(f"{where} is not UTF-8 text; save the file as UTF-8.") from None
    return build_bank(tree, where)


def write_bank(bank: Bank, path: str | Path) -> None:
    """Write a bank as JSON that `read_bank` reads back exactly; a file of that name is replaced in one step."""
    path = Path(path).expanduser()
    text = json.dumps(bank.tree(), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)
    except OSError as error:
        raise InputError(f"Skill bank {path} cannot be written ({os_reason(error)}); give another path.") from None


def build_bank(tree: Any, where: str) -> Bank:
    """A bank from a plain tree, as `Bank.tree` makes it or in the published form; ``where`` names it in messages.

    Raises:
        InputError: naming the entry and the remedy.
    """
    if not isinstance(tree, Mapping):
        raise InputError(f"{where} is not a JSON object; give one with the lists 'skills' and 'mistakes'.")
    if tree.get("task_specific_skills"):
        raise InputError(
            f"{where} has task_specific_skills, which nothing here reads; move them to general_skills or take them out."
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
        there = ", ".join(map(str, tree))[:80] or "nothing"
        raise InputError(f"{where} has no {key!r} (it has {there}); add the list.")
    if not isinstance(tree[key], list):
        raise InputError(f"{where}: {key!r} must be a list, not {tree[key]!r:.60}; correct it.")
    if not tree[key]:
        raise InputError(f"{where}: {key!r} is empty, and a hint needs a skill and a mistake; add at least one.")
    return tree[key]


def _entries(rows: Sequence[Any], kind: type[Item], id_key: str, where: str) -> tuple[Item, ...]:
    items: dict[str, Item] = {}
    for number, row in enumerate(rows, 1):
        here = f"{where}, entry {number}"
        if not isinstance(row, Mapping):
            raise InputError(f"{here} is not an object; give it {', '.join((id_key, *text_names(kind)))}.")
        item = kind(*(_text(row, name, here) for name in (id_key, *text_names(kind))))
        if item.id in items:
            raise InputError(f"{here} has the {id_key} {item.id!r:.60} of an earlier entry; give it one of its own.")
        items[item.id] = item
    return tuple(items.values())


def _text(row: Mapping[str, Any], name: str, here: str) -> str:
    if name not in row:
        raise InputError(f"{here} has no {name!r}; add it or take the entry out.")
    value = row[name]
    if not isinstance(value, str):
        raise InputError(f"{here}: {name!r} must be text, not {value!r:.60}; correct it or take the entry out.")
    if not value.strip():
        raise InputError(f"{here}: {name!r} is empty; fill it in or take the entry out.")
    return value
