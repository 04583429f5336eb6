"""Time limits: the code is interrupted until it ends, and its clean-up is not."""

import signal
import time

import pytest

from dllm_sd.limits import TooLong, limited


def work(seconds: float) -> None:
    """Use the processor for some seconds."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_the_clean_up_after_an_interrupt_is_not_interrupted():
    cleaned = []

    def act() -> None:
        with limited(0.02, 2**30):
            try:
                work(5)
            finally:
                work(0.1)  # many times the interval after which the interrupt is repeated
                cleaned.append(True)

    with pytest.raises(TooLong):
        act()
    assert cleaned
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_code_that_catches_the_first_interrupt_gets_another():
    caught = []

    def act() -> None:
        with limited(0.02, 2**30):
            try:
                work(5)
            except TooLong:
                caught.append(True)
            work(5)

    with pytest.raises(TooLong):
        act()
    assert caught == [True]
