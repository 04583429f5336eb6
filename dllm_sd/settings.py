"""Settings of a run that are no parts: optimizer, evaluation, checkpoints, log."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from dllm_sd.errors import InputError
from dllm_sd.files.writing import Place
from dllm_sd.ranges import Count, Natural, NonNegative, Positive, Range, Ranged, Share, ShareBelowOne, Size, Temperature


@dataclass(frozen=True)
class Optim(Ranged, key="optim"):
    """AdamW, its schedule, and how an update is cut into micro-batches."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """PyTorch's AdamW, fused on CPUs and CUDA; or that of bitsandbytes (extra `quant`), with states in 8 bits."""
    lr: Annotated[float, Range(above=0, most=1000)] = 5e-6
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.99)
    eps: Annotated[float, Range(least=0, most=1)] = 1e-8
    weight_decay: Annotated[float, Range(least=0, most=1000)] = 0.1
    warmup: Natural = 0
    """Updates of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up, down to `final_lr` of the peak at the last update."""
    final_lr: Share = 0.0
    max_grad_norm: Positive | None = 0.2
    tokens_per_batch: Count = 16384
    """Padded canvas tokens in one forward; memory only, it cannot change the update."""
    autocast: Literal["bfloat16"] | None = None
    """Compute type of all forwards (student, teachers, decoding, evaluation); weights keep `model.dtype`."""
    pure_bfloat16: bool = False
    """Train weights that are kept in bfloat16 without float32 master weights, which is refused else: a step smaller
    than 1/512 of a weight rounds to nothing."""


@dataclass(frozen=True)
class Evaluation(Ranged, key="eval"):
    """Held-out accuracy during and after training."""

    every: Natural = 25
    """Updates between evaluations on the dev split; 0 evaluates never."""
    problems: Size = 256
    """Dev problems of each evaluation."""
    final_problems: Natural = 0
    """Test problems on which the initial and the best weights are compared at the end; 0 skips it."""
    attempts: Size = 1
    temperature: Temperature = 0.0
    decode: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of `decode` for held-out problems, such as a greater length than that of rollouts."""
    thinking: bool | None = None
    """The thinking switch of the chat template for held-out problems; None takes `model.thinking`."""
    schedules: Mapping[str, Any] = field(default_factory=dict)
    """Other decoding settings (name: overrides of `decode` and `eval.decode`) under which the end is compared too."""
    best_by: Literal["accuracy", "loss"] = "accuracy"
    """What makes the best weights: dev accuracy, or the mean training loss of the updates since the evaluation before
    (with `every` an epoch's updates the loss of the epoch, as SPD stops by, arXiv 2605.22675)."""
    min_delta: NonNegative = 0.0
    """How far that loss must fall to be a new best; accuracies are compared as they are."""
    patience: Natural = 0
    """Stop after this many evaluations in a row without a new best; 0 never stops for that."""
    collapse: Share = 0.0
    """Stop when accuracy falls this far below the best, such as 0.1; 0 never stops for that."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attempts > 1 and self.temperature == 0:
            raise InputError("eval.attempts above 1 repeats the greedy answer; set eval.temperature above 0")
        if "trained" in self.schedules:
            raise InputError("eval.schedules.trained is the name of the run's own decoding; choose another name")


@dataclass(frozen=True)
class Checkpoints(Ranged, key="checkpoint"):
    """What is saved while training."""

    every: Count = 25
    """Updates between checkpoints; one is also saved at the end and on Ctrl-C."""
    keep: Count = 2
    """Latest checkpoints that stay on disk, beside the best weights."""


@dataclass(frozen=True)
class Log(Ranged, key="log"):
    """What is shown and written."""

    tensorboard: bool = True
    progress: bool = True
    samples: Natural = 2
    """Rollouts written to samples.jsonl and TensorBoard at each update that logs them."""
    samples_every: Count = 10


@dataclass(frozen=True)
class PeerStudent:
    """One of two students that teach each other."""

    name: str
    """Its folder under `students` in the run folder."""
    domain: str
    """What it is better at, as the data names it."""
    path: Place | None = None
    """Its own checkpoint; None takes `model.path`."""
    start: Place | None = None
    """The adapter to begin with (`model.lora.start`)."""


@dataclass(frozen=True)
class Peers(Ranged, key="peers"):
    """Co-distillation of two students (OPCoD, arXiv 2606.14368, Algorithm 1): rounds of two phases, one for each.

    In a phase one student learns while the other, frozen, comments on its rollouts, if it knows enough to.
    """

    students: tuple[PeerStudent, ...]
    rounds: Size = 2
    """Rounds in `updates`, which count for each student."""
    tolerance: NonNegative = 0.2
    """How far a tutor may be behind the better student, relatively and summed over domains (Eq. 2)."""
    field: str = "domain"
    """The field of a problem that names its domain."""
    problems: Size = 60
    """Dev problems for that comparison, the same number of each domain."""
    attempts: Size = 16
    temperature: Temperature = 1.0
    freeze: Literal["round", "phase"] = "round"
    """Tutors stay as they were when the round began (Algorithm 1), or when the phase did (App. D.2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [student.name for student in self.students]
        if len(set(names)) != 2 or len(names) != 2 or not all(name.isidentifier() for name in names):
            raise InputError("peers.students must list two students whose names are different words")
        if self.attempts > 1 and self.temperature == 0:
            raise InputError("peers.attempts above 1 repeats the greedy answer; set peers.temperature above 0")
