"""Which weights a teacher runs with: live, base (reference policy), EMA, periodic snapshot, or another run's."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.func import functional_call
from torch.nn import Parameter

from dllm_sd.errors import InputError, on_one_line
from dllm_sd.files.checkpoint_files import CHECKPOINT_WEIGHTS, read_tensors
from dllm_sd.files.writing import Place
from dllm_sd.losses.numerics import at_least_float32
from dllm_sd.network.finite import find_broken
from dllm_sd.network.lazy_logits import LazyLogits
from dllm_sd.network.site_head import Head, evaluating, run_at_sites
from dllm_sd.network.swapping import swapped, switched
from dllm_sd.network.view import View
from dllm_sd.policies.policy import Policy
from dllm_sd.policies.teacher_weights import Weights, WeightsDefaults
from dllm_sd.pretrained.adapters import check_scale
from dllm_sd.pretrained.model import Model
from dllm_sd.ranges import Count, Ranged, Share


@dataclass(frozen=True)
class LiveWeights(WeightsDefaults):
    """The student's current weights, without gradient."""

    moves = True

    @property
    def is_student(self) -> bool:
        """Return True."""
        return True

    def is_rollout_policy(self, rolling: object, passes: int) -> bool:
        """Whether live weights decode and the rollouts serve a single update, after which the weights differ."""
        return rolling == self and passes == 1


@dataclass(frozen=True)
class BaseWeights(WeightsDefaults):
    """The reference policy: the initial weights, as a frozen copy or with the adapter off where that is the same.

    An adapter that was loaded (`model.lora.start`) is copied, beside the student's.
    """

    at: Literal["start", "checkpoint"] = "start"
    """``start``: the start of the run, with the adapter of `model.lora.start`; ``checkpoint``: the model at
    `model.path` without any adapter. They differ under `model.lora.start` only."""
    stored = True

    def is_without_adapter(self, started: bool) -> bool:
        """Whether the adapter was new, or the weights are those of the checkpoint."""
        return self.at == "checkpoint" or not started

    def is_rollout_policy(self, rolling: object, passes: int) -> bool:
        """Whether the base weights decode."""
        return rolling == self


@dataclass(frozen=True)
class EmaWeights(Ranged, WeightsDefaults, key="method.teacher"):
    """EMA teacher: copy <- decay copy + (1 - decay) live, after every optimizer step.

    It stays unchanged when an update is skipped, since the student has not learnt then (lasgroup/SDPO, commit 0e6d510,
    also moves the average in the optimizer step).
    """

    decay: Share = 0.99
    """Share of the copy that stays at each optimizer step; 1 never changes it."""
    stored = True
    moves = True
    follows_optimizer_steps = True
    kept_in_float32 = True

    @property
    def is_student(self) -> bool:
        """Whether the average is the student itself, with decay 0."""
        return self.decay == 0

    def after_update(self, copy: dict[str, Tensor], live: Mapping[str, Tensor], update: int) -> None:
        """Move the average."""
        for name, value in copy.items():
            value.mul_(self.decay).add_(live[name], alpha=1 - self.decay)


@dataclass(frozen=True)
class SnapshotWeights(Ranged, WeightsDefaults, key="method.teacher"):
    """A copy of the student that is updated every `every` updates."""

    every: Count = 25
    """Updates between two copies."""
    stored = True
    moves = True

    @property
    def is_student(self) -> bool:
        """Whether the copy is renewed after every update."""
        return self.every == 1

    def is_rollout_policy(self, rolling: object, passes: int) -> bool:
        """Whether the copy is renewed exactly when the student makes new rollouts."""
        return rolling == LiveWeights() and self.every == passes

    def after_update(self, copy: dict[str, Tensor], live: Mapping[str, Tensor], update: int) -> None:
        """Renew the copy after every `every` updates; `update` counts from 1."""
        if update % self.every == 0:
            for name, value in copy.items():
                value.copy_(live[name])


@dataclass(frozen=True)
class CheckpointWeights(WeightsDefaults):
    """Another model with the student's tokenizer and backbone: on-policy distillation (arXiv 2605.31490)."""

    path: Place | None = None
    """Folder or hub name of the checkpoint."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Number format of these weights in memory."""

    @property
    def source(self) -> str | None:
        """`path`."""
        return self.path

    def other_model(self, student: Model) -> Model:
        """Return the keys of `model` for this checkpoint; attention and special tokens are the student's."""
        return Model(
            path=self.path,
            dtype=self.dtype,
            attention=student.attention,
            mask_token=student.mask_token,
            end_tokens=student.end_tokens,
        )


