"""Runs the claims: probe, tuning, fresh seeds; one thing at a time, each kept when it is done.

Whatever has a record is not done again, and a run that was stopped in the middle goes on from its checkpoint, so that
the same command may be given until nothing is left to do.
"""

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import torch

import dllm_sd
from dllm_sd.config import Config, load_config
from dllm_sd.errors import InputError, Stopped
from dllm_sd.methods import METHODS
from dllm_sd.probing.opening import opened
from dllm_sd.tasks.task import Split
from dllm_sd.training.environment import environment
from dllm_sd.training.peers import first_student
from tools.lab.bases import base_path, digest, make_base
from tools.lab.claims import BASE, Claim, Laboratory, Row, Setting
from tools.lab.critic import running_critic
from tools.lab.records import Record, Records, Stage, results_of
from tools.lab.run_values import measured, values_of
from tools.lab.verdicts import chosen, premise_met

TUNING_SEED = 1
FIRST = 2
"""Updates from which the tokens of an update are counted; peers make at least one in each round."""
QUIET = ["log.progress=false", "log.trackers=[]", "eval.schedules={}", "eval.every=0", "eval.final_problems=0"]
KEPT = ["eval.collapse=0", "checkpoint.every=10", "checkpoint.keep=1"]


class Runner:
    """Runs claims one after the other in a folder."""

    def __init__(self, laboratory: Laboratory, folder: Path, results: Path) -> None:
        """Keep the claims, the folder for bases and runs, and the folder of the records."""
        self.laboratory, self.folder, self.results = laboratory, folder.resolve(), results

    def run(self, claims: Mapping[str, Claim], minutes: float | None = None) -> bool:
        """Run all that is not yet run; return whether nothing is left.

        The first statement of every claim comes first, then the second ones, and so on; last come rows of which no
        statement speaks. When the minutes are over, the run of now saves its state and stops.
        """
        with time_limit(minutes) as over:
            try:
                for name, row in schedule(claims):
                    self._run_row(name, claims[name], row)
            except (KeyboardInterrupt, InputError):  # an interrupt while a model is loaded ends as its error
                if not over():
                    raise
                return False
        return True

    def _run_row(self, name: str, claim: Claim, row: str) -> None:
        """Measure the model, then take a row through probe, tuning and fresh seeds."""
        with self.work(name, claim) as work:
            work.measure_base()
            work.probe(row)
            work.tune(row)
            work.finish(row)

    @contextmanager
    def work(self, name: str, claim: Claim) -> Iterator["Work"]:
        """The work on a claim, with its bases made and its critic running."""
        for base in (claim.base, *claim.needs):
            make_base(base, self.laboratory.bases, self.folder)
        with running_critic() if claim.critic else nullcontext("") as critic:
            yield Work(name, claim, self, results_of(name, self.results), critic)


def schedule(claims: Mapping[str, Claim]) -> list[tuple[str, str]]:
    """Claims and rows in the order in which they are run, each once."""
    turns = max(len(claim.statements) for claim in claims.values())
    ordered: list[tuple[str, str]] = []
    for turn in range(turns + 1):
        for name, claim in claims.items():
            if turn == turns:
                ordered += [(name, row) for row in _with_models(claim, set(claim.rows))]
            elif turn < len(claim.statements):
                ordered += [(name, row) for row in _with_models(claim, claim.statements[turn].rows)]
    return list(dict.fromkeys(ordered))


def _with_models(claim: Claim, rows: set[str]) -> list[str]:
    """The rows in the order of the claim, with the rows whose settings they take."""
    needed = rows | {like for row in rows if (like := claim.rows[row].like) is not None}
    return [row for row in claim.rows if row in needed]


