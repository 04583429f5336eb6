"""Horizons: how much of a completion a rollout generates. Evaluation is always complete.

What lies beyond is never decoded, so that a shorter horizon costs less. Source: TOPD and POPD (arXiv 2605.31490).
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from dllm_sd.policies.decoding import Decoding
from dllm_sd.policies.policy import Policy
from dllm_sd.ranges import Count, Natural, PositiveShare, Ranged
from dllm_sd.trajectory import Reach


class Horizon(Protocol):
    """What a rollout rule calls."""

    def __call__(self, policy: Policy, settings: Decoding, update: int) -> Reach | None:
        """How far to decode at ``update``, counted from 0; None is to the end."""
        ...


@dataclass(frozen=True)
class Complete:
    """The whole completion."""

    def __call__(self, policy: Policy, settings: Decoding, update: int) -> None:
        return None


@dataclass(frozen=True)
class Truncated(Ranged, key="method.rollout.horizon"):
    """The first part of every completion (TOPD, arXiv 2605.31490, Eq. 12: ``H = ratio T``)."""

    ratio: PositiveShare = 0.25
    """Share of the canvas's blocks or steps (autoregressive: of `decode.length`), rounded, at least one."""
    unit: Literal["blocks", "steps"] = "blocks"
    """On masked diffusion the first blocks, or the first decoding steps; autoregressive, both are tokens."""

    def __call__(self, policy: Policy, settings: Decoding, update: int) -> Reach:
        whole = policy.extent(self.unit, settings)
        return Reach(self.unit, max(1, round(self.ratio * whole)))


@dataclass(frozen=True)
class Progressive(Ranged, key="method.rollout.horizon"):
    """A horizon that grows: ``min(T, start + step floor(update / every))`` (POPD, arXiv 2605.31490, Eq. 10, 11)."""

    start: Count = 1
    """Blocks or steps (autoregressive: tokens) at first; the paper does not say its value."""
    step: Natural = 1
    every: Count = 1
    """Updates between two growths."""
    unit: Literal["blocks", "steps"] = "blocks"

    def __call__(self, policy: Policy, settings: Decoding, update: int) -> Reach:
        grown = self.start + self.step * (update // self.every)
        return Reach(self.unit, min(policy.extent(self.unit, settings), grown))


HORIZONS: dict[str, type] = {"complete": Complete, "truncated": Truncated, "progressive": Progressive}
