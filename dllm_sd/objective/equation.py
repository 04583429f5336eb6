"""Where the parts meet: the equation.

``rollouts -> canvases and sites -> teacher views -> support -> target -> divergence [t m] x trust [t m] -> mean``

`plan.plan_update` counts the sites of a whole update before any model runs; `grade` computes the loss of some of its
canvases, a `MicroBatch`. The sum over any partition of the canvases is the loss of the update, so that
micro-batches and processes cannot change it. Within a micro-batch the sites are taken in chunks, and the gradient of a
chunk is computed with its loss (`chunked`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm_sd.losses.divergences import token_nll
from dllm_sd.losses.gap import drawn_gap
from dllm_sd.losses.numerics import floor_logp
from dllm_sd.losses.sites import choose
from dllm_sd.losses.trust import Drawn, Pooling
from dllm_sd.methods.method import Method
from dllm_sd.network.lazy_logits import LazyLogits
from dllm_sd.network.site_head import Head, SiteReader
from dllm_sd.network.view import View
from dllm_sd.objective.chunked import chunked_loss
from dllm_sd.objective.plan import MicroBatch

Student = Callable[[View, SiteReader], Any]
"""Reads a view and returns what ``read`` makes of hidden states and head; see `run_at_sites`."""
Teacher = Callable[[View], LazyLogits]


@dataclass(frozen=True)
class Graded:
    """The loss of some canvases and what is logged about their sites."""

    loss: Tensor
    """Scalar with gradient."""
    value: Tensor
    """``[m]``: divergence before clip and trust, summed over targets."""
    clipped: Tensor
    """``[m]``: the same behind the clip."""
    student_entropy: Tensor
    """``[m]``, nats, full vocabulary."""
    teacher_entropy: Tensor
    """``[m]`` of the first context's teacher; NaN without one."""
    measures: dict[str, Tensor]
    """``[m]`` each: what target and trust say of themselves."""
    advantage: Tensor
    """``[m]``: log-probability of the drawn token under the first teacher less the student's; NaN without a teacher."""
    agreement: Tensor
    """``[m]``: 1 where student and first teacher rank the same token first; NaN without a teacher."""
    term: Tensor
    """``[m]``: what each site adds to the loss."""
    sites: Tensor
    """bool ``[n l]``."""


def grade(method: Method, batch: MicroBatch, student: Student, teachers: Sequence[Teacher]) -> Graded:
    """The equation, on the canvases of a micro-batch, on the device of the models.

    Args:
        method: the parts.
        batch: what is read and where it is graded.
        student: lets somebody read the hidden states, with gradient.
        teachers: one per context, without gradient.
    """
    canvases, sites = batch.canvases, batch.candidates
    lazy = [
        teacher(_view(reading.ids, reading.mask, sites))
        for teacher, reading in zip(teachers, batch.teacher_inputs, strict=True)
    ]
    score = method.sites.score
    if score is not None:
        first = lazy[0]
        sites = choose(sites, batch.quota, torch.cat([score(first.logits(rows)) for rows in first.chunks()]))
        lazy = [one.select(sites[batch.candidates]) for one in lazy]
    equation = _Equation(method, batch, sites, lazy)
    loss, columns = student(_view(canvases.ids, canvases.mask, sites), equation.read)
    measures = {name: columns.pop(name) for name in method.measured}
    return Graded(loss, sites=sites, measures=measures, **columns)


