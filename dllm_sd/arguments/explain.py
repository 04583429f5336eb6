"""Arguments of ``dllm-sd explain``."""

import argparse

HELP = "explain a config key: its meaning, type, default and choices, and the configs that set it"
EXAMPLES = """
dllm-sd explain optim.lr
dllm-sd explain method.contexts.0.ratio
dllm-sd explain method.divergence.beta
dllm-sd explain '*.temperature'         # every key that ends so
dllm-sd explain                         # the keys at the top
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("key", nargs="?", metavar="KEY", help="dotted; an end of a key, or * for anything, finds all")
    parser.add_argument("--json", action="store_true", help="a list of objects instead of text")
    parser.set_defaults(overrides=None)
