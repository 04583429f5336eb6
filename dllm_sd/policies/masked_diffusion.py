"""The masked-diffusion policy: a bidirectional or block-causal network, its chat format, its sampler."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from dllm_sd.errors import InputError
from dllm_sd.policies.chat import Chat
from dllm_sd.policies.denoising import Denoising, Meter, denoise
from dllm_sd.policies.merging import merged
from dllm_sd.policies.policy import View
from dllm_sd.policies.site_head import SiteHead, evaluating
from dllm_sd.trajectory import NEVER, Trajectory, left_pad


class MaskedDiffusion:
    """A masked-diffusion language model behind the `Policy` protocol."""

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
        self.module = SiteHead(model, block_length, shift)
        self.chat = chat
        self.mask_id, self.end_ids, self.pad_id = mask_id, end_ids, pad_id
        self.suppress = suppress
        """Ids of the output head that the tokenizer does not know."""
        self.block_length = block_length
        """Positions of an attention block; None where every position sees all others."""
        self.merge_rollouts = merge_rollouts

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    def site_logits(self, view: View) -> Tensor:
        """Logits ``[m v]`` of a view on any device."""
        view = view.trimmed()
        return self.module(*(x.to(self.device) for x in (view.ids, view.mask, view.sites)))

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Denoising,
        keys: Sequence[int],
        watch: Callable[[Tensor], None] | None = None,
        finished: Callable[[Tensor, Trajectory], None] | None = None,
        meter: Meter | None = None,
    ) -> Trajectory:
        """Denoise any number of prompts, `settings.batch_size` of them at a time, in eval mode (see `denoise`).

        Returns the trajectory on the CPU, in the order of the prompts.
        """
        check_blocks(self.block_length, settings)
        settings = replace(settings, suppress=tuple(sorted({*settings.suppress, *self.suppress})))
        model = self.module.model
        folded = merged(model) if self.merge_rollouts and isinstance(model, PeftModel) else nullcontext()
        with evaluating(self.module), folded:
            return denoise(
                self.site_logits,
                prompts,
                settings,
                keys,
                mask_id=self.mask_id,
                end_ids=self.end_ids,
                pad_id=self.pad_id,
                device=self.device,
                watch=watch,
                finished=finished,
                meter=meter,
                blocks_of_prompt=self.block_length is not None,
                cached=self.module if self.block_length and settings.prefix_cache else None,
            ).to("cpu")

    def demonstration(self, prompt: Sequence[int], tokens: Sequence[int], settings: Denoising) -> Trajectory:
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

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Chat messages as prompt tokens, the assistant's turn opened."""
        return self._chat.encode(messages)

    def encode_completion(self, text: str) -> list[int]:
        """A completion as tokens, with the end token."""
        return self._chat.encode_completion(text)

    def text(self, tokens: Sequence[int]) -> str:
        """Completion tokens as text, without special tokens."""
        return self._chat.text(tokens)

    @property
    def _chat(self) -> Chat:
        if self.chat is None:
            raise InputError("this model was loaded without a tokenizer; name one in model.tokenizer")
        return self.chat


def check_blocks(block_length: int | None, settings: Denoising, key: str = "decode") -> None:
    """Refuse to decode a block-causal model in other blocks than those it sees.

    Raises:
        InputError: naming the key.
    """
    if block_length is not None and settings.block_length != block_length:
        raise InputError(
            f"{key}.block_length is {settings.block_length}, but this model is block-causal with blocks of "
            f"{block_length}: a position cannot see later blocks; set {key}.block_length to {block_length}"
        )
