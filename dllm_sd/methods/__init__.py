"""The table of named methods: each is one choice of part for every slot, and nothing else.

A new paper adds a part and an entry. The trainer never reads the name of a method.
"""

from dllm_sd.methods.baselines import BASELINES
from dllm_sd.methods.denoising import DENOISING
from dllm_sd.methods.method import Method
from dllm_sd.methods.named_method import NamedMethod
from dllm_sd.methods.prompted import PROMPTED
from dllm_sd.methods.written import WRITTEN

METHODS: dict[str, NamedMethod] = {**DENOISING, **PROMPTED, **WRITTEN, **BASELINES}

__all__ = ["METHODS", "Method", "NamedMethod"]
