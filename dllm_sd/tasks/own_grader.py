"""Graders that may take any time: a function in a file of the user's own, and regular expressions.

They run in a process of their own, one for each trainer process, which is limited in time and memory and started again
when it hangs or crashes.
"""

import atexit
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from dllm_sd.errors import InputError, Stopped
from dllm_sd.files.writing import names_file
from dllm_sd.tasks.task import Grade

_PROGRAM = Path(__file__).with_name("grader_worker.py")
_START = 120.0
"""Seconds in which the user's file must be imported."""
_PATIENCE = 20
"""Completions after which a grader that failed on all of them ends the run."""
_LONGEST_REPLY = 2**20


class Failed(Exception):
    """The worker gave no answer; the message says why."""


class Worker:
    """A process that grades; safe to use from several threads, which then wait for each other."""

    def __init__(self, file: str, function: str, seconds: float, memory: int) -> None:
        """Start nothing yet.

        Args:
            file: the user's file; empty for regular expressions.
            function: the name of the function in it.
            seconds: wall-clock time of one answer.
            memory: MiB that the process may use beyond those of Python.
        """
        self.file, self.function, self.seconds, self.memory = file, function, seconds, memory
        self.calls = self.failures = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: int | None = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"task.grader {self.file}:{self.function}" if self.file else "task.pattern"

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the reply to a request.

        Raises:
            Failed: if there is none in time, the process ended, or the function raised an exception.
            InputError: if the user's file cannot be imported, or has no such function.
        """
        with self._lock:
            process = self._started()
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
                process.stdin.flush()
                reply = self._reply(process, self.seconds)
            except (Failed, OSError) as error:
                self._end()
                raise Failed(str(error) if isinstance(error, Failed) else _CRASHED) from None
        if "error" in reply:
            raise Failed(str(reply["error"]))
        return reply

    def grade(self, fields: Mapping[str, Any], completion: str, threshold: float) -> Grade:
        """Grade with the user's function; a completion on which it fails is wrong, and the first one is reported.

        Raises:
            InputError: as `ask`.
            Stopped: if it fails on each of the first completions.
        """
        self.calls += 1
        try:
            score, parsed = self.score(fields, completion)
        except Failed as error:
            self.failures += 1
            if self.failures == self.calls == _PATIENCE:
                raise Stopped(
                    f"{self.name} failed on each of the first {_PATIENCE} completions ({error}); correct it, and the "
                    "same command continues"
                ) from None
            if self.failures == 1:
                print(
                    f"dllm-sd: {self.name} failed on a completion ({error}); where it fails, a completion is wrong and "
                    "is counted (grader_failed)",
                    file=sys.stderr,
                )
            return Grade(False, 0.0, None, failed=True)
        return Grade(score >= threshold, score, parsed)

    def score(self, fields: Mapping[str, Any], completion: str) -> tuple[float, str]:
        """Return the score that the function gives, and the answer that it read, by default the whole completion."""
        reply = self.ask({"problem": dict(fields), "completion": completion})
        score, parsed = reply.get("score"), reply.get("parsed")
        if not isinstance(score, float) or not math.isfinite(score) or not 0 <= score <= 1:
            raise Failed(f"its score is {score!r:.40}, not a number from 0 to 1")
        return score, " ".join(completion.split()) if parsed is None else str(parsed)

    def close(self) -> None:
        """End the process; the next request starts another."""
        with self._lock:
            self._end()

    __del__ = close

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        if self.file and not names_file(self.file):
            raise InputError(f"{self.name}: there is no such file; name one, as in task.grader=my_reward.py:score")
        held, self._lifeline = os.pipe()
        limits = (str(self.seconds), str(self.memory), str(held))
        file = str(Path(self.file).absolute()) if self.file else ""
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM), file, self.function, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(held,),
            start_new_session=True,
        )
        os.close(held)
        try:
            ready = self._reply(process, _START)
        except Failed as error:
            ready = {"error": str(error)}
        if "error" in ready:
            self._end()
            raise InputError(f"{self.name} cannot be imported ({ready['error']}); correct the file")
        return process

    def _reply(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
        assert process.stdout is not None
        line, end = b"", time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise Failed(f"it took longer than {seconds:g} s (task.grader_seconds)")
                piece = os.read(process.stdout.fileno(), 2**16)
                line += piece
                if not piece or len(line) > _LONGEST_REPLY:
                    raise Failed(_CRASHED)
        return json.loads(line)

    def _end(self) -> None:
        process, lifeline = self._process, self._lifeline
        self._process = self._lifeline = None
        if lifeline is not None:
            os.close(lifeline)
        if process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                with suppress(OSError):
                    assert stream is not None
                    stream.close()


_CRASHED = "its process ended, or needed more memory than task.grader_memory"


@cache
def worker(file: str, function: str, seconds: float, memory: int) -> Worker:
    """Return the worker of this process for a function; ``file`` is empty for regular expressions."""
    made = Worker(file, function, seconds, memory)
    atexit.register(made.close)
    return made


def file_and_function(grader: str) -> tuple[str, str] | None:
    """Split ``FILE.py:FUNCTION``; None if the text is not of that form."""
    file, colon, function = grader.rpartition(":")
    return (file, function) if colon and file.endswith(".py") and function.isidentifier() else None


def search(pattern: str, text: str, seconds: float, memory: int) -> str | None:
    """Return what the last match of a pattern in ``text`` holds; None without a match, or if it takes too long."""
    try:
        return worker("", "", seconds, memory).ask({"pattern": pattern, "text": text})["parsed"]
    except Failed:
        return None
