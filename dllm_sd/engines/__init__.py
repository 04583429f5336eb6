"""Engines: which servers decode rollouts instead of the trainer's own network, and in which words they are asked."""

from dllm_sd.engines.dllm_sd import DllmSd
from dllm_sd.engines.engine import CompletionRequest, Engine, Local, RemoteEngine
from dllm_sd.engines.vllm import Vllm

ENGINES: dict[str, type] = {"local": Local, "vllm": Vllm, "dllm_sd": DllmSd}

__all__ = ["ENGINES", "CompletionRequest", "DllmSd", "Engine", "Local", "RemoteEngine", "Vllm"]