@dataclass(frozen=True)
class PeerWeights(WeightsDefaults):
    """The adapter (or all weights) of another run that was trained on the student's base, held beside the student's."""

    path: Place | None = None
    """Folder of one of its checkpoints, or of a PEFT adapter (``dllm-sd export --to peft``), of the student's shape."""
    stored = True
    of_another_run = True

    @property
    def source(self) -> str | None:
        """`path`."""
        return self.path

    def read(self, policy: Policy) -> dict[str, Tensor]:
        """Return its tensors, by the names of the parameters that the student ``policy`` trains.

        Raises:
            InputError: if the folder holds fewer, more or other tensors, or an adapter of another rank or alpha.
        """
        live, model = trained(policy), _peft(policy)
        remedy = "give the folder of a checkpoint, or PEFT adapter, of a run with the same model and model.lora"
        file = Path(self.path or "") / "adapter_model.safetensors"
        exported = self.path is not None and file.is_file()
        try:
            tensors = load_file(file) if exported else read_tensors(file.parent, CHECKPOINT_WEIGHTS)
        except (OSError, SafetensorError, InputError) as error:
            raise InputError(f"there is no usable peer at {self.path!r} ({on_one_line(error)}); {remedy}") from error
        if broken := find_broken(tensors):
            raise InputError(f"the peer at {self.path!r} is damaged ({broken} is not finite); {remedy}")
        settings = model and model.peft_config[model.active_adapters[0]]
        if isinstance(settings, LoraConfig):
            check_scale(self.path or "", settings)
        names = {name: name.removeprefix("model.").replace(".default.", ".") if exported else name for name in live}
        for name, stored in names.items():
            if stored not in tensors or tensors[stored].shape != live[name].shape:
                raise InputError(f"the peer at {self.path!r} has no tensor {stored} of the student's shape; {remedy}")
        if len(tensors) != len(names):
            raise InputError(f"the peer at {self.path!r} holds other tensors than the student trains; {remedy}")
        return {name: placed_like(tensors[stored], live[name]) for name, stored in names.items()}


WEIGHTS: dict[str, type] = {
    "live": LiveWeights,
    "base": BaseWeights,
    "ema": EmaWeights,
    "snapshot": SnapshotWeights,
    "checkpoint": CheckpointWeights,
    "peer": PeerWeights,
}


