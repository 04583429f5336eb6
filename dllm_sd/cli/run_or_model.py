"""Shared by several commands: loading a run or a model, and warnings on stderr."""

import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from dllm_sd.cli.used_keys import refuse_unused
from dllm_sd.config import apply_overrides, build_config
from dllm_sd.errors import InputError, shown
from dllm_sd.files.writing import names_file
from dllm_sd.pairing import check_decodings
from dllm_sd.plugins import import_plugins, with_plugins
from dllm_sd.policies.loading import build_policy, load_adapter
from dllm_sd.pretrained.blueprint import model_folder, read_blueprint
from dllm_sd.tasks.own_grader import file_and_function
from dllm_sd.training.checkpoint import chosen_checkpoint, load_weights, state_of
from dllm_sd.training.folder import code_changes, code_of, read_run_config
from dllm_sd.training.outcome import initial_of


def warn(sentence: str) -> None:
    """Print a warning on stderr, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"dllm-sd: {sentence}", file=sys.stderr)


def quiet_libraries() -> None:
    """Silence transformers, since problems with a checkpoint are reported by an `InputError`."""
    disable_progress_bar()
    set_verbosity_error()


def load(
    command: str,
    name: str,
    overrides: Sequence[str],
    task: str | None = None,
    adapter: str | None = None,
    last: bool = False,
    refuse: Callable[[Any], object] = lambda config: None,
) -> tuple[Any, Any, str]:
    """Load a run (its best or last weights) or a model, in the precision that the run trained in.

    Args:
        command: the command that loads it; overrides of keys that have no effect in it are refused.
        name: a run folder, or a model folder or hub name.
        overrides: ``key=value`` overrides of the config.
        task: name of the task; by default that of the run or recipe.
        adapter: a PEFT adapter to load on the model.
        last: load the last weights of a run instead of the best ones.
        refuse: called with the config before any weights are read; raises if the command cannot use it.

    Returns:
        The config, the policy, and a description of the weights.
    """
    run, recipe = Path(name), Path(model_folder(name)) / "recipe.yaml"
    if is_run(name):
        tree = read_run_config(run)
        load_plugins(run, overrides)
    elif recipe.is_file():
        tree = {**read_run_config(recipe.parent, recipe.name), "model": {"path": name}}
        _refuse_code(name, tree, {override.partition("=")[0] for override in overrides} | ({"task"} if task else set()))
    elif task is not None:
        tree = {"task": {"name": task}, "model": {"path": name}}
    else:
        there = "is neither a run nor a model with a recipe" if Path(name).exists() else "is no folder here, and no run"
        raise InputError(f"{name!r} {there}; correct the path, or for a model name a task with --task")
    own_task = tree.get("task")
    if task is not None and task != (own_task.get("name") if isinstance(own_task, dict) else own_task):
        tree["task"] = {"name": task}
    config = build_config(apply_overrides(tree, overrides))
    refuse_unused(command, overrides)
    if is_run(name):
        for sentence in code_changes(run, code_of(config)):
            warn(sentence)
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
        if (warning := initial_of(folder)) and accelerator.is_main_process:
            warn(warning)
    return config, policy, weights


def _refuse_code(name: str, tree: Mapping[str, Any], given: Collection[str]) -> None:
    """Refuse to run code that the recipe of a model names and the user does not: models come from strangers."""
    task, plugins = tree.get("task"), tree.get("plugins")
    grader = str(task.get("grader", "")) if isinstance(task, Mapping) else ""
    where = f"the recipe of {name!r} names"
    if plugins and "plugins" not in given:
        raise InputError(
            f"{where} code (plugins {shown(plugins)}), which is imported only where you name it: add plugins=[FILE.py]"
        )
    if file_and_function(grader) and not {"task", "task.name", "task.grader"} & {*given}:
        raise InputError(
            f"{where} code (the grader {grader}), which is run only where you name it: add task.grader={grader}, or "
            "another grader"
        )


def load_plugins(run: Path, overrides: Sequence[str]) -> None:
    """Import the plugins of a run, so that its files can be understood.

    Raises:
        InputError: if one cannot be imported, or lies in the folder of the run, which may have come from somebody else
            together with it.
    """
    tree = with_plugins(apply_overrides(read_run_config(run), overrides), not_in=run)
    import_plugins(tree.get("plugins") or ())


def is_run(name: str) -> bool:
    """Whether ``name`` is a folder that ``dllm-sd train`` wrote."""
    return names_file(str(Path(name) / "config.yaml")) and (Path(name) / "checkpoints").is_dir()


def warn_unknown_text(policy: Any, conversations: Iterable[Sequence[Mapping[str, str]]], what: str) -> None:
    """Print a warning if the tokenizer does not know some characters of the prompts, which ``what`` names."""
    if policy.chat is not None and (line := policy.chat.warn_of_lost(map(policy.chat.render, conversations), what)):
        print(line, file=sys.stderr)
