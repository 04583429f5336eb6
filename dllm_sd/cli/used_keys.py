"""Which keys of a config have an effect in a command that does not train; overrides of other keys are refused."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dllm_sd.errors import InputError, shown
from dllm_sd.files.plain_yaml import parse_yaml

LOADED = ("model", "task", "plugins", "optim.autocast")
"""Keys that have an effect wherever a model is loaded and run. A task belongs to every config."""
USED: Mapping[str, tuple[str, ...]] = {
    "eval": (
        *(*LOADED, "decode", "seed", "max_prompt", "eval.final_problems", "eval.attempts", "eval.temperature"),
        *("eval.decode", "eval.thinking", "eval.schedules"),
    ),
    "sample": (*LOADED, "decode", "seed", "eval.temperature", "eval.decode", "eval.thinking"),
    "serve": (*LOADED, "decode", "max_prompt", "eval.thinking"),
    "probe": (
        *(*LOADED, "decode", "method", "peers", "seed", "max_prompt", "cache", "eval.probe_problems"),
        *("eval.temperature", "eval.decode", "optim.tokens_per_batch", "optim.pure_bfloat16"),
    ),
    "export": ("model", "plugins"),
    "grade": ("task", "plugins"),
}
"""The keys that have an effect, by command; a key stands for all keys below it."""
TRAINING = ("model.gradient_checkpointing", "model.lora.dropout")
"""Keys that concern training alone."""
TRAIN_SPLIT = ("task.size_train",)
"""Keys that concern the train split alone."""
UNUSED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("eval", "sample", "serve"), ("decode.engine", *TRAINING, *TRAIN_SPLIT)),
    "probe": ("decode.engine", *TRAINING),
    "export": TRAINING,
    "grade": TRAIN_SPLIT,
}
"""Keys below those of `USED` that have no effect, by command."""
INSTEAD: Mapping[tuple[str, str], str] = {
    ("eval", "eval.problems"): "set eval.final_problems, or --problems",
    ("eval", "decode.engine"): "leave it out, since this machine decodes",
    ("sample", "decode.engine"): "leave it out, since this machine decodes",
    ("probe", "decode.engine"): "leave it out, since this machine decodes",
    ("serve", "eval.temperature"): "set decode.temperature, or let the requests set it",
    ("probe", "eval.problems"): "set eval.probe_problems, or --problems",
    ("probe", "eval.final_problems"): "set eval.probe_problems, or --problems",
    ("probe", "eval.thinking"): "set model.thinking, since a probe reads the prompts of training",
}
"""What to do instead of setting a key that has no effect."""


def refuse_unused(command: str, overrides: Sequence[str]) -> None:
    """Refuse an override of a key that has no effect in a command.

    Args:
        command: the name of the command, such as ``eval``.
        overrides: ``key=value`` overrides that a config was built with.

    Raises:
        InputError: naming the key, and what to do.
    """
    used, unused = USED[command], UNUSED.get(command, ())
    for override in overrides:
        name, _, text = override.partition("=")
        for key in _keys_of(name, parse_yaml(text, f"override {shown(override)}"), (*used, *unused)):
            if not _among(key, used) or _among(key, unused):
                remedy = INSTEAD.get((command, key), "leave it out")
                raise InputError(f"{key} has no effect in dllm-sd {command}; {remedy}")


def _keys_of(key: str, value: Any, known: Sequence[str]) -> Iterator[str]:
    """The keys that an override sets: one, or those in its mapping where some keys of a block are in ``known``."""
    if isinstance(value, Mapping) and any(other.startswith(f"{key}.") for other in known):
        for name, inner in value.items():
            yield from _keys_of(f"{key}.{name}", inner, known)
    else:
        yield key


def _among(key: str, known: Sequence[str]) -> bool:
    """Whether a key is one of these, or below one."""
    return any(f"{key}.".startswith(f"{other}.") for other in known)
