"""Arguments of ``dllm-sd export``."""

import argparse

from dllm_sd.arguments.values import add_overrides, place

HELP = "export the weights of a run for other programs: as an adapter, as a whole model, or in the original format"
EXAMPLES = """
dllm-sd export runs/mine --to peft adapter
dllm-sd export runs/mine --to merged model --weights last
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("run", type=place, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--to",
        required=True,
        choices=("peft", "merged", "original"),
        help="a LoRA adapter for PEFT, a whole model for transformers, or the names and dtypes of the first checkpoint",
    )
    parser.add_argument("folder", type=place, metavar="DIR", help="must be empty or not exist")
    parser.add_argument("--weights", choices=("best", "last"), default="best", help="default: best on the dev split")
    parser.add_argument("--push", metavar="REPO", help="also upload DIR to this repository of the Hugging Face hub")
    add_overrides(parser)
