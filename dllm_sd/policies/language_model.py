"""What both kinds of policy share: a network wrapped for distributed training, a chat format, token ids."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from dllm_sd.errors import InputError
from dllm_sd.network.merging import merged
from dllm_sd.network.site_head import SiteHead, evaluating
from dllm_sd.network.view import View
from dllm_sd.pretrained.chat import Chat


class LanguageModel:
    """The part of the `Policy` protocol that autoregressive and masked-diffusion models share."""

    causal: ClassVar[bool]

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
        return next(self.module.parameters()).device

    @property
    def vocabulary(self) -> int:
        """``v``, rows of the output head."""
        return self.module.network.get_output_embeddings().weight.shape[0]

    def site_logits(self, view: View) -> Tensor:
        """Logits ``[m v]`` of a view on any device."""
        view = view.trimmed()
        return self.module(*(x.to(self.device) for x in (view.ids, view.mask, view.sites)))

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Eval mode without gradient inside; adapters are merged if `merge_rollouts` is set."""
        model = self.module.model
        folded = merged(model) if self.merge_rollouts and isinstance(model, PeftModel) else nullcontext()
        with evaluating(self.module), folded, torch.no_grad():
            yield

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
    def silent_ids(self) -> frozenset[int]:
        """Ids that `text` leaves out (`Chat.silent_ids`)."""
        return self._chat.silent_ids

    @property
    def byte_ids(self) -> frozenset[int]:
        """Ids that stand for single bytes (`Chat.byte_ids`)."""
        return self._chat.byte_ids

    @property
    def _chat(self) -> Chat:
        if self.chat is None:
            raise InputError("this model was loaded without a tokenizer; name one in model.tokenizer")
        return self.chat
