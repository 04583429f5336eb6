"""Measures how many weights four updates change, in float32 with bfloat16 autocast and in pure bfloat16.

    python tools/check_precision.py [CONFIG ...]

It takes the optimizer, learning rate and warm-up of the shipped configs that train all weights, or of the given ones,
and trains a small random model of the same family (standard deviation of weights 0.02) on random tokens.
"""

import sys
import tempfile
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import Qwen2Config, Qwen3Config

from dllm_sd.config import Config, load_config, shipped_configs
from dllm_sd.policies.loading import DTYPES, build_policy
from dllm_sd.policies.weights import trained
from dllm_sd.pretrained.model import Model
from dllm_sd.training.optim import build_optimizer, learning_rate

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
UPDATES = 4


def trains_all_weights(config: Config) -> bool:
    """Whether a config fine-tunes all weights of a published checkpoint."""
    model = config.model
    return model.lora is None and not model.random_init and model.path is not None and "/" in model.path


def changed_share(config: Config, dtype: str, autocast: str | None) -> float:
    """Share of the trained weights that differ after `UPDATES` updates with the config's optimizer.

    Args:
        config: gives the optimizer and the model family.
        dtype: dtype of the weights.
        autocast: autocast dtype of the forward passes; None for none.
    """
    with tempfile.TemporaryDirectory() as folder:
        kind: Any = Qwen3Config if "qwen3" in str(config.model.path).lower() else Qwen2Config
        kind(**SIZES, **HEADS, eos_token_id=1).save_pretrained(folder)
        model = Model(path=folder, tokenizer="tiny_ar", random_init=True, as_="autoregressive", dtype=dtype)  # pyright: ignore[reportArgumentType]
        policy = build_policy(model)
    parameters = trained(policy)
    before = {name: value.detach().clone() for name, value in parameters.items()}
    optimizer = build_optimizer(parameters.values(), config.optim)
    rate = learning_rate(optimizer, config.optim, config.updates)
    generator = torch.Generator().manual_seed(0)
    for update in range(1, UPDATES + 1):
        ids = torch.randint(0, SIZES["vocab_size"], (16, 64), generator=generator)
        with torch.autocast("cpu", DTYPES[autocast]) if autocast else nullcontext():
            logits = policy.module.network(input_ids=ids).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(parameters.values(), config.optim.max_grad_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = rate(update)
        optimizer.step()
        optimizer.zero_grad()
    changed = sum(int((value.detach() != before[name]).sum()) for name, value in parameters.items())
    return changed / sum(value.numel() for value in before.values())


def main(names: list[str]) -> None:
    """Print one line per config."""
    configs = {name: load_config(name) for name in names or shipped_configs()}
    for name, config in configs.items():
        if names or trains_all_weights(config):
            now = changed_share(config, config.model.dtype, config.optim.autocast)
            pure = changed_share(config, "bfloat16", None)
            kept = f"{config.model.dtype}, forwards in {config.optim.autocast or config.model.dtype}"
            print(f"{name}: {now:.1%} of the weights change ({kept}), {pure:.1%} in bfloat16 alone")


if __name__ == "__main__":
    main(sys.argv[1:])
