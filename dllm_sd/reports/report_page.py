"""The report of one or more runs as a single HTML file, which loads nothing: figures, curves, settings, trajectories.

Everything that comes from data is escaped: text by `html.escape`, the data of curves and viewer as JSON without ``<``.
A content security policy in the page forbids all requests and `eval`.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from dllm_sd.errors import InputError, shown
from dllm_sd.evaluation.comparison import Comparison, compare_files
from dllm_sd.evaluation.estimates import wilson_interval
from dllm_sd.files.writing import writable, write_file
from dllm_sd.reports.curves import CURVES
from dllm_sd.reports.run_report import Rows, RunReport, read_runs

REPORT_PAGE = "report.html"
"""The report in a run folder."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
LONGEST_VALUE = 160
"""Characters of a setting that are shown."""
RESULTS = {"before": "initial weights", "after": "last weights", "best": "best weights"}


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write the report of the runs in ``folders`` to ``out``.

    Raises:
        InputError: if a folder is no run, a file in it was not written by one, or ``out`` cannot be written.
    """
    text = page(read_runs(folders))
    with writable(f"the report {shown(str(out))}", "name another file with --out"):
        write_file(out, text.encode("utf-8", "backslashreplace"))  # half a surrogate pair is no UTF-8


def page(runs: Sequence[RunReport]) -> str:
    """The HTML of the report."""
    title = " and ".join(run.name for run in runs)
    body = "".join(
        [
            f"<header><h1>{escape(title)}</h1>{_tagline(runs)}</header>",
            _notes(runs),
            _results(runs),
            _comparisons(runs) if len(runs) > 1 else "",
            _curves(runs),
            '<section id="trajectories"><h2>Trajectories</h2><div id="viewer"></div></section>',
            _settings(runs),
            _environment(runs),
        ]
    )
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)} - dllm-sd report</title>",
            f"<style>{_asset('uPlot.min.css')}\n{_asset('report.css')}</style></head><body><main>{body}</main>",
            f'<script type="application/json" id="data">{embedded(_data(runs))}</script>',
            *(f"<script>{_asset(name)}</script>" for name in ("uPlot.iife.min.js", "report.js", "viewer.js")),
            "</body></html>\n",
        ]
    )


def embedded(tree: Any) -> str:
    """JSON that may stand in a script element, whatever text it holds; numbers that are not finite become null."""
    text = json.dumps(_finite(tree), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(tree: Any) -> Any:
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, Mapping):
        return {str(key): _finite(value) for key, value in tree.items()}
    return [_finite(value) for value in tree] if isinstance(tree, list | tuple) else tree


def _asset(name: str) -> str:
    return (files("dllm_sd") / "assets" / "report" / name).read_text(encoding="utf-8")


def _data(runs: Sequence[RunReport]) -> dict[str, Any]:
    """What the scripts draw."""
    return {
        "curves": [asdict(curve) for curve in CURVES],
        "runs": [
            {
                "name": run.name,
                "metrics": _columns(run.drawn),
                "best": run.best,
                "collapse": run.collapse,
                "teachers": _teacher_names(run),
                "references": run.imitates_references,
                "traced_updates": run.traced_updates,
                "traces": run.traces,
            }
            for run in runs
        ],
    }


def _columns(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The metrics that some curve draws, by name; null where an update lacks them."""
    wanted = {"update", *(name for curve in CURVES for name in curve.metrics)}
    names = [name for name in dict.fromkeys(name for line in metrics for name in line) if name in wanted]
    return {name: [_number(line.get(name)) for line in metrics] for name in names}


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _teacher_names(run: RunReport) -> list[str]:
    """The part of each teacher context."""
    contexts = (run.tree.get("method") or {}).get("contexts") or []
    return [str(context.get("name")) if isinstance(context, Mapping) else str(context) for context in contexts]


