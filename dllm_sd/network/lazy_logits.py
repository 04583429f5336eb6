"""Logits that are computed on demand, a chunk of sites at a time.

Axes: ``m`` graded sites, ``i`` sites of a chunk, ``h`` width of the hidden states, ``v`` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Numbers in the logits of a chunk: 32 MiB in float32 on a CPU (larger tensors are newly mapped by the system each
#: time), and four times that on an accelerator (not measured).
LOSS_CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**25}


def sites_per_chunk(vocabulary: int, width: int, device: str) -> int:
    """Sites ``i`` of a chunk.

    Each chunk also reads the head and adds to its gradient, ``v h`` numbers each. So a chunk has at least ``h / 32``
    sites (up to 128), however many logits these have; then the logits are at most a 32nd of the head.
    """
    return max(1, LOSS_CHUNK_LOGITS.get(device, LOSS_CHUNK_LOGITS["cuda"]) // vocabulary, min(width // 32, 128))


@dataclass(frozen=True)
class LazyLogits:
    """A model's predictions at the sites: hidden states, and the output head that turns some of them into logits."""

    hidden: Tensor
    """``[m h]``."""
    head: Callable[[Tensor], Tensor] = lambda hidden: hidden
    """Maps ``[i h]`` to ``[i v]``; by default the states are already logits."""
    autocast: torch.dtype | None = None
    """Compute type of the head."""

    @staticmethod
    def under_autocast(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> "LazyLogits":
        """Record the autocast type that is active now, and apply the head with it later."""
        device = hidden.device.type
        return LazyLogits(hidden, head, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)

    def apply_head(self, hidden: Tensor) -> Tensor:
        """Map hidden states ``[i h]`` to logits ``[i v]``."""
        device, dtype = hidden.device.type, self.autocast
        # Without the cache: a cast of the head made under no_grad must not be reused where a gradient is needed.
        with torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False):
            return self.head(hidden)

    def logits(self, rows: slice) -> Tensor:
        """Logits ``[i v]`` of some sites."""
        return self.apply_head(self.hidden[rows])

    def select(self, kept: Tensor) -> "LazyLogits":
        """Keep the sites that are true in bool ``[m]``."""
        return replace(self, hidden=self.hidden[kept])

    def chunks(self) -> list[slice]:
        """Return slices that cover all sites, `sites_per_chunk` each."""
        with torch.no_grad():
            vocabulary = self.apply_head(self.hidden[:0]).shape[-1]
        size = sites_per_chunk(vocabulary, self.hidden.shape[-1], self.hidden.device.type)
        return [slice(start, start + size) for start in range(0, max(1, len(self.hidden)), size)]
