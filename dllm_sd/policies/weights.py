"""Whose weights a teacher runs with: live, base, a moving average, a periodic snapshot, or another run's."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.func import functional_call
from torch.nn import Parameter

from dllm_sd.errors import InputError, on_one_line
from dllm_sd.files.checkpoint_files import WEIGHTS as CHECKPOINT_WEIGHTS
from dllm_sd.files.checkpoint_files import read_tensors
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
class Live(WeightsDefaults):
    """The student's current weights, without gradient."""

    moves: ClassVar[bool] = True

    @property
    def is_student(self) -> bool:
        """Always."""
        return True

    def is_rollout_policy(self, rolling: object, passes: int) -> bool:
        """Before the step of the first update that they serve."""
        return rolling == self and passes == 1


@dataclass(frozen=True)
class Base(WeightsDefaults):
    """The weights that the run starts with: a frozen copy of them, or the adapter switched off where that is the same.

    An adapter that starts from another one (`model.lora.start`) is copied, beside the student's.
    """

    at: Literal["start", "checkpoint"] = "start"
    """The start of the run, with what `model.lora.start` put into the adapter; or the checkpoint at `model.path`,
    without any adapter. They differ under `model.lora.start` only."""
    stored: ClassVar[bool] = True

    def is_without_adapter(self, started: bool) -> bool:
        """Where the adapter began as nothing, or is not meant."""
        return self.at == "checkpoint" or not started

    def is_rollout_policy(self, rolling: object, passes: int) -> bool:
        """Where base weights decode."""
        return rolling == self


@dataclass(frozen=True)
class Ema(Ranged, WeightsDefaults, key="method.teacher"):
    """An exponential moving average of the student: copy <- decay copy + (1 - decay) live, after every optimizer step.

    At an update that is skipped it stays (lasgroup/SDPO, commit 0e6d510, moves it in the step): else it would come
    nearer to a student that has not learnt.
    """

    decay: Share = 0.99
    stored: ClassVar[bool] = True
    moves: ClassVar[bool] = True
    follows_optimizer_steps: ClassVar[bool] = True
    kept_in_float32: ClassVar[bool] = True

    @property
    def is_student(self) -> bool:
        """Only an average that forgets everything."""
        return self.decay == 0

    def after_update(self, copy: dict[str, Tensor], live: Mapping[str, Tensor], update: int) -> None:
        """Move the average."""
        for name, value in copy.items():
            value.mul_(self.decay).add_(live[name], alpha=1 - self.decay)


@dataclass(frozen=True)
class Snapshot(Ranged, WeightsDefaults, key="method.teacher"):
    """A copy of the student, renewed every `every` updates."""

    every: Count = 25
    stored: ClassVar[bool] = True
    moves: ClassVar[bool] = True

    @property
    def is_student(self) -> bool:
        """A copy renewed after every update."""
        return self.every == 1

    def is_rollout_policy(self, rolling: object, passes: int) -> bool:
        """If it is renewed whenever the student makes new rollouts, and never in between."""
        return rolling == Live() and self.every == passes

    def after_update(self, copy: dict[str, Tensor], live: Mapping[str, Tensor], update: int) -> None:
        """Renew the copy when its time has come; `update` counts from 1."""
        if update % self.every == 0:
            for name, value in copy.items():
                value.copy_(live[name])


@dataclass(frozen=True)
class Checkpoint(WeightsDefaults):
    """Another model with the student's tokenizer and backbone: on-policy distillation (arXiv 2605.31490)."""

    path: Place | None = None
    """Folder or hub name of the checkpoint."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"

    @property
    def source(self) -> str | None:
        """`path`."""
        return self.path

    def other_model(self, student: Model) -> Model:
        """Read as the student is."""
        return Model(
            path=self.path,
            dtype=self.dtype,
            attention=student.attention,
            mask_token=student.mask_token,
            end_tokens=student.end_tokens,
        )


@dataclass(frozen=True)
class Peer(WeightsDefaults):
    """What another run trained on the student's own base: its adapter (or all weights), beside the student's."""

    path: Place | None = None
    """Folder of one of its checkpoints, or of a PEFT adapter (``dllm-sd export --to peft``), of the student's shape."""
    stored: ClassVar[bool] = True
    of_another_run: ClassVar[bool] = True

    @property
    def source(self) -> str | None:
        """`path`."""
        return self.path

    def read(self, policy: Policy) -> dict[str, Tensor]:
        """Its tensors by the names of those that the student ``policy`` trains.

        Raises:
            InputError: if the folder does not hold just these, or says that they were scaled otherwise.
        """
        live, model = trained(policy), _peft(policy)
        remedy = "give the folder of a checkpoint, or PEFT adapter, of a run with the same model and model.lora"
        file = Path(self.path or "") / "adapter_model.safetensors"
        exported = self.path is not None and file.is_file()
        try:
            found = load_file(file) if exported else read_tensors(file.parent, CHECKPOINT_WEIGHTS)
        except (OSError, SafetensorError, InputError) as error:
            raise InputError(f"there is no usable peer at {self.path!r} ({on_one_line(error)}); {remedy}") from error
        if broken := find_broken(found):
            raise InputError(f"the peer at {self.path!r} is damaged ({broken} is not finite); {remedy}")
        settings = model and model.peft_config[model.active_adapters[0]]
        if isinstance(settings, LoraConfig):
            check_scale(self.path or "", settings)
        names = {name: name.removeprefix("model.").replace(".default.", ".") if exported else name for name in live}
        for name, stored in names.items():
            if stored not in found or found[stored].shape != live[name].shape:
                raise InputError(f"the peer at {self.path!r} has no tensor {stored} of the student's shape; {remedy}")
        if len(found) != len(names):
            raise InputError(f"the peer at {self.path!r} holds other tensors than the student trains; {remedy}")
        return {name: placed_like(found[stored], live[name]) for name, stored in names.items()}


