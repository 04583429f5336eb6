"""Merge LoRA adapters into the weights temporarily, and restore the weights bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear

from dllm_sd.losses.numerics import at_least_float32


@contextmanager
def merged(model: PeftModel) -> Iterator[None]:
    """Run the network on merged weights W + BA inside; afterwards the former weights are copied back.

    Adapters that are switched off are not merged.
    """
    layers: list[Any] = [part for part in model.modules() if isinstance(part, Linear) and not part._disable_adapters]
    weights = [layer.get_base_layer().weight for layer in layers]
    former = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for layer, weight in zip(layers, weights, strict=True):
                delta = sum(at_least_float32(layer.get_delta_weight(adapter)) for adapter in layer.active_adapters)
                weight.copy_(at_least_float32(weight) + delta)
                layer._disable_adapters = True  # PEFT's own switch would also set `requires_grad`
        yield
    finally:
        with torch.no_grad():
            for layer, weight, value in zip(layers, weights, former, strict=True):
                weight.copy_(value)
                layer._disable_adapters = False
