"""Hand a trained policy to other programs: a PEFT adapter, a native transformers model, or the family's own layout."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, split_torch_state_dict_into_shards
from peft import PeftModel, get_peft_model_state_dict
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
from dllm_sd.pretrained.blueprint import Blueprint, brief, find_file, read_blueprint
from dllm_sd.pretrained.families import MARK
from dllm_sd.pretrained.model import Model
from dllm_sd.pretrained.weight_files import INDEX_FILE, stored_tensors

SHARD = "5GB"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
NAMED_TEMPLATES = "additional_chat_templates"
"""Folder of a tokenizer's other chat templates, as transformers writes it."""
STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Floating types by their name in a safetensors header."""


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
        policy: the policy; it is not changed. Folded weights take a second copy of the adapted layers in host memory.
        model: the keys of `model` it was built from.
        to: ``peft``: the adapter alone; ``merged``: a native transformers model; ``original``: the tensor names,
            types and config.json of the checkpoint that `model.path` names.
        folder: must be empty or not exist.
        trained: the run, for the model card.
        name: what the model card calls the model, such as its name on the hub; None takes the folder's.

    Raises:
        InputError: if the model has no such form, or the folder is not empty or cannot be written.
    """
    _check_form(policy, model, to)
    blueprint = read_blueprint(model, text=False)
    with _appearing(folder) as partial:
        if to == "original":
            changed = _write_original(policy, blueprint, partial)
        else:
            changed = None
            (_write_adapter if to == "peft" else _write_merged)(policy, blueprint, partial)
            _write_tokenizer(policy, partial)
            _generation(policy).save_pretrained(partial)
        if trained and to != "peft":  # so that `dllm-sd eval` and `sample` decode as the run did
            write_file(partial / "recipe.yaml", settings_of(trained.run))
        grown = _rows(policy) if _rows(policy) > blueprint.config.vocab_size else None
        card = model_card(policy, blueprint, to, name or folder.resolve().name, trained, changed, grown)
        write_file(partial / "README.md", card)


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not empty.

    Raises:
        InputError: naming it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{str(folder)!r} exists and is not an empty folder; give another DIR")


def push_folder(folder: Path, repository: str) -> None:
    """Upload an exported folder to the hub; the repository is made where it does not exist.

    Raises:
        InputError: if the hub refuses or cannot be reached; the folder stays.
    """
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository)
    except Exception as error:  # names, rights, quotas, the network: the hub's client has an exception for each
        raise InputError(
            f"{str(folder)!r} is written, but its upload to {repository!r} (--push) failed: {brief(error)}; log in "
            "with `hf auth login` or fix the name, then upload the folder with `hf upload`"
        ) from error


