"""``dllm-sd eval --compare A B``: compares two evaluations on the same problems."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dllm_sd.errors import InputError
from dllm_sd.evaluation.comparison import Comparison, compare_files
from dllm_sd.evaluation.estimates import in_percent


def run(options: argparse.Namespace) -> int:
    """Compare two evaluations; print a table and write nothing."""
    others = [value for name, value in vars(options).items() if name not in ("compare", "command") and value]
    if others:
        raise InputError(
            f"eval --compare A B reads two finished evaluations and takes nothing else; leave out {others[0]!r}"
        )
    a, b = options.compare
    comparisons = compare_files(Path(a), Path(b))
    console = Console()
    console.print(_table(comparisons))
    console.print(f"A: {a}\nB: {b}", highlight=False, markup=False, soft_wrap=True)
    console.print("95 % interval: bootstrap over the problems of both; p: McNemar's exact test, two-sided")
    if any(result.counts is None for result in comparisons.values()):
        console.print("a problem with several attempts counts by their mean, and McNemar's test is left out")
    return 0


def _table(comparisons: Mapping[str, Comparison]) -> Table:
    table = Table(title="B against A")
    table.add_column("decoding")
    for name in comparisons:
        table.add_column("as configured" if name == "trained" else escape(name), justify="right")
    rows = [_cells(result) for result in comparisons.values()]
    for label in rows[0]:
        table.add_row(label, *(cells[label] for cells in rows))
    return table


def _cells(result: Comparison) -> dict[str, str]:
    counts, p = result.counts, result.p_value
    cells = {
        "problems of both": str(result.n),
        "only in A, only in B": f"{result.alone_a}, {result.alone_b}",
        "accuracy of A": in_percent(result.accuracy_a),
        "accuracy of B": in_percent(result.accuracy_b),
        "B - A, points": f"{100 * result.difference:+.2f}",
        "95 % interval": "{:+.2f} to {:+.2f}".format(*(100 * end for end in result.ci95)),
    }
    right = ("", "", "", "") if counts is None else (counts.both, counts.only_a, counts.only_b, counts.neither)
    cells |= zip(("both right", "only A right", "only B right", "neither right"), map(str, right), strict=True)
    return {**cells, "McNemar's p": "" if p is None else f"{p:.2g}"}
