"""Arguments of ``dllm-sd eval``."""

import argparse

from dllm_sd.arguments.values import add_overrides, count, place

HELP = "measure the accuracy of a run or a model on a task"
EXAMPLES = """
dllm-sd eval runs/mine
dllm-sd eval runs/mine --attempts 8 eval.temperature=0.7
dllm-sd eval Qwen/Qwen3-0.6B --task gsm8k --problems 100
dllm-sd eval --compare runs/a/eval/gsm8k runs/b/eval/gsm8k
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "model",
        nargs="?",
        type=place,
        metavar="RUN_OR_MODEL",
        help="a run folder, or a model folder or hub name; this machine decodes, also with another decode.engine",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=place,
        metavar=("A", "B"),
        help="compare two evaluations instead",
    )
    parser.add_argument("--task", help="name of the task; default: the run's own")
    parser.add_argument("--adapter", type=place, metavar="DIR", help="a PEFT adapter to put on the model")
    parser.add_argument("--attempts", type=count, metavar="K", help="attempts at each problem, for pass@k and maj@k")
    parser.add_argument(
        "--problems", "--limit", type=count, metavar="N", help="the first N test problems; default: eval.final_problems"
    )
    parser.add_argument(
        "--out", type=place, help="folder for report.json; default: RUN/eval/TASK of a run, eval/MODEL/TASK of a model"
    )
    add_overrides(parser)
