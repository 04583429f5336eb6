"""Prints what a probe found: accuracies, signal by group, shares, probabilities, and the verdict."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

CONTROLS = {"another": "with the hint of another problem", "no_question": "without the question"}
SIGNAL = {
    "sites": "sites",
    "share": "share of divergence",
    "divergence": "divergence",
    "student_entropy": "student's entropy",
    "teacher_entropy": "teacher's entropy",
    "agreement": "agreement",
    "overlap": "overlap of top 5",
    "advantage": "advantage",
}
"""Rows of the table of signals: field of a group, and its name on the page."""
PLACES = {"before": "before the first deviation", "at": "at it", "mistake": "at a mistake", "doubts": "below 0.5"}
"""Columns of the table of probabilities: place, and its name on the page."""
PROMISE = {True: "promising", False: "not promising", None: "undecided"}


def print_probe(name: str, tree: Mapping[str, Any]) -> None:
    """Print the tree of some `Findings`."""
    console = Console()
    console.print(_accuracies(name, tree))
    counts = tree["rollouts"]
    if counts["made"]:
        console.print(
            f"{counts['made']} rollouts, {counts['right']} of them correct; {counts['passing']} pass method.gate, and "
            f"{counts['hinted']} of these have their hints",
            highlight=False,
        )
    if tree["groups"]:
        console.print(_signal(tree["groups"]))
    if (shares := tree["shares"]) is not None:
        words = ", ".join(f"{part} {_percent(share)}" for part, share in shares.items())
        console.print(f"shares of the divergence from the teacher on these rollouts: {words}", highlight=False)
    if any(value is not None for places in tree["premise"].values() for value in places.values()):
        console.print(_premise(tree["premise"]))
    console.print(f"verdict: {PROMISE[tree['verdict']['promising']]}", highlight=False)
    for sentence in tree["verdict"]["because"]:
        console.print(f"- {sentence['says']}", highlight=False)


def _accuracies(name: str, tree: Mapping[str, Any]) -> Table:
    table = Table(title=f"{name}: accuracy on dev problems (95 % interval)")
    for column in ("", "problems", "accuracy", "student's on these", "difference"):
        table.add_column(column, justify="right" if column else "left")
    if (student := tree["student"]) is not None:
        table.add_row("student", str(student["n"]), _rate(student), "", "")
    if (imitated := tree["imitated"]) is not None:
        table.add_row("rollouts that it imitates", *_gap(imitated))
    for teacher in tree["teachers"]:
        shown = "" if teacher["revealed"] is None else f", {_percent(teacher['revealed'])} revealed"
        who = f"teacher {teacher['context']} ({teacher['name']}{shown})"
        table.add_row(who, *_gap(teacher["gap"]))
    for kind, control in tree["controls"].items():
        if (accuracy := control["accuracy"]) is not None:
            table.add_row(f"  {CONTROLS[kind]}", str(accuracy["n"]), _rate(accuracy), "", "")
    return table


def _gap(gap: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Problems, both accuracies, and the difference in points with its interval."""
    low, high = gap["ci95"]
    points = f"{100 * gap['gap']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return str(gap["teacher"]["n"]), _rate(gap["teacher"]), _rate(gap["student"]), points


def _signal(groups: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="signal: means over graded sites, in nats")
    table.add_column("rollouts, or sites of them")
    for name in groups:
        table.add_column(name.replace("_", " "), justify="right")
    for field, words in SIGNAL.items():
        table.add_row(words, *(_number(group[field]) for group in groups.values()))
    return table


def _premise(premise: Mapping[str, Mapping[str, float | None]]) -> Table:
    table = Table(title="mean probability of the reference's token")
    for column in ("under", *PLACES.values()):
        table.add_column(column, justify="left" if column == "under" else "right")
    for reader, places in premise.items():
        words = f"  {CONTROLS[reader]}" if reader in CONTROLS else reader
        table.add_row(words, *(_number(places[place]) for place in PLACES))
    return table


def _rate(rate: Mapping[str, Any]) -> str:
    low, high = rate["ci95"]
    return f"{_percent(rate['accuracy'])} ({100 * low:.0f} to {100 * high:.0f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
