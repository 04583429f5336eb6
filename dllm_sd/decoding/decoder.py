"""The decoder protocol: a decoder completes the jobs of a queue, with the network of this process or elsewhere."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from dllm_sd.decoding.queue import Job, Listed, Queue
from dllm_sd.decoding.settings import Decoding, Meter
from dllm_sd.trajectory import StopAfter, Trajectory

Watch = Callable[[Sequence[Job | None], Tensor], None]
"""Called before each step with the job of each row, and the completion sides int64 ``[r l]``."""


class Decoder(Protocol):
    """Chooses tokens, whichever model computes their probabilities; scoring is the `Policy`'s."""

    def complete(
        self, queue: Queue, settings: Decoding, *, meter: Meter | None = None, stop_after: StopAfter | None = None
    ) -> None:
        """Complete the jobs of a queue.

        Args:
            queue: gives the jobs and takes their trajectories.
            settings: the keys of `decode`.
            meter: counts the cost.
            stop_after: how far each completion is decoded; None decodes it to its end.
        """
        ...


class LocalDecoder(Decoder, Protocol):
    """A decoder whose network runs in this process, so that every step can be watched."""

    def complete(
        self,
        queue: Queue,
        settings: Decoding,
        *,
        meter: Meter | None = None,
        stop_after: StopAfter | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Complete the jobs of a queue; ``watch`` sees every step."""
        ...


def decode(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: Decoding,
    keys: Sequence[int],
    *,
    finished: Callable[[Tensor, Trajectory], None] | None = None,
    meter: Meter | None = None,
    stop_after: StopAfter | None = None,
) -> Trajectory:
    """Complete tokenised prompts; ``keys[b]`` seed each row, so that no batch can change a result.

    ``finished`` is called with the rows int64 ``[r]`` that have ended, and their trajectory. Returns the trajectory on
    the CPU, in the order of the prompts.
    """
    queue = Listed(prompts, keys, finished)
    decoder.complete(queue, settings, meter=meter, stop_after=stop_after)
    return queue.collected()
