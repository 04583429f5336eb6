"""The policy protocol: a policy computes logits at the sites of a view, and knows its decoder and chat format."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from dllm_sd.decoding.decoder import LocalDecoder
from dllm_sd.network.view import View
from dllm_sd.trajectory import StopAfter, Trajectory, Unit


class Policy(Protocol):
    """A language model as the trainer sees it."""

    causal: ClassVar[bool]
    """Whether the model is autoregressive; otherwise it is a masked-diffusion model."""
    mask_id: int
    """The mask token id, which stands at positions without a token."""
    starts_adapted: bool
    """Whether the adapter was loaded, so that the model without its adapter is not the initial policy."""

    @property
    def module(self) -> nn.Module:
        """A `SiteHead`, which maps ``(ids, mask, sites)`` to logits ``[m v]``. DDP and FSDP wrap this module."""
        ...

    @property
    def decoder(self) -> LocalDecoder:
        """Decodes with the network of this policy; rollouts may come from another decoder."""
        ...

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Any,
        keys: Sequence[int],
        *,
        finished: Callable[[Tensor, Trajectory], None] | None = None,
        meter: Any = None,
        stop_after: StopAfter | None = None,
    ) -> Trajectory:
        """Complete tokenised prompts with the network of this policy (see `decoder.decode`)."""
        ...

    def extent(self, unit: Unit, settings: Any) -> int:
        """Blocks or steps of a complete decoding."""
        ...

    def site_logits(self, view: View) -> Tensor:
        """Logits ``[m v]``; row ``m`` is the prediction for the token at site ``m``."""
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
        """Ids of formatting tokens: special tokens, marks, line breaks."""
        ...

    def text(self, tokens: Sequence[int]) -> str:
        """Completion tokens as text, without end, padding and other special tokens."""
        ...

    @property
    def non_text_ids(self) -> frozenset[int]:
        """Ids that `text` leaves out."""
        ...

    @property
    def byte_ids(self) -> frozenset[int]:
        """Ids that stand for single bytes; `text` decodes a run of them together."""
        ...


WINDOW, OVERLAP = 24, 8
"""Most tokens that `offsets` decodes together, and how many of them it keeps when it drops the earlier ones."""


def offsets(policy: Policy, tokens: Sequence[int]) -> list[int]:
    """Return the character at which each token begins in the text of all tokens, and the one at which the last ends.

    Entry ``i`` is the length of ``policy.text(tokens[:i])``, in which a character whose last bytes are still missing is
    written with replacement characters. Decoding every prefix from its start would be quadratic, so only the last
    tokens are decoded: tokens more than `OVERLAP` before a place no longer change the text after it. The exception is a
    run of byte tokens, which is decoded whole, since one invalid byte turns all of it into replacement characters.
    """
    visible = [token for token in tokens if token not in policy.non_text_ids]
    ends, start, before = [0], 0, 0
    for stop in range(1, len(visible) + 1):
        text = policy.text(visible[start:stop])
        ends.append(before + len(text))
        if stop - start < WINDOW:
            continue
        first = stop - OVERLAP
        while first > start and visible[first] in policy.byte_ids:
            first -= 1
        rest = policy.text(visible[first:stop])
        if text.endswith(rest[len(rest) // 2 :]):  # else the first tokens still change the text
            start, before = first, ends[-1] - len(rest)
    visible_before = accumulate((token not in policy.non_text_ids for token in tokens), initial=0)
    return [ends[count] for count in visible_before]