class _Equation:
    """``support -> target -> divergence [t i] x trust [t i]`` at some of the sites, each for itself."""

    def __init__(self, method: Method, batch: MicroBatch, sites: Tensor, teachers: Sequence[LazyLogits]) -> None:
        self.method, self.teachers = method, teachers
        self.canvas = sites.nonzero()[:, 0]
        self.token, self.old_logp = batch.canvases.tokens[sites], batch.canvases.old_logp[sites]
        self.weight, self.belief = batch.rollout_weight[self.canvas], batch.belief[self.canvas].T
        self.coefficient = batch.coefficient[self.canvas]
        self.pooled: Tensor | None = None

    def read(self, hidden: Tensor, head: Head) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its columns ``[m]``; inside the student's forward."""
        student, pooling = LazyLogits.under_autocast(hidden, head), self.method.trust.pooling
        with torch.autocast(hidden.device.type, enabled=False):
            if pooling is not None and len(student.chunks()) > 1:  # no chunk has all sites of a canvas
                with torch.no_grad():
                    found = [self._evidence(pooling, student, rows) for rows in student.chunks()]
                self.pooled = pooling.pooled(torch.cat(found, 1), self.canvas, self.weight)
            return chunked_loss(student, head.trained, self)

    def __call__(self, logits: Callable[[], Tensor], rows: slice) -> dict[str, Tensor]:
        """Columns ``[i]`` of the chunk ``rows``."""
        method, token = self.method, self.token[rows]
        student_logp, teacher_logp = self._logp(logits, rows)
        student_u, teacher_u = method.support(student_logp, teacher_logp)
        target = method.target(teacher_u)
        value, unclipped = method.divergence.measure(student_u, target, token)
        with torch.no_grad():
            drawn = Drawn(token, -token_nll(student_logp, token), self.old_logp[rows], self.canvas[rows])
            given = student_u.detach(), target, drawn, self.weight[rows]
            trust = self._trust(given, rows)[: len(value)]  # policies that are no targets come last and have no value
            assert trust.shape == value.shape, f"trust {[*trust.shape]} for values {[*value.shape]}"
            factor = trust.to(value.dtype) * self.coefficient[rows].to(value.dtype)
            columns = {
                "value": unclipped.sum(0),
                "clipped": value.sum(0),
                **_described(student_logp, teacher_logp, token),
                **method.target.measures(teacher_u),
                **method.trust.measures(*given),
            }
        return {"term": (value * factor).sum(0), **columns}

    def _logp(self, logits: Callable[[], Tensor], rows: slice) -> tuple[Tensor, Tensor]:
        """Student ``[i v]`` and teachers ``[c i v]``."""
        student = _log_softmax(logits(), self.method.temperature)
        with torch.no_grad():
            teachers = [_log_softmax(teacher.logits(rows), self.method.temperature) for teacher in self.teachers]
        if len(teachers) == 1:
            return student, teachers[0][None]
        return student, torch.stack(teachers) if teachers else student.new_zeros((0, *student.shape))

    def _evidence(self, pooling: Pooling, student: LazyLogits, rows: slice) -> Tensor:
        """``[t i]``."""
        student_u, teacher_u = self.method.support(*self._logp(lambda: student.logits(rows), rows))
        return pooling.evidence(student_u, self.method.target(teacher_u), self.token[rows])

    def _trust(self, given: tuple[Tensor, Tensor, Drawn, Tensor], rows: slice) -> Tensor:
        """``[t i]`` from the arguments of a trust."""
        trust = self.method.trust(*given) if self.pooled is None else self.pooled[:, rows]
        if self.method.target.keeps_contexts:
            trust = trust * self.belief[:, rows].to(trust.dtype)
        return trust


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """In float32 at least."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return (logits if temperature == 1 else logits.to(dtype) / temperature).log_softmax(-1, dtype=dtype)


def _described(student_logp: Tensor, teacher_logp: Tensor, token: Tensor) -> dict[str, Tensor]:
    """What is logged about each site whatever the loss, ``[i]`` each."""
    found = {"student_entropy": entropy(student_logp)}
    if not len(teacher_logp):
        unknown = torch.full_like(found["student_entropy"], torch.nan)
        return found | dict.fromkeys(("teacher_entropy", "advantage", "agreement"), unknown)
    first = teacher_logp[0]
    return found | {
        "teacher_entropy": entropy(first),
        "advantage": drawn_gap(student_logp, first[None], token)[0],
        "agreement": (student_logp.argmax(-1) == first.argmax(-1)).to(first.dtype),
    }


def entropy(logp: Tensor) -> Tensor:
    """Entropy in nats of ``logp [... v]``, ``-> [...]``."""
    return -logp.exp().mul_(floor_logp(logp)).sum(-1)


def _view(ids: Tensor, mask: Tensor, sites: Tensor) -> View:
    prompt = torch.zeros((len(ids), ids.shape[1] - sites.shape[1]), dtype=torch.bool, device=ids.device)
    return View(ids, mask, torch.cat([prompt, sites], 1)).trimmed()
