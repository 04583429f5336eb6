"""The sampler: semi-autoregressive blocks, any number of tokens per step.

The published reference (LLaDA, `generate`) works one canvas at a time on logits of the whole canvas. Here the rows of a
fixed number of slots are decoded together, the output head runs only on the active block of each row, and every random
number is keyed, so that a row's result depends neither on its batch nor on its place in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dllm_sd.decoding.queue import Job, Queue
from dllm_sd.decoding.sampling import banned_ids, draw
from dllm_sd.decoding.settings import Decoding, Meter
from dllm_sd.decoding.slots import Group, Layout, Slots
from dllm_sd.losses.sites import rank_descending
from dllm_sd.network.prefix_cache import PrefixCache
from dllm_sd.network.site_head import Head, SiteHead
from dllm_sd.randomness import fold, make_key, uniform_at
from dllm_sd.trajectory import NEVER, Reach

LOOK = 4
"""Steps between two looks at what has ended, where looking makes the host wait for the device."""
CHUNK = {"cpu": 2**23}
"""Logits that are held at once, by kind of device: what fits a cache is faster."""
CHUNK_ELSEWHERE = 2**27

Watch = Callable[[Sequence[Job | None], Tensor], None]


@dataclass(frozen=True)
class Proposal:
    """What each site would take, all ``[m]`` or in the shape of the sites."""

    token: Tensor
    score: Tensor
    """How early it wants to be committed: the model's own (before temperature and suppression), as in LLaDA."""
    logp: Tensor
    """`Trajectory.logp`."""


@torch.no_grad()
def denoise(
    module: SiteHead | Callable[..., Any],
    queue: Queue,
    settings: Decoding,
    layout: Layout,
    *,
    vocabulary: int,
    device: torch.device | str = "cpu",
    watch: Watch | None = None,
    meter: Meter | None = None,
    use_kv_cache: bool = False,
    static_shapes: bool = False,
    reach: Reach | None = None,
) -> None:
    """Denoise what the queue has, at most `settings.batch_size` rows at a time; a free slot is refilled at once.

    Args:
        module: the denoiser, called with ``(ids, mask, sites, read=...)`` as `SiteHead` is.
        queue: where the jobs come from and where what has ended goes to.
        settings: the schedule.
        layout: token ids and blocks.
        vocabulary: ``v``.
        device: where to work.
        watch: called before every step with the job of each slot, and the completion sides int64 ``[r l]``.
        meter: counts what it costs.
        remember: reuse the keys and values of finished blocks (block-causal models).
        fixed: keep to a few shapes, as compiled modules like it: whole active blocks, rows in powers of two, one width.
        reach: stop there; None goes on to the end.
    """
    device = torch.device(device)
    slots = Slots(min(settings.batch_size, queue.most), queue.longest, settings, layout, device, reach)
    stepper = _Stepper(module, slots, vocabulary, use_kv_cache, static_shapes or device.type != "cpu")
    steps = most = 0
    patience = queue.patience or (1 if device.type == "cpu" else LOOK)
    while (jobs := queue.take(len(slots.vacant))) is not None:
        if unwanted := [slot for slot, job in enumerate(slots.jobs) if job is not None and not queue.wanted(job)]:
            slots.free(unwanted)
        if jobs:
            stepper.begin(jobs)
        if slots.taken:
            groups = slots.groups(static_shapes, stepper.cache is not None)
            for _ in range(patience):
                if watch is not None:
                    watch(slots.jobs, slots.tokens[:, :-1])
                for group in groups:
                    stepper(group)
                steps, most = steps + 1, max(most, len(slots.taken))
                if meter is not None:
                    meter.read += sum(len(group.slots) for group in groups)
                    meter.positions += sum(len(group.slots) * stepper.width(group) for group in groups)
            if ended := slots.finished():
                trajectory = slots.trajectory(ended)
                queue.ended(slots.free(ended), trajectory)
    if meter is not None:
        meter.forwards, meter.slots = meter.forwards + steps, meter.slots + steps * most
        meter.rows += int(slots.row_steps)


