"""Arguments of ``dllm-sd sample``."""

import argparse

from dllm_sd.arguments.values import add_overrides, place

HELP = "show how a prompt is completed: a canvas that fills, or a text that grows"
EXAMPLES = """
dllm-sd sample runs/mine "What is 7 times 8?"
dllm-sd sample tiny test:0 eval.temperature=0.5         # a problem of the task's data, with a verdict
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", type=place, metavar="RUN_OR_MODEL", help="a run folder, or a model folder or hub name")
    parser.add_argument(
        "prompt", help="a question, which is put into the task's prompt, or test:0 for a problem of the data"
    )
    parser.add_argument("--raw", action="store_true", help="give the model the text as it is, without a template")
    parser.add_argument("--task", help="name of the task, for a model without a recipe")
    add_overrides(parser)
