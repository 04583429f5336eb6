"""Supports: on which vocabulary entries student and teacher are compared.

A support is called as ``support(student_logp [m v], teacher_logp [c m v]) -> ([m u], [c m u])``. It reads
log-probabilities over the vocabulary and returns log-probabilities over the entries that it keeps; these sum to one
(not so with ``TopK(rest="keep")``, which is made for the divergence ``policy_gradient`` alone).

Axes: ``m`` graded sites, ``c`` teacher contexts, ``v`` vocabulary, ``u`` support, ``k`` entries kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from dllm_sd.errors import InputError
from dllm_sd.losses.numerics import at_least_float32, floor_logp
from dllm_sd.losses.roles import AllTeachers, Role
from dllm_sd.parts import Part
from dllm_sd.ranges import Count, Ranged

#: The tail bucket holds at least this much probability (SDPO's constant), so that its logarithm stays finite.
MIN_TAIL = 1e-7


class Support(Part, Protocol):
    """Protocol of a support; `SupportDefaults` implements all but the call."""

    @property
    def full_vocabulary(self) -> bool:
        """Whether every vocabulary entry is kept, at its own place."""
        ...

    @property
    def normalised(self) -> bool:
        """Whether the returned log-probabilities are distributions."""
        ...

    @property
    def degenerate(self) -> bool:
        """Whether it maps all distributions to the same one, so that the loss has no gradient."""
        ...

    @property
    def reads_rollout_policy(self) -> bool:
        """Whether it uses the last of several contexts as the policy that made the rollouts."""
        ...

    def roles(self, contexts: int, passes: int) -> tuple[Role, ...]:
        """The role of each context (`AllTeachers.roles`)."""
        ...

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
        """``[m v], [c m v] -> [m u], [c m u]``."""
        ...


class SupportDefaults(AllTeachers):
    """Defaults of a support that keeps some entries and returns distributions over them."""

    full_vocabulary: bool = False

    @property
    def normalised(self) -> bool:
        """True."""
        return True

    @property
    def degenerate(self) -> bool:
        """False."""
        return False

    @property
    def reads_rollout_policy(self) -> bool:
        """False: all contexts are teachers."""
        return False


def top_k_index(logp: Tensor, k: int) -> Tensor:
    """Indices of the ``min(k, v)`` largest entries, ``[... v] -> [... k]`` (int64, no order promised)."""
    return logp.detach().topk(min(k, logp.shape[-1]), dim=-1, sorted=False).indices


def gather_top_k(logp: Tensor, index: Tensor) -> Tensor:
    """The entries ``index [m k]`` of ``logp [... m v]``, as they are: ``[... m k]``, not renormalised."""
    return logp.gather(-1, index.expand(*logp.shape[:-1], -1))


def log_tail(kept_logp: Tensor) -> Tensor:
    """Log of the probability outside the kept entries, ``[... u] -> [... 1]``.

    ``log(1 - exp(min(logsumexp, -1e-7)))``, written with ``expm1``. Source: SDPO's top-k distillation with a tail.
    Where the kept entries hold all but ``MIN_TAIL``, the tail is the constant ``log(MIN_TAIL)`` without gradient.
    """
    kept = floor_logp(kept_logp).logsumexp(-1, keepdim=True).clamp(max=-MIN_TAIL)
    return (-kept.expm1()).log()


def renormalise(kept_logp: Tensor) -> Tensor:
    """The distribution given that one of the kept entries is drawn, ``[... u] -> [... u]``."""
    return floor_logp(kept_logp).log_softmax(-1)


def append_tail(kept_logp: Tensor) -> Tensor:
    """The kept entries and one more that holds the rest of the probability, ``[... u] -> [... u+1]``."""
    return torch.cat([at_least_float32(kept_logp), log_tail(kept_logp)], dim=-1)


CLOSE: dict[str, Callable[[Tensor], Tensor]] = {
    "renormalise": renormalise,
    "bucket": append_tail,
    "keep": at_least_float32,
}
"""What ``TopK.rest`` does with the kept log-probabilities, ``[... k] -> [... u]``."""


def top_k_overlap(student_logp: Tensor, teacher_logp: Tensor, k: int) -> Tensor:
    """Share of the teacher's top-k entries that are among the student's top-k.

    ``student_logp [m v]``, ``teacher_logp [m v] -> [m]``; with contexts, ``teacher_logp [c m v] -> [c m]``.
    """
    student, teacher = top_k_index(student_logp, k), top_k_index(teacher_logp, k)
    shared = (teacher[..., :, None] == student[..., None, :]).any(-1)
    return at_least_float32(shared).mean(-1)


@dataclass(frozen=True)
class FullVocabulary(SupportDefaults):
    """Every vocabulary entry: both inputs, unchanged (``u = v``)."""

    full_vocabulary = True

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
        """``[m v], [c m v] -> [m v], [c m v]`` in float32 or float64."""
        return at_least_float32(student_logp), at_least_float32(teacher_logp)


@dataclass(frozen=True)
class TopK(Ranged, SupportDefaults, key="method.support"):
    """The ``k`` most probable entries of one distribution; all distributions are restricted to them.

    Source: d-OPSD and OPSD (k = 20 of the teacher, renormalised); SDPO (of the student, with a tail bucket);
    thunlp/OPD (k = 16 of the policy that made the rollouts, kept). With ``k >= v`` this is the full vocabulary.

    Fields:
        k: entries kept.
        of: which distribution: ``teacher`` (the first context), ``student`` (as it is now, without gradient) or
            ``rollout`` (the last of several contexts: the policy that made the rollouts).
        rest: what happens to the other entries: ``renormalise`` drops them (``u = k``; the loss then ignores the
            probability that the student puts there), ``bucket`` sums them up in one more entry (``u = k + 1``),
            ``keep`` leaves the kept log-probabilities as they were (``u = k``; no distribution).
    """

    k: Count = 20
    of: Literal["teacher", "student", "rollout"] = "teacher"
    rest: Literal["renormalise", "bucket", "keep"] = "renormalise"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of not in ("teacher", "student", "rollout"):
            raise InputError(f"support.of is {self.of!r}: choose 'teacher', 'student' or 'rollout'.")
        if self.rest not in CLOSE:
            raise InputError(f"support.rest is {self.rest!r}: choose 'renormalise', 'bucket' or 'keep'.")

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
        """``[m v], [c m v] -> [m u], [c m u]``; ``c = 0`` (no teacher) is legal only for ``of = student``."""
        if self.k >= student_logp.shape[-1]:
            return at_least_float32(student_logp), at_least_float32(teacher_logp)
        index = top_k_index(self._chooser(student_logp, teacher_logp), self.k)
        close = CLOSE[self.rest]
        return close(gather_top_k(student_logp, index)), close(gather_top_k(teacher_logp, index))

    def roles(self, contexts: int, passes: int) -> tuple[Role, ...]:
        """With ``of = rollout`` the last context is the policy that made the rollouts."""
        roles: list[Role] = ["teacher"] * contexts
        if self.reads_rollout_policy:
            roles[-1:] = ["rollouts"]
        return tuple(roles)

    @property
    def normalised(self) -> bool:
        """False for ``rest = keep``."""
        return self.rest != "keep"

    @property
    def degenerate(self) -> bool:
        """True where one entry is kept and renormalised: every policy then gives it the probability 1."""
        return self.k == 1 and self.rest == "renormalise"

    @property
    def reads_rollout_policy(self) -> bool:
        """True for ``of = rollout``."""
        return self.of == "rollout"

    def _chooser(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        """The distribution ``[m v]`` whose largest entries are kept."""
        if self.of == "student":
            return student_logp
        if self.of == "teacher" and len(teacher_logp) == 0:
            raise InputError("support.of is 'teacher' but the method has no teacher: set it to 'student'.")
        if self.of == "rollout" and len(teacher_logp) < 2:
            raise InputError(
                f"support.of is 'rollout' but the method has {len(teacher_logp)} teacher contexts: "
                "add the policy that made the rollouts as the last of several, or set it to 'student'."
            )
        return teacher_logp[0 if self.of == "teacher" else -1]


SUPPORTS: dict[str, type] = {"full": FullVocabulary, "top_k": TopK}