WEIGHTS: dict[str, type] = {
    "live": Live,
    "base": Base,
    "ema": Ema,
    "snapshot": Snapshot,
    "checkpoint": Checkpoint,
    "peer": Peer,
}


class Teacher:
    """The policy's module run with a teacher's weights: eval mode, no gradient, only trained tensors copied.

    Another checkpoint is a policy of its own, whole on every process. Under LoRA the base is the model without its
    adapter where that began as nothing, and a copy is a second, frozen adapter of the same model. Under full
    fine-tuning a copy takes the place of the parameters for the time of a call.
    """

    def __init__(
        self, weights: Weights, policy: Policy, adapter: str | None = None, other: Policy | None = None
    ) -> None:
        """Copy the student as it is now.

        Args:
            weights: whose weights.
            policy: the student.
            adapter: what `add_adapter` gave; to be called first, and by hand, where the parameters are sharded.
            other: the other checkpoint, loaded, if it is one.
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
        """What it says at the sites: logits if they are few, else hidden states and the head that reads them later."""
        module = self.policy.module
        with evaluating(module), self.applied():
            return run_at_sites(module, view, self._lazy_logits)

    def _lazy_logits(self, hidden: Tensor, head: Head) -> LazyLogits:
        lazy = LazyLogits.under_autocast(hidden, head)
        if len(lazy.chunks()) == 1:
            return LazyLogits(lazy.logits(slice(None)))
        own = {
            name: _whole(self.copy[full]).to(value.dtype)
            for name, value in self._head.named_parameters()
            if (full := self._full_names.get(name)) in self.copy
        }
        return replace(lazy, head=partial(self._logits, own))

    @property
    def _head(self) -> nn.Module:
        module: Any = self.policy.module
        return module.network.get_output_embeddings()

    def _logits(self, own: dict[str, Tensor], hidden: Tensor) -> Tensor:
        """``[i h] -> [i v]``, even in the middle of the student's forward."""
        head = self._head
        with evaluating(head), switched(head, self._adapter) if self._switches else nullcontext():
            module: Any = self.policy.module
            return functional_call(head, own, (hidden,)) if own else module.logits(hidden)

    @property
    def _switches(self) -> bool:
        return _peft(self.policy) is not None and self.weights.stored

    def applied(self) -> AbstractContextManager[None]:
        """The teacher's weights in the place of those of `policy`."""
        model = _peft(self.policy)
        if model is not None and self._switches:
            return switched(model, self._adapter)
        return swapped(self.policy.module, self.copy) if self.copy else nullcontext()

    @torch.no_grad()
    def after_update(self, update: int, stepped: bool = True) -> None:
        """Let the weights follow the student; call once after each update, counted from 1, also after a skipped one.

        A snapshot is renewed whether the update ``stepped`` or not: it belongs to rollouts, which go by updates.
        """
        if self.weights.follows_optimizer_steps and not stepped:
            return
        self.weights.after_update(self.copy, trained(self.policy), update)
        self._fill_adapter()

    @property
    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint must hold: none for the base and a peer, which are read again."""
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
            if slot is not self.copy[name]:  # an average in more digits than the adapter has
                slot.copy_(self.copy[name])


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the pieces and on the device of another one; every process has it, so nothing is sent."""
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value.to(like.device)


def trained(policy: Policy) -> dict[str, Parameter]:
    """The trained parameters by name."""
    return {name: value for name, value in policy.module.named_parameters() if value.requires_grad}


def add_adapter(weights: Weights, policy: Policy) -> str | None:
    """Make room for a teacher's copy in an adapted model; the name of the new adapter, None where none is needed.

    It has parameters, so it must exist before the model is sharded over processes.
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
    for part in model.modules():  # new ones start in training mode
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
    """The parameters of another adapter by the names of the live one's."""
    model, every = _peft(policy), dict(policy.module.named_parameters())
    assert model is not None
    live = model.active_adapters[0]

    def twin(name: str) -> str:
        return ".".join(adapter if part == live else part for part in name.split("."))

    return {name: every[twin(name)].detach() for name in trained(policy)}


def _ema_dtype(weights: Weights, value: Tensor) -> Tensor:
    """In bfloat16 the small steps of an average would round to nothing."""
    return at_least_float32(value) if weights.kept_in_float32 else value


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
