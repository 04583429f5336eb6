"""The sampler of masked-diffusion models: semi-autoregressive blocks, any number of tokens per step.

The published reference (LLaDA, `generate`) works one canvas at a time on logits of the whole canvas. Here the rows of a
fixed number of slots are decoded together, the output head runs only on the active block of each row, and every random
number is keyed, so that a row's result depends neither on its batch nor on its slot.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dllm_sd.decoding.decoder import Watch
from dllm_sd.decoding.queue import Job, Queue
from dllm_sd.decoding.sampling import banned_ids, draw
from dllm_sd.decoding.settings import Decoding, Meter
from dllm_sd.decoding.slots import CanvasLayout, SlotGroup, Slots
from dllm_sd.errors import InputError
from dllm_sd.losses.sites import rank_descending
from dllm_sd.network.merging import inference
from dllm_sd.network.prefix_cache import PrefixCache
from dllm_sd.network.site_head import Head, SiteHead
from dllm_sd.randomness import fold, make_key, uniform_at
from dllm_sd.trajectory import NEVER, StopAfter

CHECK_INTERVAL = 4
"""Steps between two checks for finished rows, where the check makes the host wait for the device."""
DECODE_CHUNK_LOGITS = {"cpu": 2**23}
"""Logits (numbers) computed at once, by kind of device: chunks that fit into the cache of a CPU are faster."""
DECODE_CHUNK_LOGITS_ELSEWHERE = 2**27


class Denoiser:
    """The decoder of a masked-diffusion model in this process."""

    def __init__(
        self, module: SiteHead, layout: CanvasLayout, *, suppress: tuple[int, ...] = (), merge: bool = False
    ) -> None:
        """Decode with ``module``, in eval mode.

        Args:
            module: the denoiser.
            layout: token ids and how blocks are counted.
            suppress: ids that are never sampled, beside those of `decode.suppress`.
            merge: merge LoRA adapters into the weights while decoding.
        """
        self.module, self.layout, self.suppress, self.merge = module, layout, suppress, merge

    def complete(
        self,
        queue: Queue,
        settings: Decoding,
        *,
        meter: Meter | None = None,
        stop_after: StopAfter | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Denoise the jobs of a queue, `settings.batch_size` at a time (see `denoise`)."""
        module = self.module
        check_denoising(module.block_length, settings)
        use_kv_cache = module.block_length is not None and settings.prefix_cache and not module.shift
        with inference(module, self.merge), module.compiled(settings.compile):
            denoise(
                module,
                queue,
                replace(settings, suppress=tuple(sorted({*settings.suppress, *self.suppress}))),
                self.layout,
                vocabulary=module.vocabulary,
                device=module.device,
                watch=watch,
                meter=meter,
                use_kv_cache=use_kv_cache,  # with a shift, a block's first logits stand in the block before it
                static_shapes=settings.compile is not None,
                stop_after=stop_after,
            )


def check_denoising(block_length: int | None, settings: Decoding, key: str = "decode") -> None:
    """Refuse continuous batching, blocks that do not fill the canvas, and a block length that the model does not have.

    Raises:
        InputError: naming the key.
    """
    if settings.continuous:
        raise InputError(f"{key}.continuous is for autoregressive models and this one denoises; leave it out")
    if settings.compile is not None and block_length is not None and settings.prefix_cache:
        raise InputError(f"{key}.compile needs static shapes and {key}.prefix_cache has none; leave one of them out")
    if settings.length % settings.block_length:
        raise InputError(
            f"{key}.block_length {settings.block_length} does not divide {key}.length {settings.length}; "
            "choose a divisor, or block_length = length for a single block"
        )
    if settings.steps is not None and settings.steps < settings.num_blocks:
        raise InputError(f"{key}.steps must be at least the number of blocks, {settings.num_blocks}")
    if block_length is not None and settings.block_length != block_length:
        raise InputError(
            f"{key}.block_length is {settings.block_length}, but this model is block-causal with blocks of "
            f"{block_length}: a position cannot see later blocks; set {key}.block_length to {block_length}"
        )


