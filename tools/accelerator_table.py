"""Keeps the results of `tools/accelerator_day.sh`, and makes a table of them for docs/benchmarks.md.

    python -m tools.accelerator_table [--step NAME --status 0 --seconds 12] OUT [-- COMMAND ...]

With ``--step`` a line is added to OUT/results.jsonl: the step, how it ended, and what it printed (OUT/NAME.log). Then
OUT/table.md is made from all lines that are there.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TIMED_OUT = (124, 137)
"""The exit statuses of `timeout`."""
NOISE = ("torch ", "Loading weights", "Warning", "warn")
"""Beginnings of lines that are no results."""


def printed(log: Path, most: int = 12) -> list[str]:
    """The last lines of a log, at most ``most``, without those that are no results; 200 characters of each."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return [line[:200] for line in lines if line and not line.startswith(NOISE)][-most:]


def outcome(status: int) -> str:
    """How a step ended, in words."""
    return "done" if status == 0 else "ran out of time" if status in TIMED_OUT else f"failed with exit status {status}"


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table of results, a row for each line that a step printed; of a failed step the last three."""
    rows = ["| step | outcome | seconds | result |", "|---|---|---|---|"]
    for result in results:
        lines = result["printed"] if result["status"] in (0, *TIMED_OUT) else result["printed"][-3:]
        first = (result["step"], outcome(result["status"]), str(result["seconds"]))
        for i, line in enumerate(lines or ["nothing printed"]):
            cells = (*(first if i == 0 else ("", "", "")), line.replace("|", "\\|"))
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def read(file: Path) -> list[dict[str, Any]]:
    """The results in a file; a last line that was cut off is left out."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def main() -> None:
    """Add a result if one is given, and make the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--step")
    parser.add_argument("--status", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    results = options.out / "results.jsonl"
    if options.step:
        facts = {key: getattr(options, key) for key in ("step", "status", "seconds")}
        command = [word for word in options.command if word != "--"]
        facts |= {"command": command, "printed": printed(options.out / f"{options.step}.log")}
        with results.open("a") as file:
            file.write(json.dumps(facts) + "\n")
    (options.out / "table.md").write_text(table(read(results)))


if __name__ == "__main__":
    main()
