"""Who writes the texts that hints are made of: a model's weights, or a server."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from dllm_sd.parts import Part
from dllm_sd.policies.weights import WEIGHTS, Base, Weights
from dllm_sd.ranges import Ranged, Share
from dllm_sd.writers import Sampling, Server, Writer

Message = Mapping[str, str]
"""A chat message: ``role`` and ``content``."""

WRITERS: dict[str, type] = {**WEIGHTS, "server": Server}


class TextSource(Part, Protocol):
    """Who may write: a model's weights, or somebody else."""

    @property
    def weights(self) -> Weights | None:
        """The weights that write, with the run's models; None if somebody else writes."""
        ...

    @property
    def remote(self) -> Writer | None:
        """Who else writes, such as a server; None for weights."""
        ...


@dataclass(frozen=True)
class Writing(Ranged):
    """A text for each rollout before its teacher is asked; what is not usable is dropped and counted by reason."""

    writer: TextSource = field(default_factory=Base, metadata={"parts": WRITERS})
    """Weights as in `method.teacher`, or a server with an OpenAI-compatible interface."""
    sampling: Sampling = field(default_factory=Sampling)
    tolerance: Share = 0.5
    """Largest share of an update's texts that may be dropped; beyond it the run stops, with its work saved."""
