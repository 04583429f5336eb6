"""Exports a trained policy as a PEFT adapter, a native transformers model, or in the original checkpoint format."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, split_torch_state_dict_into_shards
from peft import PeftModel
from peft.tuners.lora import Linear
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig
from transformers.core_model_loading import revert_weight_conversion

from dllm_sd.errors import InputError
from dllm_sd.export.model_card import ExportFormat, Trained, model_card, settings_of
from dllm_sd.files.writing import write_file
from dllm_sd.losses.numerics import at_least_float32
from dllm_sd.network.finite import find_broken
from dllm_sd.policies.loading import AnyPolicy
from dllm_sd.policies.saving import native_class, write_adapter
from dllm_sd.pretrained.blueprint import Blueprint, brief, find_file, read_blueprint
from dllm_sd.pretrained.families import MARK
from dllm_sd.pretrained.model import Model
from dllm_sd.pretrained.weight_files import INDEX_FILE, stored_tensors

MAX_SHARD_SIZE = "5GB"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
NAMED_TEMPLATES = "additional_chat_templates"
"""Folder in which transformers stores the additional chat templates of a tokenizer."""
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Floating dtypes by their name in a safetensors header."""


def export_policy(
    policy: AnyPolicy,
    model: Model,
    to: ExportFormat,
    folder: Path,
    trained: Trained | None = None,
    name: str | None = None,
) -> None:
    """Write a policy that was built from ``model`` to ``folder``, which appears whole or not at all.

    Args:
        policy: the policy; it is not changed. Merged weights need a second copy of the adapted layers in host memory.
        model: the keys of `model` that the policy was built from.
        to: ``peft``: the adapter alone; ``merged``: a native transformers model; ``original``: the tensor names,
            dtypes and config.json of the checkpoint at `model.path`.
        folder: must be empty or not exist.
        trained: the run, for the model card.
        name: the name of the model in the model card, such as its name on the hub; by default that of the folder.

    Raises:
        InputError: if the model cannot be exported in this format, or the folder is not empty or cannot be written.
    """
    _check_format(policy, model, to)
    blueprint = read_blueprint(model, text=False)
    with _written_whole(folder) as partial:
        if to == "original":
            stored = _write_original(policy, blueprint, partial)
        else:
            stored = None
            (_write_adapter if to == "peft" else _write_merged)(policy, blueprint, partial)
            _write_tokenizer(policy, partial)
            _generation(policy).save_pretrained(partial)
        if trained and to != "peft":  # so that `dllm-sd eval` and `sample` decode as the run did
            write_file(partial / "recipe.yaml", settings_of(trained.run))
        grown = _rows(policy) if _rows(policy) > blueprint.config.vocab_size else None
        card = model_card(policy, blueprint, to, name or folder.resolve().name, trained, stored, grown)
        write_file(partial / "README.md", card)


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not empty.

    Raises:
        InputError: naming it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{str(folder)!r} exists and is not an empty folder; give another DIR")


def push_folder(folder: Path, repository: str) -> None:
    """Upload an exported folder to the hub; the repository is created if it does not exist.

    Raises:
        InputError: if the hub refuses or cannot be reached; the folder is kept.
    """
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository)
    except Exception as error:  # the client has many exceptions: names, rights, quotas, network
        raise InputError(
            f"{str(folder)!r} is written, but its upload to {repository!r} (--push) failed: {brief(error)}; log in "
            "with `hf auth login` or fix the name, then upload the folder with `hf upload`"
        ) from error


