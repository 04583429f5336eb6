"""Whose weights a teacher runs with: live, base, an exponential moving average, or a periodic snapshot."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from torch.func import functional_call
from torch.nn import Parameter

from dllm_sd.errors import InputError
from dllm_sd.losses.supports import at_least_float32
from dllm_sd.policies.policy import Policy, View
from dllm_sd.policies.site_head import evaluating


@dataclass(frozen=True)
class Live:
    """The student's current weights, without gradient."""

    stored: ClassVar[bool] = False

    def after_update(self, copy: dict[str, Tensor], live: Mapping[str, Tensor], update: int) -> None:
        """Nothing to keep."""


@dataclass(frozen=True)
class Base:
    """The initial weights: the adapter switched off, or a frozen copy under full fine-tuning."""

    stored: ClassVar[bool] = True

    def after_update(self, copy: dict[str, Tensor], live: Mapping[str, Tensor], update: int) -> None:
        """The base never moves."""


@dataclass(frozen=True)
class Ema:
    """An exponential moving average of the student: copy <- decay copy + (1 - decay) live, after every update."""

    decay: float = 0.99
    stored: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise InputError("method.teacher.decay must be between 0 and 1")

    def after_update(self, copy: dict[str, Tensor], live: Mapping[str, Tensor], update: int) -> None:
        """Move the average."""
        for name, value in copy.items():
            value.mul_(self.decay).add_(live[name], alpha=1 - self.decay)


@dataclass(frozen=True)
class Snapshot:
    """A copy of the student, renewed every `every` updates."""

    every: int = 25
    stored: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError("method.teacher.every must be at least 1 update")

    def after_update(self, copy: dict[str, Tensor], live: Mapping[str, Tensor], update: int) -> None:
        """Renew the copy when its time has come; `update` counts from 1."""
        if update % self.every == 0:
            for name, value in copy.items():
                value.copy_(live[name])


Weights = Live | Base | Ema | Snapshot
WEIGHTS: dict[str, type] = {"live": Live, "base": Base, "ema": Ema, "snapshot": Snapshot}


class Teacher:
    """The policy's module run with a teacher's weights: eval mode, no gradient, only trained tensors copied."""

    def __init__(self, weights: Weights, policy: Policy) -> None:
        self.weights = weights
        self.policy = policy
        adapter = getattr(policy.module, "model", None)
        self._adapter = adapter if isinstance(weights, Base) and isinstance(adapter, PeftModel) else None
        self.copy: dict[str, Tensor] = {}
        if weights.stored and self._adapter is None:
            self.copy = {name: value.detach().clone() for name, value in trained(policy).items()}
        if isinstance(weights, Ema):  # in bfloat16 the small steps of an average would round to nothing
            self.copy = {name: at_least_float32(value) for name, value in self.copy.items()}

    @torch.no_grad()
    def __call__(self, view: View) -> Tensor:
        """Logits ``[m v]``."""
        module = self.policy.module
        with evaluating(module), self._adapter.disable_adapter() if self._adapter else nullcontext():
            if not self.copy:
                return module(view.ids, view.mask, view.sites)
            live = trained(self.policy)
            weights = {name: value.to(live[name].dtype) for name, value in self.copy.items()}
            return functional_call(module, weights, (view.ids, view.mask, view.sites))

    @torch.no_grad()
    def after_update(self, update: int) -> None:
        """Let the weights follow the student; call once after each update, counted from 1."""
        self.weights.after_update(self.copy, trained(self.policy), update)

    @property
    def moving(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint must hold: none for the base, which is loaded again with the model."""
        return {} if isinstance(self.weights, Base) else self.copy

    @torch.no_grad()
    def load(self, copy: Mapping[str, Tensor]) -> None:
        """Restore `moving` from a checkpoint."""
        for name, value in self.moving.items():
            value.copy_(copy[name])


def trained(policy: Policy) -> dict[str, Parameter]:
    """The trained parameters by name."""
    return {name: value for name, value in policy.module.named_parameters() if value.requires_grad}
