"""The rollout pipeline: the processes share the problems, decode, grade and gate, and teacher prompts are added."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from dllm_sd.config import Config
from dllm_sd.experience.feed import Feed
from dllm_sd.experience.rollout_engine import RolloutEngine
from dllm_sd.experience.rollout_weights import RolloutWeights
from dllm_sd.experience.skill_bank import SkillBankState
from dllm_sd.experience.text_generator import TextGenerator
from dllm_sd.network.swapping import swapped
from dllm_sd.parallel.processes import on_main
from dllm_sd.policies.loading import AnyPolicy
from dllm_sd.policies.weights import TeacherModel, Weights, trained
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.attempt_queue import AttemptQueue, Workers
from dllm_sd.rollouts.rollout import Batch, Prompted, Rollout, Rollouts, UnfinishedBatch
from dllm_sd.rollouts.rules import PassAtK, RolloutRule, gather
from dllm_sd.tasks.task import Problem
from dllm_sd.teachers.context import Context
from dllm_sd.teachers.prompts import Analyse, Sources, build_teacher_prompts
from dllm_sd.writers import Cache


@dataclass(frozen=True)
class BegunBatch:
    """A batch on which servers work while the one before it is learnt; the fields of `Batch`, and what completes it."""

    number: int
    version: int
    queue: AttemptQueue
    finish: Callable[[], None]
    cursor: int
    too_long: int
    weights: Mapping[str, Tensor]
    """The trained weights that decode it, by name, as they lie on this process."""


class RolloutPipeline:
    """Makes the rollouts of every batch; to be used by all processes together."""

    def __init__(
        self,
        config: Config,
        problems: Sequence[Problem],
        policy: AnyPolicy,
        module: nn.Module,
        models: Mapping[Weights, TeacherModel],
        accelerator: Accelerator,
    ) -> None:
        """For a run whose policy is wrapped in ``module``; ``models`` hold the weights of all teachers and writers."""
        self.config, self.method, self.policy, self.module = config, config.method, policy, module
        several = accelerator.num_processes > 1
        self.workers = Workers(accelerator.process_index, accelerator.num_processes, gather_object if several else list)
        self.feed = Feed(problems, policy, config.task, config.seed, config.max_prompt)
        self.rollout_weights = RolloutWeights(self.method.rollout, policy, models, accelerator)
        teachers = [models[weights] for weights in self.method.weights()]
        cache = Cache(config.cache or Path(config.run) / "written") if self.method.writings else None
        self.text_generator = TextGenerator(teachers, config.decode, accelerator, models, cache)
        self.engine = RolloutEngine(config, policy, module, accelerator)
        self.engine_metrics: Mapping[str, float] = {}
        """Of the last batch (`RolloutEngine.check`), and its lag."""
        self.batch: Batch | None = None
        """The batch that was taken last, of a run whose rollouts run ahead."""
        self.ahead: BegunBatch | Batch | None = None
        """The batch after it, of such a run."""
        self.skill_bank = SkillBankState(self.method.skill_bank, config.task, self.text_generator.write, config.seed)

    @property
    def notes(self) -> list[str]:
        """Sentences to print before the run begins."""
        corrected = not self.method.rollout.lag or self.method.trust.needs_old_logp
        lagging = [
            "rollouts are one batch older than the student (method.rollout.lag), and the loss takes them for its own; "
            "method.trust importance_cap corrects for it"
        ]
        return self.engine.notes + ([] if corrected else lagging)

    def open(
        self, bank: Mapping[str, Any] | None, update: int = 0, ahead: Batch | UnfinishedBatch | None = None
    ) -> dict[str, int]:
        """Prepare the subspace and the skill bank once, from the initial weights or a checkpoint; returns counts.

        Args:
            bank: the skill bank of the checkpoint.
            update: the updates that the weights have had.
            ahead: the batch of the checkpoint that runs ahead of learning.
        """
        if isinstance(ahead, UnfinishedBatch):
            with swapped(self.policy.module, ahead.weights):
                self.ahead = self._begin(ahead.number, ahead.version, ahead.cursor)
                self.settle()
        else:
            self.ahead = ahead
        self.engine.use(str(update))
        calibrated = self.rollout_weights.calibrate(self.config.task, self.feed.problems)
        counts = calibrated | self.skill_bank.open(bank, self._attempt)
        if bank is not None:  # a run that was killed between the checkpoint and this file
            on_main(lambda: self.skill_bank.write_down(Path(self.config.run)))
        return counts

    def take(self, batch: int, cursor: int) -> tuple[Rollouts, int, int]:
        """The rollouts of a batch, the next position in the stream of problems, and how many prompts were too long.

        Every process gets all rollouts, in the order of the problems.
        """
        config, rule = self.config, self.method.rollout
        tried = self.settle()
        if tried is None or tried.number != batch:
            tried = self._make(batch, batch * rule.passes, cursor)
        self.engine_metrics = tried.metrics
        if rule.lag:
            self.batch = tried
            self.engine_metrics = {**tried.metrics, "rollouts/lag": batch * rule.passes - tried.version}
            if (batch + 1) * rule.passes < config.updates:
                self.ahead = self._begin(batch + 1, batch * rule.passes, tried.cursor)
        rollouts = gather(rule, self.method.gate, tried.attempts)
        informed = self.informed(rollouts, self.method.contexts, (config.seed, batch))
        if damaged := sum(self.workers.gather([self.text_generator.damaged_texts()])):
            informed = replace(informed, counts={**informed.counts, "damaged": float(damaged)})
        return informed, tried.cursor, tried.too_long

    def settle(self) -> Batch | None:
        """The batch that runs ahead, as soon as it is complete; None if there is none.

        To be called before the servers get other weights, since attempts may still begin.

        Raises:
            Stopped: if the servers fail, or the batch must not be trained on.
        """
        if isinstance(begun := self.ahead, BegunBatch):
            begun.finish()
            attempts = begun.queue.collected()
            settings = self.method.rollout.settings(self.config.decode)
            metrics = self.engine.check(attempts, settings, begun.weights)
            tried = tuple(map(tuple, attempts))
            self.ahead = Batch(begun.number, begun.version, tried, begun.cursor, begun.too_long, metrics)
        return self.ahead

    def use(self, version: str) -> None:
        """As `RolloutEngine.use`, when the batch that runs ahead is complete."""
        self.settle()
        self.engine.use(version)

    def unlearnt(self, number: int) -> BegunBatch | Batch | None:
        """The batch of this number, if it was begun."""
        return next((batch for batch in (self.batch, self.ahead) if batch is not None and batch.number == number), None)

    def _make(self, number: int, version: int, cursor: int) -> Batch:
        """Make a batch with the weights of now, which have had ``version`` updates."""
        rule, decode = self.method.rollout, self.config.decode
        self.engine.use(str(version))
        prompted, cursor, too_long = self.feed.take(cursor, rule.problems)
        attempts = self.attempts(rule, prompted, self.config.seed, number)
        metrics = self.engine.check(attempts, rule.settings(decode))
        return Batch(number, version, tuple(map(tuple, attempts)), cursor, too_long, metrics)

    def _begin(self, number: int, version: int, cursor: int) -> BegunBatch | Batch:
        """Begin a batch with the weights of now, which have had ``version`` updates.

        Servers work on it from now on; the trainer's own network makes it at once.
        """
        if not self.engine.engine.remote:
            return self._make(number, version, cursor)
        rule, config = self.method.rollout, self.config
        self.engine.use(str(version))
        prompted, cursor, too_long = self.feed.take(cursor, rule.problems)
        queue = rule.queue(self.policy, config.task, prompted, config.seed, number, self.workers)
        assert queue is not None
        settings = rule.settings(config.decode)
        weights = {name: value.detach().clone() for name, value in trained(self.policy).items()}
        with self.rollout_weights.applied(self.module):
            finish = self.engine.begin(queue, settings, rule.stop_after(self.policy, settings, number))
        return BegunBatch(number, version, queue, finish, cursor, too_long, weights)

    def informed(
        self, rollouts: Rollouts, contexts: Sequence[Context], batch: tuple[int, int], of: int | None = None
    ) -> Rollouts:
        """The rollouts with the prompts of their teachers (`build_teacher_prompts`).

        ``of`` is the context of the method whose teacher writes all analyses; None lets every teacher write its own.
        """
        generator = self.text_generator
        sources = Sources(self.feed.problems, generator.write, self.skill_bank.pairs)
        analyse: Analyse = generator if of is None else lambda _, *asked: generator(of, *asked)
        return build_teacher_prompts(rollouts, contexts, self.config.task, self.policy, analyse, batch, sources)

    def attempts(
        self, rule: RolloutRule, prompted: Sequence[Prompted], seed: int, batch: int, by_student: bool = False
    ) -> list[list[Rollout]]:
        """The attempts at each problem, by all processes together; ``by_student`` by its own weights in any case."""
        with nullcontext() if by_student else self.rollout_weights.applied(self.module):
            decoder = self.engine.decoder
            return rule(self.policy, self.config.task, prompted, self.config.decode, seed, batch, self.workers, decoder)

    def _attempt(self, count: int) -> tuple[list[Rollout], int]:
        """One attempt of the current model at each of the first problems, for a bank; and how many were too long."""
        prompted, _, dropped = self.feed.take(0, min(count, len(self.feed.problems)))
        decode, task = self.config.decode, self.config.task
        rule = PassAtK(problems=count, attempts=1, temperature=1.0)
        if (sampling := self.method.skill_bank and self.method.skill_bank.attempt) is not None:
            rule = replace(rule, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
            decode = replace(decode, length=sampling.length)
        if sampling is not None and sampling.thinking is not None:
            encode = self.policy.encode
            prompted = [
                replace(item, prompt=tuple(encode(task.messages(item.problem), sampling.thinking))) for item in prompted
            ]
        key = make_key(self.config.seed, "memories")
        with self.rollout_weights.applied(self.module):
            tried = rule(self.policy, task, prompted, decode, key, 0, self.workers)
        return [attempt for attempts in tried for attempt in attempts], dropped
