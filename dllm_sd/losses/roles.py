"""The role that the loss gives a context: teacher, reference policy, or the policy that made the rollouts."""

from typing import Literal

Role = Literal["teacher", "reference", "rollouts"]


class AllTeachers:
    """A part of the loss that treats every context as a teacher."""

    def roles(self, contexts: int, passes: int) -> tuple[Role, ...]:
        """The role of each of ``contexts`` contexts, in order, where the same rollouts serve ``passes`` updates."""
        role: tuple[Role, ...] = ("teacher",)
        return role * contexts