# Words and tables


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already."""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>'


def _tagline(runs: Sequence[RunReport]) -> str:
    words = []
    for run in runs:
        updates = max((line["update"] for line in run.metrics), default=0)
        task = (run.tree.get("task") or {}).get("name")
        model = (run.tree.get("model") or {}).get("path")
        state = "finished" if run.report else "not finished"
        method = f"{_method(run) or 'unknown'}, model {model}, task {task}"
        name = f"{run.name}: method" if len(runs) > 1 else "Method"
        words.append(f"{name} {method}, {updates} updates, {state}")
    return "".join(_paragraph(line, "tagline") for line in words)


def _notes(runs: Sequence[RunReport]) -> str:
    """Warnings, and what is missing."""
    blocks = ""
    for run in runs:
        name = f"<strong>{escape(run.name)}</strong> " if len(runs) > 1 else ""
        for kind, sentences in (("warning", run.warnings), ("missing", run.missing)):
            blocks += "".join(f'<li class="{kind}">{name}{escape(_sentence(text))}</li>' for text in sentences)
    return f'<ul class="notes">{blocks}</ul>' if blocks else ""


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."


def percent(share: float, digits: int = 1) -> str:
    """A share as percent."""
    return f"{100 * share:.{digits}f} %"


def _with_interval(tree: Mapping[str, Any]) -> str:
    """Accuracy and interval of an evaluation report."""
    low, high = tree.get("ci95") or wilson_interval(tree["accuracy"], tree["n"])
    return f"{percent(tree['accuracy'])} <small>{100 * low:.1f} to {100 * high:.1f}</small>"


def _results(runs: Sequence[RunReport]) -> str:
    parts = []
    for run in runs:
        parts.append(f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else "")
        report = run.report or {}
        if report.get("best"):
            rows = [_result_row(report, schedule) for schedule in report["best"]]
            split = f"{report.get('split', 'test')} split"
            parts.append(_table((split, *RESULTS.values(), "best minus initial", "problems"), rows, "figures"))
        if run.curve:
            best = dict(run.curve).get(run.best) if run.best is not None else None
            cells = [_dev_accuracy(run, accuracy) for accuracy in (run.curve[0][1], run.curve[-1][1])]
            cells.append("" if best is None else f"{_dev_accuracy(run, best)} <small>update {run.best}</small>")
            cells += [] if run.dev_problems is None else [str(run.dev_problems)]
            head = ("dev split", "first", "last", "best", *(["problems"] * (run.dev_problems is not None)))
            parts.append(_table(head, [("accuracy", *cells)], "figures"))
    note = (
        "Accuracies with their 95 % interval (Wilson). The best weights were chosen by their dev accuracy, so that "
        "accuracy is optimistic. Initial, last and best weights are tested on the same problems, so their differences "
        "are more certain than the intervals suggest."
    )
    return _section("Results", *parts, _paragraph(note, "healthy")) if any(parts) else ""


def _dev_accuracy(run: RunReport, accuracy: float) -> str:
    """A dev accuracy, with its interval where the number of problems is known."""
    return (
        percent(accuracy) if run.dev_problems is None else _with_interval({"accuracy": accuracy, "n": run.dev_problems})
    )


def _result_row(report: Mapping[str, Any], schedule: str) -> list[str]:
    trees = [report[name].get(schedule) for name in RESULTS]
    cells = ["" if tree is None else _with_interval(tree) for tree in trees]
    before, _, best = trees
    gain = "" if before is None or best is None else f"{100 * (best['accuracy'] - before['accuracy']):+.1f} points"
    name = "as in training" if schedule == "trained" else schedule
    return [escape(name), *cells, gain, str(report["best"][schedule]["n"])]


# Two and more runs


def _comparisons(runs: Sequence[RunReport]) -> str:
    rows = {
        "method": _method,
        "model": lambda run: (run.tree.get("model") or {}).get("path"),
        "updates": lambda run: max((line["update"] for line in run.metrics), default=0),
        "test accuracy, initial weights": partial(_tested, "before"),
        "test accuracy, best weights": partial(_tested, "best"),
        "best dev accuracy": _best_dev,
        "tokens generated": lambda run: f"{sum(line.get('rollouts/generated', 0) for line in run.metrics):,}",
        "time of the updates": lambda run: f"{_seconds(run):,.0f} s",
    }
    cells = [(escape(label), *(escape(str(show(run))) for run in runs)) for label, show in rows.items()]
    cells = [row for row in cells if any(row[1:])]
    parts = [_table(("", *(run.name for run in runs)), cells, "figures")]
    settings = _differences(runs)
    first, *others = runs
    parts.append("<h3>Problem by problem</h3>")
    parts += [_paired(first, other) for other in others]
    if settings:
        parts += ["<h3>Settings that differ</h3>", _table(("key", *(run.name for run in runs)), settings, "settings")]
    return _section("Side by side", *parts)


def _method(run: RunReport) -> str:
    """The named method, and whether the run changes it; empty if it is not known."""
    return f"{run.method or ''}{' with changes' if run.method_changes else ''}"


def _tested(which: str, run: RunReport) -> str:
    """The test accuracy of the initial (`before`) or best weights as they were decoded in training."""
    tree = (run.report or {}).get(which, {}).get("trained")
    return "" if tree is None else percent(tree["accuracy"])


def _best_dev(run: RunReport) -> str:
    return "" if run.best is None else f"{percent(dict(run.curve).get(run.best, math.nan))} at update {run.best}"


def _seconds(run: RunReport) -> float:
    return math.fsum(line.get(f"time/{name}") or 0 for line in run.metrics for name in ("rollouts", "learning"))


def _differences(runs: Sequence[RunReport]) -> list[list[str]]:
    """Rows of the settings that differ, with the value in each run; a dash where a run has no such key.

    Of the keys that only some runs have, those are left out that stay as the part or the method has them.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    changed = {f"method.{key}" for run in runs for key, _, _ in run.method_changes}
    changed |= {key for run in runs for key, _, _ in run.changes}
    unequal = [
        key
        for key in keys
        if any(_set_in(run, key) != _set_in(runs[0], key) for run in runs)
        and (key in changed or key.endswith(".name") or all(key in run.settings for run in runs))
    ]
    return [[f"<code>{escape(key)}</code>", *(_set_in(run, key) for run in runs)] for key in unequal]


