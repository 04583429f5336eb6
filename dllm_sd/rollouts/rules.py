"""Rollouts: decode, grade, retry unsolved problems, keep, gate.

Decoding order never changes a result: attempt ``a`` of a problem is a function of (seed, update, problem, attempt), and
of which occurrence of the problem it is where one batch holds several.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Protocol

from dllm_sd.decoding.decoder import Decoder
from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError
from dllm_sd.network.subspace import Subspace
from dllm_sd.parts import Part
from dllm_sd.policies.policy import Policy
from dllm_sd.policies.teacher_weights import RolloutPolicy, Weights
from dllm_sd.policies.weights import BaseWeights, LiveWeights
from dllm_sd.randomness import make_key
from dllm_sd.ranges import Natural, PositiveShare, Range, Ranged, Size, Temperature
from dllm_sd.rollouts.attempt_queue import AttemptQueue, Workers
from dllm_sd.rollouts.gates import Gate
from dllm_sd.rollouts.horizons import HORIZONS, Complete, Horizon
from dllm_sd.rollouts.rollout import Prompted, Rollout, Rollouts
from dllm_sd.tasks.task import Grade, Problem, Task
from dllm_sd.trajectory import StopAfter, Trajectory


def encode_problem(
    policy: Policy, task: Task, problem: Problem, longest: int, thinking: bool | None = None
) -> Prompted | None:
    """The problem with its prompt, or None where that is longer than ``longest`` tokens (never cut).

    ``thinking`` overrides the template's switch.
    """
    prompt = tuple(policy.encode(task.messages(problem), thinking))
    return Prompted(problem, prompt) if len(prompt) <= longest else None


class RolloutRule(Part, Protocol):
    """Protocol of a rollout rule: how an update gets its rollouts."""

    @property
    def problems(self) -> int:
        """Problems per batch of rollouts."""
        ...

    @property
    def passes(self) -> int:
        """Updates that the same rollouts serve."""
        ...

    @property
    def decodes(self) -> bool:
        """Whether a policy decodes (else the data set's references are used)."""
        ...

    @property
    def policy(self) -> RolloutPolicy | None:
        """The weights that decode; None if nothing is decoded."""
        ...

    @property
    def lag(self) -> int:
        """Batches by which rollouts run ahead of learning."""
        ...

    @property
    def rolling(self) -> Weights | None:
        """The weights that decode instead of the student's (of a subspace, the initial ones); None for these."""
        ...

    @property
    def temperature(self) -> float | None:
        """Softmax temperature of sampling; None if nothing is sampled."""
        ...

    @property
    def filters(self) -> bool:
        """Whether top-k or top-p filters the tokens before sampling."""
        ...

    @property
    def cuts(self) -> bool:
        """Whether some completions are not generated to their end."""
        ...

    @property
    def needs_outcome(self) -> bool:
        """Whether the outcome of attempts decides which are made or kept."""
        ...

    @property
    def keeps_groups(self) -> bool:
        """Whether several rollouts of a problem are kept, right or wrong."""
        ...

    def __call__(
        self,
        policy: Policy,
        task: Task,
        prompted: Sequence[Prompted],
        decode: Decoding,
        seed: int,
        update: int,
        workers: Workers | None = None,
        decoder: Decoder | None = None,
    ) -> list[list[Rollout]]:
        """The graded attempts at each problem, in the order of the problems; on every process of the ``workers``.

        ``decoder`` decodes instead of the policy's own.
        """
        ...

    def queue(
        self, policy: Policy, task: Task, prompted: Sequence[Prompted], seed: int, update: int, workers: Workers | None
    ) -> AttemptQueue | None:
        """The attempts as the queue of a decoder; None where nothing is decoded."""
        ...

    def stop_after(self, policy: Policy, decode: Decoding, batch: int) -> StopAfter | None:
        """How far the rollouts of a batch are decoded; None decodes to the end."""
        ...

    def settings(self, decode: Decoding) -> Decoding:
        """How attempts are decoded, in a run whose own settings are ``decode``."""
        ...

    def choose(self, attempts: Sequence[Rollout]) -> list[Rollout]:
        """Which of the counted attempts at one problem are kept."""
        ...

    def unselected(self) -> "RolloutRule":
        """The rule for measuring the policy: complete rollouts, without a selection by their outcome."""
        ...


ROLLING: dict[str, type] = {"live": LiveWeights, "base": BaseWeights, "subspace": Subspace}
"""The weights that may decode rollouts."""


@dataclass(frozen=True)
class PassAtK(Ranged, key="method.rollout"):
    """Sample until solved, at most `attempts` times a problem (pass@k resampling, arXiv 2606.18195, Sec. 3.3).

    Only problems not yet solved are tried again, in any free slot of any process; the outcome is that of a serial loop.
    """

    problems: Size = 16
    """Problems of an update."""
    attempts: Size = 8
    """Most attempts at each problem."""
    keep: Literal["first", "best", "all"] = "first"
    """Which attempts are kept: the first correct one (or the last if none is correct), the one with the best score (the
    latest of equals), or all."""
    until_solved: bool = True
    """False makes all attempts, also after a correct one."""
    ahead: Natural = 0
    """Further attempts at an unsolved problem that may begin early where decoding slots would stay empty; those behind
    the first correct one are dropped. Worth it only where a device is idle because few rows are left."""
    temperature: Temperature = 0.9
    """Sampling temperature of rollouts; 0 is greedy."""
    top_k: Natural = 0
    """As in `decode`, which is for evaluations."""
    top_p: PositiveShare = 1.0
    """As in `decode`, which is for evaluations."""
    policy: RolloutPolicy = field(default_factory=LiveWeights, metadata={"parts": ROLLING})
    """The weights that decode: the student's, the initial ones, or the initial ones projected onto a subspace (SPD)."""
    horizon: Horizon = field(default_factory=Complete, metadata={"parts": HORIZONS})
    """How much of a completion is generated."""
    draw: Literal["fresh", "fixed"] = "fresh"
    """`fixed`: a problem's attempts are the same whenever it is met, so that later epochs train on one set of texts,
    which is drawn once (SPD). They are decoded anew each time, and are the same since `policy` does not learn."""
    passes: Size = 1
    """Updates that the same rollouts serve; each takes its own chunk of decoding steps, or draws its own masks."""
    lag: Annotated[int, Range(least=0, most=1)] = 0
    """With 1 a batch is made while the trainer learns from the previous batch (`decode.engine`), with the weights of
    that time; trust `importance_cap` corrects for the difference. Attempts that depend on the outcome of others are
    made after learning."""
    decodes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep == "all" and self.until_solved:
            raise InputError("method.rollout.keep all compares a whole group; set method.rollout.until_solved to false")
        if self.draw == "fixed" and self.policy.moves:
            raise InputError(
                "method.rollout.draw fixed needs weights that stay, but the student's change in training; set "
                "method.rollout.policy to base or subspace, or draw to fresh"
            )

    def __call__(
        self,
        policy: Policy,
        task: Task,
        prompted: Sequence[Prompted],
        decode: Decoding,
        seed: int,
        update: int,
        workers: Workers | None = None,
        decoder: Decoder | None = None,
    ) -> list[list[Rollout]]:
        decode = self.settings(decode)
        queue = self.queue(policy, task, prompted, seed, update, workers)
        (decoder or policy.decoder).complete(queue, decode, stop_after=self.stop_after(policy, decode, update))
        return queue.collected()

    def queue(
        self, policy: Policy, task: Task, prompted: Sequence[Prompted], seed: int, update: int, workers: Workers | None
    ) -> AttemptQueue:
        """The attempts as the queue of a decoder."""

        def key(i: int, attempt: int) -> int:
            if self.draw == "fixed":
                return make_key(seed, "draw", prompted[i].problem.id, attempt, "decode")
            return make_key(seed, update, *prompted[i].key_parts, attempt, "decode")

        def grade(i: int, single: Trajectory) -> tuple[str, Grade]:
            text = policy.text(single.tokens[0, : int(single.length)].tolist())
            return text, task.grade(prompted[i].problem, text)

        limit, until_solved = self.attempts, self.until_solved
        return AttemptQueue(
            prompted, key, grade, limit=limit, until_solved=until_solved, ahead=self.ahead, workers=workers
        )

    def stop_after(self, policy: Policy, decode: Decoding, batch: int) -> StopAfter | None:
        """The horizon of the first update that this batch serves."""
        return self.horizon(policy, decode, batch * self.passes)

    def settings(self, decode: Decoding) -> Decoding:
        """The run's own with the temperature and filters of the rule."""
        return replace(decode, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    @property
    def rolling(self) -> Weights | None:
        """The weights that decode instead of the student's; `RolloutWeights` projects them onto the subspace."""
        return None if self.policy.is_student else self.policy.weights or BaseWeights()

    @property
    def filters(self) -> bool:
        """Whether `top_k` or `top_p` filters the tokens before sampling."""
        return self.top_k > 0 or self.top_p < 1

    @property
    def cuts(self) -> bool:
        """Whether some completions are not generated to their end."""
        return self.horizon.cuts

    @property
    def needs_outcome(self) -> bool:
        """Whether the outcome of attempts decides which are made or kept."""
        return self.attempts > 1 and (self.until_solved or self.keep == "best")

    @property
    def keeps_groups(self) -> bool:
        """Whether several rollouts of a problem are kept, right or wrong."""
        return self.keep == "all" and self.attempts > 1

    def choose(self, attempts: Sequence[Rollout]) -> list[Rollout]:
        """Which of the counted attempts at one problem are kept."""
        if self.keep == "all":
            return list(attempts)
        if self.keep == "best":
            return [max(attempts, key=lambda rollout: (rollout.grade.score, rollout.attempt))]
        correct = [rollout for rollout in attempts if rollout.grade.correct]
        return [correct[0] if correct else attempts[-1]]

    def unselected(self) -> "PassAtK":
        """Complete rollouts, and one attempt at each problem unless groups are kept."""
        return replace(self, horizon=Complete(), attempts=self.attempts if self.keeps_groups else 1)


@dataclass(frozen=True)
class Demonstrations(Ranged, key="method.rollout"):
    """The data set's reference completions instead of the policy's own (supervised fine-tuning)."""

    problems: Size = 32
    """Problems of an update."""
    passes: Size = 1
    """Updates that the same problems serve."""
    lag = 0
    decodes = False
    policy = None
    rolling = None
    temperature = None
    filters = False
    cuts = False
    needs_outcome = False
    keeps_groups = False

    def __call__(
        self,
        policy: Policy,
        task: Task,
        prompted: Sequence[Prompted],
        decode: Decoding,
        seed: int,
        update: int,
        workers: Workers | None = None,
        decoder: Decoder | None = None,
    ) -> list[list[Rollout]]:
        return [self._demonstration(policy, task, item, decode) for item in prompted]

    def queue(self, *args: object, **options: object) -> None:
        """None: nothing is decoded."""

    def settings(self, decode: Decoding) -> Decoding:
        """The run's own: nothing is decoded."""
        return decode

    def stop_after(self, policy: Policy, decode: Decoding, batch: int) -> None:
        """None: demonstrations are complete."""
        return None

    def choose(self, attempts: Sequence[Rollout]) -> list[Rollout]:
        """Everything is kept."""
        return list(attempts)

    def unselected(self) -> "Demonstrations":
        """This rule: demonstrations are complete, and none is selected."""
        return self

    def _demonstration(self, policy: Policy, task: Task, item: Prompted, decode: Decoding) -> list[Rollout]:
        reference = task.reference(item.problem)
        if reference is None:
            raise InputError(f"problem {item.problem.id} has no reference to imitate; method.rollout needs one")
        tokens = policy.encode_completion(reference)
        if needed_length(tokens) > decode.length:
            return []  # `gather` counts it
        tokens = tokens[: decode.length]  # an answer that fills the canvas needs no end token
        trajectory = policy.demonstration(item.prompt, tokens, decode)
        return [Rollout(item.problem, 0, reference, Grade(True, 1.0, None), trajectory, occurrence=item.occurrence)]


def needed_length(tokens: Sequence[int]) -> int:
    """The smallest `decode.length` for a completion's ``tokens``; a completion that fills the canvas needs no end
    token."""
    return len(tokens) - 1


ROLLOUTS: dict[str, type] = {"pass_at_k": PassAtK, "demonstrations": Demonstrations}


COUNTS = (
    *("problems", "attempts", "decoded", "solved", "first_try", "tokens", "steps", "generated"),
    *("kept", "rejected", "no_hint", "long_hint"),
)
"""What is always counted in `Rollouts.counts`."""


def gather(rule: RolloutRule, gate: Gate, tried: Sequence[Sequence[Rollout]]) -> Rollouts:
    """Keep and gate the attempts of each problem, and count.

    Args:
        rule: chooses what is kept of a problem.
        gate: rejects rollouts before any forward pass of training.
        tried: per problem, its attempts in order.
    """
    kept: list[Rollout] = []
    all_chosen: list[Rollout] = []
    counts: dict[str, float] = dict.fromkeys(COUNTS if rule.decodes else (*COUNTS, "long_reference"), 0.0)
    for attempts in tried:
        counted = [rollout for rollout in attempts if rollout.counted]
        counts["problems"] += 1
        if not rule.decodes:
            counts["long_reference"] += not attempts
        counts["attempts"] += len(counted)
        counts["decoded"] += len(attempts)
        if failed := sum(rollout.grade.failed for rollout in attempts):
            counts["grader_failed"] = counts.get("grader_failed", 0) + failed
        counts["solved"] += any(rollout.grade.correct for rollout in counted)
        counts["first_try"] += bool(counted) and counted[0].grade.correct
        counts["tokens"] += sum(int(rollout.trajectory.written) for rollout in counted)
        counts["generated"] += sum(int(rollout.trajectory.written) for rollout in attempts)
        counts["steps"] += sum(int(rollout.trajectory.num_steps) for rollout in counted)
        chosen = rule.choose(counted) if counted else []
        passed = gate(chosen)
        counts["kept"] += len(passed)
        counts["rejected"] += len(chosen) - len(passed)
        kept += passed
        all_chosen += chosen
    return Rollouts(tuple(kept), counts, tuple(all_chosen))
