"""Writers of the texts of hints: the weights of a model, or a server."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from dllm_sd.parts import Part
from dllm_sd.policies.weights import WEIGHTS, BaseWeights, Weights
from dllm_sd.ranges import Ranged, Share
from dllm_sd.writers import Sampling, Server, Writer

Message = Mapping[str, str]
"""A chat message: ``role`` and ``content``."""

WRITERS: dict[str, type] = {**WEIGHTS, "server": Server}


class TextSource(Part, Protocol):
    """Protocol of a writer: a model's weights, or a remote writer such as a server."""

    @property
    def weights(self) -> Weights | None:
        """The weights that write, with the run's models; None for a remote writer."""
        ...

    @property
    def remote(self) -> Writer | None:
        """The remote writer, such as a server; None for weights."""
        ...


@dataclass(frozen=True)
class Writing(Ranged):
    """A writer writes a text for each rollout before the teacher runs. Unusable texts are dropped, and counted by
    reason."""

    writer: TextSource = field(default_factory=BaseWeights, metadata={"parts": WRITERS})
    """Weights as in `method.teacher`, or a server with an OpenAI-compatible interface."""
    sampling: Sampling = field(default_factory=Sampling)
    tolerance: Share = 0.5
    """Largest share of an update's texts that may be dropped; if more are dropped, the run saves and stops."""
