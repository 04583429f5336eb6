"""Text and tokens: the only renderer of chat templates, for students and teachers, in training and evaluation."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from dllm_sd.errors import InputError
from dllm_sd.limits import TooLong, limited
from dllm_sd.policies.small_files import brief

SECONDS = 5.0
"""Processor time that a template has for one conversation."""
MEMORY = 2**27
"""Bytes that it may ask for."""
_FAILED, _REMEDY = "the chat template", "mend it in the tokenizer's files, or set model.chat_template"


@dataclass(frozen=True)
class Chat:
    """A tokenizer and the way in which conversations are written for one checkpoint."""

    tokenizer: Tokenizer
    end_id: int
    """Token that ends the assistant's turn."""
    template: str | None = None
    """Jinja chat template instead of the tokenizer's own; without either, contents are joined by blank lines."""
    thinking: bool | None = None
    """Value of the template's thinking switch (`enable_thinking`); None leaves it to the template."""

    def __post_init__(self) -> None:
        if self.thinking is not None and not self.has_switch:
            raise InputError("model.thinking is set, but the chat template has no thinking switch; leave it out")

    @property
    def has_switch(self) -> bool:
        """Whether the template can turn thinking on and off."""
        return "enable_thinking" in (self._template or "")

    @property
    def _template(self) -> str | None:
        own = self.tokenizer.chat_template
        return self.template or (own if isinstance(own, str) else None)

    def render(
        self, messages: Sequence[Mapping[str, str]], open_turn: bool = True, thinking: bool | None = None
    ) -> str:
        """A conversation as text; ``open_turn`` adds what makes the assistant speak next.

        ``thinking`` is for this conversation, where it differs from the usual one.

        Raises:
            InputError: if the template refuses the messages, fails, takes too long, or asks for too much memory.
        """
        template = self._template
        if template is None:
            return "\n\n".join(message["content"] for message in messages)
        thinking = self.thinking if thinking is None else thinking
        switch: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        try:
            with limited(SECONDS, MEMORY):
                rendered = self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=open_turn,
                    **switch,
                )
        except TooLong:
            raise InputError(f"chat_template: {_FAILED} takes more than {SECONDS:g} seconds; {_REMEDY}") from None
        except MemoryError:
            raise InputError(f"chat_template: {_FAILED} takes too much memory; {_REMEDY}") from None
        except Exception as error:  # a template is a program, which can stumble over anything
            raise InputError(f"the chat template cannot render the prompt: {brief(error)}; {_REMEDY}") from error
        given = sum(len(message["content"]) for message in messages)
        if len(rendered) > 8 * given + 2**20:
            raise InputError(f"chat_template: {_FAILED} makes {len(rendered)} characters of {given}; {_REMEDY}")
        return str(rendered)

    def encode(self, messages: Sequence[Mapping[str, str]], thinking: bool | None = None) -> list[int]:
        """Chat messages as prompt tokens, the assistant's turn opened."""
        return self._tokens(self.render(messages, thinking=thinking))

    def encode_completion(self, text: str, ended: bool = True) -> list[int]:
        """A completion as tokens, with the token that ends the turn if it is ``ended``."""
        return [*self._tokens(text), *([self.end_id] if ended else [])]

    @cached_property
    def formatting(self) -> tuple[int, ...]:
        """Ids of tokens that say nothing: special ones, marks such as ``<think>`` and ``<|im_end|>``, line breaks.

        Source: the released code of SGSD (arXiv 2605.28791).
        """
        words = self.tokenizer.get_vocab()
        mark = re.compile(r"</?think>|<\|[^<>|]*\|>")
        breaks = {self._tokens("\n" * count)[0] for count in range(1, 9) if len(self._tokens("\n" * count)) == 1}
        marks = {number for word, number in words.items() if mark.fullmatch(word)}
        return tuple(sorted(breaks | marks | set(self.tokenizer.all_special_ids)))

    def text(self, tokens: Sequence[int]) -> str:
        """Completion tokens as text, without special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    @cached_property
    def silent_ids(self) -> frozenset[int]:
        """Ids of special tokens, which `text` leaves out."""
        added = self.tokenizer.added_tokens_decoder
        special = {number for number, token in added.items() if token.special} | {*self.tokenizer.all_special_ids}
        return frozenset(number for number in special if not self.text([number]))

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids of ``<0x00>`` to ``<0xFF>``, in which sentencepiece spells what it has no piece for."""
        words = self.tokenizer.get_vocab()
        return frozenset(words[word] for word in (f"<0x{byte:02X}>" for byte in range(256)) if word in words)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]
