"""The page docs/methods.md: parts, source and notes of each method, and the measurements on the tiny models."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib.resources import files
from textwrap import fill
from typing import Any

from dllm_sd.methods import METHODS, NamedMethod
from dllm_sd.methods.method import Method
from dllm_sd.parts import name_of

HEAD = """# Methods

A method has one part for each slot; [concepts](concepts.md) explains the slots, and [which method
when](which_method.md) compares methods by what they need, what they cost and what they gained. `dllm-sd train CONFIG
method=NAME` trains any of them; a method that does not fit the model or the data is refused with the reason. Below,
each method is described by its differences from another one; `dllm-sd show CONFIG method=NAME` prints all of its parts.

This page is generated from the table in `dllm_sd/methods/` by `python -m tools.make_methods_page`.
"""
PROMPTS = """## Prompts

The prompts of methods that replace the default prompt of a part. `{question}`, `{hint}` and `{reference}` are filled in
for each rollout.

"""
MEASURED = """## Measured

Greedy accuracy in percent on 1,024 test puzzles (4x4 Sudoku) of the shipped tiny models, `tiny` and `tiny_ar`, measured
by `tools/measure_methods.py`. All methods of a backbone have the same number of updates, learning rate and schedule;
nothing was tuned for a single method. "Best" are the best weights on 512 dev puzzles. Words after the name of a method
are overrides. A star marks rows that do not test the method, because the model lacks what the method needs; the remarks
below each table explain this. Seconds are those of rollouts and updates with one thread, and tokens are those generated
in rollouts. The autoregressive reader (`tools/make_tiny_reader.py`) writes its solution in tagged steps and was trained
to read rubrics, critiques and skills. A row of two students shows the values of both.

