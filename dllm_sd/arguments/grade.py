"""Arguments of ``dllm-sd grade``."""

import argparse

from dllm_sd.arguments.values import add_overrides, place

HELP = "grade generations that were made by another program"
EXAMPLES = """
dllm-sd grade generations.jsonl --task gsm8k
dllm-sd grade generations.jsonl.gz --task math --mode compatible --out graded
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "file",
        type=place,
        metavar="FILE",
        help=".jsonl or .jsonl.gz; each line has a generation and the fields of its problem",
    )
    parser.add_argument("--task", required=True, help="name of the task")
    parser.add_argument("--mode", help="default, or compatible: the verdicts of the published parsers, quirks included")
    parser.add_argument(
        "--out", type=place, metavar="DIR", help="for report.json and graded.jsonl; default: FILE_graded beside it"
    )
    add_overrides(parser, "task.key=value", "settings of the task")
