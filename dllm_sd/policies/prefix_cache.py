"""Block-causal attention, and the exact prefix cache that it allows: finished blocks never change again.

A position of a block-causal model sees its own and earlier blocks only, so the keys and values of finished blocks can
be kept, and a decoding step reads no more than the active block. Bidirectional models have no such cache.
"""

from typing import Protocol

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


class _Denoiser(Protocol):
    def __call__(self, ids: Tensor, mask: Tensor, sites: Tensor, window: "Window") -> Tensor: ...


class PrefixCache:
    """Logits of the active blocks of ``b`` rows that are being decoded, with the finished blocks remembered."""

    def __init__(
        self, module: _Denoiser, prompt_ids: Tensor, prompt_mask: Tensor, length: int, block_length: int, slots: int
    ) -> None:
        """Begin with nothing remembered.

        Args:
            module: a `SiteHead`.
            prompt_ids: int64 ``[b p]``, padded on the left.
            prompt_mask: bool ``[b p]``.
            length: ``l``, completion positions.
            block_length: positions of a block, counted from the first real prompt token.
            slots: rows that are decoded at the same time.
        """
        self.module, self.prompt_ids, self.block_length = module, prompt_ids, block_length
        self.width = prompt_ids.shape[1] + length
        self.padding = (~prompt_mask).sum(1)
        self.prompt_blocks = prompt_mask.sum(1) // block_length
        self.stored = torch.zeros(slots, dtype=torch.int64, device=prompt_ids.device)
        """int64 ``[slots]``: leading blocks that are remembered."""
        self.keys: dict[int, Tensor] = {}
        """By layer, ``[slots s+1 heads width]``; the last position takes what stands outside a row."""
        self.values: dict[int, Tensor] = {}

    def begin(self, slots: Tensor) -> None:
        """Forget what some slots remember: other rows take them."""
        self.stored[slots] = 0

    def __call__(self, rows: Tensor, slots: Tensor, tokens: Tensor, active: Tensor, block: Tensor) -> Tensor:
        """Logits ``[m v]`` at the sites, row by row from left to right.

        Args:
            rows: int64 ``[r]``, which of the ``b`` rows.
            slots: int64 ``[r]``, where each of them is remembered.
            tokens: int64 ``[r l]``, their completion sides.
            active: bool ``[r l]``, the sites; all of them in the row's active block.
            block: int64 ``[r]``, the active block, counted from the one in which the completion begins.
        """
        ids = torch.cat([self.prompt_ids[rows], tokens], 1)
        sites = torch.cat([torch.zeros_like(self.prompt_ids[rows], dtype=torch.bool), active], 1)
        target = self.prompt_blocks[rows] + block
        while bool((behind := self.stored[slots] < target).any()):
            late, place = rows[behind], slots[behind]
            stored, prompt = self.stored[place], self.prompt_blocks[late]
            until = torch.where(stored < prompt, prompt, stored + 1)  # the prompt's whole blocks at once
            self._read(ids[behind], late, place, stored, until, None)
            self.stored[place] = until
        return self._read(ids, rows, slots, target, target + 1, sites)

    def _read(
        self, ids: Tensor, rows: Tensor, slots: Tensor, first: Tensor, until: Tensor, sites: Tensor | None
    ) -> Tensor:
        """Run blocks ``first`` to ``until`` (exclusive) of some rows; without sites, remember them."""
        start, stop = first * self.block_length, until * self.block_length
        position = start[:, None] + torch.arange(int((stop - start).max()), device=ids.device)
        column = position + self.padding[rows, None]
        real = (position < stop[:, None]) & (column < self.width)
        inside = column.clamp(max=self.width - 1)
        place = column.masked_fill(~real, self.width)
        window = Window(self, slots, self.padding[rows], position, place, start, writes=sites is None)
        wanted = torch.zeros_like(real) if sites is None else sites.gather(1, inside) & real
        return self.module(ids.gather(1, inside), real, wanted, window)


class Window:
    """Some blocks of some rows, in the shape that the attention layers of transformers ask of a cache."""

    def __init__(
        self,
        cache: PrefixCache,
        slots: Tensor,
        padding: Tensor,
        position: Tensor,
        column: Tensor,
        start: Tensor,
        writes: bool,
    ) -> None:
        """See `PrefixCache`; ``position`` and ``column`` are int64 ``[r w]``, the others int64 ``[r]``."""
        self.cache, self.slots, self.padding = cache, slots, padding
        self.position, self.column, self.start, self.writes = position, column, start, writes

    def attention(self, real: Tensor) -> Tensor:
        """bool ``[r 1 w s+w]``: every remembered position, then `block_causal` inside the window."""
        cache = self.cache
        place = torch.arange(cache.width, device=real.device) - self.padding[:, None]
        before = (place >= 0) & (place < self.start[:, None])
        within = block_causal(self.position, real, cache.block_length)
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
            store[layer][self.slots[:, None], self.column] = new.transpose(1, 2)
        return torch.cat([before, new], 2)
