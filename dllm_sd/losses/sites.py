"""Which positions of a canvas are graded: those that the student revealed, the teacher's most confident ones, or all
masked ones.

A rule names `candidates` and a `quota` from the canvas alone, so that the sites of a whole update are counted before
any model runs. A rule that needs the teacher ranks the candidates by its `score` and keeps the quota; `score` is None
in all other rules.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from dllm_sd.parts import Part
from dllm_sd.ranges import Count, Ranged

Covers = Literal["none", "step", "block", "masked"]
"""The positions that are graded on every canvas whatever the teacher predicts, so that no context may reveal them:
none, those that the step reveals, the masked ones of the active block, or all masked ones."""


class SiteRule(Part, Protocol):
    """Protocol of a site rule; `SiteDefaults` implements `score` and `follows_decoder` for rules without a teacher."""

    @property
    def content(self) -> bool:
        """Whether tokens without content are left out."""
        ...

    @property
    def prompt(self) -> bool:
        """Whether the tokens of the prompt are graded too."""
        ...

    @property
    def covers(self) -> Covers:
        """The positions that are graded on every canvas whatever the teacher predicts."""
        ...

    @property
    def score(self) -> Callable[[Tensor], Tensor] | None:
        """The teacher's confidence ``[m]`` from its raw logits ``[m v]``; None where no teacher is needed."""
        ...

    @property
    def follows_decoder(self) -> bool:
        """Whether each token is graded where the decoder chose it, and nowhere else."""
        ...

    def __call__(self, masked: Tensor, active: Tensor, revealed: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates bool ``[n l]`` and quota int64 ``[n]`` from three bool ``[n l]`` maps of the canvases."""
        ...


class SiteDefaults:
    """Defaults of a rule that needs no teacher."""

    prompt: bool = False
    score: None = None
    follows_decoder: bool = False


@dataclass(frozen=True)
class Revealed(SiteDefaults):
    """The positions that the student reveals at this step (the "student" row of arXiv 2606.18195, Table 7)."""

    content: bool = False
    """Leave out tokens without content: special tokens, thinking tags, line breaks (SGSD, arXiv 2605.28791)."""
    prompt: bool = False
    """Grade the tokens of the prompt too, all but the first (SPD, arXiv 2605.22675, Eq. 14): cross-entropy on whole
    texts, of autoregressive models only."""
    follows_decoder = True

    @property
    def covers(self) -> Covers:
        """The same for all canvases."""
        return "step"

    def __call__(self, masked: Tensor, active: Tensor, revealed: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates bool ``[n l]`` and quota int64 ``[n]`` from three bool ``[n l]`` maps of the canvases."""
        return revealed, revealed.sum(1)


@dataclass(frozen=True)
class AllMaskedSites(SiteDefaults):
    """Every masked position, of the active block only if `block`."""

    block: bool = False
    """Only positions of the block that is being denoised."""
    content: bool = False
    """As for `revealed`."""
    prompt = False

    @property
    def covers(self) -> Covers:
        """``block`` for the active block alone, else ``masked``."""
        return "block" if self.block else "masked"

    def __call__(self, masked: Tensor, active: Tensor, revealed: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates bool ``[n l]`` and quota int64 ``[n]``."""
        candidates = active if self.block else masked
        return candidates, candidates.sum(1)


@dataclass(frozen=True)
class TeacherTop(Ranged, key="method.sites"):
    """The `count` masked positions of the active block of which the teacher is most confident (2606.18195, Sec. 3.2).

    The teacher may choose a position again at the next step, so the choices do not partition the completion.
    """

    count: Count | None = None
    """Number of positions; None takes as many as the student reveals at this step (all, on canvases that are no
    decoding step)."""
    by: Literal["probability", "logit"] = "probability"
    """Confidence: largest probability (paper), or largest raw logit (released code)."""
    content = False
    prompt = False

    @property
    def covers(self) -> Covers:
        """The same for all canvases."""
        return "none"

    follows_decoder = False

    def __call__(self, masked: Tensor, active: Tensor, revealed: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates bool ``[n l]`` and quota int64 ``[n]``."""
        wanted = revealed.sum(1) if self.count is None else torch.full_like(active.sum(1), self.count)
        return active, torch.minimum(wanted, active.sum(1))

    def score(self, teacher_logits: Tensor) -> Tensor:
        """Confidence ``[m]`` of raw teacher logits ``[m v]``."""
        top = teacher_logits.amax(-1)
        return top if self.by == "logit" else top - teacher_logits.logsumexp(-1)


SITES: dict[str, type] = {"revealed": Revealed, "all_masked": AllMaskedSites, "teacher_top": TeacherTop}


def choose_sites(candidates: Tensor, quota: Tensor, score: Tensor) -> Tensor:
    """The best ``quota`` candidates of each canvas, ties from left to right.

    Args:
        candidates: bool ``[n l]``, ``m`` of them true.
        quota: int64 ``[n]``, at most the number of candidates of the canvas.
        score: ``[m]``, in the order of ``candidates``.

    Returns:
        bool ``[n l]``, a subset of the candidates.
    """
    table = torch.full(candidates.shape, -torch.inf, dtype=score.dtype, device=score.device)
    table[candidates] = score
    rank = rank_descending(table)
    return candidates & (rank < quota[:, None])


def rank_descending(values: Tensor) -> Tensor:
    """int64, the rank (0 = largest, ties from left to right) of each entry of ``values [... l]`` in its row."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    position = torch.arange(values.shape[-1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, position)
