"""Arguments of ``dllm-sd init``."""

import argparse

from dllm_sd.arguments.values import place

HELP = "write a config for a model and a data file of your own"
EXAMPLES = """
dllm-sd init                                     # asks for what is missing, at a terminal
dllm-sd init --model Qwen/Qwen3-0.6B --data own.jsonl
dllm-sd init --model tiny --data own.csv --method sft --out own.yaml
dllm-sd init --model tiny --data own.jsonl --question q --answer a --grader my_reward.py:score
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--model", type=place, help="folder or hub name of the model, or tiny, or tiny_ar")
    parser.add_argument(
        "--as",
        dest="as_",
        choices=("diffusion", "autoregressive"),
        help="use the model as this kind instead of the kind that it is",
    )
    parser.add_argument("--data", type=place, help="JSON Lines, CSV or Parquet file, or a data set of the hub")
    parser.add_argument("--method", help="named method (dllm-sd list methods); by default one that fits model and data")
    parser.add_argument("--out", type=place, help="the config to write; by default it is named after the data")
    parser.add_argument("--question", metavar="COLUMN", help="column of the questions, if its name is not recognised")
    parser.add_argument("--answer", metavar="COLUMN", help="column of the right answers")
    parser.add_argument("--reference", metavar="COLUMN", help="column of the worked solutions")
    parser.add_argument("--grader", help="how completions are graded (dllm-sd explain task.grader)")
    parser.set_defaults(overrides=[])
