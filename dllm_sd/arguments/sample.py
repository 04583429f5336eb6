"""Arguments of ``dllm-sd sample``."""

import argparse

from dllm_sd.arguments.values import add_overrides, place

HELP = "watch a prompt being denoised"
EXAMPLES = """
dllm-sd sample runs/mine "What is 7 times 8?"
dllm-sd sample tiny "0100 3000 0002 0030" eval.temperature=0.5
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", type=place, metavar="RUN_OR_MODEL")
    parser.add_argument("prompt")
    parser.add_argument("--task", help="name of the task, for a model without a recipe")
    add_overrides(parser)
