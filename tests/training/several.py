"""Several processes without any: what `accelerate` gives one of them, and what they gather one after the other."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from dllm_sd.experience import text_generator as scribe
from dllm_sd.policies.loading import AnyPolicy
from dllm_sd.policies.weights import trained


@dataclass
class Processes:
    """What `accelerate` gives one of several processes."""

    process_index: int = 0
    num_processes: int = 1
    state: Any = field(default_factory=object)

    def autocast(self) -> Any:
        return torch.autocast("cpu", enabled=False)


def gathering(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """What each process hands in from now on; it gets all that there is by then, the latest first."""
    parts: list[list[Any]] = []

    def gather(pairs: list[Any]) -> list[Any]:
        parts.append(pairs)
        return [pair for some in parts[::-1] for pair in some]

    monkeypatch.setattr(scribe, "gather_object", gather)
    return parts


def move(policy: AnyPolicy, seed: int) -> None:
    """Something like an update."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in trained(policy).values():
            value.add_(0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
