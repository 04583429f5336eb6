"""The signal of a method: what its equation computes at the sites of some rollouts, without a step.

Everything comes from `grade_micro_batch`; here it is looked at from aside, split into groups and summed.

Axes: ``m`` sites of all rollouts, ``i`` sites of a chunk, ``c`` contexts, ``u`` support, ``v`` vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_sd.losses.divergences import ReverseKL
from dllm_sd.losses.measured import Divergence, clipped_share
from dllm_sd.losses.supports import FullVocabulary, top_k_overlap
from dllm_sd.methods.method import Method
from dllm_sd.network.lazy_logits import LazyLogits
from dllm_sd.network.view import View
from dllm_sd.objective.batching import micro_batches
from dllm_sd.objective.equation import RunStudent, grade_micro_batch
from dllm_sd.objective.observing import Seen
from dllm_sd.objective.plan import Plan
from dllm_sd.probing.deviations import PLACES, Deviations
from dllm_sd.rollouts.rollout import Rollouts
from dllm_sd.trajectory import NEVER

OVERLAP_K = 5
"""Entries of student and teacher whose overlap is measured."""
DOUBT = 0.5
"""Probability of the reference's token below which the student doubts it."""


@dataclass(frozen=True)
class Models:
    """What runs the student and the teachers, without gradient."""

    student: RunStudent
    teachers: Sequence[Callable[[View], LazyLogits]]
    device: torch.device
    tokens: int
    """Padded tokens of a forward pass."""


@dataclass(frozen=True)
class Sites:
    """Columns over all sites of some rollouts, float64 or bool ``[m]`` each, on the CPU."""

    columns: Mapping[str, Tensor]
    row: Tensor
    """int64 ``[m]``: the rollout."""
    right: Tensor
    """bool ``[m]``: whether it is correct."""
    place: Tensor
    """int64 ``[m]``: `Deviations.place`."""
    wrong_step: Tensor
    """bool ``[m]``: whether the site's token belongs to the first wrong step."""

    @property
    def count(self) -> int:
        """``m``."""
        return len(self.row)

    def mean(self, name: str, where: Tensor) -> float | None:
        """The mean of a column over some sites that have a value; None without any."""
        values = self.columns[name][where]
        values = values[~values.isnan()]
        return float(values.mean()) if len(values) else None

    def total(self, name: str) -> float:
        """The sum of a column."""
        return float(self.columns[name].nansum())

    def of(self, rollouts: Tensor) -> "Sites":
        """The sites of the rollouts that are true in bool ``[b]``."""
        kept = rollouts[self.row]
        columns = {name: column[kept] for name, column in self.columns.items()}
        return Sites(columns, self.row[kept], self.right[kept], self.place[kept], self.wrong_step[kept])

    def at(self, place: str) -> Tensor:
        """bool ``[m]``: the sites at a place of `PLACES`."""
        return self.place == PLACES.index(place)


def yardstick(divergence: Divergence) -> Divergence:
    """What distances are measured in: the method's own divergence, if it is one between distributions.

    Likelihoods, gaps at one token and surrogates of a policy gradient are not; KL(student || teacher) stands for them.
    """
    between = divergence.reads_target and not divergence.judges_each_teacher
    surrogate = divergence.reads_rollout_policy or divergence.needs_unnormalised or divergence.reads_drawn_token
    return divergence if between and not surrogate else ReverseKL()


def of_method(method: Method, teachers: Sequence[int]) -> Callable[[Seen, Tensor], dict[str, Tensor]]:
    """Columns that say how much of the divergence each part of the equation leaves, and what is known of the reference.

    In the order of the equation: ``whole`` is the divergence from the teacher on the full vocabulary, ``supported``
    that on the support, ``targeted`` that from the target. With a target that merges teachers the first of them, the
    informed one, is the teacher; else all are, and their divergences add up.

    Args:
        method: the parts.
        teachers: the contexts that are teachers.
    """
    measure, target = yardstick(method.divergence).measure, method.target
    chosen = list(teachers) if target.keeps_contexts else list(teachers[:1])

    def observe(seen: Seen, wanted: Tensor) -> dict[str, Tensor]:
        student, contexts = FullVocabulary()(seen.student_logp, seen.teacher_logp)
        targets = seen.target[chosen] if target.keeps_contexts else seen.target
        columns = {
            "whole": measure(student, contexts[chosen], seen.token).unclipped.sum(0),
            "supported": measure(seen.student_u, seen.teacher_u[chosen], seen.token).unclipped.sum(0),
            "targeted": measure(seen.student_u, targets, seen.token).unclipped.sum(0),
            "overlap": top_k_overlap(student, contexts[chosen[0]], OVERLAP_K),
            "p/student": probability(student, wanted),
        }
        columns |= {f"p/teacher {i}": probability(contexts[i], wanted) for i in teachers}
        if not target.keeps_contexts:
            columns["p/target"] = probability(target(contexts)[0], wanted)
        return columns

    return observe


