"""Fault injection: interrupts and damages small runs, and counts the outcomes: `python -m tools.attack_runs KIND ...`.

kills    a command is killed before each file operation and in the middle of each write, then run again
writes   a file operation fails (disk full, read-only, denied, broken), then the command is run again
damage   files of a run folder, and values in them, are damaged; then the run is continued, evaluated and exported
races    the same command runs twice at the same time
configs  hostile configs, overrides and command lines
ranks    one of two processes is killed, then both are started again (half a minute each)

Runs use small random models in forked children of one process and take about a second each. A row of the table counts
the outcomes of a case: ok (the result is as without the fault), sentence (refused in one sentence, and nothing is lost)
and FAULT (a traceback, a difference, a hang, or damage without a message). Faults are printed, and every finding is
appended to `--out` at once. The exit status is 1 if there is a fault.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import mkdtemp

from tools.attacks import configs, damage, kills, races, ranks, writes
from tools.attacks.cases import CASES, add_task, writer
from tools.attacks.findings import Finding, append, report

KINDS = ("kills", "writes", "damage", "races", "configs", "ranks")
LARGE = ("peers", "tensorboard")
"""Cases with many operations; `LARGE_POINTS` of them are attacked unless `--points` is given."""
LARGE_POINTS = 40


def attacks(kind: str, names: Sequence[str], points: int | None, folder: Path, url: str) -> Iterator[Finding]:
    """Yield the findings of one kind of attack."""
    if kind == "configs":
        yield from configs.attack(folder, points)
    elif kind == "ranks":
        yield from ranks.attack(folder, points)
    elif kind == "damage":
        for victim in damage.victims(folder, url):
            if not names or victim.name in names:
                yield from damage.attack(victim, points)
    elif kind == "races":
        for i, (name, overrides) in enumerate(races.RACES):
            if not names or name in names:
                yield from races.attack(kills.follow(CASES[name], folder / str(i), url), overrides, points or 12)
    else:
        attack = {"kills": kills.attack, "writes": writes.attack}[kind]
        for name in names or CASES:
            course = kills.follow(CASES[name], folder / name, url)
            yield from attack(course, points or (LARGE_POINTS if name in LARGE else None))
            shutil.rmtree(course.folder)


def quick(folder: Path, url: str, points: int) -> Iterator[Finding]:
    """A small sample of all kinds but ranks, on one run."""
    course = kills.follow(CASES["ema"], folder / "ema", url)
    yield from kills.attack(course, points)
    yield from kills.check(course, 1)
    yield from writes.attack(course, max(points - 1, 1))
    yield from races.attack(course, points=min(points, 2), times=0)
    yield from damage.attack(damage.stopped(course, "000002"), points)
    yield from configs.attack(folder, points + 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen attacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], metavar="KIND", help="default: all but ranks")
    parser.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="cases to attack; default: all")
    parser.add_argument("--points", type=int, metavar="N", help="number of attacks of each case, evenly spread")
    parser.add_argument(
        "--quick", action="store_true", help="a small sample of all kinds but ranks, by default in 20 s"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="all findings, a JSON object a line")
    options = parser.parse_args(arguments)
    add_task()
    folder, findings, started = Path(mkdtemp(prefix="attacks")), list[Finding](), time.perf_counter()
    try:
        with writer() as url:
            for finding in quick(folder, url, options.points or 4) if options.quick else _all(options, folder, url):
                findings.append(finding)
                if options.out:
                    append(finding, options.out)
                if finding.outcome == "FAULT":
                    print(f"FAULT {finding.kind}: {finding.case}: {finding.attack}\n      {finding.words}", flush=True)
    finally:
        shutil.rmtree(folder)
        print("\n".join(report(findings)), f"\n{time.perf_counter() - started:.0f} s", sep="")  # also when stopped
    return int(any(finding.outcome == "FAULT" for finding in findings))


def _all(options: argparse.Namespace, folder: Path, url: str) -> Iterator[Finding]:
    for kind in options.kinds or [kind for kind in KINDS if kind != "ranks"]:
        yield from attacks(kind, options.cases, options.points, folder / kind, url)


if __name__ == "__main__":
    sys.exit(main())