def _check_form(policy: AnyPolicy, model: Model, to: ExportFormat) -> None:
    adapted = isinstance(policy.module.model, PeftModel)
    if to == "peft" and not adapted:
        raise InputError("the run trained all weights and has no adapter (model.lora); export it --to merged")
    if to != "merged" and model.random_init:
        raise InputError("the run began with random weights (model.random_init), not a checkpoint; use --to merged")
    if to != "peft" and model.quantization:
        raise InputError(
            "the adapter was trained on a 4-bit base (model.quantization) that cannot take it in; use --to peft, or "
            "add model.quantization=null to fold it into the full-precision base, which it fits less exactly"
        )
    if to == "original" and model.as_ == "diffusion":
        raise InputError(
            f"the original format of {model.path!r} is autoregressive and would forget model.as; use --to merged"
        )


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` to write into, which takes its place at the end or is removed."""
    check_folder(folder)
    target = folder.resolve()
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        words = error.strerror if isinstance(error, OSError) and error.strerror else brief(error)
        raise InputError(f"cannot write to {str(folder)!r}: {words}; give another DIR") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# Weights


def merged_weights(model: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights by native name, with W + BA computed in float32 and rounded once, on the CPU.

    Args:
        model: the native network, or it under a `PeftModel`; modules trained whole stand at their own place.
        dtype: of what an adapter or `modules_to_save` changed; None takes that of the base weight.
    """
    adapter = model.active_adapters[0] if isinstance(model, PeftModel) else ""
    network = _network(model)
    parts: dict[str, Any] = dict(network.named_modules())
    state: dict[str, Tensor] = network.state_dict()
    whole = f".modules_to_save.{adapter}."
    folded: dict[str, Tensor] = {}
    untouched: dict[Any, Tensor] = {}
    for key, value in state.items():
        if ".lora_" in key or ".original_module." in key or (".modules_to_save." in key and whole not in key):
            continue
        owner, kept = parts.get(key.removesuffix(".base_layer.weight")), value.dtype
        if isinstance(owner, Linear):
            halves: tuple[Any, Any] = (owner.lora_A, owner.lora_B)
            a, b = (at_least_float32(half[adapter].weight.detach()) for half in halves)
            value = (at_least_float32(value) + owner.scaling[adapter] * (b @ a)).to(dtype or kept).cpu()
        elif whole in key:
            value = value.to(dtype or state[key.replace(whole, ".original_module.")].dtype).cpu()
        else:  # a tied head stays tied
            value = untouched.setdefault((value.data_ptr(), value.shape), value.cpu())
        folded[key.replace(whole, ".").replace(".base_layer.", ".")] = value
    return folded


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names whose tensor is the one of an earlier name (a tied head)."""
    first: dict[Any, str] = {}
    names = {name: first.setdefault((value.data_ptr(), value.shape), name) for name, value in state.items()}
    return {name: other for name, other in names.items() if name != other and state[name].numel()}


def _write_weights(state: Mapping[str, Tensor], folder: Path) -> None:
    if broken := find_broken(state):
        raise InputError(
            f"{broken} overflows {str(state[broken].dtype).removeprefix('torch.')}, the type that it is written in; "
            "use --to merged with model.dtype=float32"
        )
    split = split_torch_state_dict_into_shards(
        dict(state), filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD
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
    config.architectures = [_native_class(policy).__name__]
    config.dtype = blueprint.model.dtype
    if not policy.causal:  # an autoregressive one is what transformers takes it for
        config.is_causal, config.mask_token_id = False, policy.mask_id
        thinking = policy.chat.thinking if policy.chat else blueprint.family.thinking
        mark = {"family": blueprint.family.name, "block_length": policy.block_length}
        setattr(config, MARK, {**mark, "thinking": thinking, "end_ids": list(policy.end_ids)})
    config.save_pretrained(folder)
    _write_weights({name: value for name, value in state.items() if name not in tied}, folder)


def _write_adapter(policy: AnyPolicy, blueprint: Blueprint, folder: Path) -> None:
    model = policy.module.model
    assert isinstance(model, PeftModel)
    adapter = model.active_adapters[0]
    settings: Any = copy(model.peft_config[adapter])
    local = Path(blueprint.folder)
    settings.base_model_name_or_path = str(local.resolve()) if local.is_dir() else blueprint.folder
    settings.inference_mode = True
    native = _native_class(policy)
    names = {"base_model_class": native.__name__, "parent_library": native.__module__}
    settings.save_pretrained(str(folder), auto_mapping_dict=names)
    grown = blueprint.config.vocab_size < _rows(policy)  # the row of an added mask token is in no checkpoint
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=grown)
    state = {name: value.detach().cpu().clone() for name, value in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _write_original(policy: AnyPolicy, blueprint: Blueprint, folder: Path) -> str | None:
    """Also copies the small files of the source; returns its floating types if the run computed in another one."""
    path = str(blueprint.model.path)
    source = stored_tensors(path)
    types = {stored.dtype for stored in source.values()} & STORED.keys()
    dtype = STORED[types.pop()] if len(types) == 1 else torch.float32  # mixed: rounded below, tensor by tensor
    state = revert_weight_conversion(_network(policy.module.model), merged_weights(policy.module.model, dtype))
    extra = state.keys() - source.keys()
    groups = _aliases(state)
    kept = {groups.get(name, name) for name in state.keys() & source.keys()}
    if alone := sorted(name for name in extra if groups.get(name, name) not in kept):
        raise InputError(f"the original format of {path!r} has no place for {alone[0]}; use --to merged")
    state = {name: value for name, value in state.items() if name not in extra}
    lost: set[str] = set()
    for name, stored in source.items():
        if name not in state:  # what the native class does not use
            with safe_open(stored.file, "pt") as tensors:
                state[name] = tensors.get_tensor(name)
        elif tuple(state[name].shape) != stored.shape:
            raise InputError(f"the original format of {path!r} has another shape for {name}; use --to merged")
        elif state[name].is_floating_point() and stored.dtype in STORED:
            lost |= {stored.dtype} if STORED[stored.dtype] != getattr(torch, blueprint.model.dtype) else set()
            state[name] = state[name].to(STORED[stored.dtype])
    _write_weights({name: state[name] for name in source}, folder)
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        file = find_file(blueprint.model.tokenizer or path if name in TOKENIZER_FILES else path, name)
        if file is not None:
            write_file(folder / name, file.read_bytes())
    _copy_named_templates(blueprint, folder)
    return ", ".join(sorted(str(STORED[name]).removeprefix("torch.") for name in lost)) or None


def _copy_named_templates(blueprint: Blueprint, folder: Path) -> None:
    """The chat templates beside the default one, each in a file of its own, where the tokenizer has such files."""
    named = blueprint.chat.tokenizer.chat_template if blueprint.chat is not None else None
    source = blueprint.model.tokenizer or blueprint.model.path
    assert source is not None
    for name in named if isinstance(named, Mapping) else ():
        place = Path(NAMED_TEMPLATES) / f"{name}.jinja"
        if place.parent == Path(NAMED_TEMPLATES) and (file := find_file(source, str(place))) is not None:
            (folder / NAMED_TEMPLATES).mkdir(exist_ok=True)
            write_file(folder / place, file.read_bytes())


def _network(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _native_class(policy: AnyPolicy) -> type:
    """The class that ships with transformers; a family's own class only carries a conversion of names."""
    return next(
        kind for kind in type(_network(policy.module.model)).__mro__ if kind.__module__.startswith("transformers.")
    )


def _rows(policy: AnyPolicy) -> int:
    return _network(policy.module.model).get_input_embeddings().weight.shape[0]


# Small files


def _generation(policy: AnyPolicy) -> GenerationConfig:
    return GenerationConfig(eos_token_id=list(policy.end_ids), pad_token_id=policy.pad_id)


def _write_tokenizer(policy: AnyPolicy, folder: Path) -> None:
    """The tokenizer with the chat template that the policy uses."""
    if policy.chat is None:
        return
    tokenizer = copy(policy.chat.tokenizer)
    if policy.chat.template is not None:
        tokenizer.chat_template = policy.chat.written_by
    tokenizer.save_pretrained(folder)
