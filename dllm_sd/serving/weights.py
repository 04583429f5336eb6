"""Whose weights decode: those that the server was started with, adapters that were loaded, or all weights replaced."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dllm_sd.errors import InputError, on_one_line, shown
from dllm_sd.files.checkpoint_files import STATE
from dllm_sd.network.finite import find_broken
from dllm_sd.network.swapping import switched
from dllm_sd.policies.loading import AnyPolicy, load_network
from dllm_sd.policies.weights import trained, without_peft_warning
from dllm_sd.pretrained.adapters import check_scale
from dllm_sd.pretrained.blueprint import read_blueprint
from dllm_sd.pretrained.model import Model
from dllm_sd.pretrained.small_files import ADAPTER, read_small_file
from dllm_sd.serving.refusal import Refusal
from dllm_sd.training.checkpoint import load_weights

MOST_ADAPTERS = 16
"""Adapters that are held at the same time."""
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class ServedWeights:
    """The weights of a policy by name. All but `names` and `check` may be called on the decoding thread only."""

    def __init__(self, policy: AnyPolicy, model: Model, name: str) -> None:
        """Serve a policy that was built from ``model`` under a ``name``."""
        self.policy, self.model, self.base = policy, model, name
        network = policy.module.model
        self._own = network.active_adapters[0] if isinstance(network, PeftModel) else None
        """The adapter that belongs to the base, if it has one."""
        self._trained = list(trained(policy).values()) if self._own is None else []
        """What PEFT freezes while adapters are there."""
        self._adapters: dict[str, str] = {}
        """PEFT's name of each loaded adapter, by its own name."""
        self._count = 0

    @property
    def names(self) -> list[str]:
        """The base, and the adapters."""
        return [self.base, *self._adapters]

    def check(self, name: str | None) -> str:
        """Return the name of the weights that a request asks for, the base's where it names none.

        Raises:
            Refusal: if there are no such weights.
        """
        if name is None:
            return self.base
        if name not in self.names:
            known = ", ".join(shown(known) for known in self.names[:5])
            raise Refusal(404, f"no weights are loaded under the name {shown(name)}; ask for one of {known}")
        return name

    def applied(self, name: str) -> AbstractContextManager[None]:
        """Put the weights of a name in place inside.

        Raises:
            Refusal: if they were unloaded in the meantime.
        """
        self.check(name)
        network = self.policy.module.model
        if not isinstance(network, PeftModel):
            return nullcontext()
        return switched(network, self._adapters.get(name, self._own))

    def load_adapter(self, name: str, folder: str, in_place: bool) -> str:
        """Load a PEFT adapter, under a new name or in the place of the one that has it; return what was done.

        Beyond `MOST_ADAPTERS` the one that was loaded first makes room, and has to be loaded again to be used.

        Raises:
            InputError: if the folder holds no usable adapter, or one of another shape than those that are there.
            Refusal: if the name is taken.
        """
        if name == self.base or (name in self._adapters and not in_place):
            remedy = "load it under another one" if name == self.base else "set load_inplace to replace it"
            raise Refusal(400, f"the name {shown(name)} is taken; {remedy}")
        tensors = _read_adapter(Path(folder))
        network = self.policy.module.model
        settings = self._settings(Path(folder))
        if name in self._adapters:
            self._fill(self._adapters[name], tensors, folder)
            return f"adapter {shown(name)} was replaced"
        self._count += 1
        inner = f"served{self._count}"
        with torch.random.fork_rng(devices=[]), without_peft_warning():
            try:
                if isinstance(network, PeftModel):
                    network.add_adapter(inner, settings)
                else:
                    self.policy.module.model = PeftModel(network, settings, adapter_name=inner)
                self._fill(inner, tensors, folder)
            except BaseException:
                self._drop(inner)
                raise
        self.policy.module.model.eval()
        self._adapters[name] = inner
        for former in list(self._adapters)[:-MOST_ADAPTERS]:
            self.unload_adapter(former)
        return f"adapter {shown(name)} was loaded"

    def unload_adapter(self, name: str) -> str:
        """Remove an adapter that was loaded; return what was done.

        Raises:
            Refusal: if there is none of that name.
        """
        if name not in self._adapters:
            raise Refusal(404, f"no adapter is loaded under the name {shown(name)}")
        self._drop(self._adapters.pop(name))
        return f"adapter {shown(name)} was unloaded"

    def load_all(self, name: str, folder: str) -> str:
        """Replace the weights of the base, which gets a new name; return what was done.

        Args:
            name: the new name of the base.
            folder: a checkpoint of a run with the same config, or a model's folder, such as an export.

        Raises:
            InputError: if the folder holds no weights of this model's shape.
            Refusal: if adapters are loaded, which belong to the present weights.
        """
        if self._adapters:
            raise Refusal(400, "adapters are loaded that belong to the present weights; unload them first")
        if (Path(folder) / STATE).is_file():
            load_weights(self.policy, Path(folder))
        else:
            self._copy_model(folder)
        self.base = name
        return f"the weights are those of {shown(name)} now"

    def _settings(self, folder: Path) -> LoraConfig:
        """Return the settings of the adapter in a folder: those of the adapters that are there, else its own."""
        network = self.policy.module.model
        told = read_small_file(folder / CONFIG, ADAPTER)
        if isinstance(network, PeftModel):
            there = deepcopy(next(iter(network.peft_config.values())))
            assert isinstance(there, LoraConfig)
            check_scale(str(folder), there)
            return there
        targets = told.get("target_modules")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise InputError(f"{folder / CONFIG} must list its target_modules by name; write it with PEFT's own export")
        plain = LoraConfig(r=told.get("r") or 1, lora_alpha=told.get("lora_alpha") or 1, target_modules=targets)
        check_scale(str(folder), plain)
        saved = told.get("modules_to_save")
        return LoraConfig(r=plain.r, lora_alpha=plain.lora_alpha, target_modules=targets, modules_to_save=saved)

    def _fill(self, inner: str, tensors: Mapping[str, Tensor], folder: str) -> None:
        """Put tensors into an adapter, all or none."""
        network: Any = self.policy.module.model
        wanted = get_peft_model_state_dict(network, adapter_name=inner, save_embedding_layers=False)
        if odd := sorted(wanted.keys() ^ tensors.keys()):
            raise InputError(f"the adapter at {folder!r} and the one that is served differ in {odd[0]:.150}")
        for name, value in wanted.items():
            if tensors[name].shape != value.shape:
                shapes = f"{list(tensors[name].shape)} and not {list(value.shape)}"
                raise InputError(f"{name:.150} of the adapter at {folder!r} has the shape {shapes}")
        set_peft_model_state_dict(network, dict(tensors), adapter_name=inner)

    def _drop(self, inner: str) -> None:
        network: Any = self.policy.module.model
        if not isinstance(network, PeftModel) or inner not in network.peft_config:
            return
        others = [name for name in network.peft_config if name != inner]
        if others:
            network.set_adapter(self._own or others[0])  # PEFT warns where it has to choose
            network.delete_adapter(inner)
            return
        self.policy.module.model = network.unload()
        for value in self._trained:
            value.requires_grad_(True)

    def _copy_model(self, folder: str) -> None:
        if self._own is not None:
            raise InputError("the served model has an adapter; give the checkpoint of a run, or load an adapter")
        if not Path(folder).is_dir():
            raise InputError(f"there is no folder {folder!r}; give a checkpoint of a run, or a model's folder")
        blueprint = read_blueprint(replace(self.model, path=folder, random_init=False), text=False)
        given = _parameters(load_network(blueprint, "cpu"))
        live = _parameters(self.policy.module.network)
        if odd := sorted(given.keys() ^ live.keys()):
            raise InputError(f"the model at {folder!r} and the served one differ in {odd[0]:.150}")
        for name, value in live.items():
            if value.shape != given[name].shape:
                raise InputError(
                    f"{name:.150} of the model at {folder!r} has another shape than that of the served one"
                )
        if broken := find_broken(given):
            raise InputError(f"the model at {folder!r} is damaged ({broken:.150} is not finite)")
        with torch.no_grad():
            for name, value in live.items():
                value.copy_(given[name])


def _parameters(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.named_parameters())


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter, from safetensors only."""
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise InputError(f"there is no {name} in {str(folder)!r}; give the folder of a PEFT adapter")
    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / TENSORS} cannot be read ({on_one_line(error):.150}); write it again") from error
    if broken := find_broken(tensors):
        raise InputError(f"{folder / TENSORS} is damaged ({broken:.150} is not finite); write it again")
    return tensors
