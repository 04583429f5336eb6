"""Make the tokenizer of the tiny model: one token for each character that its tasks use, and the special tokens.

python tools/make_tiny_tokenizer.py dllm_sd/assets/tiny
"""

import sys

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|mask|>", "<|end|>", "<|pad|>", "<|unk|>"]
CHARACTERS = "0123456789+-*/()=,: \n"


def main(folder: str) -> None:
    """Write the tokenizer to ``folder``."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        mask_token="<|mask|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
