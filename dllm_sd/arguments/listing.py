"""Arguments of ``dllm-sd list``."""

import argparse

HELP = "what there is: methods, tasks, configs, parts, families of checkpoints"
EXAMPLES = """
dllm-sd list methods
dllm-sd list parts
dllm-sd list configs --json
"""
KINDS = ("methods", "tasks", "configs", "parts", "families")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("what", choices=KINDS, metavar="|".join(KINDS))
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    parser.set_defaults(overrides=None)
