"""What is kept of some graded sites for people to look at: distributions, divergence, clip and trust.

A tracer reads what the loss computes at a chunk of sites, and changes nothing of it: no forward pass, no random number
and no collective is added, so a run is the same with and without it.

Axes: ``n`` canvases, ``l`` completion, ``m`` graded sites, ``i`` sites of a chunk, ``j`` traced sites, ``t`` targets,
``c`` teacher contexts, ``v`` vocabulary, ``u`` the `TOP` most probable entries.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dllm_sd.objective.observing import Seen

TOP = 5
"""Vocabulary entries that are kept of each distribution."""
ROWS_AT_ONCE = 16
"""Sites whose distributions are copied at a time."""


@dataclass(frozen=True)
class TracedSites:
    """The traced sites of a micro-batch, on the CPU, in the order of the sites."""

    canvas: Tensor
    """int64 ``[j]``, index in the micro-batch."""
    column: Tensor
    """int64 ``[j]``, column of `Graded.sites`."""
    token: Tensor
    """int64 ``[j]``, the drawn token."""
    ids: Tensor
    """int64 ``[j 1+c u]``: the most probable tokens of the student and of each teacher, best first."""
    logp: Tensor
    """float ``[j 1+c u]``: their log-probabilities, at `Method.temperature` and over the full vocabulary."""
    drawn: Tensor
    """float ``[j 1+c]``: log-probability of the drawn token."""
    value: Tensor
    """float ``[j t]``: the divergence before the clip."""
    clipped: Tensor
    """float ``[j t]``: the divergence after the clip."""
    trust: Tensor
    """float ``[j t]``: the factor of each divergence, the weights of rollout and context included."""


class Tracer:
    """Records every so many of the graded sites of some canvases while their loss is computed."""

    def __init__(self, first: Tensor, every: Tensor) -> None:
        """Choose the sites.

        Args:
            first: int64 ``[n]``: how many sites of its rollout precede those of each canvas; -1 for a canvas that is
                not traced.
            every: int64 ``[n]``: a site is traced if its number in its rollout is a multiple of this.
        """
        self._first, self._every = first, every
        self._canvas = self._column = self._traced = first.new_empty(0)
        self.width = 0
        """Columns of the sites: ``l``, or prompt and completion where the prompt is graded too."""
        self._chunks: list[tuple[Tensor, ...]] = []

    def begin(self, sites: Tensor) -> None:
        """Learn where the micro-batch is graded, bool ``[n l]``; called once, before the first chunk."""
        self.width = sites.shape[1]
        self._canvas, self._column = sites.nonzero(as_tuple=True)
        number = self._first[self._canvas] + (sites.cumsum(1) - 1)[sites]
        self._traced = (self._first[self._canvas] >= 0) & (number % self._every[self._canvas] == 0)

    @torch.no_grad()
    def record(self, seen: Seen) -> None:
        """Keep the traced sites of a chunk."""
        rows, token = seen.rows, seen.token
        kept = self._traced[rows].nonzero()[:, 0]
        if not len(kept):
            return
        best = [_best(logp, kept, token) for logp in (seen.student_logp, *seen.teacher_logp)]
        ids, logp, drawn = (torch.stack(column, 1) for column in zip(*best, strict=True))
        chunk = (self._canvas[rows][kept], self._column[rows][kept], token[kept], ids, logp, drawn)
        self._chunks.append(
            (*(x.cpu() for x in chunk), *(x[:, kept].T.cpu() for x in (seen.value, seen.clipped, seen.trust)))
        )

    @property
    def sites(self) -> TracedSites | None:
        """All sites recorded so far; None if there are none."""
        if not self._chunks:
            return None
        columns = map(torch.cat, zip(*self._chunks, strict=True))
        return TracedSites(**dict(zip((f.name for f in fields(TracedSites)), columns, strict=True)))


def _best(logp: Tensor, kept: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and log-probabilities ``[j u]`` of the best tokens at the sites ``kept [j]``, and the drawn one's ``[j]``.

    A few sites at a time: a copy of a whole chunk ``[i v]`` might not fit into the memory.
    """
    best = [logp[rows].topk(min(TOP, logp.shape[-1]), -1) for rows in kept.split(ROWS_AT_ONCE)]
    ids, values = torch.cat([one.indices for one in best]), torch.cat([one.values for one in best])
    return ids, values, logp[kept, token[kept]]
