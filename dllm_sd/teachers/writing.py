"""Who writes the texts that hints are made of: a model's weights, or a server."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dllm_sd.errors import InputError
from dllm_sd.policies.weights import WEIGHTS, Base, Weights
from dllm_sd.writers import Sampling, Server

Message = Mapping[str, str]
"""A chat message: ``role`` and ``content``."""

WRITERS: dict[str, type] = {**WEIGHTS, "server": Server}
AnyWriter = Weights | Server


@dataclass(frozen=True)
class Writing:
    """A text for each rollout before its teacher is asked; what is not usable is dropped and counted by reason."""

    writer: AnyWriter = field(default_factory=Base, metadata={"parts": WRITERS})
    """Weights as in `method.teacher`, or a server with an OpenAI-compatible interface."""
    sampling: Sampling = field(default_factory=Sampling)
    tolerance: float = 0.5
    """Largest share of an update's texts that may be dropped; beyond it the run stops, with its work saved."""

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance <= 1:
            raise InputError("a context's writing.tolerance is a share; give a number from 0 to 1")
