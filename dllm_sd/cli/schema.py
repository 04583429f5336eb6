"""``dllm-sd schema``: prints the JSON schema of a config."""

import argparse
import sys

from dllm_sd.keys import schema_file


def run(options: argparse.Namespace) -> int:
    """Print the schema, or where it is."""
    file = schema_file()
    sys.stdout.write(f"{file}\n" if options.path else file.read_text(encoding="utf-8"))
    return 0
