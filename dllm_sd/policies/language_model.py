"""What both kinds of policy share: a network wrapped for distributed training, a chat format, token ids."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from dllm_sd.decoding.decoder import LocalDecoder, decode
from dllm_sd.decoding.queue import Job, Listed
from dllm_sd.decoding.settings import Decoding, Meter
from dllm_sd.errors import InputError
from dllm_sd.network.site_head import SiteHead
from dllm_sd.network.view import View
from dllm_sd.pretrained.chat import Chat
from dllm_sd.trajectory import NEVER, StopAfter, Trajectory


class LanguageModel:
    """The part of the `Policy` protocol that autoregressive and masked-diffusion models share."""

    causal: ClassVar[bool]
    mask_id: int

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        chat: Chat | None,
        *,
        end_ids: tuple[int, ...],
        pad_id: int,
        suppress: tuple[int, ...] = (),
        block_length: int | None = None,
        shift: bool = False,
        merge_rollouts: bool = False,
    ) -> None:
        self.module = SiteHead(model, block_length, shift or self.causal)  # causal logits predict the next token
        self.chat = chat
        self.end_ids, self.pad_id = end_ids, pad_id
        self.suppress = suppress
        """Rows of the output head without a token of the tokenizer; they are never sampled."""
        self.merge_rollouts = merge_rollouts
        self.starts_adapted = False
        """Whether the adapter was loaded (`model.lora.start`) rather than newly initialised."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.module.device

    @property
    def vocabulary(self) -> int:
        """``v``, rows of the output head."""
        return self.module.vocabulary

    def site_logits(self, view: View) -> Tensor:
        """Logits ``[m v]`` of a view on any device."""
        view = view.trimmed()
        return self.module(*(x.to(self.device) for x in (view.ids, view.mask, view.sites)))

    @property
    def decoder(self) -> LocalDecoder:
        """Decodes with the network of this policy."""
        raise NotImplementedError

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Decoding,
        keys: Sequence[int],
        watch: Callable[[Tensor], None] | None = None,
        finished: Callable[[Tensor, Trajectory], None] | None = None,
        meter: Meter | None = None,
        stop_after: StopAfter | None = None,
    ) -> Trajectory:
        """Complete any number of prompts with the network of this policy (see `decoder.decode`).

        ``watch`` sees all completion sides int64 ``[b l]`` before every step and at the end, `mask_id` at positions
        without a token; rows that have ended keep their last canvas.
        """
        if watch is None:
            return decode(self.decoder, prompts, settings, keys, finished=finished, meter=meter, stop_after=stop_after)
        canvases = torch.full((len(prompts), settings.length), self.mask_id)

        def ended(rows: Tensor, trajectory: Trajectory) -> None:
            canvases[rows] = trajectory.tokens.masked_fill(trajectory.reveal_step == NEVER, self.mask_id)
            if finished is not None:
                finished(rows, trajectory)

        def seen(jobs: Sequence[Job | None], tokens: Tensor) -> None:
            for job, row in zip(jobs, tokens.cpu(), strict=True):
                if job is not None:
                    canvases[job.name[0]] = row
            watch(canvases.clone())

        queue = Listed(prompts, keys, ended)
        self.decoder.complete(queue, settings, meter=meter, stop_after=stop_after, watch=seen)
        watch(canvases)
        return queue.collected()

    def encode(self, messages: Sequence[Mapping[str, str]], thinking: bool | None = None) -> list[int]:
        """Chat messages as prompt tokens, the assistant's turn opened; ``thinking`` overrides the template's switch.

        Raises:
            InputError: if the prompt is empty and the model is autoregressive.
        """
        prompt = self._chat.encode(messages, thinking)
        if self.causal and not prompt:
            raise InputError("a prompt is empty and an autoregressive model cannot begin; add words to task.prompt")
        return prompt

    def encode_completion(self, text: str, ended: bool = True) -> list[int]:
        """A completion as tokens, with the end token if it is ``ended``."""
        return self._chat.encode_completion(text, ended)

    @property
    def formatting(self) -> tuple[int, ...]:
        """Ids of formatting tokens (`Chat.formatting`)."""
        return self._chat.formatting

    def text(self, tokens: Sequence[int]) -> str:
        """Completion tokens as text, without special tokens."""
        return self._chat.text(tokens)

    @property
    def non_text_ids(self) -> frozenset[int]:
        """Ids that `text` leaves out (`Chat.non_text_ids`)."""
        return self._chat.non_text_ids

    @property
    def byte_ids(self) -> frozenset[int]:
        """Ids that stand for single bytes (`Chat.byte_ids`)."""
        return self._chat.byte_ids

    @property
    def _chat(self) -> Chat:
        if self.chat is None:
            raise InputError("this model was loaded without a tokenizer; name one in model.tokenizer")
        return self.chat
