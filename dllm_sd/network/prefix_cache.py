"""Block-causal attention, and the exact prefix cache (a KV cache of finished blocks) that it allows.

A position of a block-causal model attends to its own and earlier blocks only. So the keys and values of finished blocks
never change and can be cached, and a decoding step reads only the active block. Bidirectional models cannot do this.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def block_causal(position: Tensor, mask: Tensor, block_length: int) -> Tensor:
    """Attention mask bool ``[n 1 s s]``: a query (third axis) attends to its own and earlier blocks, not to padding.

    Args:
        position: int64 ``[n s]``, counted from the first real token of each row.
        mask: bool ``[n s]``, true at real tokens.
        block_length: positions of a block.
    """
    block = position // block_length
    seen = (block[:, None, :] <= block[:, :, None]) & mask[:, None, :]
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)  # so that no softmax is over an empty row
    return (seen | itself)[:, None]


class PrefixCache:
    """Runs the active blocks of rows that are being decoded, with a KV cache of their finished blocks."""

    def __init__(self, module: Callable[..., Any], slots: int, width: int, block_length: int) -> None:
        """Start with an empty cache.

        Args:
            module: a `SiteHead`.
            slots: rows decoded at the same time.
            width: tokens of the longest row.
            block_length: positions of a block, counted from the first real prompt token.
        """
        self.module, self.width, self.block_length = module, width, block_length
        self.stored = torch.zeros(slots, dtype=torch.int64)
        """int64 ``[slots]``: leading blocks that are cached."""
        self.keys: dict[int, Tensor] = {}
        """By layer, ``[slots s+1 heads width]``; the last position takes writes outside a row."""
        self.values: dict[int, Tensor] = {}

    def begin(self, slots: Tensor) -> None:
        """Clear the cache of some slots, for new rows."""
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
        """Return the result of ``read`` on the hidden states at the sites, row by row from left to right.

        Args:
            slots: int64 ``[r]``, the slot of each row in the cache.
            prompt: int64 ``[r p]``, padded on the left.
            real: bool ``[r p]``, true at real prompt tokens.
            tokens: int64 ``[r l]``, the completion sides.
            sites: bool ``[r l]``, all in the row's active block; None takes the whole block.
            block: int64 ``[r]``, the active block, counted from the one in which the completion begins.
            read: see `SiteHead.forward`.
        """
        marked = None if sites is None else torch.cat([torch.zeros_like(real), sites], 1)
        rows = _Rows(torch.cat([prompt, tokens], 1), (~real).sum(1), marked)
        prompt_blocks = real.sum(1) // self.block_length  # prefilled together
        target = prompt_blocks + block
        while bool((behind := self.stored[slots] < target).any()):
            late, stored = slots[behind], self.stored[slots[behind]]
            until = torch.where(stored < prompt_blocks[behind], prompt_blocks[behind], stored + 1)
            blocks = int((until - stored).max())
            self._read(rows.select(behind), late, stored, until, blocks, None)
            self.stored[late] = until
        return self._read(rows, slots, target, target + 1, 1, read)

    def _read(self, rows: "_Rows", slots: Tensor, first: Tensor, until: Tensor, most: int, read: Any) -> Any:
        """Run blocks ``first`` to ``until`` (exclusive, at most ``most``) of rows; without ``read``, cache them."""
        start, stop = first * self.block_length, until * self.block_length
        index = torch.arange(most * self.block_length, device=slots.device)
        position = start[:, None] + index
        column = position + rows.padding[:, None]
        real = (position < stop[:, None]) & (column < rows.ids.shape[1])
        inside = column.clamp(max=rows.ids.shape[1] - 1)
        place = position.masked_fill(~real, self.width)
        window = Window(self, slots, position, place, start, rows.ids.shape[1], writes=read is None)
        if read is None:
            sites = torch.zeros_like(real)
        else:
            sites = index.expand_as(place) if rows.sites is None else rows.sites.gather(1, inside) & real
        return self.module(rows.ids.gather(1, inside), real, sites, window, read=read or _nothing)


@dataclass(frozen=True)
class _Rows:
    """Full rows: ids int64 and sites bool ``[r s]``, and the number of left padding columns ``[r]``."""

    ids: Tensor
    padding: Tensor
    sites: Tensor | None

    def select(self, chosen: Tensor) -> "_Rows":
        return _Rows(self.ids[chosen], self.padding[chosen], None)


def _nothing(hidden: Tensor, head: Any) -> None:
    """A `SiteReader` that computes no logits."""


class Window:
    """Some blocks of some rows, with the interface that the attention layers of transformers expect of a KV cache."""

    def __init__(
        self,
        cache: PrefixCache,
        slots: Tensor,
        position: Tensor,
        place: Tensor,
        start: Tensor,
        width: int,
        writes: bool,
    ) -> None:
        """Arguments as in `PrefixCache`; ``position`` and ``place`` are int64 ``[r w]``, the rest int64 ``[r]``.

        Only the first ``width`` cached positions are read, so that no result depends on how wide the cache is.
        """
        self.cache, self.slots, self.width = cache, slots, width
        self.position, self.place, self.start, self.writes = position, place, start, writes

    def attention(self, real: Tensor) -> Tensor:
        """Attention mask bool ``[r 1 w s+w]``: all cached positions, then `block_causal` inside the window."""
        before = torch.arange(self.width, device=real.device) < self.start[:, None]
        within = block_causal(self.position, real, self.cache.block_length)
        return torch.cat([before[:, None, None].expand(-1, 1, real.shape[1], -1), within], -1)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Return the keys and values ``[r heads s+w width]`` of a layer: cached ones, then the window's."""
        return self._joined(self.cache.keys, key, layer), self._joined(self.cache.values, value, layer)

    def _joined(self, store: dict[int, Tensor], new: Tensor, layer: int) -> Tensor:
        if layer not in store:
            rows, heads, _, width = len(self.cache.stored), *new.shape[1:]
            store[layer] = new.new_zeros(rows, self.cache.width + 1, heads, width)
        before = store[layer][self.slots, : self.width].transpose(1, 2)
        if self.writes:
            store[layer][self.slots[:, None], self.place] = new.transpose(1, 2)
        return torch.cat([before, new], 2)
