"""Runs commands in forked children, bounded in time and memory, without importing the libraries each time."""

import os
import resource
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from ctypes import CDLL
from dataclasses import dataclass
from pathlib import Path

import torch

import dllm_sd.cli.compare
import dllm_sd.cli.evaluate
import dllm_sd.cli.grade
import dllm_sd.cli.train
import dllm_sd.export.exporting
import dllm_sd.reports.memory
import dllm_sd.reports.tables
import dllm_sd.training.peers  # noqa: F401  (imported here once, for all children)
from dllm_sd.cli.main import main

torch.set_num_threads(1)

EXTRA_MEMORY = 4 * 2**30
"""Bytes of address space that a child may take in addition to what it starts with."""


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    status: int | None
    """Exit status; negative for a signal, None if the child was killed after its time limit."""
    out: str
    err: str
    seconds: float
    memory: int
    """Peak resident memory in bytes."""

    @property
    def sentence(self) -> str | None:
        """The message that the command ended with; None if it ended in another way."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        if self.status not in (1, 2) or not lines or "Traceback" in self.err or not lines[-1].startswith("dllm-sd: "):
            return None
        return lines[-1].removeprefix("dllm-sd: ")

    def __str__(self) -> str:
        lines = [line for line in self.err.splitlines() if line.strip()]
        how = "hang" if self.status is None else f"status {self.status}"
        return f"{how}{' with a traceback' if 'Traceback' in self.err else ''}: {lines[-1][:300] if lines else ''}"


def die_with_parent() -> None:
    """Let the system kill this process when its parent ends for any reason (Linux)."""
    CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Child:
    """A function in a fork of this process; its result is the exit status."""

    def __init__(self, act: Callable[[], int], folder: Path) -> None:
        """Fork, and start the function in ``folder``."""
        self.started = time.perf_counter()
        pipes = [os.pipe() for _ in range(2)]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            die_with_parent()
            for number, (_, end) in enumerate(pipes, 1):
                os.dup2(end, number)
            os._exit(_run(act, folder))
        for _, end in pipes:
            os.close(end)
        self.ends = [end for end, _ in pipes]

    def wait(self, seconds: float = 60) -> Ended:
        """Read the output until the child ends; it is killed after ``seconds``."""
        output, deadline = dict.fromkeys(self.ends, b""), time.perf_counter() + seconds
        with selectors.DefaultSelector() as ready:
            for end in self.ends:
                ready.register(end, selectors.EVENT_READ)
            while ready.get_map() and (left := deadline - time.perf_counter()) > 0:
                for key, _ in ready.select(left):
                    piece = os.read(key.fd, 2**16)
                    output[key.fd] += piece
                    if not piece:
                        ready.unregister(key.fd)
            hung = bool(ready.get_map())
        if hung:
            os.kill(self.pid, signal.SIGKILL)
        _, code, usage = os.wait4(self.pid, 0)
        for end in self.ends:
            os.close(end)
        out, err = (output[end].decode(errors="replace") for end in self.ends)
        status = None if hung else os.waitstatus_to_exitcode(code)
        return Ended(status, out, err, time.perf_counter() - self.started, usage.ru_maxrss * 1024)


def run(
    arguments: Sequence[str], folder: Path, before: Callable[[], object] = lambda: None, seconds: float = 60
) -> Ended:
    """Run ``dllm-sd`` with these arguments in ``folder``, after ``before`` in the same process."""
    return Child(command(arguments, before), folder).wait(seconds)


def command(arguments: Sequence[str], before: Callable[[], object] = lambda: None) -> Callable[[], int]:
    """``dllm-sd`` as a function for a `Child`."""

    def act() -> int:
        before()
        return main(list(arguments))

    return act


def _run(act: Callable[[], int], folder: Path) -> int:
    try:
        os.chdir(folder)
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + EXTRA_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        status = act()
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status