"""
_COLUMNS = ("method", "seeds", "before", "last", "best", "updates (skipped)", "tokens", "seconds", "length", "entropy")


def methods_page() -> str:
    """The text of docs/methods.md."""
    sections = [f"## `{name}`\n\n{section(method)}" for name, method in METHODS.items()]
    return "\n".join([HEAD, *sections, PROMPTS + "\n".join(_prompts()), MEASURED + _measured_tables()])


def section(named: NamedMethod) -> str:
    """One method, in Markdown: its note, its source, and what it changes of its parent."""
    backbones = (
        "masked diffusion only" if any(context.reveals for context in named.method.contexts) else "both backbones"
    )
    source = f"Source: {named.source}. Defined on {backbones}."
    parent = None if named.parent is None else METHODS[named.parent].method
    told = parts(named.method, parent)
    unchanged = {} if parent is None else parts(parent, parent)
    slots = "; ".join(
        f"{slot} {', '.join(map(_code, names)) or 'none'}"
        for slot, names in told.items()
        if names != unchanged.get(slot)
    )
    head = "Parts:" if named.parent is None else f"As [`{named.parent}`](#{named.parent}), but:"
    paragraphs = (named.note, source, f"{head} {slots}.")
    return "\n\n".join(fill(text, 118, break_on_hyphens=False, break_long_words=False) for text in paragraphs) + "\n"


def parts(method: Method, base: Method | None = None) -> dict[str, list[str]]:
    """The names of the parts of each slot, with the fields that differ from those of ``base`` (else from the defaults
    of the part)."""
    slots: dict[str, list[str]] = {}
    for f in (f for f in fields(method) if f.name != "name"):
        group, former = (_group(getattr(of, f.name)) if of else () for of in (method, base))
        formers = former if len(former) == len(group) else (None,) * len(group)
        table = f.metadata.get("parts")
        slots[f.name] = [_describe(part, old, table) for part, old in zip(group, formers, strict=True)]
    return slots


def _group(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _prompts() -> Iterator[str]:
    """The long texts that methods set, each once, in Markdown."""
    seen: dict[str, list[str]] = {}
    for name, named in METHODS.items():
        for f in fields(named.method):
            for i, part in enumerate(_group(getattr(named.method, f.name))):
                place = f"{f.name}.{i}" if isinstance(getattr(named.method, f.name), tuple) else f.name
                for key, value in _changes(part, None) if is_dataclass(part) else ():
                    if _is_prompt(value):
                        seen.setdefault(value, []).append(f"`{name}`, `method.{place}.{key}`")
    for text, places in seen.items():
        yield f"{'; '.join(places)}:\n\n```text\n{text}\n```\n"


def measured(name: str) -> list[Mapping[str, Any]]:
    """The valid measurements of a method and its variants on the tiny models."""
    return [record for record in _valid_records() if record["method"].split()[0] == name]


def is_premise_missing(record: Mapping[str, Any]) -> bool:
    """Whether a measurement does not test its method, because the model lacks what the method needs."""
    return _remark(record, "premise") is not None


def measured_line(record: Mapping[str, Any]) -> str:
    """A measurement as a sentence."""
    after = ", ".join(map(str, record["after"]))
    remark = _remark(record, "premise")
    caveat = f"; this does not test the method, since {remark['reason']}" if remark else ""
    setting = _remark(record, "setting")
    caveat += f"; with another setting: {setting['reason']}" if setting else ""
    return (
        f"{record['method']} on the tiny {record['backbone']} model: {record['before'][0]} -> {after} % after "
        f"{record['updates']} updates ({record['seeds']} seeds){caveat}"
    )


def _records() -> list[dict[str, Any]]:
    """The measurements that `tools/measure_methods.py` collected."""
    return _read("measured.json")


def _remarks() -> list[dict[str, Any]]:
    """Later remarks on measurements; their `kind`: `withdrawn` (the measurement was wrong), `premise` (the model lacks
    what the method needs), or `setting` (the settings of the method have changed since)."""
    return _read("remarks.json")


@cache
def _read(name: str) -> list[dict[str, Any]]:
    return json.loads((files("dllm_sd") / "assets" / name).read_text(encoding="utf-8"))


def _remark(record: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    remarks = (r for r in _remarks() if r["backbone"] == record["backbone"] and record["method"] in r["methods"])
    return next((remark for remark in remarks if remark["kind"] == kind), None)


def _valid_records() -> list[dict[str, Any]]:
    return [record for record in _records() if _remark(record, "withdrawn") is None]


def _measured_tables() -> str:
    text = ""
    for backbone in dict.fromkeys(record["backbone"] for record in _records()):
        records = [record for record in _valid_records() if record["backbone"] == backbone]
        text += f"### {backbone}\n\n"
        text += f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}\n"
        text += "".join(f"| {' | '.join(_cells(record))} |\n" for record in records) + "\n"
        remarks = [remark for remark in _remarks() if remark["backbone"] == backbone]
        text += "".join(_remark_line(remark) for remark in remarks) + "\n" * bool(remarks)
    return text.rstrip() + "\n"


def _remark_line(remark: Mapping[str, Any]) -> str:
    word = {"withdrawn": "Withdrawn", "premise": "Does not test the method", "setting": "Another setting"}[
        remark["kind"]
    ]
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


def _describe(part: Any, base: Any, table: Mapping[str, type] | None) -> str:
    """A part by name, with the fields that differ from ``base`` if that is of its kind, else from the defaults.

    Any other value as text.
    """
    if not is_dataclass(part):
        return str(part)
    changed = [
        f"{key} {'[its own prompt](#prompts)' if _is_prompt(value) else value}".strip()
        for key, value in _changes(part, base)
    ]
    name = "set" if table is None else name_of(table, part)
    return f"{name} ({', '.join(changed)})" if changed else name


def _changes(part: Any, base: Any) -> Iterator[tuple[str, Any]]:
    """The dotted keys of a part, and values, that differ from those of ``base``, or from the defaults of the part."""
    for f in fields(part):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        former = getattr(base, f.name) if type(base) is type(part) else default
        value, table = getattr(part, f.name), f.metadata.get("parts")
        if value == former:
            continue
        if not is_dataclass(value):
            yield f.name, value
            continue
        if type(value) is not type(former):
            yield f.name, name_of(table, value) if table else ""
        yield from ((f"{f.name}.{key}", inner) for key, inner in _changes(value, former))


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) and "\n" in value


def _code(description: str) -> str:
    name, bracket, rest = description.partition(" ")
    return f"`{name}`{bracket}{rest}"
