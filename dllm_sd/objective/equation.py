"""The loss of an update, computed from the parts of a method.

``rollouts -> canvases and sites -> teacher views -> support -> target -> divergence [t m] x trust [t m] -> mean``

`plan.plan_update` counts the sites of a whole update before any model runs; `grade_micro_batch` computes the loss of
some of its canvases, a `MicroBatch`. The sum over any partition of the canvases is the loss of the update, so that
its value does not depend on micro-batches and processes. Within a micro-batch the sites are taken in chunks, and the
gradient of a chunk is computed with its loss (`chunked`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm_sd.losses.divergences import token_nll
from dllm_sd.losses.gap import drawn_gap
from dllm_sd.losses.numerics import floor_logp
from dllm_sd.losses.sites import choose_sites
from dllm_sd.losses.trust import Drawn, Pooling
from dllm_sd.methods.method import Method
from dllm_sd.network.lazy_logits import LazyLogits
from dllm_sd.network.site_head import Head, SiteReader
from dllm_sd.network.view import View
from dllm_sd.objective.chunked import chunked_loss
from dllm_sd.objective.observing import Observer, Seen
from dllm_sd.objective.plan import MicroBatch

RunStudent = Callable[[View, SiteReader], Any]
"""``student(view, read)`` runs the model and returns ``read(hidden, head)`` at the sites; see `run_at_sites`."""
RunTeacher = Callable[[View], LazyLogits]


@dataclass(frozen=True)
class Graded:
    """The loss of some canvases and what is logged about their sites."""

    loss: Tensor
    """Scalar with gradient."""
    value: Tensor
    """``[m]``: divergence before clip and trust, summed over targets."""
    clipped: Tensor
    """``[m]``: the same after the clip."""
    student_entropy: Tensor
    """``[m]``, nats, full vocabulary."""
    teacher_entropy: Tensor
    """``[m]`` of the first context's teacher; NaN without one."""
    measures: dict[str, Tensor]
    """``[m]`` each: what target and trust log (`Method.measured`)."""
    advantage: Tensor
    """``[m]``: log-probability of the drawn token under the first teacher less the student's; NaN without a teacher."""
    agreement: Tensor
    """``[m]``: 1 where student and first teacher rank the same token first; NaN without a teacher."""
    term: Tensor
    """``[m]``: what each site adds to the loss."""
    sites: Tensor
    """bool ``[n l]``."""


def grade_micro_batch(
    method: Method,
    batch: MicroBatch,
    student: RunStudent,
    teachers: Sequence[RunTeacher],
    observer: Observer | None = None,
) -> Graded:
    """Compute the loss of the canvases of a micro-batch, on the device of the models.

    Args:
        method: the parts.
        batch: what is read and where it is graded.
        student: runs the student, with gradient.
        teachers: run the teacher of each context, without gradient.
        observer: looks on; it changes nothing.
    """
    canvases, sites = batch.canvases, batch.candidates
    lazy = [
        teacher(_view(inputs.ids, inputs.mask, sites))
        for teacher, inputs in zip(teachers, batch.teacher_inputs, strict=True)
    ]
    score = method.sites.score
    if score is not None:
        first = lazy[0]
        sites = choose_sites(sites, batch.quota, torch.cat([score(first.logits(rows)) for rows in first.chunks()]))
        lazy = [logits.select(sites[batch.candidates]) for logits in lazy]
    if observer is not None:
        observer.begin(sites)
    equation = _Equation(method, batch, sites, lazy, observer)
    loss, columns = student(_view(canvases.ids, canvases.mask, sites), equation.read)
    measures = {name: columns.pop(name) for name in method.measured}
    return Graded(loss, sites=sites, measures=measures, **columns)


