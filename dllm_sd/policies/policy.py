"""What a policy is: it decodes to a trajectory, and it gives logits at the sites of a view."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from dllm_sd.trajectory import Reach, Trajectory, Unit


@dataclass(frozen=True)
class View:
    """What a model reads, and where it is graded.

    Student and teacher views may differ in prompt and length, but list their sites in the same order: row by row,
    from left to right. So row ``m`` of one always belongs to row ``m`` of the other.
    """

    ids: Tensor
    """int64 ``[n s]``."""
    mask: Tensor
    """bool ``[n s]``, true where attention may look."""
    sites: Tensor
    """bool ``[n s]``, ``m`` of them true."""

    def trimmed(self) -> "View":
        """The same view without leading and trailing columns that are padding in every row."""
        used = self.mask.any(0).nonzero()[:, 0]
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, self.mask.shape[1])
        return View(self.ids[:, first:last], self.mask[:, first:last], self.sites[:, first:last])


class Policy(Protocol):
    """A language model as the trainer sees it."""

    causal: ClassVar[bool]
    """Whether it is autoregressive; else it denoises."""
    mask_id: int
    """What stands where nothing is written yet."""

    @property
    def module(self) -> nn.Module:
        """Called with ``(ids, mask, sites)`` of a view; returns logits ``[m v]``. This is what processes wrap."""
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


def offsets(policy: Policy, tokens: Sequence[int]) -> list[int]:
    """Where each token begins in the text of all of them, in characters, and where the last one ends."""
    return [len(policy.text(tokens[:i])) for i in range(len(tokens) + 1)]
