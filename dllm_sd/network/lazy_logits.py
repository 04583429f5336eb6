"""Logits that are made when somebody asks for them, a few sites at a time.

Axes: ``m`` graded sites, ``i`` sites of a chunk, ``h`` width of the hidden states, ``v`` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Logits of a chunk, as many numbers: 32 MiB in float32 (larger tensors of a CPU are new pages of the system, each
#: time), or four times that on an accelerator (not measured).
CHUNK = {"cpu": 2**23, "cuda": 2**25}


def sites_per_chunk(vocabulary: int, width: int, device: str) -> int:
    """Sites ``i`` of a chunk.

    What a chunk costs beside its sites is to read the head and to add to its gradient, ``v h`` numbers each. So wide
    heads have at least a site for 32 columns (up to 128 sites), however many logits that are: a copy of these is then
    at most a 32nd of the head.
    """
    return max(1, CHUNK.get(device, CHUNK["cuda"]) // vocabulary, min(width // 32, 128))


@dataclass(frozen=True)
class LazyLogits:
    """What a model says at the sites: hidden states, and how to turn some of them into logits, whenever asked."""

    hidden: Tensor
    """``[m h]``."""
    head: Callable[[Tensor], Tensor] = lambda hidden: hidden
    """``[i h] -> [i v]``; by default the states are logits already."""
    autocast: torch.dtype | None = None
    """Compute type of the head."""

    @staticmethod
    def under_autocast(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> "LazyLogits":
        """With the compute type that is in force."""
        device = hidden.device.type
        return LazyLogits(hidden, head, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)

    def apply_head(self, hidden: Tensor) -> Tensor:
        """``[i h] -> [i v]``."""
        device, dtype = hidden.device.type, self.autocast
        # A cast of the head that was made without gradient must not be found again where one is needed.
        with torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False):
            return self.head(hidden)

    def logits(self, rows: slice) -> Tensor:
        """Logits ``[i v]`` of some sites."""
        return self.apply_head(self.hidden[rows])

    def select(self, kept: Tensor) -> "LazyLogits":
        """At the sites that are true in bool ``[m]``."""
        return replace(self, hidden=self.hidden[kept])

    def chunks(self) -> list[slice]:
        """All sites, so many at a time as one may hold the logits of."""
        with torch.no_grad():
            vocabulary = self.apply_head(self.hidden[:0]).shape[-1]
        size = sites_per_chunk(vocabulary, self.hidden.shape[-1], self.hidden.device.type)
        return [slice(start, start + size) for start in range(0, max(1, len(self.hidden)), size)]
