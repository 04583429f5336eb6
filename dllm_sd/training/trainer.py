"""The training loop from top to bottom: roll out, plan, grade, step, log, evaluate, save."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dllm_sd.config import Config, to_tree
from dllm_sd.errors import InputError, Stopped
from dllm_sd.evaluation.evaluate import Report, about_counts, check_ids, evaluate_run, final_problems, first, trees
from dllm_sd.evaluation.recording import VERDICTS, write_verdicts
from dllm_sd.experience.pipeline import BegunBatch, RolloutPipeline
from dllm_sd.experience.rollout_engine import check_servers
from dllm_sd.files.checkpoint_files import STATE, damaged_checkpoint
from dllm_sd.files.writing import write_file
from dllm_sd.network.finite import fingerprint
from dllm_sd.objective.plan import plan_update
from dllm_sd.pairing import check_data, check_model, check_references, check_tokenizer
from dllm_sd.parallel.processes import any_process, on_main, sum_over_processes, together
from dllm_sd.parallel.sharding import gather_tensors, gathered, prepare, start_accelerator
from dllm_sd.parallel.zero import parameters_in_words
from dllm_sd.policies.loading import build_policy, make_teacher
from dllm_sd.policies.weights import add_adapter, trained
from dllm_sd.pretrained.blueprint import Blueprint
from dllm_sd.probing import Probe
from dllm_sd.rollouts.rollout import Rollouts, UnfinishedBatch
from dllm_sd.tasks.sources import about_dev, about_tests, final_split, rows_left_out
from dllm_sd.tasks.task import Problem
from dllm_sd.teachers.suffix import answer_spans
from dllm_sd.training.advantage import region_map, region_metrics, region_sums
from dllm_sd.training.checkpoint import (
    State,
    best_checkpoint,
    check_best,
    latest_checkpoint,
    load_weights,
    prune_checkpoints,
    restore_ahead,
    restore_run,
    run_tensors,
    save_best,
    save_run,
    saved_log_sums,
    why_no_best,
)
from dllm_sd.training.environment import environment
from dllm_sd.training.folder import FINAL, REPORT, RunFolder, read_report
from dllm_sd.training.learner import Learner
from dllm_sd.training.log_files import MetricsLog, check_logs, log_sums
from dllm_sd.training.metrics import rollout_metrics, site_metrics, site_sums
from dllm_sd.training.optim import build_optimizer, check_optimizer, learning_rate
from dllm_sd.training.outcome import about_device, about_sources, outcome_of, warnings_of
from dllm_sd.training.progress import Interrupt, Progress
from dllm_sd.training.run_log import RunLog
from dllm_sd.training.selection import add_loss, judge
from dllm_sd.training.trackers import check_trackers
from dllm_sd.training.unknown import Unknown, told_of
from dllm_sd.trajectory import Trajectory


class Trainer:
    """Trains one configuration; every process makes one trainer."""

    def __init__(self, config: Config) -> None:
        """Prepare data, folder and model, in this order, so that the cheapest checks come first.

        Raises:
            InputError: if the config, the data, the model or the run folder is wrong; the run folder is left unchanged.
        """
        check_trackers(config.log)
        self.config, self.method, self.run = config, config.method, Path(config.run)
        self.accelerator = start_accelerator(config)
        sharded = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        check_optimizer(config.optim, self.accelerator.device, sharded)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        with together():
            problems = config.task.problems("train")
            self.dev = first(config.task.problems("dev"), config.eval.problems) if config.eval.every else []
            self.test, untested = final_problems(config)
            probed = config.eval.probe_problems if config.eval.probe_every else 0
            self.probe_problems = first(config.task.problems("dev"), probed) if probed else []
            check_ids(self.dev, self.test, self.probe_problems)
            if probed and not self.probe_problems:
                raise InputError("eval.probe_every probes on the dev split, which holds no problems; set it to 0")
            check_data(config, problems)
            blueprint = check_model(config)
            long_references = check_references(config, blueprint, problems)
            unknown_tokens = check_tokenizer(config, blueprint, problems)
            splits = (about_dev(config.task), about_tests(config.task) if self.test else untested)
            counts = about_counts(config.eval, self.dev, self.test, self.probe_problems)
            self.rows_left_out, shared_rows = rows_left_out(config.task)
            about_servers = check_servers(config)
        self.notes = [*filter(None, (*splits, *counts, shared_rows, long_references, *unknown_tokens.values()))]
        self.notes += about_servers
        self.folder = RunFolder(config)
        self.notes += self.folder.notes
        try:
            self._build(blueprint)
            self._restore()
            with self.folder.changing():
                self._open(problems)
        except BaseException:
            self.folder.release()
            raise
        self.unknown = Unknown(self.policy.chat, config.method.rollout.decodes, told_of(config.method, unknown_tokens))
        notes = [*about_sources(config), *about_device(config, self.accelerator.device.type)]
        if self.main:
            for sentence in (*self.notes, *self.pipeline.notes, *notes):
                print(sentence, file=sys.stderr)

    def _build(self, blueprint: Blueprint) -> None:
        """Build the student, its optimizer and the teachers."""
        config = self.config
        with together():
            self.policy = build_policy(blueprint, self.accelerator.device)
        adapters = {weights: add_adapter(weights, self.policy) for weights in self.method.models()}
        self.optimizer = build_optimizer(trained(self.policy).values(), config.optim)
        self.lr = learning_rate(self.optimizer, config.optim, config.updates)
        self.module, self.optimizer = prepare(self.accelerator, self.policy.module, self.optimizer)
        self.models = {
            weights: make_teacher(weights, self.policy, adapter, config.model) for weights, adapter in adapters.items()
        }
        teachers = [self.models[weights] for weights in self.method.weights()]
        self.learner = Learner(config, self.accelerator, self.policy, self.module, self.optimizer, teachers)

    def _restore(self) -> None:
        """Load the latest checkpoint, unless the config says `resume=fresh`."""
        self.state, self.rollouts, self.ahead = State(), None, None
        checkpoint = None if self.config.resume == "fresh" else on_main(lambda: latest_checkpoint(self.run))
        self.resumed = checkpoint is not None
        if checkpoint is None:
            return
        with together():
            if not checkpoint.is_dir():
                raise InputError(
                    f"process {self.rank} does not see {checkpoint}; put the run folder where all processes see it"
                )
        self._load(checkpoint)

    def _open(self, problems: Sequence[Problem]) -> None:
        """Open the rollout pipeline, the progress bar and the log files."""
        config = self.config
        with together():
            self.pipeline = RolloutPipeline(config, problems, self.policy, self.module, self.models, self.accelerator)
        self.first_metrics = self.rows_left_out | self.pipeline.open(self.state.bank, self.state.update, self.ahead)
        self.progress = Progress(self.run.name, config.updates, self.state.update, self.main and config.log.progress)
        self.progress.say(parameters_in_words(self.policy.module))
        self.evaluation_checked: Mapping[str, float] = {}
        """Of the last evaluation (`RolloutEngine.check_evaluation`)."""
        with together():
            if self.main and self.resumed and self.finished:  # otherwise the next save prunes what a killed run left
                prune_checkpoints(self.run, config.checkpoint.keep)
            files = MetricsLog(self.run, self.state.update, self._logged) if self.main else None
        self.log = RunLog(config, self.policy, self.world, files)

    @property
    def _logged(self) -> int:
        """The last update whose metrics are logged; -1 before the evaluation of the initial weights."""
        return self.state.logged if self.resumed else -1

    @property
    def finished(self) -> bool:
        """Whether all updates are done, or the run stopped early."""
        return self.state.update >= self.config.updates or self.state.stopped is not None

    def train(self, until: int | None = None) -> dict[str, Any]:
        """Train to the end and return the report; or train up to update ``until``, save, and return an empty dict.

        Raises:
            KeyboardInterrupt: after Ctrl-C, with the last update saved.
            FloatingPointError: at a non-finite loss or gradient, before it is applied, with the last update saved; or
                at weights that a step made non-finite, with nothing saved since the last checkpoint.
            Stopped: if the run cannot go on, with the last update saved; or with nothing saved since the last
                checkpoint if an update was left between its step and its end.
        """
        self.folder.hold()
        try:
            former = on_main(lambda: read_report(self.run, self._facts())) if self.resumed and self.finished else None
            return former or self._train(until)
        except BaseException:
            self.pipeline.engine.cancel()
            raise
        finally:
            self.folder.release()

    def _train(self, until: int | None) -> dict[str, Any]:
        state, every = self.state, self.config.checkpoint.every
        until = self.config.updates if until is None else until
        start = {"update": state.update, **environment(self.accelerator.device, self.world)}
        with self.log.started(self._logged, start), self.progress, Interrupt(self.progress) as interrupt:
            if self.resumed and not self.finished:
                self.progress.say(f"continuing from update {state.update} of {self.config.updates}")
            self._catch_up()
            if until == 0 and not self.resumed:
                self._save()
            while not self.finished and state.update < until:
                self._advance(state.update + 1)
                interrupted = any_process(self.accelerator, interrupt.asked)
                if interrupted or self.finished or state.update in (until, state.update // every * every):
                    self._save()
                if interrupted and not self.finished:
                    raise KeyboardInterrupt
            if not self.finished:
                return {}
            report = self._report()
            self.pipeline.engine.end()
            return report

    def _catch_up(self) -> None:
        """Make the evaluation that has not ended yet: of the initial weights, or of the update where a run stopped."""
        state = self.state
        if self.resumed and state.unevaluated is None:
            return
        metrics = state.unevaluated or {"update": 0, **self.first_metrics}
        with self._evaluation(metrics):
            if not state.update and not state.before:
                state.before = trees(self._test("testing the initial weights"))
                self.log.results("before", state.before, 0)
            self._evaluate(metrics)
        if self.resumed:
            self._save()

    def _advance(self, update: int) -> None:
        """Learn once more and evaluate; what cannot go on stops the run with the last update saved."""
        state, started = self.state, time.perf_counter()
        former = (state.cursor, state.too_long, state.skipped)
        try:
            metrics = self._update(update)
        except (FloatingPointError, Stopped) as error:
            if self.learner.stepped < update and _can_save(error):  # after a step it is not the last update's weights
                state.cursor, state.too_long, state.skipped = former
                self._write(prune=False)  # keeps earlier checkpoints, in case the run fails here again
            raise
        state.update = update
        state.seconds += time.perf_counter() - started
        add_loss(state, metrics["loss"])
        with self._evaluation(metrics):
            self._evaluate(metrics)
        self.progress.finished(metrics)

    @contextmanager
    def _evaluation(self, metrics: dict[str, Any]) -> Iterator[None]:
        """A context in which an update that is learnt is evaluated; if that fails, it is made when the run goes on."""
        try:
            yield
        except (FloatingPointError, Stopped) as error:
            if _can_save(error):
                self.state.unevaluated = metrics
                self._write(prune=False)
            raise
        self.state.unevaluated = None

    def _update(self, update: int) -> dict[str, Any]:
        """Make one update and return its metrics; ``update`` counts from 1."""
        batch, part = divmod(update - 1, self.method.rollout.passes)
        start = time.perf_counter()
        if part == 0 or self.rollouts is None:
            self.progress.phase("rolling out")
            self.rollouts = self._roll_out(batch)
            self.log.samples(update, self.rollouts)
        rolled = time.perf_counter()
        self.progress.phase("learning")
        keys = self.rollouts.keys(self.config.seed, batch)
        answers = answer_spans(self.policy, self.method.contexts, self.rollouts.kept)
        plan = plan_update(self.method, self.rollouts, keys, part, answers, self.policy.formatting)
        lr, trace = self.lr(update), self.log.trace(update, plan, self.rollouts)
        metrics: dict[str, Any] = {"update": update, "loss": None, "sites": 0, "lr": lr}
        regions = region_map(self.policy, self.method.contexts, self.rollouts)
        if plan is None:
            self.state.skipped += 1
        else:
            before = fingerprint(trained(self.policy).values())
            parts, norm = self.learner.step(plan, self.rollouts, update, lr, trace)
            if not any_process(self.accelerator, fingerprint(trained(self.policy).values()) != before):
                metrics["weights_unchanged"] = 1
            names = self.method.measured
            total = partial(sum_over_processes, self.accelerator)
            sums = total(site_sums([graded for _, graded in parts], names, self.accelerator.device))
            metrics |= site_metrics(sums, names) | {"canvases": plan.size, "grad_norm": norm}
            metrics |= region_metrics(total(region_sums(parts, regions, self.rollouts, self.accelerator.device)))
            self.log.pictures(update, parts, regions, self.rollouts)
        self.log.traces(update, trace, regions)
        for model in self.models.values():
            model.after_update(update, stepped=plan is not None)
        metrics |= rollout_metrics(self.rollouts) | self.unknown(self.rollouts, self.main)
        metrics |= self.pipeline.skill_bank.after_update(update, self.rollouts.chosen)
        stop_after = self.method.rollout.stop_after(self.policy, self.config.decode, batch)
        metrics |= {} if stop_after is None else {"rollouts/horizon": stop_after.count}
        metrics |= self.pipeline.engine_metrics if part == 0 else {}
        metrics |= {"rollouts/too_long": self.state.too_long, "updates_skipped": self.state.skipped}
        return metrics | {"time/rollouts": rolled - start, "time/learning": time.perf_counter() - rolled}

    def _roll_out(self, batch: int) -> Rollouts:
        rollouts, self.state.cursor, dropped = self.pipeline.take(batch, self.state.cursor)
        self.state.too_long += dropped
        return rollouts

    # Evaluation

    def _evaluate(self, metrics: dict[str, Any]) -> None:
        """Evaluate if due, save the best weights, decide whether to stop; then write the metrics of the update."""
        settings, state, report = self.config.eval, self.state, None
        if settings.every and (state.update % settings.every == 0 or state.update == self.config.updates):
            self.progress.phase("evaluating")
            report = self._accuracy(self.dev, None)
            metrics |= {"eval/accuracy": report.accuracy, "eval/score": report.score, "eval/length": report.length}
            metrics |= {"eval/too_long": report.too_long, "eval/cut": report.cut, "eval/unread": report.unread}
            metrics |= {"time/eval": report.seconds}
            metrics |= self.evaluation_checked
        if settings.probe_every and state.update % settings.probe_every == 0:
            self.progress.phase("probing")
            metrics |= self._probe()
        if report is not None:  # judged when nothing can stop the run any more that would have it judged again
            if judge(state, settings, report.accuracy):
                weights = gather_tensors(trained(self.policy))
                on_main(lambda: save_best(self.run, weights, state))
            self.progress.line(metrics)
        self.log.metrics(metrics)

    def _accuracy(self, problems: Sequence[Problem], schedule: str | None, weights: str | None = None) -> Report:
        """Evaluate the current ``weights``, whose name is the number of updates unless it is given."""
        self.pipeline.use(weights or str(self.state.update))
        engine, done, share = self.pipeline.engine, list[Trajectory](), (self.rank, self.world)
        with gathered(self.accelerator, self.module):
            seen = done.append if engine.engine.remote else None
            report = evaluate_run(
                self.policy, self.config, problems, *share, schedule, decoder=engine.decoder, seen=seen
            )
            decode = replace(self.config.held_out(schedule), temperature=self.config.eval.temperature)
            self.evaluation_checked = engine.check_evaluation(done, decode)
        return report

    def _probe(self) -> dict[str, float]:
        """What the teachers have left to teach the student of now (`dllm-sd probe`)."""
        start = time.perf_counter()
        self.pipeline.use(str(self.state.update))
        probe = Probe(self.config, self.pipeline, self.module, self.models, self.accelerator)
        found = probe(self.probe_problems, controls=False).metrics
        return found | {"time/probe": time.perf_counter() - start}

    def _test(self, phase: str, weights: str | None = None) -> dict[str, Report]:
        """Test reports by decoding schedule; `trained` is the run's own `decode` settings."""
        if not self.test:
            return {}
        self.progress.phase(phase)
        return {x or "trained": self._accuracy(self.test, x, weights) for x in (None, *self.config.eval.schedules)}

    def _report(self) -> dict[str, Any]:
        """Test initial, last and best weights, write report.json, and leave the best weights loaded."""
        state, best = self.state, best_checkpoint(self.run) if self.state.best_accuracy >= 0 else None
        after = chosen = self._test("testing the last weights")
        if best is not None and state.best_update != state.update:
            load_weights(self.policy, best)
            chosen = self._test("testing the best weights", f"best-{state.best_update}")
        on_main(lambda: write_verdicts(self.run / VERDICTS, {name: x.verdicts for name, x in chosen.items()}))
        tests = {"after": trees(after), "best": trees(chosen)}
        for which, tested in tests.items():
            self.log.results(which, tested, state.update)
        final = tests["best"].get("trained", {})
        report = {
            **self._facts(),
            **{key: final[key] for key in FINAL if key in final},
            **self._outcome(),
            **tests,
            "settings": to_tree(self.config),
        }
        on_main(lambda: write_file(self.run / REPORT, json.dumps(report, indent=1)))
        return report

    def _facts(self) -> dict[str, Any]:
        """Entries of the report about the run itself, as JSON values."""
        state = self.state
        facts = {
            "task": to_tree(self.config)["task"]["name"],
            **({"split": "dev"} if self.test and final_split(self.config.task) == "dev" else {}),
            "updates": state.update,
            "updates_skipped": state.skipped,
            "too_long": state.too_long,
            "stopped": state.stopped,
            "best_update": state.best_update,
            "best_dev_accuracy": state.best_accuracy,
            "before": state.before,
            "time/updates": state.seconds,
        }
        return json.loads(json.dumps(facts))

    def _outcome(self) -> dict[str, Any]:
        """Entries of the report on what the run left out, and its warnings."""
        sums = self.log.summed_up()
        return {
            "left_out": sums.left_out,
            "outcome": outcome_of(self.state, sums.unchanged),
            "dev_problems": len(self.dev),
            "warnings": [*warnings_of(self.state, sums), *self.log.warnings()],
        }

    # Checkpoints and collectives

    def _load(self, checkpoint: Path) -> None:
        self.state, self.rollouts = restore_run(checkpoint, self.policy, self.optimizer, [*self.models.values()])
        state = self.state
        if self.config.resume == "force":  # the method may have changed, so some entries may be missing or of no use
            on_main(lambda: check_logs(self.run, state.update, None))
            if (reason := on_main(lambda: why_no_best(self.run, state))) is not None:
                self.notes.append(state.without_best(reason))
            return
        on_main(lambda: check_best(self.run, state))
        self.ahead = restore_ahead(checkpoint, self.policy)
        reuses_rollouts = state.update % self.method.rollout.passes != 0
        is_missing = {"rollouts": reuses_rollouts and self.rollouts is None}
        is_missing["bank"] = self.method.skill_bank is not None and state.bank is None
        if names := [name for name, missing in is_missing.items() if missing]:
            raise damaged_checkpoint(checkpoint / STATE, f"it lacks {names[0]!r}, which the next update needs")
        on_main(lambda: check_logs(self.run, state.update, saved_log_sums(checkpoint), state.logged))

    def _save(self) -> None:
        try:
            self.pipeline.settle()
        except Stopped as error:
            if _can_save(error):
                self._write(prune=False)
            raise
        self._write()

    def _write(self, prune: bool = True) -> None:
        keep, state = self.config.checkpoint.keep if prune else None, self.state
        rollouts = self.rollouts if state.update % self.method.rollout.passes else None
        ahead = self.pipeline.unlearnt(-(-state.update // self.method.rollout.passes))
        if isinstance(ahead, BegunBatch):
            ahead = UnfinishedBatch(ahead.number, ahead.version, state.cursor, gather_tensors(ahead.weights))
        state.bank = self.pipeline.skill_bank.tree
        tensors = run_tensors(self.policy, self.optimizer, [*self.models.values()])
        sums = on_main(lambda: log_sums(self.run, state.update, state.logged))
        on_main(lambda: save_run(self.run, tensors, state, rollouts, keep, sums, ahead))
        on_main(lambda: self.pipeline.skill_bank.write_down(self.run))
        if prune:  # a run that stopped in the middle of an update goes on from the completions it had
            self.pipeline.engine.saved()


def _can_save(error: Exception) -> bool:
    """Whether all processes have come to this error, so that they can save together."""
    return not (isinstance(error, Stopped) and error.elsewhere)
