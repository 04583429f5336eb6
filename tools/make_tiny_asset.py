"""Make the shipped tiny models: `tiny` denoises, `tiny_ar` writes from left to right and reads hints in its prompt.

python tools/make_tiny_asset.py tokenizer               # one token per character, and special tokens; for both models
dllm-sd train configs/tiny_sft.yaml                     # about two minutes on two cores
python tools/make_tiny_asset.py model runs/tiny_sft     # the best weights of that run, with its recipe
python tools/make_tiny_asset.py data runs/tiny_ar_data  # training data of `tiny_ar`
dllm-sd train configs/tiny_ar_sft.yaml                  # about five minutes on two cores
python tools/make_tiny_asset.py model runs/tiny_ar_sft tiny_ar
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

ASSETS = Path(__file__).resolve().parent.parent / "dllm_sd" / "assets"
SPECIAL = ["<|mask|>", "<|end|>", "<|pad|>", "<|unk|>"]
CHARACTERS = "0123456789+-*/()=,: \n"
ROWS = 100_000
TINY_AR_TASK = {"name": "sudoku", "prompt": "{puzzle}:", "answer": "{steps}\n{solution}"}
KINDS = {"plain": 620, "worked": 150, "answer": 100, "worked_alone": 80, "answer_alone": 50}
"""Rows per thousand by the content of the prompt: the puzzle; a reference and the puzzle; the reference alone."""


def word_tokenizer(words: Sequence[str], pattern: str) -> PreTrainedTokenizerFast:
    """A tokenizer with special tokens and ``words``; ``pattern`` splits a text into words."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *words])}
    tokenizer: Any = Tokenizer(WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        mask_token="<|mask|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        clean_up_tokenization_spaces=False,
    )


def make_tokenizer() -> None:
    """Write the tokenizer."""
    fast = word_tokenizer(CHARACTERS, "[\\s\\S]")
    for asset in ("tiny", "tiny_ar"):
        fast.save_pretrained(str(ASSETS / asset))


def make_data(folder: Path) -> None:
    """Write train.jsonl: puzzles of the task's train split, some behind a reference as hints write it.

    Worked steps in the prompt are repeated, in their proper order even where the prompt has them shuffled (one prompt
    in five that also asks the puzzle). An answer alone is repeated without steps: the shortcut that it invites.
    """
    from dllm_sd.config import build_config
    from dllm_sd.randomness import make_key
    from dllm_sd.tasks.sources import Draws

    task = build_config({"task": TINY_AR_TASK, "model": {"path": "tiny"}}).task
    problems = task.problems("train")
    kinds = [kind for kind, share in KINDS.items() for _ in range(share)]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for i in range(ROWS):
            draws = Draws(make_key("tiny_ar", i))
            kind = kinds[draws.below(len(kinds))]
            question = task.messages(problems[i], question=not kind.endswith("alone"))[0]["content"]
            worked, grid = str(task.reference(problems[i])), str(task.final_answer(problems[i]))
            hint, answer = (worked, worked) if kind.startswith("worked") else (grid, grid)
            if kind == "plain":
                prompt, answer = question, worked
            elif kind == "worked" and draws.below(5) == 0:
                *steps, last = worked.split("\n")
                prompt = "({}){}".format("\n".join([*(steps[j] for j in draws.shuffled(len(steps))), last]), question)
            else:
                prompt = f"({hint}){question}"
            file.write(json.dumps({"kind": kind, "prompt": prompt, "answer": answer}) + "\n")


def make_model(run: Path, asset: Path) -> None:
    """Write the best weights of ``run`` and the config that made them; that of `tiny_ar` names its task."""
    from dllm_sd.config import build_config, to_yaml
    from dllm_sd.policies.loading import build_policy
    from dllm_sd.training.checkpoint import best_checkpoint, load_weights
    from dllm_sd.training.folder import read_run_config

    folder = best_checkpoint(run)
    assert folder is not None, f"{run} has no best checkpoint"
    tree = {**read_run_config(run), "run": f"runs/{asset.name}_sft"}
    policy = build_policy(build_config(tree).model)
    load_weights(policy, folder)
    policy.module.model.save_pretrained(str(asset))
    recipe = build_config({**tree, "task": TINY_AR_TASK} if asset.name == "tiny_ar" else tree)
    (asset / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")


if __name__ == "__main__":
    command, *given = sys.argv[1:]
    if command == "tokenizer":
        make_tokenizer()
    elif command == "data":
        make_data(Path(given[0]))
    else:
        make_model(Path(given[0]), ASSETS / (given[1] if len(given) > 1 else "tiny"))
