"""The command line; `arguments/` holds the arguments of each command.

Exit status: 0 done; 2 the input was wrong (one sentence on stderr); 3 `train` finished, but nothing was learnt or the
run collapsed (`report.json` is written, and says why); 130 interrupted after saving; 1 anything else.
"""

import argparse
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from textwrap import indent
from typing import NoReturn

from dllm_sd import __version__
from dllm_sd.arguments import COMMANDS
from dllm_sd.config_files import read_config, stored_config
from dllm_sd.errors import InputError, Stopped, in_short, on_one_line, shortened, shown
from dllm_sd.keys import check_names, nearest
from dllm_sd.overrides import apply_overrides

SETTINGS_OF = {"evaluate": "model", "sample": "model", "serve": "model", "export": "run", "grade": "file"}
"""Commands whose settings change the config of a run or model, and the argument that names it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status."""
    commands = parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow
        import_module("dllm_sd.cli.completion").complete(commands)
    options, arguments_left = commands.parse_known_args(arguments)
    if unknown := [argument for argument in arguments_left if argument.startswith("-") or "=" not in argument]:
        commands.error(_unknown_arguments(unknown))
    if arguments_left and options.overrides is None:
        commands.error(f"this command takes no settings; leave out {shown(arguments_left[0])}")
    options.overrides = [*(options.overrides or ()), *arguments_left]  # key=value pairs that follow an option
    _warn_of_single_process()
    try:
        with _quiet_thread_failures():
            _refuse_misspelt(options)
            command = import_module(f"dllm_sd.cli.{options.command}")  # imported here, since its libraries take seconds
            return command.run(options)
    except InputError as error:
        return _end(str(error), 2)
    except KeyboardInterrupt:
        return _end("interrupted; the same command continues from the last saved update", 130)
    except (FloatingPointError, Stopped) as error:
        return _end(str(error), 1)
    except BrokenPipeError:  # the reader of the output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = "" if error.filename is None else f" {str(error.filename)!r:.200}"
        reason = error.strerror or on_one_line(error)[:200] or type(error).__name__
        return _end(
            f"cannot read or write{where}: {reason}; fix that, and the same command continues from the last saved "
            "update",
            1,
        )


def _unknown_arguments(unknown: Sequence[str]) -> str:
    """What is wrong with arguments that no command has, such as ``--lr 1e-4``."""
    option, _, value = unknown[0].partition("=")
    value = value or next((argument for argument in unknown[1:2] if not argument.startswith("-")), "VALUE")
    name = option.lstrip("-").replace("-", "_")
    if option.startswith("--") and name and (keys := nearest(name, "", [])):
        return f"there is no option {shown(option)}; write settings as key=value, as in {keys[0]}={shortened(value)}"
    return f"unrecognized arguments: {shortened(' '.join(unknown))}"


def _refuse_misspelt(options: argparse.Namespace) -> None:
    """Refuse misspelt keys before libraries are imported, unless somebody has added parts of their own by then."""
    if "dllm_sd.methods" in sys.modules:
        return
    if hasattr(options, "config"):
        tree = read_config(options.config, options.overrides)
    elif options.overrides and (name := getattr(options, SETTINGS_OF.get(options.command, ""), None)):
        tree = {} if options.command == "grade" else stored_config(name)
        own, task = tree.get("task"), getattr(options, "task", None)
        if task is not None and task != (own.get("name") if isinstance(own, dict) else own):
            tree["task"] = {"name": task}
        tree = apply_overrides(tree, options.overrides)
    else:
        return
    if not tree.get("plugins"):
        check_names(tree)


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


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    program = _Parser(
        prog="dllm-sd",
        description="On-policy self-distillation of masked-diffusion and autoregressive language models.",
        epilog="dllm-sd COMMAND --help shows the arguments of a command, and examples.",
    )
    program.add_argument("--version", action="version", version=f"dllm-sd {__version__}")
    commands = program.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        arguments = import_module(f"dllm_sd.arguments.{module}")
        command = commands.add_parser(
            name,
            help=arguments.HELP,
            description=f"{arguments.HELP[0].upper()}{arguments.HELP[1:]}.",
            epilog=f"examples:\n{indent(arguments.EXAMPLES.strip(), '  ')}{getattr(arguments, 'STATUS', '')}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        arguments.add(command)
        command.set_defaults(command=module)
    return program
