"""``dllm-sd grade``: grades generations of other programs."""

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dllm_sd.cli.used_keys import refuse_unused
from dllm_sd.config import apply_overrides, build_config, to_tree
from dllm_sd.errors import InputError
from dllm_sd.evaluation.estimates import in_percent
from dllm_sd.evaluation.generations import grade_file, grades_folder
from dllm_sd.tasks import TASKS


def run(options: argparse.Namespace) -> int:
    """Grade a file of generations; print a table, write ``report.json`` and ``graded.jsonl``."""
    task = {"name": options.task}
    part = TASKS.get(options.task)
    has_modes = part is not None and "mode" in {field.name for field in fields(part)}  # pyright: ignore[reportArgumentType]
    if options.mode is not None and has_modes:
        task["mode"] = options.mode
    elif options.mode not in (None, "default") and part is not None:
        raise InputError(f"--mode {options.mode}: task {options.task} is graded in one way only; leave --mode out")
    config = build_config(apply_overrides({"task": task}, options.overrides))
    refuse_unused("grade", options.overrides)
    tree, path = to_tree(config)["task"], Path(options.file)
    report = grade_file(
        path,
        config.task,
        folder := Path(options.out) if options.out else grades_folder(path),
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
    table.add_row("accuracy", f"{in_percent(report['accuracy'])} ({100 * low:.1f} to {100 * high:.1f})")
    for key, label in (("pass_at_k", "pass"), ("maj_at_k", "maj")):
        for k, share in report.get(key, {}).items():
            if k != "1":
                table.add_row(f"{label}@{k}", in_percent(share))
    known = {"task", "mode", "n", "accuracy", "ci95", "generations"}
    for name, value in report.items():
        if name not in known and isinstance(value, int | float):
            table.add_row(name, f"{value:.4g}")
    console = Console()
    console.print(table)
    if "schedules" in report:
        accuracies = ", ".join(f"{name} {in_percent(tree['accuracy'])}" for name, tree in report["schedules"].items())
        console.print(f"schedule {report['schedule']}; accuracies of all: {accuracies}", highlight=False, markup=False)
