"""Arguments of ``dllm-sd serve``."""

import argparse

from dllm_sd.arguments.values import add_overrides, count, place, port

HELP = "serve a run or a model over HTTP, for trainers and chat clients"
EXAMPLES = """
dllm-sd serve runs/mine --port 8000
MY_KEY=... dllm-sd serve runs/mine --host 0.0.0.0 --api-key-variable MY_KEY
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", type=place, metavar="RUN_OR_MODEL")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    parser.add_argument("--port", type=port, default=8000, help="default 8000; 0 takes a free one")
    parser.add_argument("--task", help="name of the task, for a model without a recipe")
    parser.add_argument("--adapter", type=place, metavar="DIR", help="a PEFT adapter to put on the model")
    parser.add_argument("--name", help="what clients call the model; default: RUN_OR_MODEL")
    parser.add_argument(
        "--api-key-variable", metavar="NAME", help="environment variable with the key clients must send"
    )
    parser.add_argument(
        "--allow-loading", action="store_true", help="let clients load adapters and weights from folders that they name"
    )
    parser.add_argument(
        "--max-completion", type=count, metavar="N", help="most positions of a completion; default 4096"
    )
    parser.add_argument("--max-waiting", type=count, metavar="N", help="most requests that wait; default 1024")
    parser.add_argument(
        "--max-requests",
        type=count,
        metavar="N",
        help="most requests in work at once, others get 503 and Retry-After; default 256",
    )
    parser.add_argument("--max-body", type=count, metavar="KIB", help="most KiB of a request; default 4096")
    add_overrides(parser, example="such as max_prompt=4096 decode.temperature=1")
