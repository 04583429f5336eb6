"""Bounds the time and the memory of foreign code, such as a chat template."""

import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_STATM = Path("/proc/self/statm")


class TooLong(BaseException):
    """The code took more processor time than allowed; it is a BaseException, so that the code does not catch it."""


@contextmanager
def limited(seconds: float, memory: int) -> Iterator[None]:
    """Context that is limited to ``seconds`` of processor time and ``memory`` additional bytes.

    The time is limited on the main thread only, since no other thread can be interrupted. The memory is limited on
    Linux only, for all threads together.

    Raises:
        TooLong: if the time is over, even during arithmetic with millions of digits.
        MemoryError: if the code requests too much memory.
    """
    with _limited_memory(memory):
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = signal.signal(signal.SIGVTALRM, _too_long)
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds / 4)  # repeated, in case the first is caught
            yield
        finally:
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                signal.signal(signal.SIGVTALRM, former)


@contextmanager
def _limited_memory(additional: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if not _STATM.exists():
        yield
        return
    limit = int(_STATM.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + additional
    bounds = [bound for bound in (soft, hard, limit) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _too_long(signum: int, frame: FrameType | None) -> None:
    """Interrupt the code, but not the handling of a former interrupt, which would leave contexts open."""
    if not isinstance(sys.exc_info()[1], TooLong):
        raise TooLong
