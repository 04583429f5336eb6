"""Toy denoisers: that of the golden decodings (two tables make the logits of a canvas), and one made of noise."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dllm_sd.decoding.denoising import denoise
from dllm_sd.decoding.queue import Job, Listed
from dllm_sd.decoding.settings import Decoding
from dllm_sd.decoding.slots import CanvasLayout
from dllm_sd.network.view import View
from dllm_sd.randomness import key_tensor, make_key, uniform
from dllm_sd.trajectory import NEVER, Trajectory
from tests.oracles.fixtures import golden


class ToyDenoiser:
    """``logits[i, v] = B[i, v] + sum_j A[clip(i - j, -r, r) + r, x_j, v]`` over the whole canvas, at the sites."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b, self.radius = a, b, len(a) // 2

    def __call__(self, view: View) -> Tensor:
        """Logits ``[m v]``."""
        position = torch.arange(view.ids.shape[1])
        rows = []
        for ids, sites in zip(view.ids, view.sites, strict=True):
            where = sites.nonzero()[:, 0]
            distance = (where[:, None] - position).clamp(-self.radius, self.radius) + self.radius
            rows.append(self.a[distance, ids.expand_as(distance)].sum(1) + self.b[where])
        return torch.cat(rows)


class Recorder:
    """A denoiser that notes what it was asked; its logits depend on the row's own tokens only."""

    def __init__(self, v: int = 12) -> None:
        self.v = v
        self.asked: list[View] = []

    def __call__(self, view: View) -> Tensor:
        self.asked.append(view)
        keys = key_tensor([make_key(*row.tolist()) for row in view.ids])
        table = uniform(keys, view.ids.shape[1] * self.v).view(*view.ids.shape, self.v)
        return 6 * table[view.sites]


def denoised(
    model: Callable[[View], Tensor],
    prompts: Sequence[Sequence[int]],
    settings: Decoding,
    keys: Sequence[int],
    *,
    mask_id: int,
    end_ids: tuple[int, ...],
    pad_id: int,
    blocks_of_prompt: bool = False,
    watch: Callable[[Tensor], None] | None = None,
    **options: Any,
) -> Trajectory:
    """What `denoise` makes of prompts with a function from a view to logits ``[m v]`` in the place of a network."""

    def module(ids: Tensor, mask: Tensor, sites: Tensor, read: Any) -> Any:
        return read(model(View(ids, mask, sites)).clone(), lambda logits: logits.clone())

    canvases = torch.full((len(prompts), settings.length), mask_id)

    def seen(jobs: Sequence[Job | None], tokens: Tensor) -> None:
        for job, row in zip(jobs, tokens, strict=True):
            if job is not None:
                canvases[job.name[0]] = row
        if watch is not None:
            watch(canvases.clone())

    queue, layout = Listed(prompts, keys), CanvasLayout(mask_id, end_ids, pad_id, blocks_of_prompt)
    denoise(module, queue, settings, layout, vocabulary=12, watch=watch and seen, **options)
    done = queue.collected()
    if watch is not None:
        watch(done.tokens.masked_fill(done.reveal_step == NEVER, mask_id))
    return done


def decoding_cases() -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Every case of ``diffusion_decode`` with its tensors and the token ids that all cases share."""
    tensors, settings = golden("diffusion_decode")
    ids = {name: settings[name] for name in ("mask_id", "eos_id")}
    return [(case | ids, {name: tensors[f"{case['id']}/{name}"] for name in NAMES}) for case in settings["cases"]]


NAMES = ("A", "B", "prompt_ids", "canvas", "final_ids", "commit_step")


def from_states(
    states: Tensor, final: Tensor, prompt: Tensor, block_length: int, mask_id: int, eos_id: int
) -> Trajectory:
    """One trajectory from recorded completion sides ``[k l]`` and the final one ``[l]``.

    What no recorded state shows was committed later: one block a step, after the last recorded state.
    """
    position = torch.arange(len(final))
    shown = (states != mask_id).int()
    later = len(states) + position // block_length
    seen = shown.any(0)
    reveal_step = torch.where(seen, shown.argmax(0) - 1, later)
    # What the last recorded step committed is not known; its block was the active one.
    active = (states[-1] == mask_id).int().argmax() // block_length
    reveal_step = torch.where(~seen & (position // block_length == active), len(states) - 1, reveal_step)
    is_end = (final == eos_id).nonzero()
    return Trajectory(
        prompt_ids=prompt[None].long(),
        prompt_mask=torch.ones_like(prompt[None], dtype=torch.bool),
        tokens=final[None].long(),
        reveal_step=reveal_step[None],
        length=torch.tensor([int(is_end[0]) + 1 if len(is_end) else len(final)]),
        block_length=block_length,
        mask_id=mask_id,
        end_ids=(eos_id,),
        pad_id=eos_id,
    )


def no_keys(count: int) -> list[int]:
    """Keys where nothing is random."""
    return [make_key("unused", row) for row in range(count)]
