"""The keys of a config as `configs/schema.json` describes them: found, explained, and checked for misspellings.

Nothing here imports a model library, so that lists, explanations and refusals of misspelt keys take no time.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dllm_sd.errors import InputError, shortened, shown

SYNONYMS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("learning_rate", "lr_rate"), ("optim.lr",)),
    **dict.fromkeys(
        ("batch_size", "train_batch_size", "per_device_train_batch_size", "generation_batch_size"),
        ("method.rollout.problems", "optim.tokens_per_batch", "decode.batch_size"),
    ),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), ("model.lora.rank",)),
    **{"lora_alpha": ("model.lora.alpha",), "lora_dropout": ("model.lora.dropout",)},
    **dict.fromkeys(("target_modules", "lora_target_modules"), ("model.lora.targets",)),
    **dict.fromkeys(("max_steps", "num_train_steps", "num_steps", "num_train_epochs", "epochs"), ("updates",)),
    **dict.fromkeys(("output_dir", "run_name", "logging_dir", "out"), ("run",)),
    **dict.fromkeys(("max_prompt_length", "max_prompt_len"), ("max_prompt",)),
    **dict.fromkeys(("max_completion_length", "max_new_tokens", "max_tokens", "gen_length"), ("decode.length",)),
    **dict.fromkeys(("diffusion_steps", "num_diffusion_steps"), ("decode.steps",)),
    **{"num_generations": ("method.rollout.attempts",), "cfg_scale": ("decode.guidance",)},
    **{"warmup_steps": ("optim.warmup",), "warmup_ratio": ("optim.warmup",)},
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), ("optim.schedule",)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), ("optim.betas",)),
    **{"adam_epsilon": ("optim.eps",), "max_grad_norm": ("optim.max_grad_norm",)},
    **dict.fromkeys(("bf16", "fp16", "mixed_precision"), ("optim.autocast", "model.dtype")),
    **dict.fromkeys(("torch_dtype", "precision"), ("model.dtype",)),
    **{"attn_implementation": ("model.attention",), "load_in_4bit": ("model.quantization",)},
    **dict.fromkeys(("model_name_or_path", "model_name", "model_path"), ("model.path",)),
    **dict.fromkeys(("dataset_name", "dataset", "train_file", "data_path"), ("task.data",)),
    **dict.fromkeys(("gradient_accumulation_steps", "micro_batch_size"), ("optim.tokens_per_batch",)),
    **{"save_steps": ("checkpoint.every",), "save_total_limit": ("checkpoint.keep",)},
    **{"eval_steps": ("eval.every",), "use_vllm": ("decode.engine",), "resume_from_checkpoint": ("resume",)},
    **dict.fromkeys(("ema_decay", "decay"), ("method.teacher.*.decay",)),
    **{"loss_type": ("method.divergence",), "kl_coef": ("method.trust.kl",)},
}
"""Names that other trainers (TRL, transformers, PEFT, LLaDA's code) give to keys, and the keys here."""


@dataclass(frozen=True)
class Key:
    """A key of a config."""

    path: str
    """Dotted, with ``*`` for the index of a list entry and for a name that the user chooses."""
    parts: tuple[str, ...]
    """The parts that have it, from the outermost one."""
    node: Mapping[str, Any]
    """Its schema."""

    @property
    def name(self) -> str:
        """The last segment."""
        return self.path.rpartition(".")[2]


def schema_file() -> Path:
    """The schema beside the shipped configs, installed or in a source checkout."""
    package = Path(__file__).resolve().parent
    files = [folder / "configs" / "schema.json" for folder in (package, package.parent)]
    return next((file for file in files if file.is_file()), files[0])


@cache
def read_schema() -> dict[str, Any]:
    """The schema of a config."""
    return json.loads(schema_file().read_text(encoding="utf-8"))


@cache
def all_keys() -> tuple[Key, ...]:
    """Every key of a config, also those of parts inside of parts, each once for each way to it."""
    return tuple(_walk(read_schema(), "", (), ()))


def _walk(node: Mapping[str, Any], path: str, parts: tuple[str, ...], within: tuple[str, ...]) -> Iterator[Key]:
    for definition, part, step, inner in _objects(node):
        if definition in within:
            continue
        here, where = (*parts, part) if part else parts, f"{path}.*" if step else path
        for name, value in inner.items():
            if name == "name" and part:
                continue
            key = Key(f"{where}.{name}" if where else name, here, value)
            yield key
            yield from _walk(value, key.path, here, (*within, definition))


def _objects(node: Mapping[str, Any], part: str = "", step: bool = False) -> Iterator[tuple[str, str, bool, Any]]:
    """The mappings that a node may hold: definition, name of the part, whether a list index comes first, properties."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        definition = read_schema()["definitions"][name]
        if "properties" in definition:
            yield name, part, step, definition["properties"]
        else:
            yield from _objects(definition, part, step)
    choices = node.get("anyOf", ())
    for choice in [choice for choice in choices if "items" in choice] or choices:  # a list may be a single part, too
        yield from _objects(choice, part, step)
    if "allOf" in node:
        named = node["allOf"][1]["properties"]["name"]["const"] if len(node["allOf"]) > 1 else part
        yield from _objects(node["allOf"][0], named, step)
    if isinstance(inner := node.get("additionalProperties"), Mapping):
        yield from _objects(inner, part, True)
    if isinstance(inner := node.get("items"), Mapping):
        yield from _objects(inner, part, True)


def part_names(node: Mapping[str, Any]) -> list[str]:
    """The names of the parts that a node may hold, if it is a slot."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return read_schema()["definitions"][name]["anyOf"][0]["enum"] if name.startswith("part of ") else []
    inner = [*node.get("anyOf", ()), *node.get("allOf", ())]
    return next((names for choice in inner if (names := part_names(choice))), [])


def find_keys(asked: str) -> list[Key]:
    """The keys that a question means: ``optim.lr``, ``method.contexts.0.ratio``, ``lr`` or ``*.lr``.

    An index may be left out; ``*`` stands for anything; a question that is no whole key is taken for the end of one.
    An entry of a list, and the ``name`` of a part (``method.trust.name``), are explained by their slot.

    Raises:
        InputError: if there is no such key, with the nearest ones.
    """
    steps = asked.replace("[", ".").replace("]", "").strip(".").split(".")
    found = _matching(steps)
    if not found and steps[-1] == "name":
        found = [key for key in _matching(steps[:-1]) if part_names(key.node)]
    if not found:
        wanted = [step for step in steps if step != "*" and not step.isdigit()]
        parent, _, name = asked.rpartition(".")
        close = nearest(name, parent, _siblings(parent)) if wanted else []
        raise InputError(
            f"there is no key {shown(asked)}; "
            + (f"did you mean {_either(close)}?" if close else "dllm-sd explain without a key lists those at the top")
        )
    return found


def _matching(steps: Sequence[str]) -> list[Key]:
    """The keys with this path; if there is none, those that end so."""
    whole = [key for key in all_keys() if re.fullmatch(_pattern(key.path), ".".join(steps))]
    wanted = [step for step in steps if step != "*" and not step.isdigit()]
    return whole or [key for key in all_keys() if wanted and _named_steps(key)[-len(wanted) :] == wanted]


def _pattern(path: str) -> str:
    """What a question for this key may be: indices may be left out."""
    steps = (r"(?:\.[^.]+)?" if step == "*" else rf"\.{re.escape(step)}" for step in path.split("."))
    return "".join(steps).removeprefix(r"\.")


def _named_steps(key: Key) -> list[str]:
    return [step for step in key.path.split(".") if step != "*"]


def _siblings(path: str) -> list[str]:
    start = f"{path}." if path else ""
    return [key.name for key in all_keys() if key.path.startswith(start) and "." not in key.path.removeprefix(start)]


def check_names(tree: Any, node: Mapping[str, Any] | None = None, path: str = "") -> None:
    """Refuse misspelt keys and names in a plain config; what the default part decides is left to `build_config`.

    Raises:
        InputError: naming the key, with the nearest ones.
    """
    node = read_schema() if node is None else node
    if isinstance(tree, list):
        for i, item in enumerate(tree):
            check_names(item, node, f"{path}.{i}")
        return
    name = tree.get("name") if isinstance(tree, Mapping) else tree
    names = list(read_schema()["methods"]) if path == "method" else part_names(node)
    if names and isinstance(name, str) and name not in names:
        several = any("items" in choice for choice in node.get("anyOf", ())) and not path[-1:].isdigit()
        raise unknown_name(f"{path}.0" if several else path, name, names)
    objects = [one for one in _objects(node) if not one[1] or one[1] == name]
    if not isinstance(tree, Mapping) or len(objects) != 1 or path == "eval.schedules":
        return
    definition, _, _, known = objects[0]
    former = read_schema()["definitions"][definition].get("former", {})
    for key in tree:
        if key not in known and key not in former:
            raise unknown_key(path, str(key), [key for key in known if key != "name" or not names])
        if key in known:
            check_names(tree[key], known[key], f"{path}.{key}" if path else key)


def unknown_name(path: str, name: Any, known: Iterable[str]) -> InputError:
    """The refusal of the name of a part or method, with the nearest ones."""
    what = path if path == "method" else f"{path}.name"
    return InputError(f"{what} {shown(name)} is unknown; {hint(name, known, 'choose from')}")


def unknown_key(path: str, key: str, known: Iterable[str]) -> InputError:
    """The refusal of a ``key`` that the mapping at ``path`` does not have, with the nearest keys of the config."""
    known = list(known)
    whole = f"{path}.{key}" if path else key
    if (colon := key.partition(":"))[0] in known:
        return InputError(f"unknown key {shown(whole)}; put a space after the colon: {{{colon[0]}: {colon[2]}}}")
    if parts := _parts_with(path, key):
        names = f"the part {parts[0]} has" if len(parts) == 1 else f"the parts {', '.join(parts)} have"
        return InputError(f"unknown key {shown(whole)}; {names} it: leave it out, or set {path}.name to {parts[0]}")
    close = nearest(key, path, known)
    named = f"known keys: {', '.join(known)}" if known else f"{path} takes no keys; leave it out"
    return InputError(f"unknown key {shown(whole)}; {f'did you mean {_either(close)}?' if close else named}")


def _parts_with(path: str, key: str) -> list[str]:
    """The parts of the slot at ``path`` that have a ``key``."""
    generic = re.sub(r"\.[0-9]+(?=\.|$)", ".*", path)
    return list(dict.fromkeys(one.parts[-1] for one in all_keys() if one.parts and one.path == f"{generic}.{key}"))


def nearest(key: str, path: str, siblings: Sequence[str]) -> list[str]:
    """The whole keys that somebody may mean who wrote ``key`` at ``path``, where there are ``siblings``."""
    name, start = shortened(key).lower().replace("-", "_"), f"{path}." if path else ""
    paths = sorted({one.path for one in all_keys()}, key=lambda other: (other.count("."), len(other)))
    if name in siblings:
        return [f"{start}{name}"]
    if name in SYNONYMS:
        return [other for other in SYNONYMS[name] if other != start + key]
    same = [other for other in paths if other.rpartition(".")[2] == name]
    close = difflib.get_close_matches(name, list(siblings), 1)
    longer = [one for one in siblings if name in one.split("_")]
    close = longer or close
    if close and (longer or len(same) != 1):
        return [f"{start}{close[0]}"]
    if same:
        return same[:3]
    names = list(dict.fromkeys(other.rpartition(".")[2] for other in paths))
    close = difflib.get_close_matches(name, names, 1, 0.75)
    return [other for other in paths if close and other.rpartition(".")[2] == close[0]][:2]


def hint(name: Any, known: Iterable[str], otherwise: str) -> str:
    """The remedy for an unknown name: known names that are similar or have it as a word, or all known names."""
    names = list(known)
    wanted = shortened(str(name)).lower().replace("-", "_").replace(" ", "_")
    close = [one for one in names if one.lower() == wanted] or difflib.get_close_matches(wanted, names, 1)
    close = close or [one for one in names if wanted in one.split("_")][:3]
    return f"did you mean {_either(close)}?" if close else f"{otherwise} {', '.join(names) or 'none'}"


def _either(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)
