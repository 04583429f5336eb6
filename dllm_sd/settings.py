"""Settings of a run beside its method: optimizer, evaluation, checkpoints, log, peers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from dllm_sd.errors import InputError
from dllm_sd.files.writing import Place
from dllm_sd.ranges import Count, Natural, NonNegative, Positive, Range, Ranged, Share, ShareBelowOne, Size, Temperature

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "swanlab"]

USUAL_FINAL_PROBLEMS = 256
"""Test problems of a run whose config does not say how many."""


@dataclass(frozen=True)
class Optim(Ranged, key="optim"):
    """AdamW, its learning-rate schedule, and the size of micro-batches."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """PyTorch's AdamW, fused on CPUs and CUDA, or 8-bit AdamW of bitsandbytes (extra `quant`)."""
    lr: Annotated[float, Range(above=0, most=1000)] = 5e-6
    """Learning rate at the peak of the schedule."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.99)
    """AdamW's decay rates of the averages of gradients and of squared gradients."""
    eps: Annotated[float, Range(least=0, most=1)] = 1e-8
    """AdamW's term that keeps the denominator above 0."""
    weight_decay: Annotated[float, Range(least=0, most=1000)] = 0.1
    """AdamW's decoupled weight decay; a step takes `lr` times this off each weight."""
    warmup: Natural = 0
    """Updates of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule after the warm-up; it falls to `final_lr` times the peak at the last update."""
    final_lr: Share = 0.0
    """Learning rate at the last update as a share of the peak; `constant` ignores it."""
    max_grad_norm: Positive | None = 0.2
    """L2 norm to which the gradient of all weights is clipped; None never clips."""
    tokens_per_batch: Count = 16384
    """Padded tokens of a micro-batch; it affects memory and speed, not the update."""
    autocast: Literal["bfloat16"] | None = None
    """Autocast dtype of all forward passes (student, teachers, decoding, evaluation); weights keep `model.dtype`."""
    pure_bfloat16: bool = False
    """Allow training of bfloat16 weights without float32 master weights, in which a step smaller than 1/512 of a weight
    is lost in rounding."""


@dataclass(frozen=True)
class Evaluation(Ranged, key="eval"):
    """Held-out accuracy during and after training."""

    every: Natural = 25
    """Updates between evaluations on the dev split; 0 never evaluates."""
    problems: Size = 256
    """Dev problems of each evaluation in training; ``dllm-sd eval`` takes `final_problems` test problems."""
    final_problems: Natural | None = None
    """Test problems on which initial, last and best weights are compared at the end of a run; 0 skips the comparison.
    None takes up to 256, and none where the task has no test split. ``dllm-sd eval`` takes all where this is 0 or None.
    """
    attempts: Size = 1
    """Completions of each problem; above 1 the report has pass@k and majority votes."""
    temperature: Temperature = 0.0
    """Sampling temperature of evaluations; 0 is greedy."""
    decode: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of `decode` for held-out problems, such as a larger length than that of rollouts."""
    thinking: bool | None = None
    """The thinking switch of the chat template for held-out problems; None takes `model.thinking`."""
    schedules: Mapping[str, Any] = field(default_factory=dict)
    """Further decoding settings for the comparison at the end, by name, as overrides of `decode` and `eval.decode`."""
    best_by: Literal["accuracy", "loss"] = "accuracy"
    """Criterion of the best weights: dev accuracy, or the mean training loss since the previous evaluation. SPD (arXiv
    2605.22675) stops by the loss of an epoch, which is this loss if `every` is the number of updates of an epoch."""
    min_delta: NonNegative = 0.0
    """How far the loss must fall to be a new best; it does not apply to accuracies."""
    patience: Natural = 0
    """Stop after this many evaluations in a row without a new best; 0 disables it."""
    collapse: Share = 0.0
    """Stop when accuracy falls this far below the best, such as 0.1; 0 disables it."""
    probe_every: Natural = 0
    """Updates between probes of the teacher (`dllm-sd probe`); 0 never probes."""
    probe_problems: Size = 64
    """Dev problems of a probe."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attempts > 1 and self.temperature == 0:
            raise InputError("eval.attempts above 1 repeats the greedy answer; set eval.temperature above 0")
        if "trained" in self.schedules:
            raise InputError("eval.schedules.trained is the name of the run's own decoding; choose another name")


