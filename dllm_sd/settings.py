"""Settings of a run that are no parts: optimizer, evaluation, checkpoints, log."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dllm_sd.errors import InputError


@dataclass(frozen=True)
class Optim:
    """AdamW, its schedule, and how an update is cut into micro-batches."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """PyTorch's AdamW, fused on CPUs and CUDA; or that of bitsandbytes (extra `quant`), with states in 8 bits."""
    lr: float = 5e-6
    betas: tuple[float, ...] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup: int = 0
    """Updates of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up, down to `final_lr` of the peak at the last update."""
    final_lr: float = 0.0
    max_grad_norm: float | None = 0.2
    tokens_per_batch: int = 16384
    """Padded canvas tokens in one forward; memory only, it cannot change the update."""
    autocast: Literal["bfloat16"] | None = None
    """Compute type of all forwards (student, teachers, decoding, evaluation); weights keep `model.dtype`."""

    def __post_init__(self) -> None:
        if not self.lr > 0 or len(self.betas) != 2 or self.warmup < 0 or self.tokens_per_batch < 1:
            raise InputError("optim needs lr above 0, two betas, warmup of 0 or more and tokens_per_batch above 0")
        if not 0 <= self.final_lr <= 1:
            raise InputError("optim.final_lr is a share of the peak; give a number from 0 to 1")
        if not all(0 <= beta < 1 for beta in self.betas) or not min(self.eps, self.weight_decay) >= 0:
            raise InputError("optim needs betas from 0 to below 1, and eps and weight_decay of 0 or more")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise InputError("optim.max_grad_norm must be above 0, or null for no limit")


@dataclass(frozen=True)
class Evaluation:
    """Held-out accuracy during and after training."""

    every: int = 25
    """Updates between evaluations on the dev split; 0 evaluates never."""
    problems: int = 256
    """Dev problems of each evaluation."""
    final_problems: int = 0
    """Test problems on which the initial and the best weights are compared at the end; 0 skips it."""
    attempts: int = 1
    temperature: float = 0.0
    schedules: Mapping[str, Any] = field(default_factory=dict)
    """Other decoding settings (name: overrides of `decode`) under which the end is compared too."""
    patience: int = 0
    """Stop after this many evaluations in a row without a new best; 0 never stops for that."""
    collapse: float = 0.0
    """Stop when accuracy falls this far below the best, such as 0.1; 0 never stops for that."""

    def __post_init__(self) -> None:
        if min(self.every, self.final_problems, self.patience) < 0 or min(self.problems, self.attempts) < 1:
            raise InputError("eval counts must not be negative, and eval.problems and eval.attempts at least 1")
        if self.attempts > 1 and self.temperature == 0:
            raise InputError("eval.attempts above 1 repeats the greedy answer; set eval.temperature above 0")
        if "trained" in self.schedules:
            raise InputError("eval.schedules.trained is the name of the run's own decoding; choose another name")
        if not self.temperature >= 0 or not 0 <= self.collapse <= 1:
            raise InputError("eval needs a temperature of 0 or more, and a collapse from 0 to 1")


@dataclass(frozen=True)
class Checkpoints:
    """What is saved while training."""

    every: int = 25
    """Updates between checkpoints; one is also saved at the end and on Ctrl-C."""
    keep: int = 2
    """Latest checkpoints that stay on disk, beside the best weights."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise InputError("checkpoint.every and checkpoint.keep must be at least 1")


@dataclass(frozen=True)
class Log:
    """What is shown and written."""

    tensorboard: bool = True
    progress: bool = True
    samples: int = 2
    """Rollouts written to samples.jsonl and TensorBoard at each update that logs them."""
    samples_every: int = 10

    def __post_init__(self) -> None:
        if self.samples < 0 or self.samples_every < 1:
            raise InputError("log.samples must not be negative, and log.samples_every at least 1")


@dataclass(frozen=True)
class Student:
    """One of two students that teach each other."""

    name: str
    """Its folder under `students` in the run folder."""
    domain: str
    """What it is better at, as the data names it."""
    path: str | None = None
    """Its own checkpoint; None takes `model.path`."""
    start: str | None = None
    """The adapter to begin with (`model.lora.start`)."""


@dataclass(frozen=True)
class Peers:
    """Co-distillation of two students (OPCoD, arXiv 2606.14368, Algorithm 1): rounds of two phases, one for each.

    In a phase one student learns while the other, frozen, comments on its rollouts, if it knows enough to.
    """

    students: tuple[Student, ...]
    rounds: int = 2
    """Rounds in `updates`, which count for each student."""
    tolerance: float = 0.2
    """How far a tutor may be behind the better student, relatively and summed over domains (Eq. 2)."""
    field: str = "domain"
    """The field of a problem that names its domain."""
    problems: int = 60
    """Dev problems for that comparison, the same number of each domain."""
    attempts: int = 16
    temperature: float = 1.0
    freeze: Literal["round", "phase"] = "round"
    """Tutors stay as they were when the round began (Algorithm 1), or when the phase did (App. D.2)."""

    def __post_init__(self) -> None:
        names = [student.name for student in self.students]
        if len(set(names)) != 2 or len(names) != 2 or not all(name.isidentifier() for name in names):
            raise InputError("peers.students must list two students whose names are different words")
        if min(self.rounds, self.problems, self.attempts) < 1 or not min(self.tolerance, self.temperature) >= 0:
            raise InputError("peers needs rounds, problems and attempts of 1 or more, and no negative number")
        if self.attempts > 1 and self.temperature == 0:
            raise InputError("peers.attempts above 1 repeats the greedy answer; set peers.temperature above 0")
