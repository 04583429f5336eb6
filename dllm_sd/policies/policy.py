"""What a policy is: it decodes to a trajectory, and it gives logits at the sites of a view."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from dllm_sd.network.view import View
from dllm_sd.trajectory import Reach, Trajectory, Unit


class Policy(Protocol):
    """A language model as the trainer sees it."""

    causal: ClassVar[bool]
    """Whether it is autoregressive; else it denoises."""
    mask_id: int
    """What stands where nothing is written yet."""
    starts_adapted: bool
    """Whether its adapter holds something before it learns, so that the model without it is another one."""

    @property
    def module(self) -> nn.Module:
        """A `SiteHead`: of ``(ids, mask, sites)`` it makes logits ``[m v]``. This is what processes wrap."""
        ...

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Any,
        keys: Sequence[int],
        *,
        finished: Callable[[Tensor, Trajectory], None] | None = None,
        meter: Any = None,
        reach: Reach | None = None,
    ) -> Trajectory:
        """Complete tokenised prompts; ``keys[b]`` seed each row, so that batching cannot change a result.

        ``finished`` is called with the rows that have just ended and their trajectory, ``meter`` counts the cost, and
        decoding stops at ``reach`` if one is given.
        """
        ...

    def complete(self, queue: Any, settings: Any, *, meter: Any = None, reach: Reach | None = None) -> None:
        """Complete what a `queue.Queue` has, each job as `decode` would."""
        ...

    def extent(self, unit: Unit, settings: Any) -> int:
        """Blocks or steps of a complete decoding."""
        ...

    def site_logits(self, view: View) -> Tensor:
        """Logits ``[m v]``; row ``m`` speaks about the token at site ``m``."""
        ...

    def demonstration(self, prompt: Sequence[int], tokens: Sequence[int], settings: Any) -> Trajectory:
        """A given completion as a trajectory of one row."""
        ...

    def encode(self, messages: Sequence[Mapping[str, str]], thinking: bool | None = None) -> list[int]:
        """Chat messages as prompt tokens, the assistant's turn opened."""
        ...

    def encode_completion(self, text: str, ended: bool = True) -> list[int]:
        """A completion as tokens, with the end token if it is ``ended``."""
        ...

    @property
    def formatting(self) -> tuple[int, ...]:
        """Ids of tokens that say nothing: special ones, marks, line breaks."""
        ...

    def text(self, tokens: Sequence[int]) -> str:
        """Completion tokens as text, without end, padding and other special tokens."""
        ...

    @property
    def silent_ids(self) -> frozenset[int]:
        """Ids that `text` leaves out."""
        ...

    @property
    def byte_ids(self) -> frozenset[int]:
        """Ids that stand for single bytes, a run of which `text` reads as a whole."""
        ...


WINDOW, OVERLAP = 24, 8
"""Tokens that `offsets` reads at most before it forgets the earlier ones, and how many it remembers then."""


def offsets(policy: Policy, tokens: Sequence[int]) -> list[int]:
    """Where each token begins in the text of all of them, in characters, and where the last one ends.

    Entry ``i`` is the length of ``policy.text(tokens[:i])``, in which a character whose last bytes are still missing is
    written with replacement characters. Reading every prefix from its start would be quadratic, so only the last tokens
    are read: what stands more than `OVERLAP` tokens before a place changes the text behind it no more. A run of byte
    tokens is the exception, which is read whole: all of it turns into replacement characters where one does not fit.
    """
    spoken = [token for token in tokens if token not in policy.silent_ids]
    ends, start, before = [0], 0, 0
    for stop in range(1, len(spoken) + 1):
        text = policy.text(spoken[start:stop])
        ends.append(before + len(text))
        if stop - start < WINDOW:
            continue
        later = stop - OVERLAP
        while later > start and spoken[later] in policy.byte_ids:
            later -= 1
        rest = policy.text(spoken[later:stop])
        if text.endswith(rest[len(rest) // 2 :]):  # else what it begins with still matters
            start, before = later, ends[-1] - len(rest)
    heard = accumulate((token not in policy.silent_ids for token in tokens), initial=0)
    return [ends[count] for count in heard]
