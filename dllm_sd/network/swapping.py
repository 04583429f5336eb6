"""Use other weights in a module temporarily: another adapter, or other parameter values."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@contextmanager
def switched(module: nn.Module, adapter: str | None) -> Iterator[None]:
    """Activate another adapter inside, or none; for calls without gradient.

    PEFT's own switches also set `requires_grad`, on the sharded or the gathered parameters, whichever are in place at
    that moment; this function leaves the flags as they are.
    """
    layers: list[Any] = [
        part for part in module.modules() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    former = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        yield
    finally:
        for layer, (active, disabled) in zip(layers, former, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


@contextmanager
def swapped(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Use other weights inside, and restore the former ones bit for bit; sharded parameters take sharded weights.

    Only the data is exchanged, so that an autograd graph recorded before stays valid for a backward pass.
    """
    reshard(module)
    live = {name: value for name, value in module.named_parameters() if name in weights}
    former: dict[str, Tensor] = {}
    try:
        for name, value in live.items():
            if isinstance(value, DTensor):  # FSDP2 gathers from this memory
                local, other = value.to_local(), weights[name]
                assert isinstance(other, DTensor)
                former[name] = local.clone()
                local.copy_(other.to_local())
            else:
                former[name] = value.data
                value.data = weights[name].to(value.dtype)
        yield
    finally:
        for name, data in former.items():
            value = live[name]
            if isinstance(value, DTensor):
                value.to_local().copy_(data)
            else:
                value.data = data
        reshard(module)


def reshard(module: nn.Module) -> None:
    """Free the gathered parameters that FSDP2 keeps after a forward pass without gradient; else do nothing."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
