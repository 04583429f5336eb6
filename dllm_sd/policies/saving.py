"""Weights of a policy for servers: an adapter in PEFT's own files, or all trained weights."""

from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from dllm_sd.files.checkpoint_files import CHECKPOINT_WEIGHTS, STATE, checksum, state_text
from dllm_sd.files.writing import write_file
from dllm_sd.policies.policy import Policy


def native_class(policy: Policy) -> type:
    """The class that ships with transformers; a family's own class only carries a conversion of names."""
    network = policy.module.network
    return next(kind for kind in type(network).__mro__ if kind.__module__.startswith("transformers."))


def write_adapter(policy: Policy, base: str, folder: Path, *, with_embeddings: bool = False) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT does.

    Args:
        policy: a policy with a LoRA adapter; under FSDP2 its weights are to be gathered.
        base: folder or hub name of the model that it adapts.
        folder: exists.
        with_embeddings: also write the embeddings, to which the policy has added rows.
    """
    model: Any = policy.module.model
    assert isinstance(model, PeftModel)
    adapter = model.active_adapters[0]
    settings: Any = copy(model.peft_config[adapter])
    settings.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    settings.inference_mode = True
    native = native_class(policy)
    names = {"base_model_class": native.__name__, "parent_library": native.__module__}
    settings.save_pretrained(str(folder), auto_mapping_dict=names)
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=with_embeddings)
    state = {name: value.detach().cpu().clone() for name, value in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write all trained weights as a checkpoint of a run holds them, for ``dllm-sd serve``; under FSDP2 gathered."""
    file = folder / CHECKPOINT_WEIGHTS
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, file)
    write_file(folder / STATE, state_text({}, {file.name: checksum(file)}))
