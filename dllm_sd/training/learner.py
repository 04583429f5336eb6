"""One update of the weights: losses of micro-batches, one gradient over all processes, one optimizer step."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from dllm_sd.config import Config
from dllm_sd.network.finite import MAX_WEIGHT, find_broken
from dllm_sd.network.site_head import run_at_sites
from dllm_sd.objective.batching import micro_batches
from dllm_sd.objective.equation import Graded, grade_micro_batch
from dllm_sd.objective.plan import Plan
from dllm_sd.parallel.processes import any_process, on_main
from dllm_sd.parallel.sharding import stepped_tensors, whole
from dllm_sd.policies.policy import Policy
from dllm_sd.policies.weights import TeacherModel, trained
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.rollout import Rollouts
from dllm_sd.training.advantage import GradedPlans
from dllm_sd.training.broken_sites import broken_sites, problems_of, write_broken_sites
from dllm_sd.training.checkpoint import latest_checkpoint
from dllm_sd.training.optim import BrokenStep
from dllm_sd.training.traces import UpdateTrace


class Learner:
    """Takes the optimizer steps of a run, on every process."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        policy: Policy,
        module: Any,
        optimizer: Any,
        teachers: Sequence[TeacherModel],
    ) -> None:
        """Keep the parts of a run.

        Args:
            config: the config of the run.
            accelerator: what joins the processes of the run.
            policy: the student.
            module: the student's network as the accelerator has prepared it.
            optimizer: the optimizer as the accelerator has prepared it.
            teachers: the model of each teacher context of the method, in the order of `method.contexts`.
        """
        self.config, self.method, self.run = config, config.method, Path(config.run)
        self.accelerator, self.policy, self.module = accelerator, policy, module
        self.optimizer, self.teachers = optimizer, teachers
        self.stepped = 0
        """The last update whose step was taken."""

    def step(
        self, plan: Plan, rollouts: Rollouts, update: int, lr: float, trace: UpdateTrace | None = None
    ) -> tuple[GradedPlans, float]:
        """Accumulate the gradient of the update over micro-batches and processes, then take one optimizer step.

        Returns the micro-batches of this process with their losses, and the norm of the gradient. What a ``trace``
        wants of them is added to it.

        Raises:
            FloatingPointError: if the loss or the gradient is not finite; then the step is not taken.
            BrokenStep: if the step made weights that are not finite.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.module.train()
        torch.manual_seed(make_key(self.config.seed, update, rank, "dropout"))
        batches = micro_batches(plan, self.config.optim.tokens_per_batch, world)
        student = partial(run_at_sites, self.module)
        parts: list[tuple[Plan, Graded]] = []
        for i, shares in enumerate(batches):
            index = shares[rank]
            idle = len(index) == 0  # this process joins the collectives with a loss of weight 0
            batch = plan.micro_batch(shares[0][:1] if idle else index).to(self.accelerator.device)
            tracer = None if trace is None or idle else trace.tracer(index, self.accelerator.device)
            with nullcontext() if i == len(batches) - 1 else self.accelerator.no_sync(self.module):
                graded = grade_micro_batch(self.method, batch, student, self.teachers, tracer)
                self.accelerator.backward(graded.loss * (0 if idle else world))  # averaged over processes
            if not idle:
                parts.append((plan.select(index), graded))
            if trace is not None and tracer is not None:
                trace.add(index, tracer)
        limit = self.config.optim.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), float("inf") if limit is None else limit)
        assert norm is not None
        norm = whole(norm)
        self._refuse_non_finite(update, norm, parts, rollouts)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.stepped = update
        self.optimizer.zero_grad(set_to_none=True)
        self._refuse_broken_step(update)
        return parts, float(norm)

    def _refuse_non_finite(self, update: int, norm: Tensor, parts: GradedPlans, rollouts: Rollouts) -> None:
        finite = bool(torch.isfinite(norm)) and all(bool(torch.isfinite(graded.loss)) for _, graded in parts)
        if not any_process(self.accelerator, not finite):
            return
        sites = [site for plan, graded in parts for site in broken_sites(plan, graded, rollouts)]
        sites = gather_object(sites) if self.accelerator.num_processes > 1 else sites
        file = self.run / "nonfinite.json"
        on_main(lambda: write_broken_sites(file, update, sites, rollouts))
        raise FloatingPointError(
            f"the loss or gradient of update {update} is not finite; the step was not taken. Rollouts of problem "
            f"{problems_of(sites, rollouts)} caused it; details in {file}"
        )

    def _refuse_broken_step(self, update: int) -> None:
        changed = stepped_tensors(self.optimizer, trained(self.policy))
        broken = find_broken(changed, MAX_WEIGHT)
        if not any_process(self.accelerator, broken is not None):
            return
        last = latest_checkpoint(self.run)
        on = f"continues from update {int(last.name)}" if last else "begins again"
        raise BrokenStep(
            f"the step of update {update} made weights not finite, or as good as that ({broken or 'on another process'}"
            f"); nothing of it was saved: lower optim.lr or optim.max_grad_norm, and resume=force {on}"
        )
