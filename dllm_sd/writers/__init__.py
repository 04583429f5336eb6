"""Writers: who writes the texts that hints are made of, asked for all at once and never twice for the same."""

from dllm_sd.writers.cache import Cache, ask_once
from dllm_sd.writers.request import Request, Sampling, Written
from dllm_sd.writers.server import Server
from dllm_sd.writers.writer import Writer

__all__ = ["Cache", "Request", "Sampling", "Server", "Writer", "Written", "ask_once"]
