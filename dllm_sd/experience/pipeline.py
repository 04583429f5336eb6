"""The rollout pipeline: the processes share the problems, decode, grade and gate, and teacher prompts are added."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from dllm_sd.config import Config
from dllm_sd.experience.feed import Feed
from dllm_sd.experience.rollout_engine import RolloutEngine
from dllm_sd.experience.rollout_weights import RolloutWeights
from dllm_sd.experience.skill_bank import SkillBankState
from dllm_sd.experience.text_generator import TextGenerator
from dllm_sd.parallel.processes import on_main
from dllm_sd.policies.loading import AnyPolicy
from dllm_sd.policies.weights import TeacherModel, Weights
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.attempt_queue import Workers
from dllm_sd.rollouts.rollout import Prompted, Rollout, Rollouts
from dllm_sd.rollouts.rules import PassAtK, RolloutRule, gather
from dllm_sd.tasks.task import Problem
from dllm_sd.teachers.prompts import Sources, build_teacher_prompts
from dllm_sd.writers import Cache


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
        self.engine_metrics: dict[str, float] = {}
        """Of the last batch (`RolloutEngine.check`)."""
        self.skill_bank = SkillBankState(self.method.skill_bank, config.task, self.text_generator.write, config.seed)

    def open(self, bank: Mapping[str, Any] | None, update: int = 0) -> dict[str, int]:
        """Prepare the subspace and the skill bank once, from the initial weights or a checkpoint; returns counts.

        ``update`` counts the updates that the weights have had.
        """
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
        self.engine.use(str(batch * rule.passes))
        prompted, cursor, dropped = self.feed.take(cursor, rule.problems)
        tried = self._attempts(rule, prompted, config.seed, batch)
        self.engine_metrics = self.engine.check(tried, rule.settings(config.decode))
        rollouts = gather(rule, self.method.gate, tried)
        sources = Sources(self.feed.problems, self.text_generator.write, self.skill_bank.pairs)
        informed = build_teacher_prompts(
            *(
                rollouts,
                self.method.contexts,
                config.task,
                self.policy,
                self.text_generator,
                (config.seed, batch),
                sources,
            )
        )
        if damaged := sum(self.workers.gather([self.text_generator.damaged_texts()])):
            informed = replace(informed, counts={**informed.counts, "damaged": float(damaged)})
        return informed, cursor, dropped

    def _attempts(self, rule: RolloutRule, prompted: Sequence[Prompted], seed: int, batch: int) -> list[list[Rollout]]:
        """The attempts at each problem, by all processes together."""
        with self.rollout_weights.applied(self.module):
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
