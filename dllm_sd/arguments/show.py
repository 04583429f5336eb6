"""Arguments of ``dllm-sd show``."""

import argparse

from dllm_sd.arguments.values import add_overrides, count, place

HELP = "show the resolved config, its method, the memory that it needs, and a prompt"
EXAMPLES = """
dllm-sd show quickstart method=opsd_pmi
dllm-sd show llada_8b_gsm8k --processes 8 --sharded
dllm-sd show runs/mine
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("config", type=place, metavar="CONFIG", help="a file, a shipped config, or a run")
    parser.add_argument("--processes", type=count, default=1, help="processes for the memory estimate")
    parser.add_argument("--sharded", action="store_true", help="estimate for FSDP2 instead of DDP")
    add_overrides(parser)
