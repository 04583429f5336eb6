"""The command line: ``dllm-sd train | eval | grade | sample | serve | show | export``.

Exit status: 0 done; 2 the input was wrong (one sentence on stderr); 130 interrupted after saving; 1 anything else.
"""

import argparse
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, NoReturn, get_args

from dllm_sd.errors import InputError, Stopped, in_short, on_one_line, shortened, shown
from dllm_sd.files.writing import at_home
from dllm_sd.ranges import Size, check


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status."""
    parser = _parser()
    options, arguments_left = parser.parse_known_args(arguments)
    if unknown := [argument for argument in arguments_left if argument.startswith("-") or "=" not in argument]:
        parser.error(f"unrecognized arguments: {shortened(' '.join(unknown))}")
    options.overrides += arguments_left  # key=value pairs that follow an option
    _warn_of_single_process()
    try:
        with _quiet_thread_failures():
            command = import_module(f"dllm_sd.cli.{options.command}")  # imported here, since its libraries take seconds
            return command.run(options)
    except InputError as error:
        return _end(str(error), 2)
    except KeyboardInterrupt:
        return _end("interrupted; the same command goes on from the last saved update", 130)
    except (FloatingPointError, Stopped) as error:
        return _end(str(error), 1)
    except BrokenPipeError:  # the reader of the output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = "" if error.filename is None else f" {str(error.filename)!r:.200}"
        reason = error.strerror or on_one_line(error)[:200] or type(error).__name__
        return _end(
            f"cannot read or write{where}: {reason}; fix that, and the same command goes on from the last saved update",
            1,
        )


def _end(sentence: str, status: int) -> int:
    """Print the last message, to a terminal that may be gone, and return the exit status."""
    with suppress(OSError):
        print(f"dllm-sd: {sentence}", file=sys.stderr)
    return status


@contextmanager
def _quiet_thread_failures() -> Iterator[None]:
    """Context in which threads print no traceback of an `OSError`; TensorBoard's thread passes it to the main one."""
    former = threading.excepthook

    def report(failure: threading.ExceptHookArgs) -> None:
        if not issubclass(failure.exc_type, OSError):
            former(failure)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = former


