"""Writers: models and servers that write the texts of hints, in batches and with a cache."""

from dllm_sd.writers.cache import Cache, ask_once
from dllm_sd.writers.request import Request, Sampling, Written
from dllm_sd.writers.server import Server
from dllm_sd.writers.writer import Writer

__all__ = ["Cache", "Request", "Sampling", "Server", "Writer", "Written", "ask_once"]
