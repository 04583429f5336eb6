"""What several commands do: load a run or a model, and say on stderr what the figures do not."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from dllm_sd.config import apply_overrides, build_config
from dllm_sd.errors import InputError
from dllm_sd.files.writing import names_file
from dllm_sd.pairing import check_decodings
from dllm_sd.policies.loading import build_policy, load_adapter
from dllm_sd.pretrained.blueprint import model_folder, read_blueprint
from dllm_sd.training.checkpoint import chosen_checkpoint, load_weights, state_of
from dllm_sd.training.folder import read_run_config
from dllm_sd.training.outcome import initial_of


def warn(sentence: str) -> None:
    """Say on stderr what the figures do not."""
    print(f"dllm-sd: {sentence}", file=sys.stderr)


def quiet_libraries() -> None:
    """Transformers says nothing: what is wrong with a checkpoint is said once, by an `InputError`."""
    disable_progress_bar()
    set_verbosity_error()


def load(
    name: str,
    overrides: Sequence[str],
    task: str | None = None,
    adapter: str | None = None,
    last: bool = False,
    refuse: Callable[[Any], object] = lambda config: None,
) -> tuple[Any, Any, str]:
    """Config and policy of a run (its best or last weights) or of a model, in the precision that the run trained in.

    Also says which weights these are. ``refuse`` looks at the config before any weights are read.
    """
    run, recipe = Path(name), Path(model_folder(name)) / "recipe.yaml"
    if is_run(name):
        tree = read_run_config(run)
    elif recipe.is_file():
        tree = {**read_run_config(recipe.parent, recipe.name), "model": {"path": name}}
    elif task is not None:
        tree = {"task": {"name": task}, "model": {"path": name}}
    else:
        raise InputError(f"{name!r} is neither a run nor a model with a recipe; name a task with --task")
    own = tree.get("task")
    if task is not None and task != (own.get("name") if isinstance(own, dict) else own):
        tree["task"] = {"name": task}
    config = build_config(apply_overrides(tree, overrides))
    accelerator = Accelerator(mixed_precision="bf16" if config.optim.autocast else "no")
    blueprint = read_blueprint(config.model)
    check_decodings(config, blueprint)
    refuse(config)
    policy = build_policy(blueprint, accelerator.device)
    weights = name
    if adapter is not None:
        load_adapter(policy, adapter)
        weights = f"{name} with {adapter}"
    accelerator.prepare_model(policy.module, evaluation_mode=True)
    if is_run(name):
        folder = chosen_checkpoint(run, last)
        load_weights(policy, folder)
        weights = f"{folder.name}, update {state_of(folder).update}"
        if (sentence := initial_of(folder)) and accelerator.is_main_process:
            warn(sentence)
    return config, policy, weights


def is_run(name: str) -> bool:
    """Whether a folder is one that ``dllm-sd train`` wrote."""
    return names_file(str(Path(name) / "config.yaml")) and (Path(name) / "checkpoints").is_dir()


def say_lost(policy: Any, conversations: Iterable[Sequence[Mapping[str, str]]], what: str) -> None:
    """A line about what the tokenizer does not know of some prompts, if there is anything."""
    if policy.chat is not None and (words := policy.chat.warn_of_lost(map(policy.chat.render, conversations), what)):
        print(words, file=sys.stderr)
