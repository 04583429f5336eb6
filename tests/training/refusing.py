"""A program for two processes: one of them fails in each command; what both say and return is written down."""

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dllm_sd.cli.main import main
from dllm_sd.errors import InputError, Stopped
from dllm_sd.evaluation import evaluate as evaluation
from dllm_sd.evaluation.recording import Record
from dllm_sd.parallel.processes import close_process_group, on_main, processes, together
from dllm_sd.training import trainer
from dllm_sd.training.log_files import MetricsLog

FULL = OSError(28, "No space left on device", "/full/file")
FAILURES = {"input": InputError("wrong"), "stopped": Stopped("no more"), "full": FULL, "bug": KeyError("x")}
"""What may go wrong on one process; the last is a mistake in the program."""


def failing(error: Exception) -> Callable[..., Any]:
    """A function that raises."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@contextmanager
def faulty(rank: int | None, owner: Any, name: str, action: Callable[..., Any]) -> Iterator[None]:
    """On one process, another function in the place of one."""
    if rank != processes().process_index:
        yield
        return
    with patch.object(owner, name, action):
        yield


def run(arguments: list[str]) -> tuple[int, str]:
    """The exit status of a command and its last sentence."""
    with redirect_stderr(io.StringIO()) as said, redirect_stdout(io.StringIO()):
        status = main(arguments)
    return status, said.getvalue().splitlines()[-1] if said.getvalue() else ""


def mechanism() -> dict[str, Any]:
    """What each process raises for a failure of the main one, and of the other."""
    found: dict[str, Any] = {}
    for name, error in FAILURES.items():
        for way in ("on_main", "together"):
            try:
                if way == "on_main":
                    on_main(failing(error))
                with together():
                    if processes().process_index == 1:
                        raise error
            except Exception as caught:
                found[f"{way} {name}"] = f"{type(caught).__name__}: {caught}"
    found["value"] = on_main(lambda: processes().process_index)
    return found


def commands(folder: Path) -> Iterator[tuple[str, tuple[int, str]]]:
    """Each fault with what a command says of it."""
    small = str(folder / "small.yaml")
    update = trainer.Trainer._update

    def hanging_up(self: trainer.Trainer, number: int) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGHUP)
        return update(self, number)

    def train(config: str, name: str, *more: str) -> tuple[int, str]:
        return run(["train", config, f"run={folder / name}", *more])

    yield "in use", train(small, "locked")
    with faulty(1, trainer, "check_data", failing(InputError("no references"))):
        yield "data", train(small, "data")
    with faulty(0, MetricsLog, "write", failing(FULL)):
        yield "full disk", train(small, "full")
    with faulty(1, trainer.Trainer, "_update", hanging_up):
        yield "hung up", train(small, "run")
    yield "gone on", train(small, "run")
    evaluate = ["eval", str(folder / "run"), "--out", str(folder / "out")]
    with faulty(1, Record, "append", failing(FULL)):
        yield "evaluation", run(evaluate)
    with faulty(0, evaluation, "finish", failing(InputError("incomplete"))):
        yield "its end", run(evaluate)
    yield "evaluated", run(evaluate)


if __name__ == "__main__":
    results = {"mechanism": mechanism(), **dict(commands(Path(sys.argv[1])))}
    (Path(sys.argv[1]) / f"{processes().process_index}.json").write_text(json.dumps(results))
    close_process_group()
