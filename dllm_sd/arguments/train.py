"""Arguments of ``dllm-sd train``."""

import argparse

from dllm_sd.arguments.values import add_overrides, place

HELP = "train a config (a path or a shipped name), or continue a stopped run"
EXAMPLES = """
dllm-sd train quickstart
dllm-sd train quickstart seed=5 updates=12 optim.lr=1e-4 run=runs/mine
dllm-sd train mine.yaml method=opsd method.rollout.attempts=4
dllm-sd train runs/mine                          # continue a run
accelerate launch -m dllm_sd train mine.yaml     # several GPUs
"""
STATUS = """

exit status:
  0 done; 1 the run cannot go on; 2 the input was wrong; 130 interrupted after saving
  3 finished, but nothing was learnt, or dev accuracy collapsed (`outcome` in report.json)
"""
"""What ``--help`` ends with."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("config", type=place, metavar="CONFIG", help="a file, a shipped config, or a run to continue")
    add_overrides(parser, example="settings, such as optim.lr=1e-4 method=d_opsd")
