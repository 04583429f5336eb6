"""The plan of an update: which canvases are read, where they are graded, and what every site counts.

Axes: ``n`` canvases, ``l`` completion, ``m`` graded sites, ``c`` teacher contexts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dllm_sd.canvases import Canvases, drawn_share, with_prompt
from dllm_sd.methods.method import Average, Method
from dllm_sd.rollouts.rollout import Rollouts, TeacherBrief
from dllm_sd.teachers import ContextInputs, TeacherInputs
from dllm_sd.trajectory import left_pad

_BY_CANVAS = ("candidates", "quota", "coefficient", "rollout_weight", "belief")


@dataclass(frozen=True)
class Plan:
    """All canvases of one update, on the CPU."""

    canvases: Canvases
    readings: tuple[TeacherInputs, ...]
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
            readings=tuple(TeacherInputs(change(r.ids), change(r.mask), change(r.shown)) for r in self.readings),
            **{name: change(getattr(self, name)) for name in _BY_CANVAS},
        )


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
    inputs = ContextInputs(canvases, trajectory, protected, answer, keys)
    briefs = [rollout.briefs or (TeacherBrief(),) * len(method.contexts) for rollout in rollouts.kept]
    own = [[brief.prompt for brief in of_context] for of_context in zip(*briefs, strict=True)]
    readings = tuple(
        context(replace(inputs, prompt=None if None in rows else left_pad(rows, trajectory.pad_id)))
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
    weights = [[brief.weight for brief in of_rollout] for of_rollout in briefs]
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