@dataclass(frozen=True)
class Proposal:
    """The candidate token of each site; all tensors are ``[m]``, or have the shape of the sites."""

    token: Tensor
    score: Tensor
    """Sites with the highest score are committed first; computed before temperature and suppression, as in LLaDA."""
    logp: Tensor
    """`Trajectory.logp`."""


@torch.no_grad()
def denoise(
    module: SiteHead | Callable[..., Any],
    queue: Queue,
    settings: Decoding,
    layout: CanvasLayout,
    *,
    vocabulary: int,
    device: torch.device | str = "cpu",
    watch: Watch | None = None,
    meter: Meter | None = None,
    use_kv_cache: bool = False,
    static_shapes: bool = False,
    stop_after: StopAfter | None = None,
) -> None:
    """Denoise the jobs of the queue, at most `settings.batch_size` rows at a time; free slots are refilled at once.

    Args:
        module: the denoiser, called with ``(ids, mask, sites, read=...)`` as `SiteHead` is.
        queue: gives the jobs and takes their trajectories.
        settings: the decoding schedule.
        layout: token ids and how blocks are counted.
        vocabulary: ``v``.
        device: device of the module.
        watch: called before every step with the job of each slot, and the completion sides int64 ``[r l]``.
        meter: counts forward passes, rows and positions.
        use_kv_cache: reuse the keys and values of finished blocks (block-causal models).
        static_shapes: use few shapes, for compiled modules: whole active blocks, rows in powers of two, one width.
        stop_after: stop each row there; None completes it.
    """
    device = torch.device(device)
    slots = Slots(min(settings.batch_size, queue.most), queue.longest, settings, layout, device, stop_after)
    stepper = _Stepper(module, slots, vocabulary, use_kv_cache, static_shapes or device.type != "cpu")
    steps = most = 0
    patience = queue.patience or (1 if device.type == "cpu" else CHECK_INTERVAL)
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
    """Runs one decoding step on a group of rows."""

    def __init__(self, module: Any, slots: Slots, vocabulary: int, use_kv_cache: bool, full_block: bool) -> None:
        self.module, self.slots, self.settings = module, slots, slots.settings
        self.cache: PrefixCache | None = None
        if use_kv_cache and self.settings.guidance == 0:
            width = slots.prompt_ids.shape[1] + self.settings.length
            self.cache = PrefixCache(module, len(slots.jobs), width, self.settings.block_length)
        self.full_block = full_block
        """Whether logits are computed for whole active blocks (a size that the host knows) or for masked sites only."""
        self.banned = banned_ids(self.settings, (slots.layout.mask_id,), slots.device, vocabulary)
        self.place = torch.arange(self.settings.block_length, device=slots.device)
        self.rows = max(1, DECODE_CHUNK_LOGITS.get(slots.device.type, DECODE_CHUNK_LOGITS_ELSEWHERE) // vocabulary)

    def begin(self, jobs: Sequence[Job]) -> None:
        """Put jobs into free slots."""
        begun = self.slots.begin(jobs)
        if self.cache is not None:
            self.cache.begin(begun)

    def width(self, group: SlotGroup) -> int:
        """Return how many positions per row one forward pass reads."""
        return self.settings.block_length if self.cache is not None else group.prompt + self.settings.length

    def __call__(self, group: SlotGroup) -> None:
        """Propose a token for every masked site of the active blocks, choose sites by score, and commit them."""
        slots, rows, length = self.slots, group.slots, self.settings.length
        place = (slots.block[rows] * self.settings.block_length - slots.prompt_tail[rows])[:, None] + self.place
        in_completion = (place >= 0) & (place < length)
        columns = torch.where(in_completion, place, length)
        slots.row_steps += slots.active[rows].sum()
        masked = in_completion & (slots.reveal_step[rows].gather(1, columns) == NEVER) & slots.active[rows, None]
        proposal = self._propose(group, place, columns, masked)
        score = proposal.score.masked_fill(~masked, -torch.inf)
        rank = rank_descending(score)
        if self.settings.threshold is None:
            commit = masked & (rank < slots.schedule[slots.step_in_block[rows]][:, None])
        else:
            commit = masked & ((rank == 0) | (score.exp() >= self.settings.threshold))
        slots.commit(group, columns, commit, proposal.token, proposal.logp, masked & ~commit)

    def _propose(self, group: SlotGroup, place: Tensor, columns: Tensor, masked: Tensor) -> Proposal:
        """Return a `Proposal` of shape ``[n i]``, as ``columns``; entries outside ``masked`` have no meaning."""
        slots, rows = self.slots, group.slots
        keys = fold(slots.keys[rows], slots.step[rows])[:, None]
        u = uniform_at(keys, place) if self.settings.temperature else torch.zeros_like(place, dtype=torch.float32)
        proposal = self._read(group, columns, masked, u.flatten() if self.full_block else u[masked])
        if self.full_block:
            proposal = Proposal(*(x.view(masked.shape) for x in (proposal.token, proposal.score, proposal.logp)))
        else:
            flat, proposal = proposal, Proposal(torch.zeros_like(columns), torch.zeros_like(u), torch.zeros_like(u))
            proposal.token[masked], proposal.score[masked], proposal.logp[masked] = flat.token, flat.score, flat.logp
        match self.settings.order:
            case "random":
                return Proposal(proposal.token, uniform_at(fold(keys, make_key("order")), place), proposal.logp)
            case "left_to_right":
                return Proposal(proposal.token, -place.float(), proposal.logp)
        return proposal

    def _read(self, group: SlotGroup, columns: Tensor, masked: Tensor, u: Tensor) -> Proposal:
        """Run the network and return its proposals ``[m]``."""
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
    """Draw a candidate token for each of ``m`` sites; serves as ``read`` of `SiteHead.forward`.

    Args:
        hidden: ``[m h]``.
        head: the output head.
        settings: temperature, order, guidance.
        banned: token ids that must not be drawn (`banned_ids`).
        u: uniform numbers ``[m]``.
        rows: sites per chunk of logits.
        without: hidden states ``[m h]`` without the prompt, for guidance.
    """
    parts: list[Proposal] = []
    for start in range(0, max(1, len(hidden)), rows):
        chunk = slice(start, start + rows)
        logits = head(hidden[chunk]).float()
        if without is not None:
            blank = head(without[chunk]).float()
            logits = blank + (1 + settings.guidance) * (logits - blank)
        before = _before(logits, settings)
        drawn = draw(logits, settings, banned, u[chunk])
        parts.append(Proposal(drawn.token, _score(drawn.own, before, drawn.normaliser, settings), drawn.logp))
    return Proposal(*(torch.cat([getattr(part, name) for part in parts]) for name in ("token", "score", "logp")))


def _before(logits: Tensor, settings: Decoding) -> Tensor:
    """Copy the part of the logits ``[m v]`` that the score needs, since drawing overwrites them."""
    match settings.order:
        case "margin":
            return logits.topk(2, -1).values
        case "entropy":
            return logits.clone()
    return logits[:, :0]


def _score(own: Tensor, before: Tensor, normaliser: Tensor, settings: Decoding) -> Tensor:
    """Return scores ``[m]``: log-probability of the token, top-2 margin, or negative entropy."""
    match settings.order:
        case "margin":
            top = (before - normaliser[:, None]).exp()
            return top[:, 0] - top[:, 1]
        case "entropy":
            probability = (before - normaliser[:, None]).exp()
            return torch.xlogy(probability, probability).sum(-1)
    return own