def of_controls(kinds: Sequence[str]) -> Callable[[Seen, Tensor], dict[str, Tensor]]:
    """Columns that compare the teacher, the first context, with its controls.

    ``gained`` is the probability that the teacher adds to the student's, summed over the entries that gain, and
    ``gained/KIND`` the part of it that the control adds too: ``sum_v min(max(T - S, 0), max(T' - S, 0))``.
    """

    def observe(seen: Seen, wanted: Tensor) -> dict[str, Tensor]:
        student = seen.student_logp.exp()
        gains = (seen.teacher_logp.exp() - student).clamp(min=0)
        columns = {"gained": gains[0].sum(-1), "p/student": probability(seen.student_logp, wanted)}
        for i, kind in enumerate(kinds):
            columns[f"gained/{kind}"] = torch.minimum(gains[0], gains[i]).sum(-1)
            columns[f"p/{kind}"] = probability(seen.teacher_logp[i], wanted)
            columns[f"divergence/{kind}"] = ReverseKL()(seen.student_logp, seen.teacher_logp[i : i + 1], seen.token)[0]
        return columns

    return observe


def probability(logp: Tensor, token: Tensor) -> Tensor:
    """The probability of ``token [i]`` under ``logp [i v]``, NaN where the token is `NEVER`."""
    picked = logp.gather(-1, token.clamp(min=0)[:, None])[:, 0].exp()
    return picked.masked_fill(token == NEVER, torch.nan)


class _Columns:
    """An observer that collects columns ``[m]`` of the sites of a micro-batch."""

    def __init__(self, observe: Callable[[Seen, Tensor], Mapping[str, Tensor]], reference: Tensor) -> None:
        """Collect what ``observe`` gives; ``reference`` int64 ``[n l]`` are the reference's tokens."""
        self.observe, self.reference = observe, reference
        self.wanted = reference.new_empty(0)
        self.chunks: list[Mapping[str, Tensor]] = []

    def begin(self, sites: Tensor) -> None:
        """Find the reference's token at each site."""
        self.wanted = self.reference.to(sites.device)[sites]

    def record(self, seen: Seen) -> None:
        """Compute the columns of a chunk."""
        self.chunks.append(self.observe(seen, self.wanted[seen.rows]))

    @property
    def columns(self) -> dict[str, Tensor]:
        """All columns so far."""
        return {name: torch.cat([chunk[name] for chunk in self.chunks]) for name in self.chunks[0]}


def measure_sites(
    method: Method,
    plans: Sequence[Plan],
    models: Models,
    rollouts: Rollouts,
    deviations: Deviations,
    observe: Callable[[Seen, Tensor], Mapping[str, Tensor]],
) -> Sites:
    """Run the equation over all canvases of some plans, without gradient.

    ``observe(seen, wanted)`` gives columns; ``wanted`` int64 ``[i]`` are the tokens of the reference.
    """
    parts: list[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]] = []
    for plan in plans:
        for (index,) in micro_batches(plan, models.tokens):
            batch = plan.micro_batch(index)
            rows = batch.canvases.rows
            look = _Columns(observe, deviations.reference[rows])
            with torch.no_grad():
                graded = grade_micro_batch(method, batch.to(models.device), models.student, models.teachers, look)
            canvas, position = (x.cpu() for x in graded.sites.nonzero(as_tuple=True))
            names = ("value", "clipped", "student_entropy", "teacher_entropy", "agreement", "advantage")
            columns = {name: getattr(graded, name) for name in names} | look.columns
            columns = {name: column.double().cpu() for name, column in columns.items()}
            parts.append((rows[canvas], batch.canvases.steps[canvas], position, columns))
    row, step, position = (torch.cat([*column]) for column in [*zip(*parts, strict=True)][:3])
    columns = {name: torch.cat([part[3][name] for part in parts]) for name in parts[0][3]}
    right = torch.tensor([rollout.grade.correct for rollout in rollouts.kept])
    return Sites(
        columns,
        row=row,
        right=right[row],
        place=deviations.place(row, step, position),
        wrong_step=deviations.wrong_step[row, position],
    )


