"""Horizons: how much of a completion a rollout generates. Evaluation is always complete.

The rest is never decoded, so that a shorter horizon costs less. Source: TOPD and POPD (arXiv 2605.31490).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from dllm_sd.decoding.settings import Decoding
from dllm_sd.parts import Part
from dllm_sd.policies.policy import Policy
from dllm_sd.ranges import Count, PositiveShare, Ranged, Share
from dllm_sd.trajectory import StopAfter


class Horizon(Part, Protocol):
    """Protocol of a horizon; a rollout rule calls it."""

    @property
    def cuts(self) -> bool:
        """Whether some completions are not generated to their end, so that their outcome is unknown."""
        ...

    def __call__(self, policy: Policy, settings: Decoding, update: int) -> StopAfter | None:
        """How far to decode at ``update``, counted from 0; None decodes to the end."""
        ...


@dataclass(frozen=True)
class Complete:
    """The whole completion."""

    cuts = False

    def __call__(self, policy: Policy, settings: Decoding, update: int) -> None:
        return None


@dataclass(frozen=True)
class Truncated(Ranged, key="method.rollout.horizon"):
    """The first part of every completion (TOPD, arXiv 2605.31490, Eq. 12: ``H = ratio T``)."""

    ratio: PositiveShare = 0.25
    """Share of the canvas's blocks or steps (autoregressive: of `decode.length`), rounded, at least one."""
    unit: Literal["blocks", "steps"] = "blocks"
    """On masked diffusion the first blocks, or the first decoding steps; autoregressive, both are tokens."""

    @property
    def cuts(self) -> bool:
        """False for a ratio of 1."""
        return self.ratio < 1

    def __call__(self, policy: Policy, settings: Decoding, update: int) -> StopAfter:
        total = policy.extent(self.unit, settings)
        return StopAfter(self.unit, max(1, round(self.ratio * total)))


@dataclass(frozen=True)
class Progressive(Ranged, key="method.rollout.horizon"):
    """A horizon that grows: ``min(T, H_0 + step floor(update / every))`` (POPD, arXiv 2605.31490, Eq. 10, 11).

    Start and step are shares of the whole ``T``, rounded when they are added, so that they mean the same at any length.
    """

    initial_ratio: PositiveShare = 0.1
    """``H_0 / T``: share of blocks or steps (autoregressive: of tokens) at first, at least one; the paper does not say
    its value."""
    ratio_step: Share = 0.01
    """Share that is added at each growth; the paper adds 9 of 15,360 tokens."""
    every: Count = 1
    """Updates between two growths."""
    unit: Literal["blocks", "steps"] = "blocks"
    """Whether a denoiser's horizon is counted in blocks or in decoding steps."""
    former_keys: ClassVar[Mapping[str, str]] = {
        "start": "initial_ratio, a share of the length instead of a number",
        "step": "ratio_step, a share of the length instead of a number",
    }

    @property
    def cuts(self) -> bool:
        """False for an initial ratio of 1."""
        return self.initial_ratio < 1

    def __call__(self, policy: Policy, settings: Decoding, update: int) -> StopAfter:
        total = policy.extent(self.unit, settings)
        share = self.initial_ratio + self.ratio_step * (update // self.every)
        return StopAfter(self.unit, min(total, max(1, round(share * total))))


HORIZONS: dict[str, type] = {"complete": Complete, "truncated": Truncated, "progressive": Progressive}
