"""On-policy self-distillation of diffusion language models.

The names in ``__all__`` are the public API; everything else may change.
"""

from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError
from dllm_sd.methods import METHODS
from dllm_sd.network.view import View
from dllm_sd.policies.loading import load_policy
from dllm_sd.policies.policy import Policy
from dllm_sd.tasks import TASKS, grade
from dllm_sd.trajectory import Trajectory

__version__ = "0.1.0"
__all__ = ["METHODS", "TASKS", "Decoding", "InputError", "Policy", "Trajectory", "View", "grade", "load_policy"]