class _Stepper:
    """One step of a group of rows."""

    def __init__(self, module: Any, slots: Slots, vocabulary: int, use_kv_cache: bool, full_block: bool) -> None:
        self.module, self.slots, self.settings = module, slots, slots.settings
        self.cache: PrefixCache | None = None
        if use_kv_cache and self.settings.guidance == 0:
            width = slots.prompt_ids.shape[1] + self.settings.length
            self.cache = PrefixCache(module, len(slots.jobs), width, self.settings.block_length)
        self.full_block = full_block
        """Whether whole active blocks are read, whose size the host knows, or only what is masked in them."""
        self.banned = banned_ids(self.settings, (slots.layout.mask_id,), slots.device, vocabulary)
        self.place = torch.arange(self.settings.block_length, device=slots.device)
        self.rows = max(1, CHUNK.get(slots.device.type, CHUNK_ELSEWHERE) // vocabulary)

    def begin(self, jobs: Sequence[Job]) -> None:
        """Put jobs into free slots."""
        begun = self.slots.begin(jobs)
        if self.cache is not None:
            self.cache.begin(begun)

    def width(self, group: Group) -> int:
        """Positions that are read of each row."""
        return self.settings.block_length if self.cache is not None else group.prompt + self.settings.length

    def __call__(self, group: Group) -> None:
        """Propose, choose, commit."""
        slots, rows, length = self.slots, group.slots, self.settings.length
        place = (slots.block[rows] * self.settings.block_length - slots.prompt_tail[rows])[:, None] + self.place
        in_completion = (place >= 0) & (place < length)
        columns = torch.where(in_completion, place, length)
        slots.row_steps += slots.active[rows].sum()
        masked = in_completion & (slots.reveal_step[rows].gather(1, columns) == NEVER) & slots.active[rows, None]
        found = self._propose(group, place, columns, masked)
        score = found.score.masked_fill(~masked, -torch.inf)
        rank = rank_descending(score)
        if self.settings.threshold is None:
            commit = masked & (rank < slots.schedule[slots.step_in_block[rows]][:, None])
        else:
            commit = masked & ((rank == 0) | (score.exp() >= self.settings.threshold))
        slots.commit(group, columns, commit, found.token, found.logp, masked & ~commit)

    def _propose(self, group: Group, place: Tensor, columns: Tensor, masked: Tensor) -> Proposal:
        """`Proposal` in the shape ``[n i]`` of the active blocks ``columns``; what is not `masked` means nothing."""
        slots, rows = self.slots, group.slots
        keys = fold(slots.keys[rows], slots.step[rows])[:, None]
        u = uniform_at(keys, place) if self.settings.temperature else torch.zeros_like(place, dtype=torch.float32)
        found = self._read(group, columns, masked, u.flatten() if self.full_block else u[masked])
        if self.full_block:
            found = Proposal(*(x.view(masked.shape) for x in (found.token, found.score, found.logp)))
        else:
            flat, found = found, Proposal(torch.zeros_like(columns), torch.zeros_like(u), torch.zeros_like(u))
            found.token[masked], found.score[masked], found.logp[masked] = flat.token, flat.score, flat.logp
        match self.settings.order:
            case "random":
                return Proposal(found.token, uniform_at(fold(keys, make_key("order")), place), found.logp)
            case "left_to_right":
                return Proposal(found.token, -place.float(), found.logp)
        return found

    def _read(self, group: Group, columns: Tensor, masked: Tensor, u: Tensor) -> Proposal:
        """The proposals ``[m]`` of the network."""
        slots, rows, length = self.slots, group.slots, self.settings.length
        tokens = slots.tokens[rows, :-1]
        sites: Tensor | None = None
        if not self.full_block:
            sites = torch.zeros_like(slots.tokens[rows], dtype=torch.bool).scatter(1, columns, masked)[:, :-1]
        read = partial(propose, settings=self.settings, banned=self.banned, u=u, rows=self.rows)
        start = slots.prompt_ids.shape[1] - group.prompt
        prompt, real = slots.prompt_ids[rows, start:], slots.prompt_mask[rows, start:]
        if self.cache is not None:
            return self.cache(rows, prompt, real, tokens, sites, slots.block[rows], read)
        mask = torch.cat([real, torch.ones_like(tokens, dtype=torch.bool)], 1)
        if sites is None:
            where = group.prompt + columns.clamp(max=length - 1)
        else:
            where = torch.cat([torch.zeros_like(real), sites], 1)
        if self.settings.guidance:
            blank = torch.full_like(prompt, slots.layout.mask_id)
            states = self.module(torch.cat([blank, tokens], 1), mask, where, read=lambda hidden, head: hidden)
            read = partial(read, without=states)
        return self.module(torch.cat([prompt, tokens], 1), mask, where, read=read)


def propose(
    hidden: Tensor,
    head: Head,
    *,
    settings: Decoding,
    banned: Tensor,
    u: Tensor,
    rows: int,
    without: Tensor | None = None,
) -> Proposal:
    """What each of ``m`` sites would take: for the ``read`` of `SiteHead.forward`.

    Args:
        hidden: ``[m h]``.
        head: the output head.
        settings: temperature, order, guidance.
        banned: what is not to be drawn (`banned_ids`).
        u: uniform numbers ``[m]``.
        rows: sites whose logits are held at once.
        without: hidden states ``[m h]`` without the prompt, for guidance.
    """
    parts: list[Proposal] = []
    for start in range(0, max(1, len(hidden)), rows):
        some = slice(start, start + rows)
        logits = head(hidden[some]).float()
        if without is not None:
            blank = head(without[some]).float()
            logits = blank + (1 + settings.guidance) * (logits - blank)
        before = _before(logits, settings)
        drawn = draw(logits, settings, banned, u[some])
        parts.append(Proposal(drawn.token, _score(drawn.own, before, drawn.normaliser, settings), drawn.logp))
    return Proposal(*(torch.cat([getattr(part, name) for part in parts]) for name in ("token", "score", "logp")))


def _before(logits: Tensor, settings: Decoding) -> Tensor:
    """What the order needs to know of the logits ``[m v]`` before a token is drawn from them."""
    match settings.order:
        case "margin":
            return logits.topk(2, -1).values
        case "entropy":
            return logits.clone()
    return logits[:, :0]


def _score(own: Tensor, before: Tensor, normaliser: Tensor, settings: Decoding) -> Tensor:
    """``[m]``: by probability of the token, top-2 margin, or negative entropy."""
    match settings.order:
        case "margin":
            top = (before - normaliser[:, None]).exp()
            return top[:, 0] - top[:, 1]
        case "entropy":
            probability = (before - normaliser[:, None]).exp()
            return torch.xlogy(probability, probability).sum(-1)
    return own
