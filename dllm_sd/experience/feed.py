"""The order of the training problems: a keyed permutation of the training split for every epoch."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dllm_sd.errors import InputError
from dllm_sd.policies.policy import Policy
from dllm_sd.randomness import make_key, random_order
from dllm_sd.rollouts.rollout import Prompted, with_occurrences
from dllm_sd.rollouts.rules import encode_problem
from dllm_sd.tasks.task import Problem, Task


class Feed:
    """Serves training problems; the problem at a position depends on (seed, position) alone."""

    def __init__(self, problems: Sequence[Problem], policy: Policy, task: Task, seed: int, max_prompt: int) -> None:
        self.problems, self.policy, self.task = problems, policy, task
        self.seed, self.max_prompt = seed, max_prompt
        if not len(problems):
            raise InputError("the training split holds no problems; name other data in task")

    def take(self, cursor: int, count: int) -> tuple[list[Prompted], int, int]:
        """The next ``count`` problems from position ``cursor``.

        Returns:
            The problems with their prompts and occurrences, the position after them, and how many were left out on the
            way because their prompt exceeds `max_prompt`.

        Raises:
            InputError: if a whole epoch holds no prompt that is short enough.
        """
        taken: list[Prompted] = []
        dropped = dropped_in_a_row = 0
        while len(taken) < count:
            epoch, place = divmod(cursor, len(self.problems))
            problem = self.problems[int(order_of_epoch(self.seed, epoch, len(self.problems))[place])]
            prompted = encode_problem(self.policy, self.task, problem, self.max_prompt)
            cursor += 1
            if prompted is None:
                dropped, dropped_in_a_row = dropped + 1, dropped_in_a_row + 1
                if dropped_in_a_row == 2 * len(self.problems) - 1:  # so many in a row contain a whole epoch
                    raise InputError(f"every training prompt is longer than max_prompt {self.max_prompt}; raise it")
            else:
                taken.append(prompted)
                dropped_in_a_row = 0
        return with_occurrences(taken), cursor, dropped


@lru_cache(maxsize=2)
def order_of_epoch(seed: int, epoch: int, size: int) -> Tensor:
    """The order of an epoch, int32: generated tasks have a million problems, and a list of these takes 36 MB."""
    order = random_order(make_key(seed, "epoch", epoch), size)
    return order.to(torch.int32) if size <= torch.iinfo(torch.int32).max else order
