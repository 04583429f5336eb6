"""The weights that decode rollouts, and the calibration of their subspace."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dllm_sd.errors import InputError
from dllm_sd.network.subspace import Projectors, Subspace, Supervised, collect, kv_layers, projected
from dllm_sd.parallel.sharding import gathered
from dllm_sd.policies.loading import AnyPolicy
from dllm_sd.policies.policy import Policy, offsets
from dllm_sd.policies.teacher_weights import Weights
from dllm_sd.policies.weights import TeacherModel
from dllm_sd.rollouts.rules import RolloutRule
from dllm_sd.tasks.task import Problem, Task


class RolloutWeights:
    """Applies the weights that decode rollouts in place of the student's."""

    def __init__(
        self,
        rule: RolloutRule,
        policy: AnyPolicy,
        models: Mapping[Weights, TeacherModel],
        accelerator: Accelerator,
    ) -> None:
        self.subspace: Subspace | None = None if rule.policy is None else rule.policy.subspace
        self.policy, self.accelerator = policy, accelerator
        self.base = None if rule.rolling is None else models[rule.rolling]
        self.projectors: Projectors = {}

    def calibrate(self, task: Task, problems: Sequence[Problem]) -> dict[str, int]:
        """Compute the subspace of the initial weights if the rule has one, deterministically; returns counts.

        Raises:
            InputError: if model or data have no such subspace.
        """
        settings, module = self.subspace, self.policy.module
        if settings is None or self.base is None:
            return {}
        if any(isinstance(part, FSDPModule) for part in module.modules()):
            raise InputError("method.rollout.policy subspace needs whole weights on every process; train without FSDP")
        keys = kv_layers(module.network)
        dimension: Any = keys[0][0].weight
        layers = settings.chosen(len(keys), len(dimension))
        chosen = [problems[i] for i in range(min(settings.calibration, len(problems)))]
        with self.base.applied():
            statistics = collect(
                module, (supervised(self.policy, task, problem) for problem in chosen), layers, settings.longest
            )
        self.projectors = settings(statistics)
        return {f"calibration/{name}": getattr(statistics, name) for name in ("used", "skipped", "cut")}

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """A context in which ``module`` decodes with these weights, unsharded; all processes enter together."""
        held = projected(self.policy.module.network, self.projectors) if self.projectors else nullcontext()
        with self.base.applied() if self.base else nullcontext(), gathered(self.accelerator, module), held:
            yield


def supervised(policy: Policy, task: Task, problem: Problem) -> Supervised:
    """A problem with its reference; the tokens of the final answer are the sites of the loss (SPD, Sec. 3).

    The last occurrence of the answer in the reference counts, and only tokens that lie completely in it. A masked
    diffusion model reads masks there.

    Raises:
        InputError: if the task's data has no reference or no answer.
    """
    reference, answer = task.reference(problem), task.final_answer(problem)
    if reference is None or not answer:
        raise InputError(
            f"method.rollout.policy subspace learns from right answers, but problem {problem.id} has no reference with "
            "a final answer; name data that has, or another policy"
        )
    prompt, tokens = policy.encode(task.messages(problem)), policy.encode_completion(reference, ended=False)
    start = reference.rfind(answer)
    inside = [start <= a < b <= start + len(answer) for a, b in pairwise(offsets(policy, tokens))]
    targets = torch.tensor([*prompt, *tokens])
    sites = torch.tensor([False] * len(prompt) + [start >= 0 and is_inside for is_inside in inside])
    ids = targets if policy.causal else targets.masked_fill(sites, policy.mask_id)
    return Supervised(ids, sites, targets)
