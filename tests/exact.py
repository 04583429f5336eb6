"""RMSNorm of the tests' models in their own type: transformers normalises in float32, whose rounding hides equality.

Importing this is enough. ``python -m tests.exact ...`` is ``python -m dllm_sd ...`` with it.
"""

import importlib
import runpy
from typing import Any

import torch
from torch import Tensor

from dllm_sd.losses.numerics import at_least_float32


def normalise(self: Any, hidden_states: Tensor) -> Tensor:
    """As transformers does it, but float64 stays float64."""
    wide = at_least_float32(hidden_states)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * wide.to(hidden_states.dtype)


for family in ("llama", "qwen2", "qwen3"):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    getattr(module, f"{family.capitalize()}RMSNorm").forward = normalise

if __name__ == "__main__":
    runpy.run_module("dllm_sd", run_name="__main__")
