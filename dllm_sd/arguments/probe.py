"""Arguments of ``dllm-sd probe``."""

import argparse

from dllm_sd.arguments.values import add_overrides, count, place

HELP = "measure, before training, whether the teacher of a method can teach the model anything"
EXAMPLES = """
dllm-sd probe quickstart_ar
dllm-sd probe quickstart_ar method=opsd_pmi --problems 256
dllm-sd probe quickstart --json --out probe.json
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("config", type=place, metavar="CONFIG", help="a file or a shipped config")
    parser.add_argument("--problems", type=count, metavar="N", help="dev problems; default: eval.probe_problems")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--out", type=place, metavar="FILE", help="also write the JSON to this file")
    add_overrides(parser)
