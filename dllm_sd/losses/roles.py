"""What the loss takes a teacher context for: a teacher, the reference policy, or the policy that made the rollouts."""

from typing import Literal

Role = Literal["teacher", "reference", "rollouts"]


class AllTeachers:
    """A part of the loss that takes every context for a teacher."""

    def roles(self, contexts: int, passes: int) -> tuple[Role, ...]:
        """The role of each of so many contexts, in their order, where the same rollouts serve ``passes`` updates."""
        role: tuple[Role, ...] = ("teacher",)
        return role * contexts
