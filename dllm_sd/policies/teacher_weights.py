"""Protocols of the weights that a teacher runs with, and of the policy that makes rollouts."""

from collections.abc import Mapping
from typing import Protocol, Self

from torch import Tensor

from dllm_sd.network.subspace import Subspace
from dllm_sd.parts import Part
from dllm_sd.policies.policy import Policy
from dllm_sd.pretrained.model import Model


class Weights(Part, Protocol):
    """Which weights a teacher runs with; `WeightsDefaults` gives a default for every member."""

    @property
    def stored(self) -> bool:
        """Whether a copy is held beside the student's weights."""
        ...

    @property
    def moves(self) -> bool:
        """Whether they change during a run, so that a checkpoint must hold them."""
        ...

    @property
    def follows_optimizer_steps(self) -> bool:
        """Whether they stay unchanged when an update is skipped."""
        ...

    @property
    def kept_in_float32(self) -> bool:
        """Whether their copy has at least 32 bits, since small changes would round to nothing in fewer."""
        ...

    @property
    def is_student(self) -> bool:
        """Whether these are the student's weights at every update, before its step."""
        ...

    @property
    def of_another_run(self) -> bool:
        """Whether another run trained them, on the student's own base."""
        ...

    @property
    def source(self) -> str | None:
        """The folder or hub name that they are read from; None where there is none."""
        ...

    @property
    def weights(self) -> "Weights | None":
        """These weights: a part that has weights may write hints and make rollouts with the run's models."""
        ...

    @property
    def remote(self) -> None:
        """None: no server generates text."""
        ...

    @property
    def subspace(self) -> Subspace | None:
        """The subspace that keys and values are projected onto during rollouts; None projects nothing."""
        ...

    def is_without_adapter(self, started: bool) -> bool:
        """Whether switching the adapter off gives these weights; ``started`` tells that the adapter was loaded."""
        ...

    def is_rollout_policy(self, rolling: object, passes: int) -> bool:
        """Whether these weights made the rollouts that serve ``passes`` updates, where those of ``rolling`` decode."""
        ...

    def other_model(self, student: Model) -> Model | None:
        """The keys of `model` for another checkpoint beside the student's; None where it is the student's own."""
        ...

    def read(self, policy: Policy) -> dict[str, Tensor] | None:
        """The initial values of the copy, by the names of the parameters that the student ``policy`` trains; None means
        the student's values."""
        ...

    def after_update(self, copy: dict[str, Tensor], live: Mapping[str, Tensor], update: int) -> None:
        """Let the copy follow the student's ``live`` weights; `update` counts from 1."""
        ...


class WeightsDefaults:
    """Defaults: weights that never change, and of which no copy is held."""

    stored: bool = False
    moves: bool = False
    follows_optimizer_steps: bool = False
    kept_in_float32: bool = False
    of_another_run: bool = False
    remote: None = None
    subspace: None = None

    @property
    def is_student(self) -> bool:
        """Return False."""
        return False

    @property
    def source(self) -> str | None:
        """Return None: they come from the student."""
        return None

    @property
    def weights(self) -> Self:
        """Return these weights."""
        return self

    def is_without_adapter(self, started: bool) -> bool:
        """Return False."""
        return False

    def is_rollout_policy(self, rolling: object, passes: int) -> bool:
        """Return False."""
        return False

    def other_model(self, student: Model) -> Model | None:
        """Return None: the model is the student's."""
        return None

    def read(self, policy: Policy) -> dict[str, Tensor] | None:
        """Return None: the copy starts from the student's weights."""
        return None

    def after_update(self, copy: dict[str, Tensor], live: Mapping[str, Tensor], update: int) -> None:
        """Do nothing: these weights never change."""


class RolloutPolicy(Part, Protocol):
    """What may make rollouts: weights of a teacher (`Weights`), or the initial policy projected onto a subspace."""

    @property
    def is_student(self) -> bool:
        """Whether the student's own weights decode."""
        ...

    @property
    def moves(self) -> bool:
        """Whether it changes as the student learns."""
        ...

    @property
    def weights(self) -> Weights | None:
        """The weights that decode; None for the initial ones."""
        ...

    @property
    def subspace(self) -> Subspace | None:
        """The subspace that keys and values are projected onto; None projects nothing."""
        ...
