"""Plots of what the laboratory measured, as PNG; they need matplotlib, which the extra `docs` has.

Each file holds a digest of the numbers that it shows, so that a test can tell whether it is of the data of now.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_sd.errors import InputError
from dllm_sd.files.writing import write_file
from tools.lab.verdicts import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

WIDTH, HEIGHT = 8.0, 5.0
"""Of a plot, in inches."""
COLUMNS, ROW, HEAD = 2, 0.24, 0.9
"""Of the plot of gains: panels side by side, and the inches of a row and around a panel."""
COMPARED_WITH = ("sft", "rft", "rft_trajectory", "grpo", "diffu_grpo")
DOTS = 110
"""Dots an inch."""


@dataclass(frozen=True)
class Point:
    """A row of a claim: the gap between teacher and student, and the gain, in points of accuracy."""

    claim: str
    row: str
    gap: float
    gain: float


def digest(shown: Sequence[Point] | Mapping[str, Mapping[str, Estimate]]) -> str:
    """The digest of the numbers of a plot."""
    return hashlib.sha256(json.dumps(shown, default=asdict).encode()).hexdigest()


def plot_gaps(points: Sequence[Point]) -> "Figure":
    """A point for each row, what the probe promised against what training gained, by claim."""
    figure = _figure(WIDTH, HEIGHT)
    axes = figure.add_subplot()
    for i, claim in enumerate(dict.fromkeys(point.claim for point in points)):
        of_claim = [point for point in points if point.claim == claim]
        xs, ys = [point.gap for point in of_claim], [point.gain for point in of_claim]
        axes.scatter(xs, ys, label=claim, marker="os^Dv"[i // 10 % 5], color=f"C{i % 10}")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("probe: accuracy of the teacher less that of the student (points)")
    axes.set_ylabel("gain of accuracy by training (points)")
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_gains(gains: Mapping[str, Mapping[str, Estimate]]) -> "Figure":
    """A panel for each claim: the gain of every row over the model before training, with its 95 % interval.

    Baselines are grey; rows of one seed, of which no interval is known, are hollow.
    """
    names = list(gains)
    lines = [names[i : i + COLUMNS] for i in range(0, len(names), COLUMNS)]
    heights = [HEAD + ROW * max(len(gains[name]) for name in line) for line in lines]
    figure = _figure(WIDTH * 1.5, sum(heights))
    grid = figure.add_gridspec(len(lines), COLUMNS, height_ratios=heights)
    for i, name in enumerate(names):
        axes = figure.add_subplot(grid[i // COLUMNS, i % COLUMNS])
        rows = gains[name]
        for at, (row, one) in enumerate(rows.items()):
            known = one.half != inf
            colour = "grey" if row in COMPARED_WITH else "C0"
            face = colour if known else "none"
            axes.errorbar(one.value, at, xerr=one.half if known else None, fmt="o", color=colour, mfc=face, capsize=3)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("points of accuracy", fontsize=7)
    return figure


def save(figure: "Figure", file: Path, shown: str) -> None:
    """Write a plot as PNG, with the digest of what it shows."""
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=DOTS, metadata={"Description": shown, "Software": None})
    write_file(file, drawn.getvalue())


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("plots are drawn by matplotlib; install it, as in pip install -e '.[docs]'") from error
    return Figure(figsize=(width, height), layout="constrained")
