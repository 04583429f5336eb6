"""Rules for the canvases that the student reads: those of the decoder, random masks, or everything masked."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Protocol

import torch
from torch import Tensor

from dllm_sd.parts import Part
from dllm_sd.randomness import fold, make_key, uniform
from dllm_sd.ranges import Count, Range, Ranged, ShareBelowOne, Size
from dllm_sd.trajectory import NEVER, Trajectory, is_any_of


@dataclass(frozen=True)
class Canvases:
    """``n`` canvases that the student reads.

    `rows` and `steps` give the origin of each canvas; ``steps`` is -1 for a canvas that no decoder saw. `weight`
    multiplies the loss of its sites: ``1 / (t * answer positions)`` for a random mask, else 1.
    """

    rows: Tensor
    """int64 ``[n]``, index of the rollout."""
    steps: Tensor
    """int64 ``[n]``, decoding step, or -1."""
    ids: Tensor
    """int64 ``[n s]``, prompt and completion side."""
    mask: Tensor
    """bool ``[n s]``, true where attention is allowed."""
    masked: Tensor
    """bool ``[n l]``, masked positions whose final token is known."""
    active: Tensor
    """bool ``[n l]``, the masked positions of the active block."""
    revealed: Tensor
    """bool ``[n l]``, positions that the decoder commits at this step; all masked ones if no decoder saw the canvas."""
    gradable: Tensor
    """bool ``[n l]``: positions that may be sites: their token is known, and they are not end padding, unless the rule
    grades it."""
    tokens: Tensor
    """int64 ``[n l]``, the final completion."""
    weight: Tensor
    """float32 ``[n]``."""
    old_logp: Tensor
    """float ``[n l]``: `Trajectory.logp`; NaN where it is unknown, or the decoder saw another canvas."""

    @property
    def size(self) -> int:
        """``n``, the number of canvases."""
        return self.ids.shape[0]


@dataclass(frozen=True)
class Places:
    """The origins of ``n`` canvases, from which they are built per micro-batch."""

    rows: Tensor
    """int64 ``[n]``, index of the rollout."""
    steps: Tensor
    """int64 ``[n]``, decoding step, or -1."""
    draws: Tensor
    """int64 ``[n]``: index of the random mask among those of its rollout; 0 for other canvases."""

    @property
    def size(self) -> int:
        """``n``."""
        return len(self.rows)

    def select(self, index: Tensor) -> "Places":
        """The places ``index``."""
        return Places(self.rows[index], self.steps[index], self.draws[index])


def one_each(trajectory: Trajectory, step: int) -> Places:
    """The places of one canvas per rollout, all at ``step``."""
    rows = torch.arange(trajectory.size, device=trajectory.tokens.device)
    return Places(rows, torch.full_like(rows, step), torch.zeros_like(rows))


class CanvasRule(Part, Protocol):
    """Chooses and builds the canvases of one pass over a batch of rollouts.

    `CanvasDefaults` implements all members but `places` and `build`. An autoregressive rollout has the same canvas
    under every rule, the whole sequence (`whole_sequences`): nothing is masked, and its likelihood is exact.
    """

    def places(self, trajectory: Trajectory, part: int, parts: int) -> Places:
        """The places of the canvases of pass ``part`` out of ``parts`` over the same rollouts."""
        ...

    def build(self, trajectory: Trajectory, keys: Sequence[int], part: int, places: Places) -> Canvases:
        """The canvases at ``places``; ``keys [b]`` seed the draws of each rollout. Canvases are independent."""
        ...

    def __call__(self, trajectory: Trajectory, keys: Sequence[int], part: int, parts: int) -> Canvases:
        """All canvases of a pass."""
        ...

    @property
    def subset(self) -> int | None:
        """Number of canvases per rollout that are drawn at random to represent all (`drawn_share`); None takes all."""
        ...

    @property
    def decoded(self) -> bool:
        """Whether the canvases are those of decoding steps."""
        ...

    @property
    def hides_everything(self) -> bool:
        """Whether the canvases mask blocks that are always finished when a block-causal decoder reads later ones."""
        ...

    def masked_share(self, canvases: int) -> float:
        """The largest masked share of the completion positions of ``canvases`` canvases together."""
        ...


class CanvasDefaults(ABC):
    """Defaults for rules whose canvases no decoder saw, and that grade all of them."""

    subset: int | None = None
    decoded: bool = False
    hides_everything: bool = False

    @abstractmethod
    def places(self, trajectory: Trajectory, part: int, parts: int) -> Places:
        """`CanvasRule.places`."""

    @abstractmethod
    def build(self, trajectory: Trajectory, keys: Sequence[int], part: int, places: Places) -> Canvases:
        """`CanvasRule.build`."""

    def __call__(self, trajectory: Trajectory, keys: Sequence[int], part: int, parts: int) -> Canvases:
        """All canvases of a pass."""
        return self.build(trajectory, keys, part, self.places(trajectory, part, parts))

    def masked_share(self, canvases: int) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class DecoderSteps(Ranged, CanvasDefaults, key="method.canvases"):
    """The canvases that the decoder saw, one per decoding step (d-OPSD, arXiv 2606.18195, Eq. 7).

    With the defaults every step up to the one that commits the end token is used. The first four fields are options of
    the published code. If rollouts serve several passes, each pass takes its own consecutive chunk of steps.
    """

    last_block: bool = True
    """False leaves out the canvases of the last block."""
    last_state: bool = True
    """False leaves out the last usable canvas of each rollout."""
    remainder: bool = True
    """False makes all chunks of a rollout equally long and drops the steps that are left over."""
    prompt_ends: bool = False
    """True takes an end token inside the prompt for the end of the completion, so that nothing is left to train on."""
    end_padding: bool = False
    """Grade positions after the end token too, if the decoder filled them before it; the released d-OPSD code does."""
    subset: Count | None = None
    """Number of graded steps of each rollout and pass. They are drawn at random and weighted so that the expected loss
    and gradient are those of all steps, under every `method.average`; null grades all."""
    decoded = True

    def usable(self, trajectory: Trajectory) -> Tensor:
        """bool ``[b k]``: the steps whose canvases may be used, before they are divided into chunks."""
        reveal_step = trajectory.reveal_step
        position = torch.arange(reveal_step.shape[1], device=reveal_step.device)
        needed = reveal_step.masked_fill(position >= trajectory.length[:, None], NEVER).amax(1)
        steps = torch.arange(int(trajectory.num_steps.max()), device=reveal_step.device)
        slot = torch.where(reveal_step >= 0, reveal_step, steps.numel())
        committed = torch.zeros((len(slot), steps.numel() + 1), dtype=torch.bool, device=slot.device)
        usable = committed.scatter_(1, slot, True)[:, :-1] & (steps <= needed[:, None])
        if not self.last_block:
            final_block = trajectory.block == trajectory.block[:, -1:]
            first_final = torch.where(final_block & (reveal_step >= 0), reveal_step, steps.numel()).amin(1)
            usable &= steps < first_final[:, None]
        if self.prompt_ends:
            ends = is_any_of(trajectory.prompt_ids, trajectory.end_ids) & trajectory.prompt_mask
            usable &= ~ends.any(1, keepdim=True)
        if not self.last_state:
            order = usable.int().cumsum(1)
            usable &= order < order[:, -1:]
        return usable

    def places(self, trajectory: Trajectory, part: int, parts: int) -> Places:
        """The places of the steps of this pass, sorted by rollout."""
        if trajectory.causal:
            return one_each(trajectory, 0)
        usable = self.usable(trajectory)
        order = usable.int().cumsum(1) - 1
        count = usable.sum(1, keepdim=True)
        if self.remainder:
            first, last = count * part // parts, count * (part + 1) // parts
        else:
            first, last = count // parts * part, count // parts * (part + 1)
        rows, steps = (usable & (order >= first) & (order < last)).nonzero(as_tuple=True)
        return Places(rows, steps, torch.zeros_like(rows))

    def build(self, trajectory: Trajectory, keys: Sequence[int], part: int, places: Places) -> Canvases:
        """The canvases of these decoding steps."""
        if trajectory.causal:
            return whole_sequences(trajectory, places)
        rows, steps = places.rows, places.steps
        masked = trajectory.masked(rows, steps)
        known = trajectory.reveal_step != NEVER
        gradable = known if self.end_padding else known & ~trajectory.is_behind_end
        known = known[rows]
        return Canvases(
            rows=rows,
            steps=steps,
            ids=torch.cat([trajectory.prompt_ids[rows], trajectory.canvas(rows, steps)], 1),
            mask=attention_mask(trajectory, rows),
            masked=masked & known,
            active=masked & known & (trajectory.block[rows] == trajectory.active_block(rows, steps)[:, None]),
            revealed=trajectory.revealed(rows, steps),
            gradable=gradable[rows],
            tokens=trajectory.tokens[rows],
            weight=torch.ones(len(rows), device=rows.device),
            old_logp=known_logp(trajectory)[rows],
        )


@dataclass(frozen=True)
class RandomMasks(Ranged, CanvasDefaults, key="method.canvases"):
    """Random masks with ``1/t`` weights: the masked-diffusion likelihood bound (LLaDA, arXiv 2502.09992, Eq. 5).

    A canvas has the weight ``1 / (t * answer positions)``, so that the mean over canvases is LLaDA's loss per answer
    token. Answer positions are the generated ones and, with `end_padding`, those after the end token. Positions beyond
    a horizon stay masked and ungraded.

    Each draw masks every answer position independently with probability ``t``; the ``t`` of one
    rollout's draws are spread evenly over ``[t_min, 1]`` with one random offset (low-variance sampling, as in MDLM,
    arXiv 2406.07524).

    A block-causal model never reads masks in earlier blocks. Each draw then masks positions of one block, drawn
    uniformly, and its weight is multiplied by the number of blocks (one term of BD3-LM's bound, arXiv 2503.09573,
    Eq. 8).
    """

    draws: Size = 1
    """Masks per rollout and pass."""
    t_min: Annotated[float, Range(above=0, below=1)] = 0.001
    """Smallest masking probability; the weight ``1/t`` is bounded by its inverse."""
    end_padding: bool = True
    """Train on the padding after the end token too, as LLaDA does; False leaves it masked and ungraded."""

    def masked_share(self, canvases: int) -> float:
        """The mean of ``canvases`` shares, each uniform on (0, 1), plus two standard deviations."""
        return min(1, 0.5 + 2 / math.sqrt(12 * canvases))

    def places(self, trajectory: Trajectory, part: int, parts: int) -> Places:
        """The places of `draws` masks per rollout."""
        if trajectory.causal:
            return one_each(trajectory, 0)
        rows = torch.arange(trajectory.size).repeat_interleave(self.draws)
        return Places(rows, torch.full_like(rows, -1), torch.arange(self.draws).repeat(trajectory.size))

    def build(self, trajectory: Trajectory, keys: Sequence[int], part: int, places: Places) -> Canvases:
        """The canvases of these draws."""
        if trajectory.causal:
            canvases = whole_sequences(trajectory, places)
            return replace(canvases, weight=1 / canvases.masked.sum(1).clamp(min=1).float())
        rows, draw = places.rows, places.draws
        base = torch.tensor([make_key(key, "random_masks", part) for key in keys], dtype=torch.int64)
        offset = uniform(fold(base, -1), 1)[rows, 0]
        t = self.t_min + (1 - self.t_min) * ((offset + draw / self.draws) % 1)
        hidden = uniform(fold(base[rows], draw), trajectory.tokens.shape[1]) < t[:, None]
        device = trajectory.tokens.device
        answer = trajectory.is_written
        if self.end_padding:
            answer |= trajectory.is_behind_end
        rows, hidden = rows.to(device), hidden.to(device)
        weight = 1 / (t.to(device) * answer.sum(1).clamp(min=1)[rows])
        if trajectory.blocks_of_prompt:
            last = trajectory.block.masked_fill(~answer, 0).amax(1)[rows]
            place = (uniform(fold(base, -2), 1)[rows.cpu(), 0] + draw / self.draws) % 1
            block = (place.to(device) * (last + 1)).long()
            hidden &= trajectory.block[rows] == block[:, None]
            weight *= last + 1
        return _synthetic(trajectory, rows, answer, hidden, weight)


@dataclass(frozen=True)
class AllMaskedCanvas(Ranged, CanvasDefaults, key="method.canvases"):
    """The completion fully masked and the prompt masked at random: d1's one-step estimate (arXiv 2504.12216, sec. 3.2).

    Each pass over the same rollouts draws another prompt mask. Generated tokens are graded, padding after the end token
    is not.
    """

    prompt_mask_ratio: ShareBelowOne = 0.15
    """Probability with which each prompt token is replaced by the mask token."""
    hides_everything = True

    def places(self, trajectory: Trajectory, part: int, parts: int) -> Places:
        """The places of one canvas per rollout."""
        return one_each(trajectory, 0 if trajectory.causal else -1)

    def build(self, trajectory: Trajectory, keys: Sequence[int], part: int, places: Places) -> Canvases:
        """The canvases at these places, with the prompt masks of this pass."""
        if trajectory.causal:
            return whole_sequences(trajectory, places)
        device, rows = trajectory.tokens.device, places.rows
        everywhere = torch.ones_like(trajectory.tokens[rows], dtype=torch.bool)
        canvases = _synthetic(trajectory, rows, trajectory.is_written, everywhere, torch.ones(len(rows)))
        base = torch.tensor([make_key(key, "prompt_mask", part) for key in keys], dtype=torch.int64)
        width = trajectory.prompt_ids.shape[1]
        noise, prompt_mask = uniform(base, width).to(device)[rows], trajectory.prompt_mask[rows]
        index = (prompt_mask.int().cumsum(1) - 1).clamp(min=0)  # independent of the padding
        drop = (noise.gather(1, index) < self.prompt_mask_ratio) & prompt_mask
        ids = canvases.ids.clone()
        ids[:, :width] = ids[:, :width].masked_fill(drop, trajectory.mask_id)
        return replace(canvases, ids=ids)


CANVASES: dict[str, type] = {"decoder_steps": DecoderSteps, "random_masks": RandomMasks, "all_masked": AllMaskedCanvas}


def drawn_share(rows: Tensor, steps: Tensor, subset: int, keys: Sequence[int], part: int) -> Tensor:
    """Weight of each canvas if ``subset`` canvases of each rollout represent all of them.

    Canvases are drawn uniformly without replacement. The weight of a drawn one is the number of canvases divided by the
    number of drawn ones (Horvitz and Thompson, 1952), so that sums over canvases keep their expectation.

    Args:
        rows: int64 ``[n]``, index of the rollout.
        steps: int64 ``[n]``.
        subset: number of canvases drawn per rollout; all if there are fewer.
        keys: one key per rollout, ``[b]``.
        part: index of the pass over these rollouts.

    Returns:
        float64 ``[n]``, 0 for canvases that are not drawn.
    """
    base = torch.tensor([make_key(key, "subset", part) for key in keys], dtype=torch.int64)
    noise = uniform(fold(base[rows], steps), 1)[:, 0]
    order = steps.argsort(stable=True)  # by rollout, then noise, then step: the last key is sorted by first
    for key in (noise, rows):
        order = order[key[order].argsort(stable=True)]
    count = rows.bincount()
    first = count.cumsum(0) - count
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))) - first[rows]
    size = count[rows]
    return torch.where(rank < subset, size / size.clamp(max=subset), 0).double()


def whole_sequences(trajectory: Trajectory, places: Places) -> Canvases:
    """The canvases of autoregressive rollouts: the whole sequence, with all generated tokens graded."""
    rows = places.rows
    written = trajectory.is_written[rows]
    return Canvases(
        rows=rows,
        steps=places.steps,
        ids=torch.cat([trajectory.prompt_ids[rows], trajectory.tokens[rows]], 1),
        mask=torch.cat([trajectory.prompt_mask[rows], written], 1),
        masked=written,
        active=written,
        revealed=written,
        gradable=written,
        tokens=trajectory.tokens[rows],
        weight=torch.ones(len(rows), device=rows.device),
        old_logp=known_logp(trajectory)[rows],
    )


def with_prompt(canvases: Canvases, trajectory: Trajectory) -> Canvases:
    """Extend canvases of autoregressive rollouts so that the prompt is graded too.

    The axis ``l`` becomes ``p - 1 + l``, the whole sequence without its first column. The first token of each prompt is
    not graded, since no token precedes it.
    """
    prompt, mask = trajectory.prompt_ids[canvases.rows, 1:], trajectory.prompt_mask[canvases.rows]
    graded = mask[:, 1:] & mask[:, :-1]
    maps = {name: torch.cat([graded, getattr(canvases, name)], 1) for name in ("masked", "active", "revealed")}
    unknown = torch.full(prompt.shape, torch.nan, dtype=canvases.old_logp.dtype, device=prompt.device)
    return replace(
        canvases,
        **maps,
        gradable=torch.cat([graded, canvases.gradable], 1),
        tokens=torch.cat([prompt, canvases.tokens], 1),
        old_logp=torch.cat([unknown, canvases.old_logp], 1),
    )


def known_logp(trajectory: Trajectory) -> Tensor:
    """`Trajectory.logp`, or NaN everywhere."""
    if trajectory.logp is not None:
        return trajectory.logp
    return torch.full(trajectory.tokens.shape, torch.nan, device=trajectory.tokens.device)


def attention_mask(trajectory: Trajectory, rows: Tensor) -> Tensor:
    """bool ``[n s]``: prompt padding is hidden, the whole completion side is visible."""
    completion = torch.ones((len(rows), trajectory.tokens.shape[1]), dtype=torch.bool, device=rows.device)
    return torch.cat([trajectory.prompt_mask[rows], completion], 1)


def _synthetic(trajectory: Trajectory, rows: Tensor, answer: Tensor, hidden: Tensor, weight: Tensor) -> Canvases:
    """Canvases that no decoder saw, masked at ``hidden [n l]`` and everywhere outside of ``answer [b l]``."""
    answer, tokens = answer[rows], trajectory.tokens[rows]
    masked = hidden & answer
    canvas = tokens.masked_fill(masked | ~answer, trajectory.mask_id)
    return Canvases(
        rows=rows,
        steps=torch.full_like(rows, -1),
        ids=torch.cat([trajectory.prompt_ids[rows], canvas], 1),
        mask=attention_mask(trajectory, rows),
        masked=masked,
        active=masked,
        revealed=masked,
        gradable=answer,
        tokens=tokens,
        weight=weight.to(torch.float32),
        old_logp=torch.full(tokens.shape, torch.nan, device=tokens.device),
    )
