"""Block-causal attention, and the exact prefix cache that it allows: finished blocks never change again.

A position of a block-causal model sees its own and earlier blocks only, so the keys and values of finished blocks can
be kept, and a decoding step reads no more than the active block. Bidirectional models have no such cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def block_causal(position: Tensor, mask: Tensor, block_length: int) -> Tensor:
    """bool ``[n 1 s s]``, true where the query (third axis) may look: its own and earlier blocks, never padding.

    Args:
        position: int64 ``[n s]``, counted from the first real token of each row.
        mask: bool ``[n s]``, true at real tokens.
        block_length: positions of a block.
    """
    block = position // block_length
    seen = (block[:, None, :] <= block[:, :, None]) & mask[:, None, :]
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)  # no row of a softmax is empty
    return (seen | itself)[:, None]


class PrefixCache:
    """Reads the active blocks of rows that are being decoded, with their finished blocks remembered."""

    def __init__(self, module: Callable[..., Any], slots: int, width: int, block_length: int) -> None:
        """Begin with nothing remembered.

        Args:
            module: a `SiteHead`.
            slots: rows that are decoded at the same time.
            width: tokens of the longest row.
            block_length: positions of a block, counted from the first real prompt token.
        """
        self.module, self.width, self.block_length = module, width, block_length
        self.stored = torch.zeros(slots, dtype=torch.int64)
        """int64 ``[slots]``: leading blocks that are remembered."""
        self.keys: dict[int, Tensor] = {}
        """By layer, ``[slots s+1 heads width]``; the last position takes what stands outside a row."""
        self.values: dict[int, Tensor] = {}

    def begin(self, slots: Tensor) -> None:
        """Forget what some slots remember: other rows take them."""
        self.stored = self.stored.to(slots.device)
        self.stored[slots] = 0

    def __call__(
        self,
        slots: Tensor,
        prompt: Tensor,
        real: Tensor,
        tokens: Tensor,
        sites: Tensor | None,
        block: Tensor,
        read: Callable[[Tensor, Any], Any],
    ) -> Any:
        """What ``read`` makes of the hidden states at the sites, row by row from left to right (see `SiteHead`).

        Args:
            slots: int64 ``[r]``, where each row is remembered.
            prompt: int64 ``[r p]``, padded on the left.
            real: bool ``[r p]``, true at real prompt tokens.
            tokens: int64 ``[r l]``, their completion sides.
            sites: bool ``[r l]``, all of them in the row's active block; None is the whole of it.
            block: int64 ``[r]``, the active block, counted from the one in which the completion begins.
            read: see `SiteHead.forward`.
        """
        marked = None if sites is None else torch.cat([torch.zeros_like(real), sites], 1)
        rows = _Rows(torch.cat([prompt, tokens], 1), (~real).sum(1), marked)
        whole = real.sum(1) // self.block_length  # blocks of the prompt, which are read at once
        target = whole + block
        while bool((behind := self.stored[slots] < target).any()):
            late, stored = slots[behind], self.stored[slots[behind]]
            until = torch.where(stored < whole[behind], whole[behind], stored + 1)
            blocks = int((until - stored).max())
            self._read(rows.some(behind), late, stored, until, blocks, None)
            self.stored[late] = until
        return self._read(rows, slots, target, target + 1, 1, read)

    def _read(self, rows: "_Rows", slots: Tensor, first: Tensor, until: Tensor, most: int, read: Any) -> Any:
        """Run the ``most`` blocks ``first`` to ``until`` (exclusive) of some rows; without ``read``, remember them."""
        start, stop = first * self.block_length, until * self.block_length
        index = torch.arange(most * self.block_length, device=slots.device)
        position = start[:, None] + index
        column = position + rows.padding[:, None]
        real = (position < stop[:, None]) & (column < rows.ids.shape[1])
        inside = column.clamp(max=rows.ids.shape[1] - 1)
        place = position.masked_fill(~real, self.width)
        window = Window(self, slots, position, place, start, writes=read is None)
        if read is None:
            sites = torch.zeros_like(real)
        else:
            sites = index.expand_as(place) if rows.sites is None else rows.sites.gather(1, inside) & real
        return self.module(rows.ids.gather(1, inside), real, sites, window, read=read or _nothing)


@dataclass(frozen=True)
class _Rows:
    """Whole rows: ids int64 and sites bool ``[r s]``, and how many columns before each are padding ``[r]``."""

    ids: Tensor
    padding: Tensor
    sites: Tensor | None

    def some(self, chosen: Tensor) -> "_Rows":
        return _Rows(self.ids[chosen], self.padding[chosen], None)


def _nothing(hidden: Tensor, head: Any) -> None:
    """A reader that wants no logits."""


class Window:
    """Some blocks of some rows, in the shape that the attention layers of transformers ask of a cache."""

    def __init__(
        self, cache: PrefixCache, slots: Tensor, position: Tensor, place: Tensor, start: Tensor, writes: bool
    ) -> None:
        """See `PrefixCache`; ``position`` and ``place`` are int64 ``[r w]``, the others int64 ``[r]``."""
        self.cache, self.slots = cache, slots
        self.position, self.place, self.start, self.writes = position, place, start, writes

    def attention(self, real: Tensor) -> Tensor:
        """bool ``[r 1 w s+w]``: every remembered position, then `block_causal` inside the window."""
        before = torch.arange(self.cache.width, device=real.device) < self.start[:, None]
        within = block_causal(self.position, real, self.cache.block_length)
        return torch.cat([before[:, None, None].expand(-1, 1, real.shape[1], -1), within], -1)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Keys and values ``[r heads s+w width]`` that a layer attends to, from those of the window."""
        return self._joined(self.cache.keys, key, layer), self._joined(self.cache.values, value, layer)

    def _joined(self, store: dict[int, Tensor], new: Tensor, layer: int) -> Tensor:
        if layer not in store:
            rows, heads, _, width = len(self.cache.stored), *new.shape[1:]
            store[layer] = new.new_zeros(rows, self.cache.width + 1, heads, width)
        before = store[layer][self.slots, :-1].transpose(1, 2)
        if self.writes:
            store[layer][self.slots[:, None], self.place] = new.transpose(1, 2)
        return torch.cat([before, new], 2)
