"""The decoding thread: slots are shared and refilled, nobody is starved, hanging up frees a slot, nothing leaks."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from dllm_sd.decoding.queue import Job, Queue
from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError
from dllm_sd.serving.refusal import Refusal
from dllm_sd.serving.scheduler import Completion, ExclusiveWork, RequestKind, Scheduler
from dllm_sd.trajectory import left_pad, left_to_right

ONE, OTHER = (RequestKind("weights", Decoding(length=length, batch_size=3)) for length in (32, 64))


class Stepwise:
    """A decoder with slots; a row ends after as many steps as its key says, a step is made when `steps` allows it."""

    def __init__(self) -> None:
        self.steps = threading.Semaphore(0)
        self.runs: list[list[int]] = []
        """The keys of each run, in the order in which they began."""
        self.together = 0
        self.error: Exception | None = None

    @property
    def decoder(self) -> "Stepwise":
        return self

    def complete(self, queue: Queue, settings: Decoding, *, stop_after: Any = None, watch: Any = None) -> None:
        begun: list[int] = []
        self.runs.append(begun)
        rows: dict[Job, int] = {}
        while (jobs := queue.take(settings.batch_size - len(rows))) is not None:
            rows = {job: left for job, left in rows.items() if queue.wanted(job)}
            rows |= {job: job.key for job in jobs}
            begun += [job.key for job in jobs]
            self.together = max(self.together, len(rows))
            if not rows:
                continue
            watch([*rows], torch.zeros(len(rows), settings.length, dtype=torch.int64))
            assert self.steps.acquire(timeout=20)
            if self.error is not None:
                raise self.error
            rows = {job: left - 1 for job, left in rows.items()}
            ended = [job for job, left in rows.items() if left <= 0]
            if ended:
                prompt, tokens = (
                    left_pad([job.prompt for job in ended], 0),
                    torch.ones(len(ended), 1, dtype=torch.int64),
                )
                queue.ended(ended, left_to_right(prompt, tokens, settings.length, end_ids=(1,), pad_id=0))
            rows = {job: left for job, left in rows.items() if left > 0}

    def allow(self, steps: int = 1000) -> None:
        self.steps.release(steps)


Made = tuple[Stepwise, Scheduler]


@pytest.fixture
def made() -> Iterator[Made]:
    stepwise: Any = Stepwise()
    scheduler = Scheduler(stepwise, lambda name: nullcontext(), longest=8, most_waiting=20)
    yield stepwise, scheduler
    stepwise.allow()
    scheduler.stop(20)
    assert not scheduler.thread.is_alive()
    assert not scheduler.running
    assert not scheduler.waiting


def until(holds: Callable[[], bool]) -> None:
    done = threading.Event()
    for _ in range(2000):
        if holds():
            return
        done.wait(0.005)
    raise AssertionError("it never came to that")


def asked(kind: RequestKind, keys: Sequence[int]) -> list[Completion]:
    return [Completion((5, key), key, kind) for key in keys]


def test_each_gets_its_own_completion_and_slots_are_refilled(made: Made):
    stepwise, scheduler = made
    requests = asked(ONE, [5, 1, 1, 1, 1, 1, 1])
    scheduler.submit(requests)
    stepwise.allow()
    for request in requests:
        assert request.result.result(20).prompt_ids.tolist() == [[5, request.key]]
    assert stepwise.together == ONE.settings.batch_size
    assert len(stepwise.runs) == 1


def test_who_comes_later_begins_while_others_are_decoded(made: Made):
    stepwise, scheduler = made
    (first,) = asked(ONE, [1000])
    scheduler.submit([first])
    until(lambda: len(scheduler.running) == 1)
    late = asked(ONE, [1])
    scheduler.submit(late)
    stepwise.allow(20)
    late[0].result.result(20)
    assert not first.result.done()
    assert len(stepwise.runs) == 1
    first.result.cancel()


def test_a_stream_of_equal_requests_starves_nobody(made: Made):
    stepwise, scheduler = made
    scheduler.submit(asked(ONE, [2, 2, 2]))
    until(lambda: len(scheduler.running) == 3)
    (other,) = asked(OTHER, [1])
    scheduler.submit([other])
    later = asked(ONE, [1] * 9)
    scheduler.submit(later)
    item = ExclusiveWork(lambda: len(stepwise.runs))
    scheduler.submit([item])
    stepwise.allow()
    for request in (other, *later):
        request.result.result(20)
    assert stepwise.runs == [[2, 2, 2], [1], [1] * 9]
    assert item.result.result(20) == 3  # in its turn, when nothing is decoded


def test_equal_requests_that_wait_together_share_a_run_whoever_stands_between(made: Made):
    stepwise, scheduler = made
    mixed = [one for pair in zip(asked(ONE, [1] * 8), asked(OTHER, [2] * 8), strict=True) for one in pair]
    blocker = threading.Event()
    scheduler.submit([ExclusiveWork(blocker.wait)])
    scheduler.submit(mixed)
    blocker.set()
    stepwise.allow()
    for request in mixed:
        request.result.result(20)
    assert stepwise.runs == [[1] * 8, [2] * 8]


def test_who_hangs_up_frees_a_slot_or_a_place_in_the_queue(made: Made):
    stepwise, scheduler = made
    running, waiting = asked(ONE, [1000] * 3), asked(ONE, [1, 1])
    scheduler.submit(running)
    until(lambda: len(scheduler.running) == 3)
    scheduler.submit(waiting)
    waiting[0].result.cancel()
    assert len(scheduler.waiting) == 1
    running[1].result.cancel()
    stepwise.allow(20)
    waiting[1].result.result(20)
    assert [request.result.done() for request in running] == [False, True, False]
    for request in running:
        request.result.cancel()
    stepwise.allow()
    until(lambda: not scheduler.running)


def test_when_nobody_waits_any_more_decoding_stops_at_the_next_step(made: Made):
    stepwise, scheduler = made
    requests = asked(ONE, [10**9] * 3)
    scheduler.submit(requests)
    until(lambda: len(scheduler.running) == 3)
    for request in requests:
        request.result.cancel()
    stepwise.allow(2)
    until(lambda: not scheduler.running)


def test_an_error_ends_its_run_only(made: Made, capfd: pytest.CaptureFixture[str]):
    stepwise, scheduler = made
    for error, status in (
        (InputError("decode.length is odd; make it even"), 422),
        (RuntimeError("out of memory"), 500),
    ):
        stepwise.error = error
        failing = asked(ONE, [3, 3])
        scheduler.submit(failing)
        stepwise.allow(1)
        for request in failing:
            refusal = request.result.exception(20)
            assert isinstance(refusal, Refusal)
            assert refusal.status == status
            assert "out of memory" not in str(refusal)
        stepwise.error = None
        (fine,) = asked(ONE, [1])
        scheduler.submit([fine])
        stepwise.allow(1)
        assert fine.result.result(20).size == 1
    assert "out of memory" in capfd.readouterr().err  # for whoever runs the server


def test_weights_that_are_gone_fail_the_request_and_not_the_thread(made: Made):
    stepwise, scheduler = made
    stepwise.allow()

    def gone(name: str) -> Any:
        raise Refusal(404, f"no {name}")

    kept, scheduler.applied = scheduler.applied, gone
    (request,) = asked(ONE, [1])
    scheduler.submit([request])
    assert "no weights" in str(request.result.exception(20))
    scheduler.applied = kept
    (request,) = asked(ONE, [1])
    scheduler.submit([request])
    assert request.result.result(20).size == 1


def test_a_request_beyond_those_that_may_wait_is_refused_whole(made: Made):
    _, scheduler = made
    scheduler.submit(asked(ONE, [1000] * 3))
    until(lambda: len(scheduler.running) == 3)
    waiting = asked(ONE, [1] * 18)
    scheduler.submit(waiting)
    with pytest.raises(Refusal, match="18 requests wait already, of 20") as refused:
        scheduler.submit(asked(ONE, [1] * 3))
    assert (refused.value.status, refused.value.retry_after) == (503, 1)
    assert len(scheduler.waiting) == 18
    waiting[0].result.cancel()
    scheduler.submit(asked(ONE, [1] * 3))


def test_closing_refuses_what_waits_and_lets_end_what_runs(made: Made):
    stepwise, scheduler = made
    running, waiting = asked(ONE, [2] * 3), asked(ONE, [1] * 2)
    scheduler.submit(running)
    until(lambda: len(scheduler.running) == 3)
    scheduler.submit(waiting)
    scheduler.close(60)
    assert [type(request.result.exception(20)) for request in waiting] == [Refusal] * 2
    with pytest.raises(Refusal, match="shutting down"):
        scheduler.submit(asked(ONE, [1]))
    with pytest.raises(Refusal, match="shutting down"), scheduler.pause():
        pass
    stepwise.allow()
    assert all(request.result.result(20).size == 1 for request in running)
    until(lambda: not scheduler.thread.is_alive())


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_closing_ends_what_runs_after_a_step(made: Made, seconds: float):
    stepwise, scheduler = made
    requests = asked(ONE, [10**9] * 3)
    scheduler.submit(requests)
    until(lambda: len(scheduler.running) == 3)
    stepwise.allow(5)
    scheduler.close(seconds)
    until(lambda: scheduler.stopping)
    stepwise.allow()
    assert all(isinstance(request.result.exception(20), Refusal) for request in requests)


def test_the_thread_stands_still_while_it_is_asked_to(made: Made):
    stepwise, scheduler = made
    for kind in (ONE, OTHER):  # idle, and between two steps
        with scheduler.pause() as still:
            stepwise.allow(1)
            still.result(20)
            (request,) = asked(kind, [1000 if kind == ONE else 1])
            scheduler.submit([request])  # nobody waits for a lock that the thread holds
            with pytest.raises(TimeoutError):
                request.result.result(0.05)
        if kind == ONE:
            until(lambda: len(scheduler.running) == 1)
            request.result.cancel()
    stepwise.allow()
    assert request.result.result(20).size == 1
