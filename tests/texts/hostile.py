"""Texts that are made to be slow to read, and how long that takes."""

import time
from collections.abc import Callable, Iterator
from random import Random

LENGTH = 100_000


def hostile_texts(unit: str) -> Iterator[str]:
    """A hundred thousand characters each: the unit again and again, spaced out, and once before much else."""
    yield (unit * LENGTH)[:LENGTH]
    yield ((unit + " ") * LENGTH)[:LENGTH]
    yield unit + " " * LENGTH + "."
    yield unit + "a" * LENGTH + "\n"


def random_texts(characters: str, *words: str) -> Iterator[str]:
    """Short texts of these characters and words, and a long one."""
    random = Random(7)
    pieces = [*characters, *words]
    for _ in range(300):
        yield "".join(random.choices(pieces, k=random.randrange(40)))
    yield "".join(random.choices(pieces, k=LENGTH // 2))[:LENGTH]


def seconds(call: Callable[[], object]) -> float:
    """The processor time of a call, the least of up to three, so that a busy machine changes nothing."""
    least = float("inf")
    for _ in range(3):
        start = time.process_time()
        call()
        least = min(least, time.process_time() - start)
        if least < 0.02:
            break
    return least
