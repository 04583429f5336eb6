"""The masked-diffusion policy: a bidirectional or block-causal network, its chat format, its decoder."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from dllm_sd.decoding.denoising import Denoiser
from dllm_sd.decoding.settings import Decoding
from dllm_sd.decoding.slots import CanvasLayout
from dllm_sd.policies.language_model import LanguageModel
from dllm_sd.pretrained.chat import Chat
from dllm_sd.trajectory import NEVER, Trajectory, Unit, left_pad


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

    @property
    def decoder(self) -> Denoiser:
        """Denoises with the network of this policy."""
        layout = CanvasLayout(self.mask_id, self.end_ids, self.pad_id, self.block_length is not None)
        return Denoiser(self.module, layout, suppress=self.suppress, merge=self.merge_rollouts)

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
