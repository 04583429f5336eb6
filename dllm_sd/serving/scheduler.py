"""One thread that decodes for many clients: requests begin in free slots while others are being decoded.

Requests with equal weights and settings share a run of the decoder. Those that arrive later are let in as slots
become free, until a request of another kind waits: then the run is closed to requests that came after that one, so that
no stream of equal requests can starve it. What does not decode, such as loading weights and scoring given text, is
`ExclusiveWork`: it has its turn in the same order, while nothing is decoded.
"""

import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from threading import Condition, Event, Thread
from time import monotonic
from typing import Any

from torch import Tensor

from dllm_sd.decoding.queue import Job
from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError
from dllm_sd.policies.policy import Policy
from dllm_sd.serving.refusal import Refusal
from dllm_sd.trajectory import StopAfter, Trajectory

CLOSING = "the server is shutting down; ask another one, or this one when it runs again"


@dataclass(frozen=True)
class RequestKind:
    """What requests of one run of the decoder have in common."""

    weights: str
    settings: Decoding
    stop_after: StopAfter | None = None


@dataclass(eq=False)
class Completion:
    """One completion that a client waits for. Cancelling `result` frees its slot."""

    prompt: Sequence[int]
    key: int
    kind: RequestKind
    grown: Callable[[list[int]], None] | None = None
    """Called on the decoding thread before every step, with the completion side of the canvas ``[l]``."""
    result: "Future[Trajectory]" = field(default_factory=Future)
    number: int = 0
    """Its place in the order of arrival."""


@dataclass(eq=False)
class ExclusiveWork:
    """Work that needs the weights but does not decode."""

    work: Callable[[], Any]
    result: "Future[Any]" = field(default_factory=Future)
    number: int = 0
    kind: None = None


class _Abandoned(Exception):
    """Nobody waits any more for what is being decoded."""


