"""What a part must say of the weights that a teacher runs with, or that make rollouts."""

from collections.abc import Mapping
from typing import ClassVar, Protocol, Self

from torch import Tensor

from dllm_sd.network.subspace import Subspace
from dllm_sd.parts import Part
from dllm_sd.policies.policy import Policy
from dllm_sd.pretrained.model import Model


class Weights(Part, Protocol):
    """Whose weights a teacher runs with; `WeightsDefaults` has all of it."""

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
        """Whether they stay as they are at an update that is skipped."""
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
        """Themselves: what has weights may write hints and make rollouts with the run's models."""
        ...

    @property
    def remote(self) -> None:
        """None: no server writes."""
        ...

    @property
    def subspace(self) -> Subspace | None:
        """What keys and values are held in where these weights make rollouts; None for nothing."""
        ...

    def is_without_adapter(self, started: bool) -> bool:
        """Whether an adapted model has these weights when its adapter is off; ``started``: the adapter was not new."""
        ...

    def is_rollout_policy(self, rolling: object, passes: int) -> bool:
        """Whether these weights made the rollouts that serve ``passes`` updates, where those of ``rolling`` decode."""
        ...

    def other_model(self, student: Model) -> Model | None:
        """The keys of `model` for another checkpoint beside the student's; None where it is the student's own."""
        ...

    def read(self, policy: Policy) -> dict[str, Tensor] | None:
        """What is put into the copy at first, by the names of those that the student ``policy`` trains; None leaves it
        the student's."""
        ...

    def after_update(self, copy: dict[str, Tensor], live: Mapping[str, Tensor], update: int) -> None:
        """Let the copy follow the student's ``live`` weights; `update` counts from 1."""
        ...


class WeightsDefaults:
    """Weights that never move, with no copy."""

    stored: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    follows_optimizer_steps: ClassVar[bool] = False
    kept_in_float32: ClassVar[bool] = False
    of_another_run: ClassVar[bool] = False
    remote: ClassVar[None] = None
    subspace: ClassVar[None] = None

    @property
    def is_student(self) -> bool:
        """False."""
        return False

    @property
    def source(self) -> str | None:
        """None: they come from the student."""
        return None

    @property
    def weights(self) -> Self:
        """Themselves."""
        return self

    def is_without_adapter(self, started: bool) -> bool:
        """Never."""
        return False

    def is_rollout_policy(self, rolling: object, passes: int) -> bool:
        """Never."""
        return False

    def other_model(self, student: Model) -> Model | None:
        """None: it is the student's."""
        return None

    def read(self, policy: Policy) -> dict[str, Tensor] | None:
        """None: the copy is the student's."""
        return None

    def after_update(self, copy: dict[str, Tensor], live: Mapping[str, Tensor], update: int) -> None:
        """They never move."""


class RolloutPolicy(Part, Protocol):
    """Who may make rollouts: some of the weights of teachers (`Weights`), or a subspace of the initial ones."""

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
        """What keys and values are held in; None for nothing."""
        ...
