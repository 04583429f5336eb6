"""Arguments of ``dllm-sd report``."""

import argparse

from dllm_sd.arguments.values import place

HELP = (
    "write an HTML page about one or more runs: results, curves, settings, and what student and teacher "
    "saw at each step"
)
EXAMPLES = """
dllm-sd report runs/mine
dllm-sd report runs/a runs/b --out comparison.html
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("runs", nargs="+", type=place, metavar="RUN", help="folders of runs, finished or not")
    parser.add_argument(
        "--out", type=place, metavar="FILE", help="file to write; default: report.html in the folder of the first run"
    )
    parser.set_defaults(overrides=[])
