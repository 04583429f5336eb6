"""Arguments of ``dllm-sd schema``."""

import argparse

HELP = "print the JSON schema of a config, with which editors complete and check keys"
EXAMPLES = """
dllm-sd schema > schema.json
dllm-sd schema --path           # where the installed file is
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--path", action="store_true", help="print the path of the schema and not the schema")
    parser.set_defaults(overrides=None)
