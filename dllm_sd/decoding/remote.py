"""The decoder of engines on servers: many requests in flight, each finished completion handed back at once."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

from dllm_sd.decoding.queue import Job, Queue
from dllm_sd.decoding.settings import Decoding, Meter
from dllm_sd.decoding.wire import settings_to_json, stop_after_to_json
from dllm_sd.engines.engine import CompletionRequest
from dllm_sd.engines.servers import Servers
from dllm_sd.trajectory import NO_MASK, StopAfter, Trajectory

EXCHANGE = 0.2
"""Most seconds between two exchanges of several processes, while no completion ends."""


@dataclass(frozen=True)
class TokenIds:
    """What completions of a policy have in common: its special token ids, and how its blocks are counted."""

    end_ids: tuple[int, ...]
    pad_id: int
    suppress: tuple[int, ...]
    """Ids that are never sampled."""
    vocabulary: int
    """``v``, rows of the output head."""
    mask_id: int = NO_MASK
    blocks_of_prompt: bool = False
    causal: bool = True


class Journal(Protocol):
    """Completions on disk, so that none is made twice."""

    def get(self, request: CompletionRequest) -> tuple[Trajectory, str] | None:
        """The completion of an equal request and the server that made it, if it is there."""
        ...

    def put(self, request: CompletionRequest, trajectory: Trajectory, server: str) -> None:
        """Keep a completion that a server made."""
        ...


class Makers:
    """Which server made which completion, for those of the weights in use and of the ones before."""

    def __init__(self) -> None:
        self._now, self._before = dict[bytes, str](), dict[bytes, str]()

    def note(self, trajectory: Trajectory, server: str) -> None:
        """Remember who made a completion."""
        self._now[_digest(trajectory)] = server

    def turn(self) -> None:
        """Other weights decode from now on."""
        self._now, self._before = {}, self._now

    @property
    def entries(self) -> list[tuple[bytes, str]]:
        """What is known, to be exchanged between processes and given to `makers_of`."""
        return [*self._before.items(), *self._now.items()]


def makers_of(trajectories: Sequence[Trajectory], entries: Sequence[tuple[bytes, str]]) -> list[str]:
    """Return the server that made each of some completions, by the `Makers.entries` of all processes; "" if unknown."""
    known = dict(entries)
    return [known.get(_digest(one), "") for one in trajectories]


def _digest(trajectory: Trajectory) -> bytes:
    prompt = trajectory.prompt_ids[0][trajectory.prompt_mask[0]].tolist()
    return sha256(json.dumps([prompt, trajectory.tokens[0].tolist()]).encode()).digest()


class RemoteDecoder:
    """Completes queues on servers."""

    def __init__(
        self,
        servers: Servers,
        ids: TokenIds,
        weights: Callable[[], tuple[str, str]],
        journal: Journal,
        processes: int = 1,
    ) -> None:
        """Make a decoder.

        Args:
            servers: where completions are made.
            ids: the policy's special tokens.
            weights: name on the servers and version of the weights that are to decode now.
            journal: completions that were made before, such as by a run that was killed.
            processes: that share the servers, and so the requests that may be in flight (`RemoteEngine.concurrency`).
        """
        self.servers, self.ids, self.weights, self.journal = servers, ids, weights, journal
        self.makers = Makers()
        self.most = -(-servers.engine.concurrency * len(servers.engine.url) // processes)

    def complete(
        self, queue: Queue, settings: Decoding, *, meter: Meter | None = None, stop_after: StopAfter | None = None
    ) -> None:
        """Complete the jobs of a queue; ``meter`` counts tokens as rows, since the servers' forwards are not known.

        Raises:
            Stopped: if the servers fail, or answer what must not be trained on. What ended before is in the journal.
        """
        Requests(self, queue, settings, stop_after).finish(meter)

    def begin(self, queue: Queue, settings: Decoding, stop_after: StopAfter | None) -> "Requests":
        """Send the requests of all jobs that may begin now; the caller does something else until it finishes them."""
        requests = Requests(self, queue, settings, stop_after)
        requests.send(queue.take(queue.most) or [])
        return requests

    def completed(self, request: CompletionRequest) -> Trajectory:
        kept = self.journal.get(request)
        trajectory, server = kept or self.servers.complete(request)
        if kept is None:
            self.journal.put(request, trajectory, server)
        self.makers.note(trajectory, server)
        return trajectory

    def request(self, job: Job, settings: Decoding, stop_after: StopAfter | None) -> CompletionRequest:
        name, version = self.weights()
        return CompletionRequest(
            prompt=tuple(job.prompt),
            key=job.key,
            model=name,
            version=version,
            decode=settings_to_json(settings),
            steps=settings.tokens(stop_after),
            stop_after=stop_after_to_json(stop_after),
            end_ids=self.ids.end_ids,
            pad_id=self.ids.pad_id,
            banned=tuple(sorted({*settings.suppress, *self.ids.suppress})),
            vocabulary=self.ids.vocabulary,
            mask_id=self.ids.mask_id,
            block_length=1 if self.ids.causal else settings.block_length,
            blocks_of_prompt=self.ids.blocks_of_prompt,
            causal=self.ids.causal,
        )


class Requests:
    """The requests for the jobs of one queue; threads wait for the answers."""

    def __init__(self, decoder: RemoteDecoder, queue: Queue, settings: Decoding, stop_after: StopAfter | None) -> None:
        """Nothing is sent yet."""
        self.decoder, self.queue, self.settings, self.stop_after = decoder, queue, settings, stop_after
        self.most = decoder.most
        self.running: dict[Future[Trajectory], Job] = {}
        self.pool = ThreadPoolExecutor(max(1, min(self.most, queue.most)), "engine")

    def send(self, jobs: Sequence[Job]) -> None:
        """Send the requests for jobs, as many at a time as the servers are to have in flight."""
        for job in jobs:
            request = self.decoder.request(job, self.settings, self.stop_after)
            self.running[self.pool.submit(self.decoder.completed, request)] = job

    def finish(self, meter: Meter | None = None) -> None:
        """Hand back what has ended, and take and complete further jobs until the queue is finished.

        Raises:
            Stopped: as `RemoteDecoder.complete`.
        """
        queue, running = self.queue, self.running
        try:
            while (jobs := queue.take(max(0, self.most - len(running)))) is not None:
                self.send(jobs)
                done, _ = wait(running, EXCHANGE if queue.patience else None, FIRST_COMPLETED) if running else ([], [])
                self._hand_back([(running.pop(future), future.result()) for future in done], meter)
        except BaseException as error:
            self.decoder.servers.cancel()
            queue.abandon(error)
            raise
        finally:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def _hand_back(self, ended: Sequence[tuple[Job, Trajectory]], meter: Meter | None) -> None:
        queue = self.queue
        for job, trajectory in sorted(ended, key=lambda pair: pair[0].name):
            if meter is not None:
                steps = int(trajectory.num_steps.sum())
                meter.rows, meter.slots, meter.read = meter.rows + steps, meter.slots + steps, meter.read + steps
            if queue.wanted(job):
                queue.ended([job], trajectory)