class Work:
    """The work on one claim."""

    def __init__(self, name: str, claim: Claim, runner: Runner, records: Records, critic: str) -> None:
        """Keep what the steps need."""
        self.name, self.claim, self.runner, self.records, self.critic = name, claim, runner, records, critic

    def measure_base(self) -> None:
        """Measure the model before training."""
        command = self.command(None, [f"seed={self.claim.seeds[0]}"])
        self._once("base", BASE, command, lambda: {"values": self._measured(command, None, "test")})

    def probe(self, name: str) -> None:
        """Ask whether the row's teacher has anything to teach."""
        if self.claim.probe == 0:
            return
        row = self.claim.rows[name]
        command = self.command(row, [f"seed={TUNING_SEED}", f"eval.probe_problems={self.claim.probe}"])

        def measure() -> dict[str, Any]:
            with opened(first_student(self.config(command))) as (probe, problems):
                found = probe(problems)
            tree = found.tree()
            return {
                "values": {key.removeprefix("probe/"): value for key, value in found.metrics.items()},
                "found": {"verdict": tree["verdict"], "premise": tree["premise"]},
            }

        self._once("probe", name, command, measure)

    def tune(self, name: str) -> None:
        """Try every setting of the grid with one seed; one setting needs no trial."""
        settings = self.claim.settings(name)
        if len(settings) > 1 and premise_met(self.claim, self.records, name) is not False:
            for setting in settings:
                self._trained("tune", name, setting, TUNING_SEED, "dev")

    def finish(self, name: str) -> None:
        """Train with fresh seeds at the best setting, and measure on the test split and elsewhere."""
        setting = chosen(self.claim, self.records, name)
        if setting is None or premise_met(self.claim, self.records, name) is False:
            return
        for seed in self.claim.seeds:
            self._trained("final", name, setting, seed, "test")

    def command(self, row: Row | None, more: Sequence[str] = ()) -> list[str]:
        """The config and overrides of a run, without its folder."""
        base = base_path(self.claim.base, self.runner.laboratory.bases)
        claim, common = self.claim, [f"model.path={base}", *self.claim.set, *QUIET, *KEPT]
        if row is None:
            return [claim.config, *common, *more]
        rollouts = claim.rollouts if decodes(row) else ()
        return [claim.config, f"method={row.method}", *common, *rollouts, *row.set, *more]

    def _updates(self, name: str, setting: Setting, stage: Stage) -> int:
        """So many updates that the rollouts of the row generate its share of the tokens."""
        row = self.claim.rows[name]
        if not decodes(row) or row.updates_like is not None:
            reference = row.updates_like or next(iter(self.claim.rows))
            its_own = setting if row.like == reference else self.claim.settings(reference)[0]
            return self._updates(reference, its_own, stage)
        tokens, rounds = self._tokens(name, setting), self._rounds(row)
        budget = self.claim.tokens * min(row.share, self.claim.tuning if stage == "tune" else 1.0)
        return rounds * max(1, round(budget / tokens / rounds))

    def _tokens(self, name: str, setting: Setting) -> float:
        """Tokens that the rollouts of one update generate, at the start of a run; the rate does not matter."""
        row = self.claim.rows[name]
        updates = max(FIRST, self._rounds(row))
        command = self.command(row, [*setting.set, f"seed={TUNING_SEED}", f"updates={updates}"])

        def measure() -> dict[str, Any]:
            with self._run(command) as (run, found):
                return {"values": values_of(run), "found": found}

        return self._once("cost", name, command, measure, setting.variant).values["generated"] / updates

    def _rounds(self, row: Row) -> int:
        """The number that must divide the updates of a row."""
        peers = self.config(self.command(row)).peers
        return 1 if peers is None else peers.rounds

    def _trained(self, stage: Stage, name: str, setting: Setting, seed: int, split: Split) -> None:
        more = [*setting.overrides, f"updates={self._updates(name, setting, stage)}", f"seed={seed}"]
        command = self.command(self.claim.rows[name], more)

        def measure() -> dict[str, Any]:
            with self._run(command) as (run, found):
                values = {**values_of(run), **self._measured(command, run, split)}
            return {
                "values": values if decodes(self.claim.rows[name]) else {**values, "generated": 0.0},
                "found": found,
            }

        self._once(stage, name, command, measure, setting.name, seed)

    def _measured(self, command: Sequence[str], run: Path | None, split: Split) -> dict[str, float]:
        """Accuracy and length of the last weights of a run, or of the model, here and (of tests) elsewhere."""
        claim, config = self.claim, self.config(command)
        values = measured(config, run, split, claim.test if split == "test" else claim.dev)
        for name, overrides in claim.elsewhere.items() if split == "test" else ():
            there = measured(self.config([*command, *overrides]), run, split, claim.test)
            values |= {f"elsewhere/{name}{key.removeprefix('accuracy')}": value
                       for key, value in there.items() if key.startswith("accuracy")}  # fmt: skip
        return values

    def _once(
        self,
        stage: Stage,
        row: str,
        command: Sequence[str],
        measure: Callable[[], Mapping[str, Any]],
        setting: str = "",
        seed: int = 0,
    ) -> Record:
        """The record of a command, measured unless it is there."""
        key = " ".join(command)
        bases = {name: digest(name, self.runner.laboratory.bases) for name in (self.claim.base, *self.claim.needs)}
        if (there := self.records.find((stage, row, setting, seed), key, bases)) is not None:
            return there
        start = time.process_time()
        measured = measure()
        record = Record(row, stage, key, setting, seed, made={**_made(), "bases": bases}, **measured)
        record = replace(record, values={**record.values, "core_seconds": round(time.process_time() - start, 1)})
        self.records.add(record)
        told = ", ".join(f"{key} {value:.4g}" for key, value in record.values.items() if "/" not in key)
        print(f"{self.name} {stage} {row} {setting} {seed or ''}: {told}", flush=True)
        return record

    @contextmanager
    def _run(self, command: Sequence[str]) -> Iterator[tuple[Path, dict[str, str]]]:
        """The folder of the trained run, which is removed when its values are taken, and why it stopped if it did.

        A run that could not go on, for example with a loss that is not finite, ends with the weights of that moment.
        """
        name = hashlib.sha256(" ".join(command).encode()).hexdigest()[:16]
        folder = self.runner.folder / "runs" / self.name / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        found: dict[str, str] = {}
        try:
            dllm_sd.train(self.config(command, folder))
        except (FloatingPointError, Stopped) as error:
            found["stopped"] = str(error)
        yield folder, found
        shutil.rmtree(folder)

    def config(self, command: Sequence[str], run: Path | None = None) -> Config:
        """The config of a command, for a run in this folder, with the laboratory's folder and critic filled in."""
        texts = [text.replace("LAB/", f"{self.runner.folder}/").replace("CRITIC", self.critic) for text in command]
        return load_config(texts[0], [*texts[1:], *([] if run is None else [f"run={run}"])])


def decodes(row: Row) -> bool:
    """Whether the method of a row makes rollouts."""
    return METHODS[row.method].method.rollout.decodes


def _made() -> dict[str, Any]:
    """When and with what something is measured."""
    told = environment(torch.device("cpu"), 1)
    return {key: told[key] for key in ("started", "commit", "versions", "processor")}


@contextmanager
def time_limit(minutes: float | None) -> Iterator[Callable[[], bool]]:
    """Interrupt this process, as Ctrl-C does, when the minutes are over; gives a function that says whether they are.

    A process in the background, for which shells have Ctrl-C ignored, is interrupted as well.
    """
    end = inf if minutes is None else time.monotonic() + 60 * minutes
    former = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGALRM: signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT)),
    }
    if minutes is not None:
        signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield lambda: time.monotonic() >= end
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in former.items():
            signal.signal(number, handler)
