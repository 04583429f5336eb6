"""Text and tokens: the only renderer of chat templates, for students and teachers, in training and evaluation."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from dllm_sd.errors import InputError, shown
from dllm_sd.files.reading import lone_surrogate
from dllm_sd.limits import TooLong, limited
from dllm_sd.pretrained.chat_templates import choose_template, find_switches
from dllm_sd.pretrained.small_files import brief, is_whole
from dllm_sd.tasks.conversations import content_of

TEMPLATE_SECONDS = 5.0
"""Processor seconds that a template may use for one conversation."""
TEMPLATE_MEMORY = 2**27
"""Bytes that a template may allocate."""
_FAILED, _REMEDY = "the chat template", "fix it in the tokenizer's files, or set model.chat_template"
_ROLES = ("bos", "eos", "pad", "mask", "unk", "cls", "sep")
"""Roles of the special tokens that a tokenizer names and that are not text."""
_RARE = "\U0001f9ff\u3042\u0416\u00e5"
"""Rare characters: a tokenizer with unknown characters is likely not to know at least one of them."""
_TAG = re.compile(r"<(/?)([^<>/|]+)>")


def _share(part: int, whole: int) -> str:
    """A share in per cent, never rounded to nothing."""
    return f"{max(1, round(100 * part / max(1, whole)))} %" if 100 * part >= whole else "less than 1 %"


def _replaced(text: str, replacements: Mapping[str, str]) -> str:
    """Replace substrings of a text by a mapping; of overlapping ones the first is replaced."""
    return (
        re.sub("|".join(map(re.escape, replacements)), lambda match: replacements[match[0]], text)
        if replacements
        else text
    )


def _partner(tag: re.Match[str]) -> str:
    """The closing tag of an opening one, and the other way round."""
    return f"<{'' if tag[1] else '/'}{tag[2]}>"


@contextmanager
def _bounded(otherwise: str = "") -> Iterator[None]:
    """Run a template, which is untrusted code, with limits; every failure becomes an `InputError` within seconds."""
    try:
        with limited(TEMPLATE_SECONDS, TEMPLATE_MEMORY):
            yield
    except TooLong:
        raise InputError(f"chat_template: {_FAILED} takes more than {TEMPLATE_SECONDS:g} seconds; {_REMEDY}") from None
    except MemoryError:
        raise InputError(f"chat_template: {_FAILED} takes too much memory; {_REMEDY}") from None
    except Exception as error:  # a template can raise any exception
        remedy = f"{_REMEDY}{otherwise}"
        raise InputError(f"the chat template cannot render the prompt: {brief(error)}; {remedy}") from error


@dataclass(frozen=True)
class Chat:
    """A tokenizer and the way in which conversations are written for one checkpoint."""

    tokenizer: Tokenizer
    end_id: int
    """Token that ends the assistant's turn."""
    template: str | None = None
    """Jinja chat template, or the name of one of the tokenizer's; None takes the tokenizer's own. Without any, contents
    are joined by blank lines, behind the token that the tokenizer begins a text with."""
    thinking: bool | None = None
    """Value of the template's thinking switch (`chat_templates.SWITCHES`); None leaves it to the template."""
    marks: tuple[int, ...] = ()
    """Further ids that are not text, besides those that the tokenizer names: all end tokens, the mask token."""

    def __post_init__(self) -> None:
        choose_template(self.tokenizer.chat_template, self.template)
        if self.thinking is not None and not self.has_switch:
            raise InputError("model.thinking is set, but the chat template has no thinking switch; leave it out")

    @cached_property
    def written_by(self) -> str | None:
        """The text of the template in use; None where there is none."""
        return choose_template(self.tokenizer.chat_template, self.template)

    @cached_property
    def switches(self) -> tuple[str, ...]:
        """The variables by which the template turns thinking on and off."""
        if self.written_by is None:
            return ()
        with _bounded():
            return find_switches(self.written_by)

    @property
    def has_switch(self) -> bool:
        """Whether the template can turn thinking on and off."""
        return bool(self.switches)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        open_turn: bool = True,
        thinking: bool | None = None,
        *,
        continued: bool = False,
    ) -> str:
        """A conversation as text.

        Args:
            messages: each with a ``role`` and a ``content`` (`conversations.content_of`).
            open_turn: whether to add the generation prompt, which opens the assistant's turn.
            thinking: the thinking switch for this conversation; None takes `thinking` of this object.
            continued: whether the assistant continues the last message, so that its turn is neither ended nor opened
                again; ``open_turn`` is then ignored.

        Raises:
            InputError: if the template refuses the messages, fails, takes too long, or asks for too much memory, or a
                content is not text.
        """
        plain = [{**message, "content": content_of(message)} for message in messages]
        if self.written_by is None:
            return "\n\n".join(message["content"] for message in plain)
        thinking = self.thinking if thinking is None else thinking
        switch: dict[str, Any] = {} if thinking is None else dict.fromkeys(self.switches, thinking)
        system = any(message.get("role") == "system" for message in plain)
        with _bounded(", or leave out the system message (task.system)" if system else ""):
            rendered = self.tokenizer.apply_chat_template(
                plain,
                chat_template=self.written_by,
                tokenize=False,
                add_generation_prompt=open_turn and not continued,
                continue_final_message=continued,
                **switch,
            )
        given = sum(len(message["content"]) for message in plain)
        if len(rendered) > 8 * given + 2**20:
            raise InputError(f"chat_template: {_FAILED} makes {len(rendered)} characters of {given}; {_REMEDY}")
        return str(rendered)

    def encode(self, messages: Sequence[Mapping[str, Any]], thinking: bool | None = None) -> list[int]:
        """Chat messages as prompt tokens, the assistant's turn opened.

        A template writes all special tokens itself; `control_tokens` that a message spells are encoded as plain text.
        Without a template, special tokens that the prompt spells are encoded as such, after those that the tokenizer
        puts before a text; an end token that it would append is left out, since it would end the prompt.
        """
        if self.written_by is not None:
            messages, stand_ins = self._protected(messages)
            return self._tokens(self.render(messages, thinking=thinking), stand_ins)
        tokens = self._tokens(self.render(messages, thinking=thinking))
        return tokens if tokens[: len(self.opening)] == self.opening else [*self.opening, *tokens]

    @cached_property
    def opening(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text, such as BOS."""
        whole: Any = self.tokenizer("?")["input_ids"]
        bare = self._tokens("?")
        places = [i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare]
        if places:
            return whole[: places[0]]
        return [token for token in whole[:1] if token == self.tokenizer.bos_token_id]

    def encode_completion(self, text: str, ended: bool = True) -> list[int]:
        """A completion as tokens, with the token that ends the turn if it is ``ended``; `control_tokens` are text."""
        stand_ins = self._stand_ins([text])
        tokens = self._tokens(_replaced(text, stand_ins), {char: token for token, char in stand_ins.items()})
        return [*tokens, *([self.end_id] if ended else [])]

    @cached_property
    def formatting(self) -> tuple[int, ...]:
        """Ids of formatting tokens: special tokens, marks such as ``<think>`` and ``<|im_end|>``, line breaks.

        Source: the released code of SGSD (arXiv 2605.28791).
        """
        vocab = self.tokenizer.get_vocab()
        mark = re.compile(r"</?think>|<\|[^<>|]*\|>")
        breaks = {self._tokens("\n" * count)[0] for count in range(1, 9) if len(self._tokens("\n" * count)) == 1}
        marks = {number for word, number in vocab.items() if mark.fullmatch(word)}
        return tuple(sorted(breaks | marks | set(self.tokenizer.all_special_ids)))

    def text(self, tokens: Sequence[int]) -> str:
        """Completion tokens as text: all but `non_text_ids`, exactly as the tokens spell it."""
        visible = [token for token in tokens if token not in self.non_text_ids]
        return str(self.tokenizer.decode(visible, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @cached_property
    def non_text_ids(self) -> frozenset[int]:
        """Ids that `text` leaves out: padding, mask, unknown, begin and end tokens, and the marks of turns.

        Other special tokens, such as ``<think>`` or ``<answer>``, are text that a grader wants to see.
        """
        named = (getattr(self.tokenizer, f"{role}_token_id", None) for role in _ROLES)
        return frozenset({*filter(is_whole, named), self.end_id, *self.marks, *self._turn_marks()})

    def _turn_marks(self) -> set[int]:
        """Special tokens that the template writes around every message, without tags that come in pairs."""
        if self.written_by is None:
            return set()
        vocab = self.tokenizer.get_vocab()
        tags = {number for word, number in vocab.items() if (tag := _TAG.fullmatch(word)) and _partner(tag) in vocab}
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}
        written = set(self._tokens(self.render([question])))
        with suppress(InputError):  # a template may refuse an answer, and then has no marks for it
            written |= set(self._tokens(self.render([question, answer], open_turn=False)))
        return written & self._special_ids - tags

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        """Ids of all tokens that the tokenizer marks as special."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset([number for number, token in added if token.special] + self.tokenizer.all_special_ids)

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """The spelling of the special tokens among `non_text_ids`, which end, begin or hide text; the longest first.

        Data and hints may spell one, and must not end a turn with it.
        """
        spelled = [self.tokenizer.convert_ids_to_tokens(number) for number in self.non_text_ids & self._special_ids]
        return tuple(sorted(filter(None, map(str, spelled)), key=lambda token: (-len(token), token)))

    def warn_of_control(self, texts: Iterable[str], what: str) -> str | None:
        """Return a warning about texts that spell one of `control_tokens`, with an example; None if no text does."""
        count, example = 0, ""
        for text in texts:
            if held := next((token for token in self.control_tokens if token in text), None):
                count, example = count + 1, example or f"{shown(held)} in {shown(text)}"
        if not count:
            return None
        consequence = (
            "it becomes that token, since there is no chat template: take it out if that is not meant"
            if self.written_by is None
            else "it is read as text and not as that token"
        )
        return f"{count:,} of {what} spell a special token, such as {example}; {consequence}"

    def check_template(self, system: bool = False) -> None:
        """Refuse a template that writes nothing, or leaves out the user's message or the ``system`` one.

        Raises:
            InputError: for such a template, and as `render` does.
        """
        plain = [("system", "Instruction0")] * system + [("user", "Question0")]
        rendered = self.render([{"role": role, "content": content} for role, content in plain]).casefold()
        if not rendered.strip():
            raise InputError(f"{_FAILED} renders nothing for a conversation; {_REMEDY}")
        for role, content in plain:
            if content.casefold() not in rendered:
                other = ", or leave out task.system" if role == "system" else ""
                raise InputError(
                    f"{_FAILED} leaves out the {role} message, so the model cannot read it; {_REMEDY}{other}"
                )

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids of ``<0x00>`` to ``<0xFF>``, with which sentencepiece spells characters without a piece."""
        vocab = self.tokenizer.get_vocab()
        return frozenset(vocab[word] for word in (f"<0x{byte:02X}>" for byte in range(256)) if word in vocab)

    @cached_property
    def unknown_id(self) -> int | None:
        """Id of the unknown token; None where that token also has another role."""
        named = {getattr(self.tokenizer, f"{role}_token_id", None) for role in _ROLES if role != "unk"}
        unknown: Any = self.tokenizer.unk_token_id
        return None if unknown in {*named, self.end_id, *self.marks} else unknown

    @cached_property
    def loses(self) -> bool:
        """Whether the tokenizer has unknown characters; a byte-level tokenizer has none."""
        return bool(self.lost(_RARE))

    def lost(self, text: str) -> str:
        """Return the characters of a text, other than white space, that the tokenizer cannot encode."""
        if not self.tokenizer.is_fast:
            return "\ufffd" * self._tokens(text).count(-1 if self.unknown_id is None else self.unknown_id)
        read: Any = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        known = bytearray(len(text))
        for token, (start, end) in zip(read["input_ids"], read["offset_mapping"], strict=True):
            if token != self.unknown_id:
                known[start:end] = b"\1" * (end - start)
        return "".join(letter for letter, seen in zip(text, known, strict=True) if not seen and not letter.isspace())

    def warn_of_lost(self, texts: Iterable[str], what: str) -> str | None:
        """Return a warning about characters that the tokenizer does not know, with an example; None if there are none.

        Args:
            texts: as they are given to the tokenizer; not read if the tokenizer knows all characters.
            what: what the texts are, such as ``the prompts``.
        """
        if not self.loses:
            return None
        letters, lost, example = 0, 0, ""
        for text in texts:
            gone = self.lost(text)
            letters, lost = letters + sum(not letter.isspace() for letter in text), lost + len(gone)
            example = example or (gone and f"{shown(gone[:20])} of {shown(text)}")
        if not lost:
            return None
        return (
            f"the tokenizer does not know {_share(lost, letters)} of the characters of {what}, such as {example}; "
            "the model cannot see them: use its own words, or a tokenizer that knows them"
        )

    def _protected(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Put a placeholder character for each of `control_tokens` into messages; return them and the placeholders."""
        plain = [{**message, "content": content_of(message)} for message in messages]
        stand_ins = self._stand_ins([message["content"] for message in plain])
        replaced = [{**message, "content": _replaced(message["content"], stand_ins)} for message in plain]
        return replaced, {char: token for token, char in stand_ins.items()}

    def _stand_ins(self, texts: Sequence[str]) -> dict[str, str]:
        """Map each of `control_tokens` that the texts spell to a private-use character that no text contains."""
        spelled = [token for token in self.control_tokens if any(token in text for text in texts)]
        free = (char for char in map(chr, range(0xF0000, 0xFFFFE)) if not any(char in text for text in texts))
        return dict(zip(spelled, free, strict=False)) if spelled else {}

    def _tokens(self, text: str, stand_ins: Mapping[str, str] | None = None) -> list[int]:
        """Encode a text; tokens behind the placeholders ``stand_ins`` are encoded as plain text."""
        if (half := lone_surrogate(text)) is not None:
            raise InputError(f"a text holds {half}, which no tokenizer reads; correct the text that it comes from")
        if not stand_ins or not any(char in text for char in stand_ins):
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]
        tokens: list[int] = []
        for piece in self._at_special.split(text):  # every tokenizer splits a text at special tokens
            spelled = _replaced(piece, stand_ins)
            split: dict[str, Any] = {"split_special_tokens": True} if spelled != piece else {}
            read: Any = self.tokenizer(spelled, add_special_tokens=False, **split)
            if split and (held := self.non_text_ids & self._special_ids & {*read["input_ids"]} - {self.unknown_id}):
                token = self.tokenizer.convert_ids_to_tokens(min(held))
                raise InputError(
                    f"a text spells the special token {shown(token)}, which the tokenizer cannot read as text; take it "
                    "out of the data"
                )
            tokens += read["input_ids"]
        return tokens

    @cached_property
    def _at_special(self) -> re.Pattern[str]:
        """Splits a text at its special tokens, and keeps these."""
        spelled = [str(self.tokenizer.convert_ids_to_tokens(number)) for number in self._special_ids]
        return re.compile(f"({'|'.join(map(re.escape, sorted(spelled, key=len, reverse=True)))})")
