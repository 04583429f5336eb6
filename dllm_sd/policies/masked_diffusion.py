"""The masked-diffusion policy: a bidirectional or block-causal network, its chat format, its sampler."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from dllm_sd.decoding.denoising import Watch, denoise
from dllm_sd.decoding.queue import Job, Listed, Queue
from dllm_sd.decoding.settings import Decoding, Meter
from dllm_sd.decoding.slots import Layout
from dllm_sd.errors import InputError
from dllm_sd.policies.language_model import LanguageModel
from dllm_sd.pretrained.chat import Chat
from dllm_sd.trajectory import NEVER, Reach, Trajectory, Unit, left_pad


class MaskedDiffusion(LanguageModel):
    """A masked-diffusion language model behind the `Policy` protocol."""

    causal: ClassVar[bool] = False

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        chat: Chat | None,
        *,
        mask_id: int,
        end_ids: tuple[int, ...],
        pad_id: int,
        suppress: tuple[int, ...] = (),
        block_length: int | None = None,
        shift: bool = False,
        merge_rollouts: bool = False,
    ) -> None:
        super().__init__(
            model,
            chat,
            end_ids=end_ids,
            pad_id=pad_id,
            suppress=suppress,
            block_length=block_length,
            shift=shift,
            merge_rollouts=merge_rollouts,
        )
        self.mask_id = mask_id
        self.block_length = block_length
        """Positions of an attention block; None where every position sees all others."""

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Decoding,
        keys: Sequence[int],
        watch: Callable[[Tensor], None] | None = None,
        finished: Callable[[Tensor, Trajectory], None] | None = None,
        meter: Meter | None = None,
        reach: Reach | None = None,
    ) -> Trajectory:
        """Denoise any number of prompts, `settings.batch_size` of them at a time, in eval mode (see `denoise`).

        ``watch`` sees all completion sides int64 ``[b l]`` before every step and at the end; rows that ended early keep
        their last canvas. ``finished`` is called with the rows int64 ``[r]`` that have ended, and their trajectory.
        Returns the trajectory on the CPU, in the order of the prompts.
        """
        canvases = torch.full((len(prompts), settings.length), self.mask_id)

        def ended(rows: Tensor, trajectory: Trajectory) -> None:
            canvases[rows] = trajectory.tokens.masked_fill(trajectory.reveal_step == NEVER, self.mask_id)
            if finished is not None:
                finished(rows, trajectory)

        def seen(jobs: Sequence[Job | None], tokens: Tensor) -> None:
            for job, row in zip(jobs, tokens.cpu(), strict=True):
                if job is not None:
                    canvases[job.name[0]] = row
            if watch is not None:
                watch(canvases.clone())

        queue = Listed(prompts, keys, ended)
        self.complete(queue, settings, meter=meter, reach=reach, watch=None if watch is None else seen)
        if watch is not None:
            watch(canvases)
        return queue.collected()

    def complete(
        self,
        queue: Queue,
        settings: Decoding,
        *,
        meter: Meter | None = None,
        reach: Reach | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Denoise the jobs of a queue, in eval mode (see `denoise`)."""
        check_denoising(self.block_length, settings)
        use_kv_cache = self.block_length is not None and settings.prefix_cache and not self.module.shift
        layout = Layout(self.mask_id, self.end_ids, self.pad_id, self.block_length is not None)
        with self.decoding(), self.module.compiled(settings.compile):
            denoise(
                self.module,
                queue,
                replace(settings, suppress=tuple(sorted({*settings.suppress, *self.suppress}))),
                layout,
                vocabulary=self.vocabulary,
                device=self.device,
                watch=watch,
                meter=meter,
                use_kv_cache=use_kv_cache,  # with a shift, a block's first logits stand in the block before it
                static_shapes=settings.compile is not None,
                reach=reach,
            )

    def demonstration(self, prompt: Sequence[int], tokens: Sequence[int], settings: Decoding) -> Trajectory:
        """A given completion as a trajectory of one row, revealed from left to right."""
        prompt_ids, prompt_mask = left_pad([prompt], self.pad_id)
        completion = torch.full((1, settings.length), self.pad_id)
        completion[0, : len(tokens)] = torch.tensor(tokens)
        step = torch.arange(settings.length)[None]
        return Trajectory(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            tokens=completion,
            reveal_step=step.masked_fill(step >= len(tokens), NEVER),
            length=torch.tensor([len(tokens)]),
            block_length=settings.block_length,
            mask_id=self.mask_id,
            end_ids=self.end_ids,
            pad_id=self.pad_id,
            blocks_of_prompt=self.block_length is not None,
        )

    def extent(self, unit: Unit, settings: Decoding) -> int:
        """Blocks or steps of a complete decoding; with a threshold, the most steps that it may take."""
        blocks = settings.num_blocks + (self.block_length is not None)  # one more where the prompt ends inside a block
        if unit == "blocks":
            return blocks
        return settings.length if settings.threshold is not None else blocks * len(settings.schedule)


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
