"""Who writes the texts that hints are made of: a model's weights, or a server."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dllm_sd.policies.weights import WEIGHTS, Base, Weights
from dllm_sd.ranges import Ranged, Share
from dllm_sd.writers import Sampling, Server

Message = Mapping[str, str]
"""A chat message: ``role`` and ``content``."""

WRITERS: dict[str, type] = {**WEIGHTS, "server": Server}
AnyWriter = Weights | Server


@dataclass(frozen=True)
class Writing(Ranged):
    """A text for each rollout before its teacher is asked; what is not usable is dropped and counted by reason."""

    writer: AnyWriter = field(default_factory=Base, metadata={"parts": WRITERS})
    """Weights as in `method.teacher`, or a server with an OpenAI-compatible interface."""
    sampling: Sampling = field(default_factory=Sampling)
    tolerance: Share = 0.5
    """Largest share of an update's texts that may be dropped; beyond it the run stops, with its work saved."""
