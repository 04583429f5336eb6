"""Bounds on the time and the memory of work that somebody else wrote, such as a chat template."""

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_STATM = Path("/proc/self/statm")


class TooLong(BaseException):
    """The work took more processor time than it was given; no ``except Exception`` inside it catches this."""


@contextmanager
def limited(seconds: float, memory: int) -> Iterator[None]:
    """Inside, `TooLong` is raised after ``seconds`` of this process's time, MemoryError after ``memory`` bytes more.

    The time counts on the main thread only, which alone can be interrupted; the memory counts on Linux only, and is
    that of all threads together.

    Raises:
        TooLong: if the time is over; numbers of millions of digits are interrupted too.
        MemoryError: from whatever asks for too much.
    """
    with _less_memory(memory):
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = signal.signal(signal.SIGVTALRM, _too_long)
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds / 4)  # again, should somebody swallow the first
            yield
        finally:
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                signal.signal(signal.SIGVTALRM, former)


@contextmanager
def _less_memory(more: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if not _STATM.exists():
        yield
        return
    wanted = int(_STATM.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + more
    bounds = [bound for bound in (soft, hard, wanted) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _too_long(signum: int, frame: FrameType | None) -> None:
    raise TooLong
