"""AdamW (fused or 8-bit), its state by parameter name, and the learning-rate schedule."""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from dllm_sd.errors import InputError
from dllm_sd.policies.weights import placed_like
from dllm_sd.settings import Optim

FUSED = ("cpu", "cuda")
"""Device types where the fused AdamW is used. Its steps equal those of the plain one to rounding in float32 and
float64; in bfloat16 they are rounded once instead of several times."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running means of the gradient and of its square."""


class BrokenStep(FloatingPointError):
    """An optimizer step that was taken and made weights non-finite; they must not be saved."""


def check_optimizer(settings: Optim, device: torch.device, sharded: bool) -> None:
    """Refuse an optimizer that cannot run here, before any weight is read.

    Raises:
        InputError: naming the key, and the remedy.
    """
    if settings.name != "adamw_8bit":
        return
    if find_spec("bitsandbytes") is None:
        raise InputError("optim.name=adamw_8bit needs bitsandbytes: pip install 'dllm-sd[quant]', or use adamw")
    if sharded:
        raise InputError("optim.name=adamw_8bit cannot step what FSDP2 has sharded; use adamw, or launch with ddp.yaml")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"optim.name=adamw_8bit is not supported on {device.type}; use adamw")


def build_optimizer(parameters: Iterable[nn.Parameter], settings: Optim) -> torch.optim.Optimizer:
    """AdamW over the trained parameters."""
    trained_parameters = list(parameters)
    options: dict[str, Any] = {
        "lr": settings.lr,
        "betas": (settings.betas[0], settings.betas[1]),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "adamw_8bit":
        if any(value.dtype == torch.float64 for value in trained_parameters):
            raise InputError("optim.name=adamw_8bit does not support float64; use adamw, or another model.dtype")
        return import_module("bitsandbytes.optim").AdamW8bit(trained_parameters, **options)
    fused = all(value.device.type in FUSED for value in trained_parameters)
    return torch.optim.AdamW(trained_parameters, **options, fused=fused or None)


def state_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer state by name, ``{parameter}/{entry}``, without the constant quantisation map of 8-bit AdamW.

    Empty before the first step. Afterwards complete: a parameter without a gradient so far has its initial state.
    """
    if not optimizer.state:
        return {}
    states = {name: optimizer.state.get(value) or _first_state(optimizer, value) for name, value in parameters.items()}
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, entries in states.items()
        for key, value in entries.items()
        if not key.startswith("qmap")
    }


def _first_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    init_state: Any = getattr(optimizer, "init_state", None)  # only 8-bit AdamW has it
    if init_state is None:
        return {"step": torch.zeros(()), **{entry: torch.zeros_like(parameter.detach()) for entry in MOMENTS}}
    group: Any = optimizer.param_groups[0]
    init_state(group, parameter, 0, next(i for i, value in enumerate(group["params"]) if value is parameter))
    return optimizer.state[parameter]


def state_shapes(
    optimizer: torch.optim.Optimizer | None,
    shapes: Mapping[str, tuple[torch.Size, torch.dtype]],
    parameters: Mapping[str, nn.Parameter],
    saved: Mapping[str, Tensor],
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every entry of `state_tensors` after a step.

    Args:
        optimizer: AdamW, 8-bit AdamW, or None for AdamW under DeepSpeed.
        shapes: shapes and dtypes of the whole (unsharded) parameters.
        parameters: the trained parameters.
        saved: the state that is to be loaded.

    Raises:
        InputError: if another kind of optimizer saved the state.
    """
    _check_kind(optimizer, saved)
    if optimizer is not None and hasattr(optimizer, "init_state"):
        states = {name: _first_state(optimizer, value) for name, value in parameters.items()}
        tensors = {
            f"{name}/{key}": torch.as_tensor(value)
            for name, entries in states.items()
            for key, value in entries.items()
        }
        return {key: (value.shape, value.dtype) for key, value in tensors.items() if "/qmap" not in key}
    steps = {f"{name}/step": (torch.Size(), torch.float32) for name in shapes}
    return steps | {f"{name}/{entry}": shape for name, shape in shapes.items() for entry in MOMENTS}


def _check_kind(optimizer: torch.optim.Optimizer | None, saved: Mapping[str, Tensor]) -> None:
    other_entry = "exp_avg" if hasattr(optimizer, "init_state") else "state1"
    if any(key.endswith(f"/{other_entry}") for key in saved):
        raise InputError("the checkpoint was written with another optim.name; set the one of its run")


def load_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]
) -> None:
    """Restore the result of `state_tensors`.

    Raises:
        InputError: if another kind of optimizer saved it.
    """
    _check_kind(optimizer, saved)
    init_state: Any = getattr(optimizer, "init_state", None)  # only 8-bit AdamW has it
    group: Any = optimizer.param_groups[0]
    if init_state is not None:
        for i, value in enumerate(group["params"]):
            init_state(group, value, 0, i)
    fused = bool(group.get("fused"))
    for key, value in saved.items():
        name, entry = key.rsplit("/", 1)
        parameter = parameters[name]
        state = optimizer.state[parameter]
        if entry == "step" and init_state is not None:
            state[entry] = int(value)
        elif entry == "step":
            state[entry] = value.to(parameter.device) if fused else value  # the fused step reads it on the device
        elif init_state is not None:
            state[entry] = value.to(parameter.device)
        else:
            state[entry] = placed_like(value.to(parameter.dtype), parameter)


def learning_rate(optimizer: torch.optim.Optimizer, settings: Optim, updates: int) -> Callable[[int], float]:
    """The learning rate as a function of the update, counted from 1; it has no state that a checkpoint must hold.

    Update `warmup` is the first at the full rate; the last update comes closest to `final_lr`.
    """
    name, options = "constant_with_warmup", dict[str, Any]()
    if settings.schedule == "linear" and settings.final_lr < 1:
        name, options = "polynomial", {"power": 1.0, "lr_end": max(settings.final_lr * settings.lr, 1e-30)}
    if settings.schedule == "cosine":
        name, options = "cosine_with_min_lr", {"min_lr_rate": settings.final_lr}
    total = max(updates + (settings.final_lr == 0), settings.warmup + 1)
    schedule = get_scheduler(name, optimizer, settings.warmup, total, options)
    assert isinstance(schedule, LambdaLR)
    scale = schedule.lr_lambdas[0]
    return lambda update: settings.lr * scale(update)
