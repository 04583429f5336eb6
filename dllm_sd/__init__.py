"""On-policy self-distillation of diffusion language models.

The names in ``__all__`` are the public API; everything else may change. They are imported when they are first used, so
that commands which need no model do not wait for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dllm_sd.api import train
    from dllm_sd.decoding.settings import Decoding
    from dllm_sd.errors import InputError
    from dllm_sd.methods import METHODS
    from dllm_sd.network.view import View
    from dllm_sd.policies.loading import load_policy
    from dllm_sd.policies.policy import Policy
    from dllm_sd.tasks import TASKS, grade
    from dllm_sd.trajectory import Trajectory

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "TASKS",
    "Decoding",
    "InputError",
    "Policy",
    "Trajectory",
    "View",
    "grade",
    "load_policy",
    "train",
]

_MODULES = {
    "METHODS": "dllm_sd.methods",
    "TASKS": "dllm_sd.tasks",
    "Decoding": "dllm_sd.decoding.settings",
    "InputError": "dllm_sd.errors",
    "Policy": "dllm_sd.policies.policy",
    "Trajectory": "dllm_sd.trajectory",
    "View": "dllm_sd.network.view",
    "grade": "dllm_sd.tasks",
    "load_policy": "dllm_sd.policies.loading",
    "train": "dllm_sd.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
