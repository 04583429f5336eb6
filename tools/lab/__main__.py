"""The laboratory's command: runs the claims of the papers on small models, and writes what came out into the docs.

python -m tools.lab run [CLAIM ...] [--minutes M] [--folder DIR]   # goes on where it stopped
python -m tools.lab make BASE [--folder DIR]                       # trains a model that claims need, and no more
python -m tools.lab table                                          # docs/results.md from docs/results/*.json
python -m tools.lab list                                           # the claims, and what is left to do
"""

import argparse
import sys
from pathlib import Path

from dllm_sd.cli.run_or_model import quiet_libraries
from dllm_sd.errors import InputError
from tools.lab.claims import in_order, read_laboratory
from tools.lab.records import RESULTS


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 if all that was asked for is done, 3 if the minutes were over before, 130 after Ctrl-C, 2 for
    wrong input."""
    parser = argparse.ArgumentParser(prog="python -m tools.lab", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="probe, tune and train; goes on where it stopped")
    running.add_argument("claims", nargs="*", metavar="CLAIM", help="default: all, the most important first")
    running.add_argument("--minutes", type=float, help="stop after so many minutes; default: no limit")
    running.add_argument("--folder", type=Path, default=Path("runs/lab"), help="bases and unfinished runs")
    making = commands.add_parser("make", help="train a model that claims need")
    making.add_argument("base", metavar="BASE")
    making.add_argument("--folder", type=Path, default=Path("runs/lab"), help="bases and unfinished runs")
    commands.add_parser("table", help="write docs/results.md and its plot")
    commands.add_parser("list", help="the claims, and how many of their measurements are there")
    options = parser.parse_args(arguments)
    quiet_libraries()
    try:
        laboratory = read_laboratory()
        if options.command == "run":
            from tools.lab.runner import Runner

            claims = in_order(options.claims, laboratory)
            return 0 if Runner(laboratory, options.folder, RESULTS).run(claims, options.minutes) else 3
        if options.command == "make":
            from tools.lab.bases import make_base

            make_base(options.base, laboratory.bases, options.folder.resolve())
            return 0
        from tools.lab.page import list_claims, write_page

        (write_page if options.command == "table" else list_claims)(laboratory, RESULTS)
        return 0
    except KeyboardInterrupt:
        print("tools.lab: interrupted; the same command continues from the last saved update", file=sys.stderr)
        return 130
    except InputError as error:
        print(f"tools.lab: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