@dataclass(frozen=True)
class Checkpoints(Ranged, key="checkpoint"):
    """When checkpoints are saved, and how many are kept."""

    every: Count = 25
    """Updates between checkpoints; one is also saved at the end and on Ctrl-C."""
    keep: Count = 2
    """Number of latest checkpoints that are kept, beside the best weights."""


@dataclass(frozen=True)
class Log(Ranged, key="log"):
    """Progress bar, trackers and samples."""

    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where metrics, samples and pictures are shown, beside the files of the run; each but TensorBoard needs the extra
    of its name."""
    tensorboard: bool | None = None
    """An older way to set `trackers`: true stands for [tensorboard] and false for []."""
    project: str | None = None
    """Project of the run in trackers that have projects; None takes that of the tracker's environment variable, such as
    WANDB_PROJECT, else `dllm-sd`."""
    progress: bool = True
    """Show a progress bar with loss and pass rate."""
    samples: Natural = 2
    """Rollouts written to samples.jsonl and trackers at each update that logs them."""
    samples_every: Count = 10
    """Updates between those that log samples; the first does."""
    trace: Natural = 512
    """Graded sites of these rollouts that are written to traces.jsonl at each update that logs samples, with the
    predictions of student and teachers, for the report. 0 writes none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tensorboard is not None:
            if self.trackers != ("tensorboard",):
                raise InputError("log.tensorboard and log.trackers are both set; leave log.tensorboard out")
            object.__setattr__(self, "trackers", ("tensorboard",) if self.tensorboard else ())
            object.__setattr__(self, "tensorboard", None)
        if twice := [name for name in dict.fromkeys(self.trackers) if self.trackers.count(name) > 1]:
            raise InputError(f"log.trackers names {twice[0]} twice; name it once")
        if self.project == "":
            raise InputError("log.project is empty; give it a name, or null")


@dataclass(frozen=True)
class PeerStudent:
    """One of two students that teach each other."""

    name: str
    """Its folder under `students` in the run folder."""
    domain: str
    """The domain that it is better at, as named in the data."""
    path: Place | None = None
    """Its own checkpoint; None takes `model.path`."""
    start: Place | None = None
    """The adapter to start from (`model.lora.start`)."""
    tutor: bool = True
    """Whether it may comment on the other's rollouts; false for one of the two makes the distillation one-way."""


@dataclass(frozen=True)
class Peers(Ranged, key="peers"):
    """Co-distillation of two students (OPCoD, arXiv 2606.14368, Algorithm 1): rounds of two phases, one for each.

    In a phase one student is trained while the other one is frozen and comments on its rollouts (see `tolerance`).
    """

    students: tuple[PeerStudent, ...]
    rounds: Size = 2
    """Number of rounds; each student makes `updates` updates in all of them together."""
    tolerance: NonNegative | None = 0.2
    """Largest relative lag of a tutor behind the better student, summed over domains (Eq. 2); with null nobody
    comments, which is SDPO for each student (the ablation "never" of Fig. 7)."""
    field: str = "domain"
    """The field of a problem that holds its domain."""
    problems: Size = 60
    """Dev problems on which students are scored before each round, the same number of each domain."""
    attempts: Size = 16
    """Completions of each of these problems."""
    temperature: Temperature = 1.0
    """Sampling temperature of these completions."""
    freeze: Literal["round", "phase"] = "round"
    """Whether tutors have the weights from the start of the round (Algorithm 1) or of the phase (App. D.2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [student.name for student in self.students]
        if len(set(names)) != 2 or len(names) != 2 or not all(name.isidentifier() for name in names):
            raise InputError("peers.students must list two students whose names are different words")
        if self.attempts > 1 and self.temperature == 0:
            raise InputError("peers.attempts above 1 repeats the greedy answer; set peers.temperature above 0")
