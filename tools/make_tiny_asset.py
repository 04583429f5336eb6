"""Make the shipped tiny model.

python tools/make_tiny_asset.py tokenizer               # one token a character, and the special tokens
dllm-sd train configs/tiny_sft.yaml                     # about two minutes on two cores
python tools/make_tiny_asset.py model runs/tiny_sft     # the best weights of that run, with its recipe
"""

import sys
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

ASSET = Path(__file__).resolve().parent.parent / "dllm_sd" / "assets" / "tiny"
SPECIAL = ["<|mask|>", "<|end|>", "<|pad|>", "<|unk|>"]
CHARACTERS = "0123456789+-*/()=,: \n"


def make_tokenizer() -> None:
    """Write the tokenizer."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer: Any = Tokenizer(WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        mask_token="<|mask|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(ASSET))


def make_model(run: Path) -> None:
    """Write the best weights of ``run`` and the config that made them."""
    from dllm_sd.config import build_config, to_yaml
    from dllm_sd.policies.loading import build_policy
    from dllm_sd.training.checkpoint import best_checkpoint, load_weights
    from dllm_sd.training.folder import read_tree

    folder = best_checkpoint(run)
    assert folder is not None, f"{run} has no best checkpoint"
    config = build_config({**read_tree(run), "run": "runs/tiny_sft"})
    policy = build_policy(config.model)
    load_weights(policy, folder)
    policy.module.model.save_pretrained(str(ASSET))
    (ASSET / "recipe.yaml").write_text(to_yaml(config), encoding="utf-8")


if __name__ == "__main__":
    make_tokenizer() if sys.argv[1] == "tokenizer" else make_model(Path(sys.argv[2]))