class TeacherModel:
    """Runs the policy's module with a teacher's weights, in eval mode, without gradient; copies trained tensors only.

    Another checkpoint is a separate policy, unsharded on every process. Under LoRA the base is the model with its
    adapter switched off (if the adapter was new), and a copy is a second, frozen adapter of the same model. Under full
    fine-tuning a copy replaces the parameters during a call.
    """

    def __init__(
        self, weights: Weights, policy: Policy, adapter: str | None = None, other: Policy | None = None
    ) -> None:
        """Copy the student as it is now.

        Args:
            weights: which weights the teacher runs with.
            policy: the student.
            adapter: the result of `add_adapter`, which the caller must call before the parameters are sharded.
            other: the loaded policy of another checkpoint, if the teacher is one.
        """
        self.weights, self.policy = weights, other or policy
        self._adapter = adapter or add_adapter(weights, policy)
        self._adapter_params: dict[str, Tensor] = {}
        self.copy: dict[str, Tensor] = {}
        live = trained(policy)
        names = {id(value): name for name, value in self.policy.module.named_parameters()}
        self._full_names = {name: names[id(value)] for name, value in self._head.named_parameters()}
        if self._adapter is not None:
            self._adapter_params = _find_adapter_params(policy, self._adapter)
            self.copy = {name: _ema_dtype(weights, value) for name, value in self._adapter_params.items()}
            self._set(live)
        elif weights.stored and _peft(policy) is None:
            self.copy = {name: _ema_dtype(weights, value.detach().clone()) for name, value in live.items()}
        if (values := weights.read(policy)) is not None:
            self._set(values)

    @torch.no_grad()
    def __call__(self, view: View) -> LazyLogits:
        """Return logits at the sites if they fit into one chunk, else hidden states and the head to apply later."""
        module = self.policy.module
        with evaluating(module), self.applied():
            return run_at_sites(module, view, self._lazy_logits)

    def _lazy_logits(self, hidden: Tensor, head: Head) -> LazyLogits:
        lazy = LazyLogits.under_autocast(hidden, head)
        if len(lazy.chunks()) == 1:
            return LazyLogits(lazy.logits(slice(None)))
        head_params = {
            name: _whole(self.copy[full]).to(value.dtype)
            for name, value in self._head.named_parameters()
            if (full := self._full_names.get(name)) in self.copy
        }
        return replace(lazy, head=partial(self._logits, head_params))

    @property
    def _head(self) -> nn.Module:
        module: Any = self.policy.module
        return module.network.get_output_embeddings()

    def _logits(self, head_params: dict[str, Tensor], hidden: Tensor) -> Tensor:
        """Map hidden states ``[i h]`` to logits ``[i v]``; may be called during the student's forward pass."""
        head = self._head
        with evaluating(head), switched(head, self._adapter) if self._switches else nullcontext():
            module: Any = self.policy.module
            return functional_call(head, head_params, (hidden,)) if head_params else module.logits(hidden)

    @property
    def _switches(self) -> bool:
        return _peft(self.policy) is not None and self.weights.stored

    def applied(self) -> AbstractContextManager[None]:
        """Put the teacher's weights in the place of those of `policy` inside."""
        model = _peft(self.policy)
        if model is not None and self._switches:
            return switched(model, self._adapter)
        return swapped(self.policy.module, self.copy) if self.copy else nullcontext()

    @torch.no_grad()
    def after_update(self, update: int, stepped: bool = True) -> None:
        """Let the weights follow the student; call once after each update, counted from 1, also after a skipped one.

        ``stepped`` tells whether the optimizer stepped. A snapshot is renewed in any case: it serves rollouts, which
        are counted in updates.
        """
        if self.weights.follows_optimizer_steps and not stepped:
            return
        self.weights.after_update(self.copy, trained(self.policy), update)
        self._fill_adapter()

    @property
    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint must hold: none for the base and a peer, which are loaded again."""
        return self.copy if self.weights.moves else {}

    def load(self, copy: Mapping[str, Tensor]) -> None:
        """Restore `checkpoint_tensors` from a checkpoint."""
        if self.checkpoint_tensors:
            self._set(copy)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.copy.items():
            value.copy_(values[name])
        self._fill_adapter()

    def _fill_adapter(self) -> None:
        for name, slot in self._adapter_params.items():
            if slot is not self.copy[name]:  # an average of higher precision than the adapter
                slot.copy_(self.copy[name])


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """Shard and place a full tensor like another; every process holds it, so nothing is communicated."""
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value.to(like.device)


def trained(policy: Policy) -> dict[str, Parameter]:
    """The trained parameters by name."""
    return {name: value for name, value in policy.module.named_parameters() if value.requires_grad}


def add_adapter(weights: Weights, policy: Policy) -> str | None:
    """Add a second adapter for a teacher's copy; return its name, or None where none is needed.

    It has parameters, so it must be added before the model is sharded over processes.
    """
    model = _peft(policy)
    if model is None or not weights.stored or weights.is_without_adapter(policy.starts_adapted):
        return None
    name = f"teacher{len(model.peft_config)}"
    live, known = {id(value) for value in trained(policy).values()}, {id(part) for part in model.modules()}
    settings = deepcopy(model.peft_config[model.active_adapters[0]])
    with torch.random.fork_rng(devices=[]), without_peft_warning():
        model.add_adapter(name, settings)
    for value in model.parameters():
        value.requires_grad_(id(value) in live)
    for part in model.modules():  # new modules start in training mode
        part.training = policy.module.training if id(part) not in known else part.training
    return name


@contextmanager
def without_peft_warning() -> Iterator[None]:
    """PEFT 0.21 reads an attribute that transformers has deprecated, whenever it makes an adapter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _peft(policy: Policy) -> PeftModel | None:
    model = getattr(policy.module, "model", None)
    return model if isinstance(model, PeftModel) else None


def _find_adapter_params(policy: Policy, adapter: str) -> dict[str, Tensor]:
    """Return the parameters of another adapter, by the names of the student's."""
    model, params = _peft(policy), dict(policy.module.named_parameters())
    assert model is not None
    live = model.active_adapters[0]

    def twin(name: str) -> str:
        return ".".join(adapter if part == live else part for part in name.split("."))

    return {name: params[twin(name)].detach() for name in trained(policy)}


def _ema_dtype(weights: Weights, value: Tensor) -> Tensor:
    """Cast an average to float32 at least; in bfloat16 its small steps would round to nothing."""
    return at_least_float32(value) if weights.kept_in_float32 else value


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
