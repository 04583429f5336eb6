"""Compare the wordings of teachers' prompts on the laboratory's small readers, by probe.

python -m tools.lab.reader_templates [--folder DIR]   # after the bases are made; about ten minutes on one core

Each hint is probed as the claim that uses it is (`claims.yaml`): same model, same problems, only the template differs.
The readers were trained on hints in brackets before the question, so this also says how far a small model reads what it
was not trained on. `docs/results/reader_templates.json` has the rows, and docs/probe.md the table.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dllm_sd.cli.run_or_model import quiet_libraries
from dllm_sd.files.writing import write_file
from dllm_sd.probing.opening import opened
from tools.lab.claims import Laboratory, read_laboratory
from tools.lab.records import RESULTS
from tools.lab.runner import TUNING_SEED, Runner
from tools.lab.templates import read_rows

DATA = RESULTS / "reader_templates.json"
WORDINGS = {
    "in brackets before": "({hint}){question}",
    "before": "{hint}{question}",
    "before, on a line of its own": "{hint}\n{question}",
    "in brackets after": "{question}({hint})",
    "after, on a line of its own": "{question}\n{hint}",
    "the default": None,
}
"""Templates; None is the default of the hint, in English."""
READERS = {
    "reference": ("opsd", "opsd_reference"),
    "answer": ("purified", "plain"),
    "sibling": ("demo_psd", "sdpo"),
    "rubric": ("rcsd", "rubric of the data"),
    "critique": ("step_align", "step_align"),
    "skills": ("sgsd", "sgsd"),
}
"""For each hint the claim and row that show it; feedback needs a peer, which a probe of one student has not."""


@dataclass(frozen=True)
class Measured:
    """The accuracies, from 0 to 1, of a student and of its teacher behind one wording, on ``n`` problems."""

    hint: str
    claim: str
    model: str
    wording: str
    template: str
    student: float
    teacher: float
    n: int


def measure(hint: str, wording: str, laboratory: Laboratory, folder: Path, problems: int) -> Measured:
    """Probe the row of a hint with all of its contexts behind one wording."""
    name, row = READERS[hint]
    claim, template = laboratory.claims[name], WORDINGS[wording]
    with Runner(laboratory, folder, RESULTS).work(name, claim) as work:
        seed = [f"seed={TUNING_SEED}", f"eval.probe_problems={problems}"]
        config = work.config(work.command(claim.rows[row], seed))
        contexts = tuple(_worded(context, template) for context in config.method.contexts)
        with opened(replace(config, method=replace(config.method, contexts=contexts))) as (probe, held_out):
            found = probe(held_out).metrics
    used = contexts[0].wording or contexts[0].template
    accuracies = found["probe/student"], found["probe/teacher"]
    return Measured(hint, name, claim.base, wording, used, *accuracies, len(held_out))


def _worded(context: Any, template: str | None) -> Any:
    """A hint with another template; None takes the default of its kind."""
    default = next(one.default for one in fields(context) if one.name == "template")
    return replace(context, template=default if template is None else template)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The accuracy of the teacher in percent, a line for each hint and a column for each wording, in Markdown."""
    lines = [
        f"| hint | model | student | {' | '.join(WORDINGS)} |",
        f"|{'---|' * (3 + len(WORDINGS))}",
    ]
    for hint in READERS:
        of_hint = {row["wording"]: row for row in rows if row["hint"] == hint}
        if not of_hint:
            continue
        first = next(iter(of_hint.values()))
        cells = [f"{100 * of_hint[wording]['teacher']:.0f}" if wording in of_hint else "" for wording in WORDINGS]
        lines.append(f"| `{hint}` | `{first['model']}` | {100 * first['student']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/lab"))
    parser.add_argument("--problems", type=int, default=128)
    options = parser.parse_args()
    quiet_libraries()
    laboratory = read_laboratory()
    for hint in READERS:
        for wording in WORDINGS:
            rows = read_rows(DATA)
            if any(row["hint"] == hint and row["wording"] == wording for row in rows):
                continue
            measured = measure(hint, wording, laboratory, options.folder, options.problems)
            print(measured, flush=True)
            write_file(DATA, json.dumps([*rows, vars(measured)], indent=1) + "\n")
    print(table(read_rows(DATA)))


if __name__ == "__main__":
    main()