class _Equation:
    """``support -> target -> divergence [t i] x trust [t i]`` at a chunk of the sites; no site depends on another."""

    def __init__(
        self,
        method: Method,
        batch: MicroBatch,
        sites: Tensor,
        teachers: Sequence[LazyLogits],
        observer: Observer | None = None,
    ) -> None:
        self.method, self.teachers, self.observer = method, teachers, observer
        self.canvas = sites.nonzero()[:, 0]
        self.token, self.old_logp = batch.canvases.tokens[sites], batch.canvases.old_logp[sites]
        self.weight, self.context_weight = batch.rollout_weight[self.canvas], batch.context_weight[self.canvas].T
        self.coefficient = batch.coefficient[self.canvas]
        self.pooled: Tensor | None = None

    def read(self, hidden: Tensor, head: Head) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its columns ``[m]``; called inside the student's forward pass."""
        student, pooling = LazyLogits.under_autocast(hidden, head), self.method.trust.pooling
        with torch.autocast(hidden.device.type, enabled=False):
            if pooling is not None and len(student.chunks()) > 1:  # no chunk has all sites of a canvas
                with torch.no_grad():
                    evidence = [self._evidence(pooling, student, rows) for rows in student.chunks()]
                self.pooled = pooling.pooled(torch.cat(evidence, 1), self.canvas, self.weight)
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
            trust_inputs = student_u.detach(), target, drawn, self.weight[rows]
            trust = self._trust(trust_inputs, rows)[: len(value)]  # policies that are not targets come last
            assert trust.shape == value.shape, f"trust {[*trust.shape]} for values {[*value.shape]}"
            if self.observer is not None:
                logp = student_logp.detach(), teacher_logp, student_u.detach(), teacher_u, target
                self.observer.record(Seen(rows, token, *logp, unclipped, value.detach(), trust))
            factor = trust.to(value.dtype) * self.coefficient[rows].to(value.dtype)
            columns = {
                "value": unclipped.sum(0),
                "clipped": value.sum(0),
                **_site_statistics(student_logp, teacher_logp, token),
                **method.target.measures(teacher_u),
                **method.trust.measures(*trust_inputs),
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
        """What the trust pools of each site of a chunk, ``[t i]``."""
        student_u, teacher_u = self.method.support(*self._logp(lambda: student.logits(rows), rows))
        return pooling.evidence(student_u, self.method.target(teacher_u), self.token[rows])

    def _trust(self, trust_inputs: tuple[Tensor, Tensor, Drawn, Tensor], rows: slice) -> Tensor:
        """Factors ``[t i]`` of the sites of a chunk."""
        trust = self.method.trust(*trust_inputs) if self.pooled is None else self.pooled[:, rows]
        if self.method.target.keeps_contexts:
            trust = trust * self.context_weight[:, rows].to(trust.dtype)
        return trust


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-softmax over the last axis, in float32 at least."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return (logits if temperature == 1 else logits.to(dtype) / temperature).log_softmax(-1, dtype=dtype)


def _site_statistics(student_logp: Tensor, teacher_logp: Tensor, token: Tensor) -> dict[str, Tensor]:
    """What is logged about each site for every method, ``[i]`` each."""
    statistics = {"student_entropy": entropy(student_logp)}
    if not len(teacher_logp):
        unknown = torch.full_like(statistics["student_entropy"], torch.nan)
        return statistics | dict.fromkeys(("teacher_entropy", "advantage", "agreement"), unknown)
    first = teacher_logp[0]
    return statistics | {
        "teacher_entropy": entropy(first),
        "advantage": drawn_gap(student_logp, first[None], token)[0],
        "agreement": (student_logp.argmax(-1) == first.argmax(-1)).to(first.dtype),
    }


def entropy(logp: Tensor) -> Tensor:
    """Entropy in nats of ``logp [... v]``, ``-> [...]``."""
    return -logp.exp().mul_(floor_logp(logp)).sum(-1)


def _view(ids: Tensor, mask: Tensor, sites: Tensor) -> View:
    """Inputs ``[n s]`` and sites ``[n l]`` as a view without columns that are padding in all rows."""
    prompt = torch.zeros((len(ids), ids.shape[1] - sites.shape[1]), dtype=torch.bool, device=ids.device)
    return View(ids, mask, torch.cat([prompt, sites], 1)).trimmed()
