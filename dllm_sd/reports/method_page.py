"""Methods as a page for people: their parts, where they come from, what to know, what was measured here."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib.resources import files
from textwrap import fill
from typing import Any

from dllm_sd.config import to_tree
from dllm_sd.methods import METHODS, NamedMethod
from dllm_sd.methods.method import Method
from dllm_sd.parts import name_of

HEAD = """# Methods

Each method is one part for every slot; [concepts](concepts.md) says what the slots ask. `dllm-sd train CONFIG
method=NAME` takes any of them on any model, masked diffusion or autoregressive, or says in one sentence why that pair
has no meaning. `dllm-sd show CONFIG` prints the same for one run. This page is made from the table in
`dllm_sd/methods/` by `python tools/make_methods_page.py`. The pages in [methods/](methods/) say of each published
method how to run it, what was measured, what its paper claims, and where paper, code and this program part.
"""
MEASURED = """## Measured

Greedy accuracy in percent on 1,024 test puzzles (4x4 Sudoku) of the shipped tiny models, `tiny` and `tiny_ar`, by
`tools/measure_methods.py`: the same updates, learning rate and schedule for all methods of a backbone, nothing tuned
for one. Best: the best weights on 512 dev puzzles. A row with more words than a name has those overrides. A star: what
the method lives on is missing there, as said below the table, so that the row is no test of the method.
Seconds are those of rollouts and updates with one thread; tokens were generated in rollouts. The autoregressive reader
(`tools/make_tiny_reader.py`) writes its solution in tagged steps and has learnt to read rubrics, critiques and skills;
rows of two students are those of each.

"""
_COLUMNS = ("method", "seeds", "before", "last", "best", "updates (skipped)", "tokens", "seconds", "length", "entropy")


def methods_page() -> str:
    """All of docs/methods.md."""
    sections = [f"## `{name}`\n\n{section(row)}" for name, row in METHODS.items()]
    return "\n".join([HEAD, *sections, MEASURED + _measured_tables()])


def section(row: NamedMethod) -> str:
    """One method, in Markdown."""
    method = row.method
    made = "; ".join(f"{slot} {', '.join(map(_code, words)) or 'none'}" for slot, words in parts(method).items())
    where = "masked diffusion only" if any(context.reveals for context in method.contexts) else "both backbones"
    source = f"Source: {row.source}. Defined on {where}."
    return (
        "\n\n".join(fill(words, 118, break_on_hyphens=False) for words in (row.note, source, f"Parts: {made}.")) + "\n"
    )


def parts(method: Method) -> dict[str, list[str]]:
    """The parts of each slot, with those of their fields that are not the part's defaults."""
    found: dict[str, list[str]] = {}
    for f in fields(method):
        value, table = getattr(method, f.name), f.metadata.get("parts")
        group = value if isinstance(value, tuple) else (value,)
        found[f.name] = [_words(part, table) if table else str(part) for part in group]
    return found


def closest(method: Method) -> tuple[str, bool] | None:
    """The row that is made of the same parts and has most settings in common, and whether it is this very method."""

    def kinds(other: Method) -> list[Any]:
        parts = [part for slot in vars(other).values() for part in (slot if isinstance(slot, tuple) else (slot,))]
        return [(type(part), type(getattr(part, "prompt", None))) for part in parts]

    alike = {name: row.method for name, row in METHODS.items() if kinds(row.method) == kinds(method)}
    if not alike:
        return None
    name = max(alike, key=lambda name: sum(vars(alike[name])[slot] == part for slot, part in vars(method).items()))
    return name, alike[name] == method


def measured(name: str) -> list[Mapping[str, Any]]:
    """What was measured of a method and its variants on the tiny models and still stands; empty if nothing does."""
    return [record for record in _standing() if record["method"].split()[0] == name]


def measured_line(record: Mapping[str, Any]) -> str:
    """One record in words."""
    after = ", ".join(map(str, record["after"]))
    remark = _remark(record, "premise")
    doubt = f"; no test of the method, since {remark['reason']}" if remark else ""
    other = _remark(record, "setting")
    doubt += f"; with another setting: {other['reason']}" if other else ""
    return (
        f"{record['method']} on the tiny {record['backbone']} model: {record['before'][0]} -> {after} % after "
        f"{record['updates']} updates ({record['seeds']} seeds){doubt}"
    )


def _records() -> list[dict[str, Any]]:
    """What `tools/measure_methods.py` collected."""
    return _read("measured.json")


def _remarks() -> list[dict[str, Any]]:
    """What was found out of records later: `kind` is `withdrawn` (measured wrongly, no result), `premise` (measured
    rightly on a model where the method has nothing to work with), or `setting` (measured before the row changed)."""
    return _read("remarks.json")


def _read(name: str) -> list[dict[str, Any]]:
    return json.loads((files("dllm_sd") / "assets" / name).read_text(encoding="utf-8"))


def _remark(record: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    fits = (r for r in _remarks() if r["backbone"] == record["backbone"] and record["method"] in r["methods"])
    return next((remark for remark in fits if remark["kind"] == kind), None)


def _standing() -> list[dict[str, Any]]:
    return [record for record in _records() if _remark(record, "withdrawn") is None]


def _measured_tables() -> str:
    text = ""
    for backbone in dict.fromkeys(record["backbone"] for record in _records()):
        records = [record for record in _standing() if record["backbone"] == backbone]
        text += f"### {backbone}\n\n"
        text += f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}\n"
        text += "".join(f"| {' | '.join(_cells(record))} |\n" for record in records) + "\n"
        remarks = [remark for remark in _remarks() if remark["backbone"] == backbone]
        text += "".join(_remark_line(remark) for remark in remarks) + "\n" * bool(remarks)
    return text.rstrip() + "\n"


def _remark_line(remark: Mapping[str, Any]) -> str:
    word = {"withdrawn": "Withdrawn", "premise": "No test of the method", "setting": "Another setting"}[remark["kind"]]
    methods = ", ".join(f"`{name}`" for name in remark["methods"])
    line = f"- {word} ({remark['date']}), {methods}: {remark['reason']}."
    return fill(line, 118, subsequent_indent="  ", break_on_hyphens=False) + "\n"


def _cells(record: Mapping[str, Any]) -> list[str]:
    def all_of(which: str) -> str:
        return ", ".join(f"{value:.1f}" for value in record[which])

    return [
        f"`{record['method']}`{' *' if _remark(record, 'premise') else ''}",
        str(record["seeds"]),
        f"{record['before'][0]:.1f}",
        all_of("after"),
        all_of("best"),
        f"{record['updates']} ({record['skipped']})",
        f"{record['generated']:,}",
        f"{record['seconds']:.0f}",
        "" if record["length"] is None else f"{record['length']:.1f}",
        "" if record["entropy"] is None else f"{record['entropy']:.3f}",
    ]


def _words(part: Any, table: Mapping[str, type]) -> str:
    name = name_of(table, part)
    changed = []
    for f in fields(part):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        value = getattr(part, f.name)
        if value != default:
            tree = to_tree(value, f.metadata.get("parts"))
            changed.append(f"{f.name} {tree['name'] if isinstance(tree, dict) and 'name' in tree else tree}")
            rest = {key: x for key, x in tree.items() if key != "name"} if isinstance(tree, dict) else {}
            changed += [f"{f.name}.{key} {x}" for key, x in rest.items() if x != getattr(type(value), key, MISSING)]
    return f"{name} ({', '.join(changed)})" if changed else name


def _code(words: str) -> str:
    name, bracket, rest = words.partition(" ")
    return f"`{name}`{bracket}{rest}"
