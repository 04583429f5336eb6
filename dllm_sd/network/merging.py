"""Prepare a network for decoding, its LoRA adapters merged or not, and restore it bit for bit afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear

from dllm_sd.losses.numerics import at_least_float32
from dllm_sd.network.site_head import SiteHead, evaluating


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


@contextmanager
def inference(module: SiteHead, merge: bool = False) -> Iterator[None]:
    """Eval mode without gradient inside; LoRA adapters are merged if ``merge`` is set."""
    folded = merged(module.model) if merge and isinstance(module.model, PeftModel) else nullcontext()
    with evaluating(module), folded, torch.no_grad():
        yield
