"""How often the student is right, and its teachers when they decode under their own hints."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_sd.decoding.queue import Listed
from dllm_sd.decoding.settings import Decoding
from dllm_sd.evaluation.comparison import compare
from dllm_sd.evaluation.estimates import wilson_interval
from dllm_sd.objective.plan import Plan
from dllm_sd.policies.policy import Policy
from dllm_sd.policies.weights import TeacherModel
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.rollout import Rollout
from dllm_sd.tasks.task import Problem, Task
from dllm_sd.trajectory import NEVER

VerdictById = Mapping[str, bool]
"""Whether the completion was right, by the problem's id."""


@dataclass(frozen=True)
class Rate:
    """A share of right completions."""

    n: int
    accuracy: float
    ci95: tuple[float, float]
    """Wilson's interval."""


@dataclass(frozen=True)
class Gap:
    """A teacher against the student on the same problems."""

    teacher: Rate
    student: Rate
    gap: float
    """Accuracy of the teacher less that of the student."""
    ci95: tuple[float, float]
    """Of the gap, by paired bootstrap."""


def rate(verdicts: VerdictById) -> Rate | None:
    """The share that is right; None without problems."""
    if not verdicts:
        return None
    accuracy = sum(verdicts.values()) / len(verdicts)
    return Rate(len(verdicts), accuracy, wilson_interval(accuracy, len(verdicts)))


def gap(student: VerdictById, teacher: VerdictById) -> Gap | None:
    """Compare them on the problems that both have; None without any."""
    shared = sorted(student.keys() & teacher.keys())
    own, other = rate({i: student[i] for i in shared}), rate({i: teacher[i] for i in shared})
    if own is None or other is None:
        return None
    compared = compare(*({i: [verdicts[i]] for i in shared} for verdicts in (student, teacher)))
    return Gap(other, own, compared.difference, compared.ci95)


@dataclass(frozen=True)
class Exam:
    """How completions are decoded and graded, for student and teachers alike."""

    task: Task
    settings: Decoding
    seed: int

    def __call__(
        self,
        policy: Policy,
        problems: Sequence[Problem],
        prompts: Sequence[Sequence[int]],
        given: Sequence[Tensor] | None = None,
        teacher: TeacherModel | None = None,
    ) -> dict[str, bool]:
        """Let the policy, or a ``teacher`` of it, complete a prompt for each problem; ``given`` tokens are kept."""
        if not problems:
            return {}
        keys = [make_key(self.seed, problem.id, 0, "evaluate") for problem in problems]
        queue = Listed(prompts, keys, given=given)
        with nullcontext() if teacher is None else teacher.applied():
            decoder = (policy if teacher is None else teacher.policy).decoder
            decoder.complete(queue, self.settings)
        done = queue.collected()
        texts = [policy.text(row[:n].tolist()) for row, n in zip(done.tokens, done.length.tolist(), strict=True)]
        pairs = zip(problems, texts, strict=True)
        return {problem.id: self.task.grade(problem, text).correct for problem, text in pairs}


def own_prompt(rollout: Rollout) -> list[int]:
    """The student's prompt."""
    return rollout.trajectory.prompt_ids[0][rollout.trajectory.prompt_mask[0]].tolist()


def prompt_of(rollout: Rollout, context: int) -> Sequence[int]:
    """What the teacher of a context reads before the completion."""
    prompt = rollout.briefs[context].prompt if rollout.briefs else None
    return own_prompt(rollout) if prompt is None else prompt


def revealed(plan: Plan, context: int) -> dict[int, Tensor]:
    """What the teacher of a context sees of the completion at the first canvas of each rollout.

    int64 ``[l]`` by the index of the rollout, `NEVER` at positions that the teacher does not see.
    """
    rows, order = plan.rows.tolist(), plan.steps.argsort(stable=True).tolist()
    first = {rows[i]: i for i in reversed(order)}
    index = torch.tensor(sorted(first.values()), dtype=torch.int64)
    batch = plan.micro_batch(index)
    length = batch.canvases.tokens.shape[1]
    ids = batch.teacher_inputs[context].ids[:, -length:]
    given = ids.masked_fill(ids == plan.builder.trajectory.mask_id, NEVER)
    return dict(zip(plan.rows[index].tolist(), given, strict=True))
