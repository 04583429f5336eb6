"""The input of a model, and the sites at which its loss is computed."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """The input of a model, and the sites at which its loss is computed.

    Student and teacher views may differ in prompt and length, but list their sites in the same order: row by row,
    from left to right. So site ``m`` of the student is site ``m`` of the teacher.
    """

    ids: Tensor
    """int64 ``[n s]``."""
    mask: Tensor
    """bool ``[n s]``, the attention mask: true at real tokens."""
    sites: Tensor
    """bool ``[n s]``, ``m`` of them true."""
    rows: Tensor | None = None
    """int64 ``[n]``: the row of ids and mask that each row of sites belongs to; None where they are the same rows."""

    def trimmed(self) -> "View":
        """The same view without leading and trailing columns that are padding in every row."""
        used = self.mask.any(0).nonzero()[:, 0]
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, self.mask.shape[1])
        return replace(
            self, ids=self.ids[:, first:last], mask=self.mask[:, first:last], sites=self.sites[:, first:last]
        )

    def distinct(self) -> "View":
        """The same view in which equal rows of ids and mask occur only once."""
        seen = torch.where(self.mask, self.ids, -1)
        kept, rows = seen.unique(dim=0, return_inverse=True)
        if len(kept) == len(seen) or self.rows is not None:
            return self
        index = torch.empty(len(kept), dtype=torch.int64, device=rows.device)
        index[rows] = torch.arange(len(rows), device=rows.device)
        return replace(self, ids=self.ids[index], mask=self.mask[index], rows=rows)
