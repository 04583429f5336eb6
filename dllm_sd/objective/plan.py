"""The plan of an update: which canvases are read, where they are graded, and how every site is weighted.

A plan holds numbers for each canvas and none of its content: in an update of 64 rollouts, 64 steps and 1,024
positions, the canvases of student and teacher would be 4 million tokens each. Micro-batches are built one at a
time (`Plan.micro_batch`), by the process that trains on them.

Axes: ``n`` canvases, ``l`` completion, ``s`` sequence, ``m`` graded sites, ``c`` teacher contexts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dllm_sd.canvases import Canvases, Places, drawn_share, with_prompt
from dllm_sd.methods.method import Average, Method
from dllm_sd.randomness import fold, make_key
from dllm_sd.rollouts.rollout import Rollouts, TeacherBrief
from dllm_sd.teachers import ContextInputs, TeacherInputs
from dllm_sd.trajectory import Trajectory, left_pad

POSITIONS_AT_ONCE = 2**18
"""Number of canvas positions that are built at a time while a plan is made."""

_PER_CANVAS = ("quota", "coefficient", "rollout_weight", "context_weight")


@dataclass(frozen=True)
class MicroBatch:
    """Some canvases of an update: what student and teachers read, and where they are graded."""

    canvases: Canvases
    teacher_inputs: tuple[TeacherInputs, ...]
    """One for each teacher context."""
    candidates: Tensor
    """bool ``[n l]``: the sites, or the positions from which the teacher chooses them."""
    quota: Tensor
    """int64 ``[n]``: sites of each canvas."""
    coefficient: Tensor
    """float64 ``[n]``: what a site's value is multiplied by; it holds the mean over the whole update."""
    rollout_weight: Tensor
    """float64 ``[n]``: the trust in the canvas's rollout."""
    context_weight: Tensor
    """float64 ``[n c]``: weight of each teacher context relative to the others, for the canvas's rollout."""

    @property
    def size(self) -> int:
        """``n``."""
        return self.canvases.size

    def to(self, device: torch.device | str) -> "MicroBatch":
        """All tensors on ``device``."""

        def move(x: Tensor) -> Tensor:
            return x.to(device)

        return MicroBatch(
            canvases=Canvases(**{name: move(value) for name, value in vars(self.canvases).items()}),
            teacher_inputs=tuple(TeacherInputs(move(x.ids), move(x.mask), move(x.shown)) for x in self.teacher_inputs),
            candidates=move(self.candidates),
            **{name: move(getattr(self, name)) for name in _PER_CANVAS},
        )


@dataclass(frozen=True)
class CanvasBuilder:
    """Builds canvases from their places; holds everything that the canvases of an update depend on."""

    method: Method
    trajectory: Trajectory
    """Of the kept rollouts of all processes."""
    prompts: tuple[tuple[Tensor, Tensor] | None, ...]
    """Each context's own prompts, ids int64 and mask bool ``[b p]``; None for the student's prompt."""
    keys: Sequence[int]
    """One key a rollout, for the teachers' and masks' random choices."""
    part: int
    """Index of the update among those over the same rollouts."""
    answer: Tensor | None
    """bool ``[b l]``: tokens of the parsed answers; None unless a context needs it."""
    formatting: Tensor
    """int64: ids of tokens without content, for site rules that leave them out."""

    def __call__(self, places: Places) -> tuple[Canvases, tuple[TeacherInputs, ...], Tensor, Tensor]:
        """The canvases, the teachers' inputs, ``candidates [n l]`` and ``quota [n]``."""
        rows, local = places.rows.unique(return_inverse=True)  # other rollouts are left out
        tensors = {name: value[rows] for name, value in self.trajectory.tensors().items()}
        trajectory, keys = replace(self.trajectory, **tensors), [self.keys[row] for row in rows.tolist()]
        method = self.method
        canvases = method.canvases.build(trajectory, keys, self.part, replace(places, rows=local))
        if method.sites.prompt:
            canvases = with_prompt(canvases, trajectory)
        gradable = canvases.gradable
        candidates, quota = method.sites(*(x & gradable for x in (canvases.masked, canvases.active, canvases.revealed)))
        protected = torch.zeros_like(candidates) if method.sites.score is not None else candidates
        answer = None if self.answer is None else self.answer[rows]
        inputs = ContextInputs(canvases, trajectory, protected, answer, keys)
        prompts = [prompt and (prompt[0][rows], prompt[1][rows]) for prompt in self.prompts]
        teacher_inputs = tuple(
            context(replace(inputs, prompt=prompt)) for context, prompt in zip(method.contexts, prompts, strict=True)
        )
        for teacher in teacher_inputs:
            candidates = candidates & ~teacher.shown
        if method.sites.content:
            candidates = candidates & ~torch.isin(canvases.tokens, self.formatting)
        canvases = replace(canvases, rows=places.rows)
        return canvases, teacher_inputs, candidates, torch.minimum(quota, candidates.sum(1))


