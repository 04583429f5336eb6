"""A critic without fault: a server that corrects every rollout of the tiny reader."""

from collections.abc import Iterator
from contextlib import contextmanager

from tools.lab.makers import corrected
from tools.stub_writer import StubWriter, running


def correction(question: str) -> str:
    """Answer ``puzzle:|solution|trace`` with the corrected trace."""
    puzzle, solution, trace = question.split("|", 2)
    return corrected(puzzle.rstrip(":").replace(" ", ""), solution.replace(" ", ""), trace)


@contextmanager
def running_critic() -> Iterator[str]:
    """Serve the critic, and give its URL."""
    with running(StubWriter(correction)) as server:
        yield server.url