def _set_in(run: RunReport, key: str) -> str:
    """The value of a setting in a run."""
    return _value(run.settings[key]) or "<small>null</small>" if key in run.settings else "-"


def _paired(a: RunReport, b: RunReport) -> str:
    """The paired comparison of two runs, from the evaluations in their folders."""
    try:
        results = compare_files(a.folder, b.folder)
    except InputError as error:
        why = f"{b.name} against {a.name} cannot be compared problem by problem: {error}."
        return _paragraph(why + " Evaluate both runs with dllm-sd eval first.", "missing")
    schedules = ["as in training" if name == "trained" else name for name in results]
    head = ("", *(schedules if len(schedules) > 1 else [f"{b.name} against {a.name}"]))
    labels: dict[str, Callable[[Comparison], str]] = {
        "problems in both": lambda x: str(x.n),
        f"accuracy of {a.name}": lambda x: percent(x.accuracy_a),
        f"accuracy of {b.name}": lambda x: percent(x.accuracy_b),
        f"{b.name} minus {a.name}, points": lambda x: f"{100 * x.difference:+.2f}",
        "its 95 % interval": lambda x: "{:+.2f} to {:+.2f}".format(*(100 * end for end in x.ci95)),
        f"right in {a.name} only": lambda x: str(x.counts.only_a) if x.counts else "",
        f"right in {b.name} only": lambda x: str(x.counts.only_b) if x.counts else "",
        "p-value (McNemar)": lambda x: "" if x.p_value is None else f"{x.p_value:.2g}",
    }
    rows = [(escape(label), *(escape(show(x)) for x in results.values())) for label, show in labels.items()]
    note = "Interval: paired bootstrap over the problems; p: McNemar's exact test, two-sided."
    former = [
        f"{run.name} was given more updates after its end at update {run.former_end}; these are its results at that "
        "time."
        for run in (a, b)
        if run.former_end is not None
    ]
    return "".join(
        [*(_paragraph(text, "missing") for text in former), _table(head, rows, "figures"), _paragraph(note, "healthy")]
    )


# Curves, settings, environment


def _curves(runs: Sequence[RunReport]) -> str:
    if not any("loss" in line or "eval/accuracy" in line for run in runs for line in run.metrics):
        return _section("Curves", _paragraph("No update and no evaluation has finished, so there is nothing to draw."))
    charts = "".join(
        f'<figure class="chart" data-curve="{i}"><figcaption>{escape(curve.title)}</figcaption>'
        f'<div class="plot"></div>{_paragraph(curve.healthy, "healthy")}</figure>'
        for i, curve in enumerate(CURVES)
    )
    return f'<section id="curves"><h2>Curves</h2><div class="charts">{charts}</div></section>'


def _settings(runs: Sequence[RunReport]) -> str:
    """The settings of each run; those of several runs are folded, since their differences are shown side by side."""
    if len(runs) == 1:
        return _section("Settings", *_settings_of(runs[0]))
    folded = ""
    for run in runs:
        summary = f"Settings of {run.name} that are not at their defaults"
        folded += f"<details><summary>{escape(summary)}</summary>{''.join(_settings_of(run))}</details>"
    return _section("Settings", folded)


def _settings_of(run: RunReport) -> list[str]:
    """How the method differs from its named one, and the other settings that are not at their defaults."""
    parts = []
    if run.method_changes:
        parts.append(_paragraph(f"The method is {run.method}, changed:"))
        parts.append(_setting_table(run.method_changes, run.method or ""))
    elif run.method:
        parts.append(_paragraph(f"The method is {run.method} as it comes."))
    if run.changes:
        parts.append(_paragraph("Other settings that are not at their defaults:"))
        parts.append(_setting_table(run.changes, "default"))
    return parts


def _setting_table(rows: Rows, other: str) -> str:
    head = ("key", "here", other)
    prefix = "" if other == "default" else "method."
    cells = [[f"<code>{escape(prefix + key)}</code>", _value(value), _value(was)] for key, value, was in rows]
    return _table(head, cells, "settings")


def _value(value: Any) -> str:
    text = "" if value is None else json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return escape(text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}... ({len(text):,} characters)")


def _environment(runs: Sequence[RunReport]) -> str:
    known = [run for run in runs if run.start]
    if not known:
        return ""
    keys = [
        key for key in dict.fromkeys(key for run in known for key in run.start) if key not in ("versions", "update")
    ]
    versions = dict.fromkeys(name for run in known for name in run.start.get("versions", {}))
    rows = [(escape(key), *(_value(run.start.get(key)) for run in known)) for key in keys]
    rows += [(escape(name), *(_value(run.start.get("versions", {}).get(name)) for run in known)) for name in versions]
    return _section("Environment", _table(("", *(run.name for run in known)), rows))
