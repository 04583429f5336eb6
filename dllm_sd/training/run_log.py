"""What a run logs: its files (`log_files`) and its trackers, which the main process alone has."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from dllm_sd.config import Config
from dllm_sd.objective.plan import Plan
from dllm_sd.parallel.processes import on_main, together
from dllm_sd.policies.loading import AnyPolicy
from dllm_sd.rollouts.rollout import Rollouts
from dllm_sd.training.advantage import GradedPlans
from dllm_sd.training.log_files import LogSums, MetricsLog
from dllm_sd.training.metrics import sample_entry
from dllm_sd.training.pictures import pictures
from dllm_sd.training.traces import Pieces, UpdateTrace
from dllm_sd.training.trackers import Trackers


class RunLog:
    """The logs of a run. All processes call its methods together; those that are not the main one write nothing."""

    def __init__(self, config: Config, policy: AnyPolicy, world: int, files: MetricsLog | None) -> None:
        """Log to ``files``, which the main process has opened."""
        self.config, self.policy, self.world, self.files = config, policy, world, files
        self.pieces = Pieces(policy)
        self.trackers: Trackers | None = None

    @contextmanager
    def started(self, logged: int, start: Mapping[str, Any]) -> Iterator[None]:
        """A context in which the trackers run; ``start`` is what this start of the run is made with."""
        with together():
            if self.files is not None:
                self.trackers = Trackers(self.config, logged, self.files.lines())
                self.files.write_start(start)
        yield
        with together():
            if self.trackers is not None:
                self.trackers.close()

    def metrics(self, metrics: Mapping[str, Any]) -> None:
        """Log the metrics of an update."""
        with together():
            if self.files is not None and self.trackers is not None:
                self.files.write(metrics)
                self.trackers.numbers(metrics)

    def results(self, which: str, reports: Mapping[str, Any], update: int) -> None:
        """Send test reports by decoding schedule to the trackers; ``which`` is before, after or best."""
        with together():
            if self.trackers is not None:
                self.trackers.results(which, reports, update)

    def logs_samples(self, update: int) -> bool:
        """Whether this update logs samples: the first does, then about one in `log.samples_every` with new rollouts."""
        passes = self.config.method.rollout.passes
        batch, part = divmod(update - 1, passes)
        return part == 0 and batch % max(1, self.config.log.samples_every // passes) == 0

    def samples(self, update: int, rollouts: Rollouts) -> None:
        """Log some rollouts with their texts, if this update logs samples."""
        with together():
            if self.files is not None and self.trackers is not None and self.logs_samples(update):
                for slot, rollout in enumerate(rollouts.chosen[: self.config.log.samples]):
                    self.files.write_sample(sample := sample_entry(update, rollout))
                    self.trackers.sample(sample, slot)

    def trace(self, update: int, plan: Plan | None, rollouts: Rollouts) -> UpdateTrace | None:
        """What is traced of this update, if it logs samples."""
        log = self.config.log
        wanted = bool(log.trace and log.samples) and self.policy.chat is not None and self.logs_samples(update)
        return UpdateTrace(plan, rollouts, log.samples, log.trace) if wanted else None

    def traces(self, update: int, trace: UpdateTrace | None, regions: Tensor | None) -> None:
        """Log what was traced on all processes; ``regions`` are those of a critique (`region_map`)."""
        if trace is None:
            return
        found = gather_object(trace.found) if self.world > 1 else trace.found
        with together():
            if self.files is not None:
                self.files.write_traces(trace.entries(update, found, self.pieces, regions))

    def pictures(self, update: int, parts: GradedPlans, regions: Tensor | None, rollouts: Rollouts) -> None:
        """Send pictures of rollouts to the trackers, if this update logs samples."""
        with together():
            if self.trackers is not None and self.config.log.trackers and self.logs_samples(update):
                self.trackers.pictures(pictures(parts, regions, rollouts, self.policy), update)

    def summed_up(self) -> LogSums:
        """What the run says of itself in its metrics, on every process."""
        files, passes = self.files, self.config.method.rollout.passes
        return on_main(lambda: files.summed_up(passes) if files is not None else LogSums())

    def warnings(self) -> list[str]:
        """What the trackers could not be sent, on every process."""
        return on_main(lambda: self.trackers.warnings if self.trackers is not None else [])
