"""Arguments of ``dllm-sd list``."""

import argparse

HELP = "list methods, tasks, configs, parts or families of checkpoints"
EXAMPLES = """
dllm-sd list
dllm-sd list methods
dllm-sd list parts
dllm-sd list configs --json
"""
KINDS = {
    "methods": "ways to train, for method=NAME",
    "tasks": "data with prompts and graders, for task=NAME",
    "configs": "shipped configs, for dllm-sd train NAME",
    "parts": "components of methods, such as divergences and teacher contexts",
    "families": "model architectures that can be loaded",
}
"""What can be listed, with what it is."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("what", nargs="?", choices=KINDS, metavar="|".join(KINDS), help="default: how many there are")
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    parser.set_defaults(overrides=None)
