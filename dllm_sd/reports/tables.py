"""Prints reports as tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dllm_sd.evaluation.estimates import in_percent
from dllm_sd.reports.memory import MemoryEstimate
from dllm_sd.training.left_out import in_words

EVALUATION_COUNTS = {
    "too_long": ("prompts too long", "problems left out"),
    "cut": ("texts without an end", "graded as they are"),
    "unread": ("texts without an answer", "wrong"),
}
"""Fields of an evaluation report that count problems, each with what it counts and how these problems are treated."""


def print_training(report: Mapping[str, Any], run: Path) -> None:
    """Print the accuracies before and after training, and the folder of the run."""
    console = Console()
    if report["best"]:
        table = Table(title=f"{report['task']}: accuracy on {report['n']} {report.get('split', 'test')} problems")
        table.add_column("decoding")
        for name in ("before", "after", "best"):
            table.add_column(name, justify="right")
        for schedule, best in report["best"].items():
            cells = [in_percent(report[name][schedule]["accuracy"]) for name in ("before", "after")]
            low, high = best["ci95"]
            table.add_row(
                "as in training" if schedule == "trained" else schedule,
                *cells,
                f"{in_percent(best['accuracy'])} ({100 * low:.1f} to {100 * high:.1f})",
            )
            for name, (what, treatment) in EVALUATION_COUNTS.items():
                counts = [report[which][schedule].get(name) for which in ("before", "after", "best")]
                if any(counts):  # reports of earlier versions lack some
                    table.add_row(f"  {what} ({treatment})", *map(str, counts))
        console.print(table)
        console.print("before: initial weights; after: last weights; best: best on the dev split (95 % interval)")
    summary = f"{report['updates']} updates in {report['time/updates']:.0f} s ({report['updates_skipped']} skipped)"
    best_dev = f"; best dev accuracy {in_percent(report['best_dev_accuracy'])} at update {report['best_update']}"
    console.print(summary + (best_dev if report["best_dev_accuracy"] >= 0 else ""))
    if left_out := in_words(report.get("left_out", {})):  # reports of earlier versions have none
        console.print(f"left out: {', '.join(left_out)}", highlight=False)
    if report["stopped"]:
        console.print(f"stopped early: {report['stopped']}")
    console.print(f"run folder {run}: report.json, metrics.jsonl, samples.jsonl, config.yaml, checkpoints/")
    if "tensorboard" in report["settings"]["log"].get("trackers", ()):  # reports of earlier versions have none
        console.print(f"curves, samples and trajectories: tensorboard --logdir {run / 'tb'}")


def print_evaluation(title: str, report: Mapping[str, Any]) -> None:
    """Print an evaluation, with a column for each decoding schedule."""
    table = Table(title=title)
    table.add_column("decoding")
    rows: dict[str, list[str]] = {}
    for name, tree in report["schedules"].items():
        table.add_column("as configured" if name == "trained" else name, justify="right")
        low, high = tree["ci95"]
        cells = {"problems": str(tree["n"]), "accuracy": in_percent(tree["accuracy"])}
        cells["95 % interval"] = f"{100 * low:.1f} to {100 * high:.1f}"
        for key, name in (("pass_at_k", "pass"), ("maj_at_k", "maj")):
            cells |= {f"{name}@{k}": in_percent(share) for k, share in tree[key].items() if k != "1"}
        cells |= {"tokens": f"{tree['length']:.1f}", "tokens per forward": f"{tree['tokens_per_step']:.2f}"}
        cells |= {"tokens per second": f"{tree['time/tokens_per_second']:.0f}"}
        for name, (what, treatment) in EVALUATION_COUNTS.items():
            if any(other[name] for other in report["schedules"].values()):
                cells |= {f"{what} ({treatment})": str(tree[name])}
        cells |= {"slots busy": f"{tree['occupancy']:.0%}"}
        known = {"n", "accuracy", "score", "length", "tokens_per_step", "occupancy"}
        extra = {key: value for key, value in tree.items() if isinstance(value, float) and key not in known}
        cells |= {key: f"{value:.4g}" for key, value in extra.items() if not key.startswith("time/")}
        for label, cell in {**cells, "seconds": f"{tree['time/seconds']:.1f}"}.items():
            rows.setdefault(label, []).append(cell)
    for label, values in rows.items():
        table.add_row(label, *values)
    Console().print(table)


def memory_table(memory: MemoryEstimate) -> Table:
    """The table of a memory estimate."""
    table = Table(title="memory of one process (estimate)")
    table.add_column("what")
    table.add_column("size", justify="right")
    table.add_row("parameters", f"{memory.parameters:,}")
    table.add_row("trainable parameters", f"{memory.trainable:,}")
    table.add_row("tokens, sites of a micro-batch", f"{memory.tokens:,}, {memory.sites:,}", end_section=True)
    decoding = {"held": "held weights, cache", "rollouts": "rollouts", "rollout_logits": "their logits, after that"}
    groups = {
        "always": (memory.resident, {"weights": "weights", "optimizer": "optimizer state", "copies": "teacher copies"}),
        "learning, at most": (
            memory.learning,
            {
                "gradients": "gradients",
                "gathered": "gathered weights",
                "teacher": "teacher's pass, before",
                "activations": "activations",
                "losses": "logits and losses, with them",
                "backward": "backward, after these",
                "step": "optimizer step, at the end",
            },
        ),
        "decoding, at most": (memory.decoding, decoding),
    }
    for name, (total, rows) in groups.items():
        for field, label in rows.items():
            table.add_row(f"  {label}", _gigabytes(getattr(memory, field)))
        table.add_row(name, _gigabytes(total), end_section=True)
    table.add_row("peak: always + the larger of learning and decoding", _gigabytes(memory.peak), style="bold")
    return table


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB" if size else "0"


def describe_part(part: Any) -> str:
    """The name and the fields of a part in one line."""
    if not isinstance(part, dict):
        return str(part)
    fields = ", ".join(f"{key} {value}" for key, value in part.items() if key != "name")
    if "name" not in part:  # a slot with one kind of part has no names, such as the skill bank
        return fields
    return f"{part['name']} ({fields})" if fields else part["name"]