@dataclass(frozen=True)
class SiteGroup:
    """Means over the sites of a group; None where no site has a value."""

    sites: int
    share: float | None
    """Of the divergence of all sites."""
    divergence: float | None
    """From the target, before the clip, in nats."""
    student_entropy: float | None
    teacher_entropy: float | None
    agreement: float | None
    """Share of sites where student and first teacher rank the same token first."""
    overlap: float | None
    """Share of the first teacher's top `OVERLAP_K` entries that are among the student's."""
    advantage: float | None
    """Log-probability of the drawn token under the first teacher less the student's."""


def groups(sites: Sites) -> dict[str, SiteGroup]:
    """Sites of all, of right and of wrong rollouts, of first wrong steps and of first deviations; no empty groups."""
    masks = {
        "all": torch.ones_like(sites.right),
        "right": sites.right,
        "wrong": ~sites.right,
        "first_wrong_step": sites.wrong_step,
        "first_deviation": sites.at("at"),
    }
    total = sites.total("targeted")
    names = ("student_entropy", "teacher_entropy", "agreement", "overlap", "advantage")

    def group(where: Tensor) -> SiteGroup:
        here = float(sites.columns["targeted"][where].nansum())
        means = {name: sites.mean(name, where) for name in names}
        return SiteGroup(int(where.sum()), here / total if total else None, sites.mean("targeted", where), **means)

    return {name: group(where) for name, where in masks.items() if bool(where.any())}


@dataclass(frozen=True)
class Shares:
    """What each part of the equation takes of the divergence from the teacher, as shares of it; they and what is left
    add up to 1. A negative share adds to it."""

    support: float
    purification: float
    """By a target that merges several teachers; 0 for others."""
    clip: float
    """Above what was there if the clip makes the sum negative."""

    @property
    def left(self) -> float:
        """What the student is trained on."""
        return 1 - self.support - self.purification - self.clip


def shares(sites: Sites, method: Method) -> Shares | None:
    """The shares of sums over all sites; None where student and teacher do not differ."""
    whole, supported, targeted = (sites.total(name) for name in ("whole", "supported", "targeted"))
    own = yardstick(method.divergence) is method.divergence
    clipped = sites.total("clipped") if own else targeted
    if not whole or not math.isfinite(whole):
        return None
    steps = clipped_share(whole, supported), (supported - targeted) / whole, (targeted - clipped) / whole
    return Shares(*steps)


def premise_places(sites: Sites) -> dict[str, Tensor]:
    """Where a method's premise is looked at, bool ``[m]`` each.

    ``before`` and ``at`` the first deviation of a rollout; where that is a ``mistake``: in wrong rollouts and, where
    first wrong steps are known, in these, since another order of steps deviates too; and where the student ``doubts``:
    before deviations and, in wrong rollouts, at them, where it gives the token less than `DOUBT`. A right rollout that
    deviates is another solution, whose token a good teacher prefers to the reference's.
    """
    places = {place: sites.at(place) for place in ("before", "at")}
    located = sites.wrong_step if bool(sites.wrong_step.any()) else ~sites.right
    places["mistake"] = places["at"] & ~sites.right & located
    in_question = places["before"] | places["at"] & ~sites.right
    places["doubts"] = in_question & (sites.columns["p/student"] < DOUBT)
    return places


def premise(sites: Sites) -> dict[str, dict[str, float | None]]:
    """The mean probability of the reference's token at each of `premise_places`, by reader."""
    names, places = [name for name in sites.columns if name.startswith("p/")], premise_places(sites)
    return {
        name.removeprefix("p/"): {place: sites.mean(name, where) for place, where in places.items()} for name in names
    }
