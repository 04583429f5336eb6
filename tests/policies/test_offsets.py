"""Where tokens begin in their text: as the naive definition says for every kind of tokenizer, and in linear time."""

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dllm_sd.policies.policy import offsets
from dllm_sd.pretrained.blueprint import read_blueprint
from dllm_sd.pretrained.chat import Chat
from dllm_sd.pretrained.model import Model
from tests.tiers import later

SAMPLE = "h\u00e9llo \U0001f600\U0001f469\u200d\U0001f469 \u4e2d\u6587 e\u0301\u0302 \ufffd\ufffd don't . ' ' ok" * 3


class Reader:
    """The part of a policy that reads tokens; counts them."""

    def __init__(self, chat: Chat) -> None:
        self.chat, self.non_text_ids, self.byte_ids, self.count = chat, chat.non_text_ids, chat.byte_ids, 0

    def text(self, tokens: Sequence[int]) -> str:
        self.count += len(tokens)
        return self.chat.text(tokens)


def ends(reader: Any, tokens: Sequence[int]) -> list[int]:
    return offsets(reader, tokens)


def wrapped(tokenizer: Tokenizer, **options: bool) -> Chat:
    """With a special token that is left out, and an added one that is not."""
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens(["<think>"])
    return Chat(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", **options), 0)


def byte_level() -> Chat:
    """Every byte a token, so that all characters beyond ASCII come in pieces."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    return wrapped(tokenizer)


def sentencepiece() -> Chat:
    """Spaces as a mark, unknown characters as runs of bytes, the first space left out."""
    pieces = ["\u2581", "a", "b", "ab", "\u2581a", "."]
    words = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + i for i, word in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(words, [("a", "b"), ("\u2581", "a")], byte_fallback=True))
    steps = (decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence([*steps])
    return wrapped(tokenizer)


def metaspace() -> Chat:
    tokenizer = Tokenizer(models.BPE({"\u2581": 0, "a": 1, "b": 2, "\u2581a": 3, ".": 4}, [("\u2581", "a")]))
    tokenizer.decoder = decoders.Metaspace()
    return wrapped(tokenizer)


def word_pieces() -> Chat:
    """Spaces before punctuation are taken back."""
    words = ["a", "##b", ".", "n", "##'", "##t", "[UNK]", "?", "'s", "m"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return wrapped(tokenizer, clean_up_tokenization_spaces=True)


def word_ends() -> Chat:
    """The last token of a text is read in another way than the same token before others."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b</w>": 1, "a</w>": 2}, [], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return wrapped(tokenizer)


def packaged(name: str) -> Callable[[], Chat]:
    def read() -> Chat:
        chat = read_blueprint(Model(random_init=True, tokenizer=name)).chat
        assert chat is not None
        return chat

    return read


BUILDERS: dict[str, Callable[[], Chat]] = {
    "tiny": packaged("tiny"),
    "tiny_ar": packaged("tiny_ar"),
    **{build.__name__: build for build in (byte_level, sentencepiece, metaspace, word_pieces, word_ends)},
}


@cache
def chat_of(name: str) -> Chat:
    return BUILDERS[name]()


QUICK = ("sentencepiece", "word_pieces")


@pytest.mark.parametrize("name", [*QUICK, *later(*(name for name in BUILDERS if name not in QUICK))])
def test_offsets_are_the_lengths_of_all_prefixes(name: str):
    chat, rng = chat_of(name), random.Random(name)
    every = range(len(chat.tokenizer))
    pools = [[*every], [*chat.non_text_ids, *every[:40]], [i for i in every if "\ufffd" in chat.text([i])] or [*every]]
    pools += [[*sorted(chat.byte_ids), *list(every)[256:] * 12]] if chat.byte_ids else []
    texts = [rng.choices(rng.choice(pools), k=rng.randrange(120)) for _ in range(120)]
    texts += [chat.encode_completion(SAMPLE), []]
    for tokens in texts:
        assert ends(Reader(chat), tokens) == [len(chat.text(tokens[:i])) for i in range(len(tokens) + 1)], tokens


def test_pieces_of_one_character_are_counted_as_the_text_so_far_shows_them():
    chat = chat_of("byte_level")
    assert ends(Reader(chat), chat.encode_completion("a\U0001f600b", False)) == [0, 1, 2, 2, 2, 2, 3]


@pytest.mark.parametrize("name", BUILDERS)
def test_the_tokens_that_are_read_grow_with_their_number_not_with_its_square(name: str):
    chat, counts = chat_of(name), []
    ids = [i for i in range(len(chat.tokenizer)) if i not in chat.byte_ids]
    for size in (500, 1000, 2000):
        reader = Reader(chat)
        ends(reader, random.Random(size).choices(ids, k=size))
        counts.append(reader.count)
    assert counts[2] <= 2.5 * counts[1] <= 2.5 * 2.5 * counts[0]
    assert counts[2] <= 20 * 2000


def test_special_tokens_alone_cost_nothing():
    reader = Reader(chat_of("byte_level"))
    special = sorted(reader.non_text_ids)[0]
    assert ends(reader, [special] * 3000) == [0] * 3001
    assert reader.count == 0