@dataclass(frozen=True)
class Plan:
    """All canvases of one update as numbers, on the CPU."""

    builder: CanvasBuilder
    places: Places
    quota: Tensor
    """int64 ``[n]``: sites of each canvas."""
    coefficient: Tensor
    """float64 ``[n]``: what a site's value is multiplied by; it holds the mean over the whole update."""
    rollout_weight: Tensor
    """float64 ``[n]``: the trust in the canvas's rollout."""
    context_weight: Tensor
    """float64 ``[n c]``: weight of each teacher context relative to the others, for the canvas's rollout."""
    first: Tensor
    """int64 ``[n 1+c]``: the first column of the inputs of student and teachers that is not padding."""
    last: Tensor
    """int64 ``[n 1+c]``: the column after the last one that is not padding."""
    length: Tensor
    """int64 ``[n]``: tokens that the student reads."""
    content: Tensor
    """int64 ``[n]``: a hash of the student's input."""

    @property
    def size(self) -> int:
        """``n``."""
        return self.places.size

    @property
    def rows(self) -> Tensor:
        """int64 ``[n]``, index of the rollout."""
        return self.places.rows

    @property
    def steps(self) -> Tensor:
        """int64 ``[n]``, decoding step, or -1."""
        return self.places.steps

    @property
    def num_sites(self) -> int:
        """``m`` of the whole update."""
        return int(self.quota.sum())

    def select(self, index: Tensor) -> "Plan":
        """Some of the canvases; coefficients stay those of the whole update."""
        names = (*_PER_CANVAS, "first", "last", "length", "content")
        picked = {name: getattr(self, name)[index] for name in names}
        return replace(self, places=self.places.select(index), **picked)

    def micro_batch(self, index: Tensor | None = None) -> MicroBatch:
        """The micro-batch of the canvases ``index``, or of all."""
        selected = self if index is None else self.select(index)
        canvases, teacher_inputs, candidates, _ = self.builder(selected.places)
        return MicroBatch(
            canvases, teacher_inputs, candidates, **{name: getattr(selected, name) for name in _PER_CANVAS}
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
        answer: bool ``[b l]``, tokens of the parsed answers; None unless a context needs it.
        formatting: ids of tokens without content, for site rules that leave them out.

    Returns:
        The plan, or None where no site is left to train on.
    """
    if rollouts.size == 0:
        return None
    trajectory = rollouts.trajectory
    places = method.canvases.places(trajectory, part, method.rollout.passes)
    if places.size == 0:
        return None
    plain = tuple(TeacherBrief(weight=context.weight) for context in method.contexts)
    briefs = [rollout.briefs or plain for rollout in rollouts.kept]
    prompts = tuple(
        _prompts([brief.prompt for brief in column], trajectory.pad_id) for column in zip(*briefs, strict=True)
    )
    builder = CanvasBuilder(
        method, trajectory, prompts, keys, part, answer, torch.tensor(list(formatting), dtype=torch.int64)
    )
    canvas_weight, quota, first, last, length, content = _measure(builder, places)
    weight = method.trust.rollout_weight(rollouts.reward, rollouts.group)
    counted = rollouts.size + (int(rollouts.counts["rejected"]) if method.gate.count_rejected else 0)
    mean = _mean(method.average, places.rows, quota.double(), counted)
    context_weights = torch.tensor([[brief.weight for brief in row] for row in briefs], dtype=torch.float64)
    context_weight = context_weights.reshape(rollouts.size, len(method.contexts))[places.rows]
    coefficient = canvas_weight.double() * mean
    plan = Plan(
        *(builder, places, quota, coefficient, weight[places.rows], context_weight, first, last),
        length=length,
        content=content,
    )
    plan = plan.select((quota > 0) & ((plan.rollout_weight != 0) | method.trust.always_counts))
    if method.canvases.subset is not None:
        share = drawn_share(plan.rows, plan.steps, method.canvases.subset, keys, part)
        plan = replace(plan, coefficient=plan.coefficient * share).select(share > 0)
    return plan if plan.size else None


def _prompts(prompts: Sequence[Sequence[int] | None], pad_id: int) -> tuple[Tensor, Tensor] | None:
    """The padded prompts of one context; None where its teacher reads the student's."""
    given = [prompt for prompt in prompts if prompt is not None]
    return left_pad(given, pad_id) if len(given) == len(prompts) else None


def _measure(builder: CanvasBuilder, places: Places) -> tuple[Tensor, ...]:
    """Weight, quota, first and last column, length and content of every canvas, some canvases at a time."""
    width = builder.trajectory.prompt_ids.shape[1] + builder.trajectory.tokens.shape[1]
    size = max(1, POSITIONS_AT_ONCE // width)
    factors = (
        fold(torch.tensor(make_key("content")), torch.arange(width)) | 1
    )  # odd, so that every column changes the sum
    measured: list[tuple[Tensor, ...]] = []
    for start in range(0, places.size, size):
        index = torch.arange(start, min(start + size, places.size))
        canvases, teacher_inputs, _, quota = builder(places.select(index))
        masks = [canvases.mask, *(teacher.mask for teacher in teacher_inputs)]
        first = torch.stack([mask.int().argmax(1) for mask in masks], 1)
        last = torch.stack([mask.shape[1] - mask.flip(1).int().argmax(1) for mask in masks], 1)
        content = ((canvases.ids + 1) * canvases.mask * factors).sum(1)
        measured.append((canvases.weight, quota, first, last, canvases.mask.sum(1), content))
    return tuple(torch.cat(column) for column in zip(*measured, strict=True))


def _mean(average: Average, rows: Tensor, quota: Tensor, rollouts: int) -> Tensor:
    """float64 ``[n]``: the factor of each site that turns the sum over an update into the mean `Method.average`."""
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