def close_process_group() -> None:
    """Close the process group; a process that exits while its threads run is sometimes aborted."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _warn_of_single_process() -> None:
    """Warn about `accelerate launch --cpu --num_processes N`, which starts a single process without a warning."""
    if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ and "RANK" not in os.environ:
        print(
            "dllm-sd: accelerate launch --cpu started a single process; for several on the CPU use "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N",
            file=sys.stderr,
        )


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command in one sentence."""

    def error(self, message: str) -> NoReturn:
        print(f"dllm-sd: {in_short(message)}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def _size(text: str) -> int:
    """Parse a count."""
    try:
        check(Size, int(text), "it")
    except ValueError as error:
        most = get_args(Size)[1].most
        raise argparse.ArgumentTypeError(f"give a whole number from 1 to {most}, not {shown(text)}") from error
    return int(text)


def _port(text: str) -> int:
    """A port on the command line."""
    if not text.isascii() or not text.isdigit() or int(text[:6]) > 65535:
        raise argparse.ArgumentTypeError(f"give a whole number from 0 to 65535, not {shown(text)}")
    return int(text)


def _place(text: str) -> str:
    """Parse a path."""
    try:
        if not text:
            raise InputError("a path is empty; name a file or a folder")
        return at_home(text, "the path")
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dllm-sd", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a config (a path or a shipped name); continues a stopped run")
    train.add_argument("config", type=_place)
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.set_defaults(command="train")

    evaluate = commands.add_parser("eval", help="accuracy of a run or a model on a task")
    evaluate.add_argument("model", nargs="?", type=_place, metavar="RUN_OR_MODEL")
    evaluate.add_argument(
        "--compare",
        nargs=2,
        type=_place,
        metavar=("A", "B"),
        help="instead: compare two evaluations",
    )
    evaluate.add_argument("--task", help="name of the task; default: the run's own")
    evaluate.add_argument("--adapter", type=_place, metavar="DIR", help="a PEFT adapter to put on the model")
    evaluate.add_argument("--attempts", type=_size, metavar="K", help="attempts at each problem, for pass@k and maj@k")
    evaluate.add_argument(
        "--out", type=_place, help="folder for report.json; default: eval/TASK, in the run folder if it is a run"
    )
    evaluate.add_argument("overrides", nargs="*", metavar="key=value")
    evaluate.set_defaults(command="evaluate")

    grade = commands.add_parser("grade", help="grade generations made elsewhere")
    grade.add_argument(
        "file", type=_place, metavar="FILE", help=".jsonl or .jsonl.gz; a line: generation, the task's fields"
    )
    grade.add_argument("--task", required=True, help="name of the task")
    grade.add_argument("--mode", help="default, or compatible: the verdicts of the published parsers, quirks included")
    grade.add_argument(
        "--out", type=_place, metavar="DIR", help="for report.json and graded.jsonl; default: FILE_graded beside it"
    )
    grade.add_argument("overrides", nargs="*", metavar="task.key=value")
    grade.set_defaults(command="grade")

    sample = commands.add_parser("sample", help="watch a prompt being denoised")
    sample.add_argument("model", type=_place, metavar="RUN_OR_MODEL")
    sample.add_argument("prompt")
    sample.add_argument("--task", help="name of the task, for a model without a recipe")
    sample.add_argument("overrides", nargs="*", metavar="key=value")
    sample.set_defaults(command="sample")

    _add_serve(commands)
    show = commands.add_parser("show", help="the resolved config, its method, the memory it needs, a prompt")
    show.add_argument("config", type=_place)
    show.add_argument("overrides", nargs="*", metavar="key=value")
    show.add_argument("--processes", type=_size, default=1, help="processes for the memory estimate")
    show.add_argument("--sharded", action="store_true", help="estimate for FSDP2 instead of DDP")
    show.set_defaults(command="show")

    export = commands.add_parser(
        "export", help="a run's weights for other programs: adapter, native or original format"
    )
    export.add_argument("run", type=_place, metavar="RUN")
    export.add_argument("--to", required=True, choices=("peft", "merged", "original"))
    export.add_argument("folder", type=_place, metavar="DIR", help="must be empty or not exist")
    export.add_argument("--weights", choices=("best", "last"), default="best", help="default: best on the dev split")
    export.add_argument("--push", metavar="REPO", help="also upload DIR to this repository of the Hugging Face hub")
    export.add_argument("overrides", nargs="*", metavar="key=value")
    export.set_defaults(command="export")
    return parser


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser("serve", help="a run or a model behind HTTP, for trainers and chat clients")
    serve.add_argument("model", type=_place, metavar="RUN_OR_MODEL")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    serve.add_argument("--port", type=_port, default=8000, help="default 8000; 0 takes a free one")
    serve.add_argument("--task", help="name of the task, for a model without a recipe")
    serve.add_argument("--adapter", type=_place, metavar="DIR", help="a PEFT adapter to put on the model")
    serve.add_argument("--name", help="what clients call the model; default: RUN_OR_MODEL")
    serve.add_argument("--api-key-variable", metavar="NAME", help="environment variable with the key clients must send")
    serve.add_argument(
        "--allow-loading", action="store_true", help="let clients load adapters and weights from folders that they name"
    )
    serve.add_argument("--max-completion", type=_size, metavar="N", help="most positions of a completion; default 4096")
    serve.add_argument("--max-waiting", type=_size, metavar="N", help="most requests that wait; default 1024")
    serve.add_argument("--max-body", type=_size, metavar="KIB", help="most KiB of a request; default 4096")
    serve.add_argument("overrides", nargs="*", metavar="key=value", help="such as max_prompt=4096 decode.temperature=1")
    serve.set_defaults(command="serve")