class Scheduler:
    """The decoding thread, and the requests that wait for it."""

    def __init__(
        self,
        policy: Policy,
        applied: Callable[[str], AbstractContextManager[None]],
        *,
        longest: int,
        most_waiting: int,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Start the thread.

        Args:
            policy: whose decoder is used.
            applied: puts the weights of a name in place for a while.
            longest: tokens of the longest prompt that will be submitted.
            most_waiting: requests that may wait for a slot.
            around: entered once on the decoding thread, such as autocast.
        """
        self.policy, self.applied, self.longest, self.most_waiting = policy, applied, longest, most_waiting
        self.around = around
        self.changed = Condition()
        self.waiting: list[Completion | ExclusiveWork] = []
        self.running: dict[tuple[int, ...], Completion] = {}
        self.closing, self._end = False, math.inf
        self.pauses: list[tuple[Future[None], Event]] = []
        self.count = 0
        self.thread = Thread(target=self._work, name="decoding", daemon=True)
        self.thread.start()

    def submit(self, asked: Sequence[Completion | ExclusiveWork]) -> None:
        """Let all of some requests wait for their turn, or none.

        Raises:
            Refusal: if too many wait, or the server is shutting down.
        """
        with self.changed:
            self._check_open()
            self.waiting = [one for one in self.waiting if not one.result.cancelled()]
            if len(self.waiting) + len(asked) > self.most_waiting:
                raise Refusal(
                    503, f"{len(self.waiting)} requests wait already, of {self.most_waiting}; ask again later", 1
                )
            for one in asked:
                self.count += 1
                one.number = self.count
            self.waiting += asked
            self.changed.notify_all()
        for one in asked:
            one.result.add_done_callback(self._dropped)

    @contextmanager
    def pause(self) -> Iterator["Future[None]"]:
        """Let the decoding thread stand still between two steps, as soon as the future that is yielded is done.

        Raises:
            Refusal: if the server is shutting down.
        """
        still, resume = Future[None](), Event()
        with self.changed:
            self._check_open()
            self.pauses.append((still, resume))
            self.changed.notify_all()
        try:
            yield still
        finally:
            resume.set()

    def _check_open(self) -> None:
        if self.closing or not self.thread.is_alive():
            raise Refusal(503, CLOSING, retry_after=5)

    def close(self, seconds: float) -> None:
        """Refuse new requests, and those that wait; what runs goes on, and is refused if it takes more ``seconds``."""
        with self.changed:
            self.closing, self._end = True, min(self._end, monotonic() + seconds)
            refused, self.waiting = self.waiting, []
            self.changed.notify_all()
        for one in refused:
            _fail(one, Refusal(503, CLOSING, retry_after=5))

    def stop(self, seconds: float) -> None:
        """Close, end what runs after the step that is being computed, and wait some seconds for the thread."""
        self.close(0)
        self.thread.join(seconds)

    @property
    def stopping(self) -> bool:
        """Whether nothing goes on."""
        return monotonic() >= self._end

    def _dropped(self, result: "Future[Any]") -> None:
        if result.cancelled():
            with self.changed:
                self.waiting = [one for one in self.waiting if one.result is not result]
                self.changed.notify_all()

    def _work(self) -> None:
        with self.around():
            while (first := self._next()) is not None:
                if isinstance(first, ExclusiveWork):
                    self._do(first)
                else:
                    self._decode(first)
            self.stand_still()  # for who asked before the scheduler closed

    def _next(self) -> Completion | ExclusiveWork | None:
        """Wait for the request whose turn it is, and take it; None when the server stops."""
        while True:
            self.stand_still()
            with self.changed:
                if self.waiting:
                    return self.waiting.pop(0)
                if self.closing:
                    return None
                if not self.pauses:
                    self.changed.wait()

    def _do(self, item: ExclusiveWork) -> None:
        if item.result.cancelled():
            return
        try:
            done = item.work()
        except Exception as error:
            _fail(item, _as_refusal(error))
        else:
            with suppress(InvalidStateError):  # nobody waits any more
                item.result.set_result(done)

    def _decode(self, first: Completion) -> None:
        """Run the decoder for a request, and for all of its kind that come along."""
        kind = first.kind
        run = _Run(self, first)
        try:
            with self.applied(kind.weights):
                watch = None if kind.settings.continuous else run.watch
                self.policy.decoder.complete(run, kind.settings, stop_after=kind.stop_after, watch=watch)
        except _Abandoned:
            pass
        except Exception as error:
            run.fail(_as_refusal(error))
        run.fail(Refusal(503, CLOSING, retry_after=5))

    def stand_still(self) -> None:
        """Wait until the threads that asked for a pause are done; called between steps, without the lock."""
        due, self.pauses = self.pauses, []  # those that come meanwhile wait for the next step, which they cannot starve
        for still, resume in due:
            with suppress(InvalidStateError):
                still.set_result(None)
            resume.wait()


class _Run:
    """The queue of one run of the decoder."""

    patience: int | None = None

    def __init__(self, scheduler: Scheduler, first: Completion) -> None:
        self.scheduler, self.kind, self.first = scheduler, first.kind, [first]
        self.longest, self.most = scheduler.longest, first.kind.settings.batch_size
        self.begun = scheduler.count
        """The last request that had come when the run began."""
        self.last: int | None = None
        """The last request that is let in, once one of another kind waits."""

    def take(self, room: int) -> list[Job] | None:
        """Return the jobs that begin now; wait while there is nothing to do, and end when another kind has its turn."""
        scheduler = self.scheduler
        while True:
            scheduler.stand_still()
            with scheduler.changed:
                if scheduler.stopping:
                    return None
                if jobs := self._admit(room):
                    return jobs
                if scheduler.running:
                    return []
                if scheduler.closing or scheduler.waiting:
                    return None
                if not scheduler.pauses:
                    scheduler.changed.wait()

    def _admit(self, room: int) -> list[Job]:
        scheduler = self.scheduler
        others = [one.number for one in scheduler.waiting if one.kind != self.kind]
        if self.last is None and others:
            self.last = max(others[0], self.begun)
        fitting = [
            one
            for one in scheduler.waiting
            if isinstance(one, Completion) and one.kind == self.kind and (self.last is None or one.number <= self.last)
        ]
        admitted = [one for one in (self.first + fitting)[:room] if not one.result.cancelled()]
        taken = {one.number for one in admitted}
        self.first = []
        scheduler.waiting = [one for one in scheduler.waiting if one.number not in taken]
        scheduler.running.update({(one.number,): one for one in admitted})
        return [Job((one.number,), one.prompt, one.key) for one in admitted]

    def wanted(self, job: Job) -> bool:
        """Return whether the client still waits."""
        with self.scheduler.changed:
            request = self.scheduler.running.get(job.name)
            if request is None or not request.result.cancelled():
                return request is not None
            del self.scheduler.running[job.name]
            return False

    def ended(self, jobs: Sequence[Job], trajectory: Trajectory) -> None:
        """Give each client its completion."""
        for job, single in zip(jobs, trajectory.unstack(), strict=True):
            with self.scheduler.changed:
                request = self.scheduler.running.pop(job.name, None)
            if request is not None:
                with suppress(InvalidStateError):  # it hung up
                    request.result.set_result(single)

    def abandon(self, error: BaseException) -> None:
        """No other process has a share in the queue; `fail` tells the clients."""

    def watch(self, jobs: Sequence[Job | None], tokens: Tensor) -> None:
        """Show clients how their canvases grow; stop when nobody waits for any of them."""
        self.scheduler.stand_still()
        requests = [job and self.scheduler.running.get(job.name) for job in jobs]
        present = [request for request in requests if request is not None]
        if self.scheduler.stopping or all(request.result.done() for request in present):
            raise _Abandoned
        for row, request in enumerate(requests):
            if request is not None and request.grown is not None and not request.result.done():
                request.grown(tokens[row].tolist())

    def fail(self, reason: Refusal) -> None:
        """Refuse the requests that still wait for this run."""
        with self.scheduler.changed:
            left = [*self.first, *self.scheduler.running.values()]
            self.first, self.scheduler.running = [], {}
        for request in left:
            _fail(request, reason)


def _fail(asked: Completion | ExclusiveWork, reason: Refusal) -> None:
    with suppress(InvalidStateError):
        asked.result.set_exception(reason)


def _as_refusal(error: Exception) -> Refusal:
    """Say what a client may know of an error; an unexpected one is printed for the operator of the server."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, InputError):
        return Refusal(422, str(error))
    traceback.print_exception(error, file=sys.stderr)
    return Refusal(500, "the model failed; the operator of the server finds the reason in its output")