def _check_format(policy: AnyPolicy, model: Model, to: ExportFormat) -> None:
    has_adapter = isinstance(policy.module.model, PeftModel)
    if to == "peft" and not has_adapter:
        raise InputError("the run trained all weights and has no adapter (model.lora); export it --to merged")
    if to != "merged" and model.random_init:
        raise InputError("the run began with random weights (model.random_init), not a checkpoint; use --to merged")
    if to != "peft" and model.quantization:
        raise InputError(
            "the adapter was trained on a 4-bit base (model.quantization) and cannot be merged into it; use --to peft, "
            "or add model.quantization=null to merge it into the full-precision base, which is less exact"
        )
    if to == "original" and model.as_ == "diffusion":
        raise InputError(
            f"the original format of {model.path!r} is autoregressive and cannot hold model.as; use --to merged"
        )


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``, which is renamed to it at the end, or removed after an error."""
    check_folder(folder)
    target = folder.resolve()
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else brief(error)
        raise InputError(f"cannot write to {str(folder)!r}: {reason}; give another DIR") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# Weights


def merged_weights(model: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights on the CPU by native name, with LoRA's W + BA computed in float32 and rounded once.

    Args:
        model: the native network, or a `PeftModel` of it; modules trained whole replace the original ones.
        dtype: the dtype of tensors that an adapter or `modules_to_save` changed; by default that of the base weight.
    """
    adapter = model.active_adapters[0] if isinstance(model, PeftModel) else ""
    network = _network(model)
    modules: dict[str, Any] = dict(network.named_modules())
    state: dict[str, Tensor] = network.state_dict()
    trained_whole = f".modules_to_save.{adapter}."
    merged: dict[str, Tensor] = {}
    unchanged: dict[Any, Tensor] = {}
    for key, value in state.items():
        if ".lora_" in key or ".original_module." in key or (".modules_to_save." in key and trained_whole not in key):
            continue
        layer, base_dtype = modules.get(key.removesuffix(".base_layer.weight")), value.dtype
        if isinstance(layer, Linear):
            factors: tuple[Any, Any] = (layer.lora_A, layer.lora_B)
            a, b = (at_least_float32(factor[adapter].weight.detach()) for factor in factors)
            value = (at_least_float32(value) + layer.scaling[adapter] * (b @ a)).to(dtype or base_dtype).cpu()
        elif trained_whole in key:
            value = value.to(dtype or state[key.replace(trained_whole, ".original_module.")].dtype).cpu()
        else:  # the same tensor under two names, such as a tied head, stays the same
            value = unchanged.setdefault((value.data_ptr(), value.shape), value.cpu())
        merged[key.replace(trained_whole, ".").replace(".base_layer.", ".")] = value
    return merged


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names that share the tensor of an earlier name, such as a tied head, with that name."""
    first: dict[Any, str] = {}
    names = {name: first.setdefault((value.data_ptr(), value.shape), name) for name, value in state.items()}
    return {name: earlier for name, earlier in names.items() if name != earlier and state[name].numel()}


def _write_weights(state: Mapping[str, Tensor], folder: Path) -> None:
    if broken := find_broken(state):
        raise InputError(
            f"{broken} overflows {str(state[broken].dtype).removeprefix('torch.')}, the type that it is written in; "
            "use --to merged with model.dtype=float32"
        )
    split = split_torch_state_dict_into_shards(
        dict(state), filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_SHARD_SIZE
    )
    aliases = _aliases(state)
    for file, names in split.filename_to_tensors.items():
        shard = {name: state[name].clone() if name in aliases else state[name].contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_file(folder / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_merged(policy: AnyPolicy, blueprint: Blueprint, folder: Path) -> None:
    state = merged_weights(policy.module.model)
    tied = _aliases(state)
    config = deepcopy(_network(policy.module.model).config)
    config.tie_word_embeddings = bool(tied)
    config.architectures = [native_class(policy).__name__]
    config.dtype = blueprint.model.dtype
    if not policy.causal:  # transformers takes the model for an autoregressive one
        config.is_causal, config.mask_token_id = False, policy.mask_id
        thinking = policy.chat.thinking if policy.chat else blueprint.family.thinking
        mark = {"family": blueprint.family.name, "block_length": policy.block_length}
        setattr(config, MARK, {**mark, "thinking": thinking, "end_ids": list(policy.end_ids)})
    config.save_pretrained(folder)
    _write_weights({name: value for name, value in state.items() if name not in tied}, folder)


def _write_adapter(policy: AnyPolicy, blueprint: Blueprint, folder: Path) -> None:
    grown = blueprint.config.vocab_size < _rows(policy)  # the row of an added mask token is in no checkpoint
    write_adapter(policy, blueprint.folder, folder, with_embeddings=grown)


def _write_original(policy: AnyPolicy, blueprint: Blueprint, folder: Path) -> str | None:
    """Write weights and small files as in the original checkpoint.

    Returns the dtypes of the files whose weights the run computed in another dtype; None if there are none.
    """
    path = str(blueprint.model.path)
    source = stored_tensors(path)
    dtypes = {stored.dtype for stored in source.values()} & SAFETENSORS_DTYPES.keys()
    dtype = SAFETENSORS_DTYPES[dtypes.pop()] if len(dtypes) == 1 else torch.float32  # mixed dtypes are rounded below
    state = revert_weight_conversion(_network(policy.module.model), merged_weights(policy.module.model, dtype))
    extra = state.keys() - source.keys()
    aliases = _aliases(state)
    written = {aliases.get(name, name) for name in state.keys() & source.keys()}
    if lost := sorted(name for name in extra if aliases.get(name, name) not in written):
        raise InputError(f"the original format of {path!r} has no place for {lost[0]}; use --to merged")
    state = {name: value for name, value in state.items() if name not in extra}
    rounded: set[str] = set()
    for name, stored in source.items():
        if name not in state:  # a tensor that the native class does not use
            with safe_open(stored.file, "pt") as tensors:
                state[name] = tensors.get_tensor(name)
        elif tuple(state[name].shape) != stored.shape:
            raise InputError(f"the original format of {path!r} has another shape for {name}; use --to merged")
        elif state[name].is_floating_point() and stored.dtype in SAFETENSORS_DTYPES:
            rounded |= (
                {stored.dtype} if SAFETENSORS_DTYPES[stored.dtype] != getattr(torch, blueprint.model.dtype) else set()
            )
            state[name] = state[name].to(SAFETENSORS_DTYPES[stored.dtype])
    _write_weights({name: state[name] for name in source}, folder)
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        file = find_file(blueprint.model.tokenizer or path if name in TOKENIZER_FILES else path, name)
        if file is not None:
            write_file(folder / name, file.read_bytes())
    _copy_named_templates(blueprint, folder)
    return ", ".join(sorted(str(SAFETENSORS_DTYPES[name]).removeprefix("torch.") for name in rounded)) or None


def _copy_named_templates(blueprint: Blueprint, folder: Path) -> None:
    """Copy the additional chat templates of a tokenizer that stores them as separate files."""
    named = blueprint.chat.tokenizer.chat_template if blueprint.chat is not None else None
    source = blueprint.model.tokenizer or blueprint.model.path
    assert source is not None
    for name in named if isinstance(named, Mapping) else ():
        path = Path(NAMED_TEMPLATES) / f"{name}.jinja"
        if path.parent == Path(NAMED_TEMPLATES) and (file := find_file(source, str(path))) is not None:
            (folder / NAMED_TEMPLATES).mkdir(exist_ok=True)
            write_file(folder / path, file.read_bytes())


def _network(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _rows(policy: AnyPolicy) -> int:
    return _network(policy.module.model).get_input_embeddings().weight.shape[0]


# Small files


def _generation(policy: AnyPolicy) -> GenerationConfig:
    return GenerationConfig(eos_token_id=list(policy.end_ids), pad_token_id=policy.pad_id)


def _write_tokenizer(policy: AnyPolicy, folder: Path) -> None:
    """Write the tokenizer with the chat template that the policy uses."""
    if policy.chat is None:
        return
    tokenizer = copy(policy.chat.tokenizer)
    if policy.chat.template is not None:
        tokenizer.chat_template = policy.chat.written_by
    tokenizer.save_pretrained(folder)
