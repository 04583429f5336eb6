"""The objective of d-OPSD (arXiv 2606.18195, Eq. 12) by loops over rollouts, steps and sites; one canvas at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_sd.trajectory import Trajectory

CanvasLogits = Callable[[Sequence[int]], Tensor]


@dataclass
class Step:
    """What one decoding step of one rollout adds: the divergence of each of its sites."""

    rollout: int
    values: list[Tensor]


def prompt_of(trajectory: Trajectory, row: int) -> list[int]:
    """The prompt without padding."""
    ids, mask = trajectory.prompt_ids[row].tolist(), trajectory.prompt_mask[row].tolist()
    return [token for token, real in zip(ids, mask, strict=True) if real]


def reverse_kl(student: Tensor, teacher: Tensor, clip_at: float | None = None) -> Tensor:
    """KL(student || teacher) of two logit vectors over the full vocabulary, each entry at most ``clip_at``."""
    s, t = student.exp() / student.exp().sum(), teacher.exp() / teacher.exp().sum()
    entries = list(s * (s.log() - t.log()))
    if clip_at is not None:
        entries = [entry if entry.item() <= clip_at else entry.new_tensor(clip_at) for entry in entries]
    return torch.stack(entries).sum()


def graded_steps(
    trajectory: Trajectory,
    shown: Callable[[int, int], Sequence[bool]],
    student: CanvasLogits,
    teacher: CanvasLogits,
    by_teacher: bool,
    clip_at: float | None,
    per_entry: bool,
    end_padding: bool,
) -> list[Step]:
    """Every decoding step up to the one that fixes the end token.

    Args:
        trajectory: the rollouts.
        shown: ``(rollout, step)`` to the completion positions that the teacher sees revealed.
        student: logits ``[s v]`` of one canvas, with gradient.
        teacher: the same without gradient.
        by_teacher: grade the positions of the active block of which the teacher is most confident, as many as the
            student commits; else the positions that the student commits.
        clip_at: bound on the divergence of a site, or on each entry of the vocabulary.
        per_entry: which of the two.
        end_padding: grade positions behind the end token too.
    """
    length = trajectory.tokens.shape[1]
    out = []
    for row in range(trajectory.size):
        prompt = prompt_of(trajectory, row)
        tokens, reveal = trajectory.tokens[row].tolist(), trajectory.reveal_step[row].tolist()
        last = max(reveal[: int(trajectory.length[row])])
        end = length if end_padding else int(trajectory.length[row])
        for step in sorted({k for k in reveal if 0 <= k <= last}):
            masked = [not 0 <= reveal[i] < step for i in range(length)]
            canvas = [trajectory.mask_id if masked[i] else tokens[i] for i in range(length)]
            revealed = shown(row, step)
            reading = [tokens[i] if revealed[i] else canvas[i] for i in range(length)]
            with torch.no_grad():
                teacher_logits = teacher([*prompt, *reading])[len(prompt) :]
            sites = [i for i in range(end) if reveal[i] == step]
            if by_teacher:
                block = masked.index(True) // trajectory.block_length
                inside = [i for i in range(end) if i // trajectory.block_length == block and reveal[i] >= step]
                open_sites = [i for i in inside if not revealed[i]]
                confidence = teacher_logits.softmax(-1).amax(-1).tolist()
                sites = sorted(open_sites, key=lambda i: (-confidence[i], i))[: len(sites)]
            student_logits = student([*prompt, *canvas])[len(prompt) :]
            of_entry = clip_at if per_entry else None
            values = [reverse_kl(student_logits[i], teacher_logits[i], of_entry) for i in sites]
            if clip_at is not None and not per_entry:
                values = [value if value.item() <= clip_at else value.new_tensor(clip_at) for value in values]
            out.append(Step(row, values))
    return out


def mean(numbers: Sequence[Tensor]) -> Tensor:
    """The mean of some scalars."""
    return torch.stack(list(numbers)).sum() / len(numbers)


def mean_over_sites(steps: Sequence[Step]) -> Tensor:
    """All sites of the update count the same."""
    return mean([value for step in steps for value in step.values])


def mean_over_steps(steps: Sequence[Step], rollouts: int) -> Tensor:
    """Eq. 12: the mean over a step's sites, over a rollout's steps, over all rollouts.

    A step whose possible sites the teacher was all shown is no step; a rollout without any step adds 0.
    """
    total = torch.zeros((), dtype=torch.float64)
    for rollout in {step.rollout for step in steps}:
        of_steps = [mean(step.values) for step in steps if step.rollout == rollout and step.values]
        total = total + mean(of_steps) if of_steps else total
    return total / rollouts
