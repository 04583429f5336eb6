"""A critic without fault: a server that corrects every rollout of the tiny reader."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["correction", "running_critic", "word_tokenizer"]
sys.path.insert(0, str(Path(__file__).parents[1]))  # the makers of tiny models import each other from their folder

from make_tiny_asset import word_tokenizer
from make_tiny_reader import corrected
from stub_writer import StubWriter, running


def correction(question: str) -> str:
    """Answer ``puzzle:|solution|trace`` with the corrected trace."""
    puzzle, solution, trace = question.split("|", 2)
    return corrected(puzzle.rstrip(":").replace(" ", ""), solution.replace(" ", ""), trace)


@contextmanager
def running_critic() -> Iterator[str]:
    """Serve the critic, and give its URL."""
    with running(StubWriter(correction)) as server:
        yield server.url
