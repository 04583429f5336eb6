"""The commands that need no model: ``dllm-sd grade`` and ``dllm-sd eval --compare``."""

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dllm_sd.config import apply_overrides, build_config, to_tree
from dllm_sd.errors import InputError
from dllm_sd.evaluation.comparison import Comparison, compare_files
from dllm_sd.evaluation.generations import default_folder, grade_file
from dllm_sd.tasks import TASKS


def grade(options: argparse.Namespace) -> int:
    """Grade a file of generations; print a table, write ``report.json`` and ``graded.jsonl``."""
    if strange := [word for word in options.overrides if not word.startswith("task.")]:
        raise InputError(f"grade takes settings of the task only, as in task.key=value; leave out {strange[0]!r}")
    task = {"name": options.task}
    part = TASKS.get(options.task)
    has_modes = part is not None and "mode" in {field.name for field in fields(part)}  # pyright: ignore[reportArgumentType]
    if options.mode is not None and has_modes:
        task["mode"] = options.mode
    elif options.mode not in (None, "default") and part is not None:
        raise InputError(f"--mode {options.mode}: task {options.task} is graded in one way only; leave --mode out")
    config = build_config(apply_overrides({"task": task}, options.overrides))
    tree, path = to_tree(config)["task"], Path(options.file)
    report = grade_file(
        path,
        config.task,
        folder := Path(options.out) if options.out else default_folder(path),
        name=options.task,
        mode=tree.get("mode", "default"),
        settings={"file": options.file, "task": tree},
    )
    _print_grades(report, options.file)
    Console().print(f"written to {folder}: report.json, graded.jsonl", highlight=False, markup=False, soft_wrap=True)
    return 0


def _print_grades(report: Mapping[str, Any], file: str) -> None:
    table = Table(title=escape(f"{file} as {report['task']}, {report['mode']} grading"))
    table.add_column("")
    table.add_column("", justify="right")
    low, high = report["ci95"]
    table.add_row("problems", str(report["n"]))
    table.add_row("accuracy", f"{100 * report['accuracy']:.2f} % ({100 * low:.1f} to {100 * high:.1f})")
    for name, words in (("pass_at_k", "pass"), ("maj_at_k", "maj")):
        for k, share in report.get(name, {}).items():
            if k != "1":
                table.add_row(f"{words}@{k}", f"{100 * share:.2f} %")
    known = {"task", "mode", "n", "accuracy", "ci95", "generations"}
    for name, value in report.items():
        if name not in known and isinstance(value, int | float):
            table.add_row(name, f"{value:.4g}")
    console = Console()
    console.print(table)
    if "schedules" in report:
        others = ", ".join(f"{name} {100 * tree['accuracy']:.2f} %" for name, tree in report["schedules"].items())
        console.print(f"schedule {report['schedule']}; accuracies of all: {others}", highlight=False, markup=False)


def compare(options: argparse.Namespace) -> int:
    """Compare two evaluations; print a table and write nothing."""
    rest = [
        value for name, value in vars(options).items() if name not in ("compare", "command") and value
    ]  # also of options to come
    if rest:
        words = "eval --compare A B reads two finished evaluations and takes nothing else"
        raise InputError(f"{words}; leave out {rest[0]!r}")
    a, b = options.compare
    found = compare_files(Path(a), Path(b))
    console = Console()
    console.print(_comparisons(found))
    console.print(f"A: {a}\nB: {b}", highlight=False, markup=False, soft_wrap=True)
    console.print("95 % interval: bootstrap of the problems, which both were asked; p: McNemar's exact test, two-sided")
    if any(result.counts is None for result in found.values()):
        console.print("a problem with several attempts counts by their mean, and McNemar's test is left out")
    return 0


def _comparisons(found: Mapping[str, Comparison]) -> Table:
    table = Table(title="B against A")
    table.add_column("decoding")
    for name in found:
        table.add_column(escape(name), justify="right")
    rows = [_cells(result) for result in found.values()]
    for label in rows[0]:
        table.add_row(label, *(cells[label] for cells in rows))
    return table


def _cells(result: Comparison) -> dict[str, str]:
    counts, p = result.counts, result.p_value
    cells = {
        "problems of both": str(result.n),
        "only in A, only in B": f"{result.alone_a}, {result.alone_b}",
        "accuracy of A": f"{100 * result.accuracy_a:.2f} %",
        "accuracy of B": f"{100 * result.accuracy_b:.2f} %",
        "B - A, points": f"{100 * result.difference:+.2f}",
        "95 % interval": "{:+.2f} to {:+.2f}".format(*(100 * end for end in result.ci95)),
    }
    right = ("", "", "", "") if counts is None else (counts.both, counts.only_a, counts.only_b, counts.neither)
    cells |= zip(("both right", "only A right", "only B right", "neither right"), map(str, right), strict=True)
    return {**cells, "McNemar's p": "" if p is None else f"{p:.2g}"}
