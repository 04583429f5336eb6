"""Where the parts meet: the equation.

``rollouts -> canvases and sites -> teacher views -> support -> target -> divergence [t m] x trust [t m] -> mean``

`plan_update` lays out a whole update in integer tensors and counts its sites, before any model runs; `grade` computes
the loss of some of its canvases. The sum over any partition of the canvases is the loss of the update, so that
micro-batches and processes cannot change it. Within a micro-batch the sites are taken in chunks, and the gradient of a
chunk is computed with its loss (`losses.chunks`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dllm_sd.canvases import Canvases, drawn_share, with_prompt
from dllm_sd.losses.divergences import token_nll
from dllm_sd.losses.gap import drawn_gap
from dllm_sd.losses.measured import measure
from dllm_sd.losses.sites import choose
from dllm_sd.losses.supports import floor_logp
from dllm_sd.losses.trust import Drawn, Pooling
from dllm_sd.methods.method import Average, Method
from dllm_sd.network.site_head import Head, Read
from dllm_sd.objective.chunked import Spoken, swept
from dllm_sd.policies.policy import View
from dllm_sd.rollouts.rules import Rollouts
from dllm_sd.teachers import Reading, Scene
from dllm_sd.trajectory import left_pad

Student = Callable[[View, Read], Any]
"""Reads a view and returns what ``read`` makes of hidden states and head; see `site_head.ask`."""
Teacher = Callable[[View], Spoken]

_BY_CANVAS = ("candidates", "quota", "coefficient", "rollout_weight", "belief")


@dataclass(frozen=True)
class Plan:
    """All canvases of one update, on the CPU."""

    canvases: Canvases
    readings: tuple[Reading, ...]
    """One per teacher context."""
    candidates: Tensor
    """bool ``[n l]``: the sites, or what the teacher may choose them from."""
    quota: Tensor
    """int64 ``[n]``: sites of each canvas."""
    coefficient: Tensor
    """float64 ``[n]``: what a site's value is multiplied by; it holds the mean over the whole update."""
    rollout_weight: Tensor
    """float64 ``[n]``: the trust in the canvas's rollout."""
    belief: Tensor
    """float64 ``[n c]``: how far each context is believed beside the others, for the canvas's rollout."""

    @property
    def size(self) -> int:
        """``n``."""
        return self.canvases.size

    @property
    def width(self) -> int:
        """Columns of the widest of what student and teachers read."""
        return max(ids.shape[1] for ids in (self.canvases.ids, *(reading.ids for reading in self.readings)))

    @property
    def num_sites(self) -> int:
        """``m`` of the whole update."""
        return int(self.quota.sum())

    def select(self, index: Tensor) -> "Plan":
        """Some of the canvases; coefficients stay those of the whole update."""
        return self._map(lambda x: x[index])

    def to(self, device: torch.device | str) -> "Plan":
        """All tensors on ``device``."""
        return self._map(lambda x: x.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Plan":
        return Plan(
            canvases=Canvases(**{name: change(value) for name, value in vars(self.canvases).items()}),
            readings=tuple(Reading(change(r.ids), change(r.mask), change(r.shown)) for r in self.readings),
            **{name: change(getattr(self, name)) for name in _BY_CANVAS},
        )


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


def plan_update(
    method: Method,
    rollouts: Rollouts,
    keys: Sequence[int],
    part: int = 0,
    answer: Tensor | None = None,
    formatting: Sequence[int] = (),
) -> Plan | None:
    """Lay out one update.

    Args:
        method: the parts.
        rollouts: the kept rollouts of all processes, in one order.
        keys: one key a rollout, for the teachers' and masks' random choices.
        part: which of the `method.rollout.passes` updates over these rollouts.
        answer: bool ``[b l]``, tokens of the parsed answers, where a context asks for it.
        formatting: ids of tokens that say nothing, for sites that leave them out.

    Returns:
        The plan, or None where there is nothing to learn from.
    """
    if rollouts.size == 0:
        return None
    trajectory = rollouts.trajectory
    canvases = method.canvases(trajectory, keys, part, method.rollout.passes)
    if canvases.size == 0:
        return None
    if method.sites.prompt:
        canvases = with_prompt(canvases, trajectory)
    gradable = canvases.gradable
    candidates, quota = method.sites(*(x & gradable for x in (canvases.masked, canvases.active, canvases.revealed)))
    protected = torch.zeros_like(candidates) if method.sites.score is not None else candidates
    scene = Scene(canvases, trajectory, protected, answer, keys)
    prompts = zip(*(rollout.teacher_prompts for rollout in rollouts.kept), strict=True)
    own = [*prompts] or [(None,)] * len(method.contexts)
    readings = tuple(
        context(replace(scene, prompt=None if None in rows else left_pad(rows, trajectory.pad_id)))
        for context, rows in zip(method.contexts, own, strict=True)
    )
    for reading in readings:
        candidates = candidates & ~reading.shown
    if method.sites.content:
        candidates = candidates & ~torch.isin(canvases.tokens, torch.tensor(list(formatting), dtype=torch.int64))
    quota = torch.minimum(quota, candidates.sum(1))
    weight = method.trust.rollout_weight(rollouts.reward, rollouts.group)
    counted = rollouts.size + (int(rollouts.counts["rejected"]) if method.gate.count_rejected else 0)
    mean = _mean(method.average, canvases.rows, quota.double(), counted)
    weights = [rollout.teacher_weights or (1.0,) * len(method.contexts) for rollout in rollouts.kept]
    belief = torch.tensor(weights, dtype=torch.float64).reshape(rollouts.size, len(method.contexts))[canvases.rows]
    coefficient = canvases.weight.double() * mean
    plan = Plan(canvases, readings, candidates, quota, coefficient, weight[canvases.rows], belief)
    plan = plan.select((quota > 0) & ((plan.rollout_weight != 0) | method.trust.always_counts))
    if method.canvases.subset is not None:
        share = drawn_share(plan.canvases.rows, plan.canvases.steps, method.canvases.subset, keys, part)
        plan = replace(plan, coefficient=plan.coefficient * share).select(share > 0)
    return plan if plan.size else None


def _mean(average: Average, rows: Tensor, quota: Tensor, rollouts: int) -> Tensor:
    """float64 ``[n]``: the factor of each site that turns the sum over an update into the mean that is asked for."""
    graded = (quota > 0).double()

    def per_rollout(x: Tensor) -> Tensor:
        return torch.zeros(int(rows.max()) + 1, dtype=torch.float64).index_add(0, rows, x)[rows]

    match average:
        case "sites":
            mean = graded / quota.sum()
        case "canvases":
            mean = torch.full_like(quota, 1 / len(rows))
        case "steps":
            mean = graded / (quota * per_rollout(graded) * rollouts)
        case "step_sums":
            mean = graded / (per_rollout(graded) * rollouts)
        case "rollouts":
            mean = graded / (per_rollout(quota) * rollouts)
    return mean.nan_to_num(0.0)  # 0 / 0 where a canvas or rollout has no site


def grade(method: Method, plan: Plan, student: Student, teachers: Sequence[Teacher]) -> Graded:
    """The equation, on the canvases of ``plan`` (a part of an update, on the device of the models).

    Args:
        method: the parts.
        plan: what is read and where it is graded.
        student: lets somebody read the hidden states, with gradient.
        teachers: one per context, without gradient.
    """
    canvases, sites = plan.canvases, plan.candidates
    spoken = [
        teacher(_view(reading.ids, reading.mask, sites))
        for teacher, reading in zip(teachers, plan.readings, strict=True)
    ]
    if method.sites.score is not None:
        first = spoken[0]
        sites = choose(sites, plan.quota, torch.cat([method.sites.score(first.at(rows)) for rows in first.chunks()]))
        spoken = [one.select(sites[plan.candidates]) for one in spoken]
    equation = _Equation(method, plan, sites, spoken)
    loss, columns = student(_view(canvases.ids, canvases.mask, sites), equation.read)
    measures = {name: columns.pop(name) for name in method.measured}
    return Graded(loss, sites=sites, measures=measures, **columns)


class _Equation:
    """``support -> target -> divergence [t i] x trust [t i]`` at some of the sites, each for itself."""

    def __init__(self, method: Method, plan: Plan, sites: Tensor, teachers: Sequence[Spoken]) -> None:
        self.method, self.teachers = method, teachers
        self.canvas = sites.nonzero()[:, 0]
        self.token, self.old_logp = plan.canvases.tokens[sites], plan.canvases.old_logp[sites]
        self.weight, self.belief = plan.rollout_weight[self.canvas], plan.belief[self.canvas].T
        self.coefficient = plan.coefficient[self.canvas]
        self.pooled: Tensor | None = None

    def read(self, hidden: Tensor, head: Head) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its columns ``[m]``; inside the student's forward."""
        student, trust = Spoken.now(hidden, head), self.method.trust
        with torch.autocast(hidden.device.type, enabled=False):
            if isinstance(trust, Pooling) and len(student.chunks()) > 1:  # no chunk has all sites of a canvas
                with torch.no_grad():
                    found = [self._evidence(trust, student, rows) for rows in student.chunks()]
                self.pooled = trust.pooled(torch.cat(found, 1), self.canvas, self.weight)
            return swept(student, head.trained, self)

    def __call__(self, logits: Callable[[], Tensor], rows: slice) -> dict[str, Tensor]:
        """Columns ``[i]`` of the chunk ``rows``."""
        method, token = self.method, self.token[rows]
        student_logp, teacher_logp = self._logp(logits, rows)
        student_u, teacher_u = method.support(student_logp, teacher_logp)
        target = method.target(teacher_u)
        value, unclipped = measure(method.divergence, student_u, target, token)
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
            teachers = [_log_softmax(teacher.at(rows), self.method.temperature) for teacher in self.teachers]
        if len(teachers) == 1:
            return student, teachers[0][None]
        return student, torch.stack(teachers) if teachers else student.new_zeros((0, *student.shape))

    def _evidence(self, trust: Pooling, student: Spoken, rows: slice) -> Tensor:
        """``[t i]``."""
        student_u, teacher_u = self.method.support(*self._logp(lambda: student.at(rows), rows))
        return trust.evidence(student_u, self.method.target(teacher_u), self.token[rows])

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
