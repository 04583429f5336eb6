"""What the loss takes a teacher context for: a teacher, the reference policy, or the policy that made the rollouts."""

from typing import Literal, Protocol, runtime_checkable

Role = Literal["teacher", "reference", "rollouts"]


@runtime_checkable
class ReadsPolicies(Protocol):
    """A part that takes some contexts for something else than teachers."""

    def roles(self, contexts: int, passes: int) -> tuple[Role, ...]:
        """The role of each of so many contexts, in their order, where the same rollouts serve ``passes`` updates."""
        ...
