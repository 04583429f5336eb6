"""Co-distillation: two students that teach each other (OPCoD, arXiv 2606.14368, Algorithm 1).

In each round both students are scored, a frozen copy of each becomes the tutor of the other, and then each is trained
by the ordinary `Trainer` for the same number of updates. After the last round both are scored again. The decisions of
the rounds are stored in `rounds.json`, the scores also in `metrics.jsonl`, everything else in the run folders of the
students. The same command resumes a stopped run.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from dllm_sd.config import Config, to_tree
from dllm_sd.errors import InputError
from dllm_sd.evaluation.evaluate import Report, evaluate_run, first
from dllm_sd.files.checkpoint_files import CHECKPOINT_WEIGHTS, read_tensors
from dllm_sd.files.reading import damaged_file, read_own
from dllm_sd.files.typed_json import own_json, read_json
from dllm_sd.files.writing import write_file
from dllm_sd.pairing import check_data, check_model, check_peers, check_references
from dllm_sd.parallel.processes import on_main, together
from dllm_sd.parallel.sharding import gathered
from dllm_sd.policies.weights import PeerWeights
from dllm_sd.settings import Peers, PeerStudent
from dllm_sd.tasks.task import Problem
from dllm_sd.teachers.context import Context
from dllm_sd.teachers.writing import Writing
from dllm_sd.training.checkpoint import (
    check_best,
    check_checkpoint,
    latest_checkpoint,
    load_weights,
    saved_log_sums,
    write_checkpoint,
)
from dllm_sd.training.folder import REPORT, RunFolder
from dllm_sd.training.log_files import LOG_FILES, check_logs
from dllm_sd.training.trainer import Trainer

ROUNDS = "rounds.json"
Scores = Mapping[str, Mapping[str, float]]
"""Accuracy by name of the student and domain."""


def train_config(config: Config) -> dict[Path, dict[str, Any]]:
    """Train the model of the config, or its two students; return the reports by run folder."""
    if config.peers is None:
        return {Path(config.run): Trainer(config).train()}
    report = train_peers(config)
    names = [student.name for student in config.peers.students]
    return {Path(config.run) / "students" / name: report[name] for name in names}


def train_peers(config: Config) -> dict[str, Any]:
    """Train both students; return a report that holds the report of each student under its name."""
    peers = config.peers
    assert peers is not None
    with together():
        check_peers(config)
        problems = config.task.problems("train")
        for student in peers.students:
            own_config = student_config(config, student, None)
            check_data(own_config, problems)
            check_references(own_config, check_model(own_config), problems)
    folder = RunFolder(config)
    if (warning := same_start(peers.students)) is not None:
        on_main(lambda: print(f"dllm-sd: {warning}", file=sys.stderr))
    try:
        if config.resume != "fresh":
            _check_students(config, peers)
        with ExitStack() as undo_on_error:
            undo_on_error.enter_context(folder.changing())
            rounds, reports = _train_rounds(config, peers, undo_on_error.close)
        report = {"rounds": rounds, **reports, "settings": to_tree(config)}
        on_main(lambda: write_file(folder.run / REPORT, json.dumps(report, indent=1)))
    finally:
        folder.release()
    return report


def _train_rounds(
    config: Config, peers: Peers, accepted: Callable[[], None]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train all rounds; return them and the students' reports.

    ``accepted`` is called as soon as both students have passed all checks.
    """
    run, length, reports = Path(config.run), config.updates // peers.rounds, {}
    rounds = on_main(lambda: _read_rounds(run, peers))
    built: set[str] = set()
    final_reports: dict[str, dict[str, Report]] = {}
    for number in range(peers.rounds):
        if number == len(rounds):
            scored = {student.name: _begin(config, student, number, length) for student in peers.students}
            scores = _accuracies(scored)
            too_long = {
                name: {domain: report.too_long for domain, report in domains.items()}
                for name, domains in scored.items()
            }
            accepted()
            lag = lags(scores)
            tutors = {
                student.name: student.tutor and may_tutor(scores[student.name], lag[student.name], peers.tolerance)
                for student in peers.students
            }
            for former in rounds[-1:]:
                former["after"] = scores
            rounds.append({"round": number, "scores": scores, "too_long": too_long, "lag": lag, "tutors": tutors})
            on_main(lambda: _write_rounds(run, rounds, length))
        for student, other in zip(peers.students, reversed(peers.students), strict=True):
            snapshot = _snapshot(run, number + 1, student) / CHECKPOINT_WEIGHTS
            if on_main(snapshot.is_file) and number + 1 < peers.rounds:
                continue
            has_learnt = peers.freeze == "phase" and other is peers.students[0]  # in this round
            frozen = _snapshot(run, number + has_learnt, other)
            tutor = PeerWeights(str(frozen)) if rounds[number]["tutors"][other.name] else None
            trainer = Trainer(student_config(config, student, tutor))
            built.add(student.name)
            if len(built) == len(peers.students):
                accepted()
            reports[student.name] = trainer.train((number + 1) * length)
            _keep(trainer, run, number + 1, student)
            if number + 1 == peers.rounds and "after" not in rounds[-1]:
                load_weights(trainer.policy, _snapshot(run, number + 1, student))  # the trainer holds the best ones
                final_reports[student.name] = _score(trainer, config)
    if final_reports:
        rounds[-1]["after"] = _accuracies(final_reports)
        on_main(lambda: _write_rounds(run, rounds, length))
    return rounds, reports


def _accuracies(reports: Mapping[str, Mapping[str, Report]]) -> dict[str, dict[str, float]]:
    return {name: {domain: report.accuracy for domain, report in domains.items()} for name, domains in reports.items()}


def _write_rounds(run: Path, rounds: Sequence[Mapping[str, Any]], length: int) -> None:
    """Write the rounds to `rounds.json`, and their scores (before each round and after the last) as metrics."""
    all_scores = [entry["scores"] for entry in rounds] + [entry["after"] for entry in rounds[-1:] if "after" in entry]
    lines = [
        {"update": number * length}
        | {
            f"eval/accuracy/{name}/{domain}": accuracy
            for name, domains in scores.items()
            for domain, accuracy in domains.items()
        }
        for number, scores in enumerate(all_scores)
    ]
    write_file(run / LOG_FILES[0], "".join(json.dumps(line) + "\n" for line in lines))
    write_file(run / ROUNDS, json.dumps(rounds, indent=1))


def _check_students(config: Config, peers: Peers) -> None:
    """Check the stored files of both students, so that neither is changed if the other is refused.

    Raises:
        InputError: naming the file that is missing, damaged or of another run.
    """
    run, length = Path(config.run), config.updates // peers.rounds
    begun = len(on_main(lambda: _read_rounds(run, peers)))
    for student in peers.students:
        own_config = student_config(config, student, None)
        student_run = Path(own_config.run)
        if on_main(student_run.exists):
            RunFolder(own_config).release()
        on_main(lambda student_run=student_run: _check_student(student_run, begun, length, config.resume == "force"))
        on_main(lambda student=student: _check_snapshots(run, begun, student))


def _check_student(run: Path, begun: int, length: int, forced: bool) -> None:
    checkpoint = latest_checkpoint(run)
    if checkpoint is None and begun:
        raise InputError(f"{run} has no checkpoint, although its run has begun; put it back, or use resume=fresh")
    if checkpoint is None:
        return
    state = check_checkpoint(checkpoint)
    update = state.update
    if not forced:
        check_best(run, state)
    check_logs(run, update, None if forced else saved_log_sums(checkpoint), state.logged)
    least, most = 0 if state.stopped else max(0, begun - 1) * length, begun * length
    if not forced and not least <= update <= most:
        raise InputError(
            f"{checkpoint} is of update {update}, but {run.parents[1] / ROUNDS} says that it is from {least} to "
            f"{most}; put back what is missing, or use resume=fresh to start again"
        )


def _check_snapshots(run: Path, begun: int, student: PeerStudent) -> None:
    """Check the snapshots of a student at the start of each round; only the last ones are read."""
    for number in range(begun + 1):
        snapshot = _snapshot(run, number, student)
        if number < begun - 1 and (snapshot / CHECKPOINT_WEIGHTS).is_file():
            continue
        if number < begun or (snapshot / CHECKPOINT_WEIGHTS).exists():
            check_checkpoint(snapshot)


def _read_rounds(run: Path, peers: Peers) -> list[dict[str, Any]]:
    """Read the rounds that have begun.

    Raises:
        InputError: if the file does not hold the rounds of these students.
    """
    file, remedy = run / ROUNDS, "put back a copy of it, or use resume=fresh to start the rounds again"
    if not os.path.lexists(file):
        return []
    rounds, names = read_json(file, tuple[_Round, ...], remedy), {student.name for student in peers.students}
    for number, entry in enumerate(rounds):
        if entry.round != number or not entry.tutors.keys() == entry.scores.keys() == entry.lag.keys() == names:
            raise damaged_file(
                file, f"entry {number} is not of round {number} of {' and '.join(sorted(names))}", remedy
            )
    return own_json(read_own(file, remedy))


@dataclass(frozen=True)
class _Round:
    """The entries of a round that every version has written."""

    partial: ClassVar[bool] = True
    round: int
    scores: Mapping[str, Mapping[str, float]]
    lag: Mapping[str, float]
    tutors: Mapping[str, bool]


def student_config(config: Config, student: PeerStudent, tutor: PeerWeights | None) -> Config:
    """The config of one student; without a ``tutor`` its rollouts get no feedback."""
    lora = replace(config.model.lora, start=student.start) if config.model.lora and student.start else config.model.lora
    contexts = tuple(_tutored(config, context, student, tutor) for context in config.method.contexts)
    return replace(
        config,
        run=str(Path(config.run) / "students" / student.name),
        model=replace(config.model, path=student.path or config.model.path, lora=lora),
        method=replace(config.method, contexts=contexts),
        peers=None,
        cache=config.cache or str(Path(config.run) / "written"),
        resume="force",
    )


def first_student(config: Config) -> Config:
    """The config of the first of two peers, without the other's feedback; the config itself where there are none."""
    return config if config.peers is None else student_config(config, config.peers.students[0], None)


def _tutored(config: Config, context: Context, student: PeerStudent, tutor: PeerWeights | None) -> Context:
    if not context.by_peer:
        return context
    writing = None if context.hint is None else context.hint.writing
    assert writing is not None
    assert config.peers is not None
    (other,) = (candidate for candidate in config.peers.students if candidate != student)
    tutored = Writing(tutor, writing.sampling, writing.tolerance) if tutor else None
    return context.tutored(other.domain, student.domain, tutored)


def lags(scores: Scores) -> dict[str, float]:
    """The relative lag of each student behind the better one, summed over domains (Eq. 2).

    It is rounded, so that a lag equal to the tolerance does not exceed it by a float error.
    """
    best = {domain: max(accuracy[domain] for accuracy in scores.values()) for domain in next(iter(scores.values()))}
    return {
        name: round(sum((best[domain] - accuracy[domain]) / best[domain] for domain in best if best[domain] > 0), 9)
        for name, accuracy in scores.items()
    }


def may_tutor(accuracies: Mapping[str, float], lag: float, tolerance: float | None) -> bool:
    """Whether a student may comment on the other's rollouts in a round (Eq. 2).

    A student that has solved no problem may not. If neither has solved one, the paper's lag is 0 / 0; it is 0 here. Two
    equally good students have a lag of 0, so both may. Without a tolerance nobody may.
    """
    return tolerance is not None and lag <= tolerance and any(accuracies.values())


def same_start(students: Sequence[PeerStudent]) -> str | None:
    """A warning if both students begin with the same weights, else None."""
    first_start, second_start = ((student.path, student.start) for student in students)
    if first_start != second_start:
        return None
    return (
        f"students {students[0].name} and {students[1].name} begin with the same weights, so they have nothing "
        "to learn from each other; give each the adapter or checkpoint of a model that is better in its own domain, in "
        "peers.students.N.start or .path"
    )


def by_domain(problems: Sequence[Problem], field: str, count: int | None = None) -> dict[str, list[Problem]]:
    """The problems of each domain; with a count the first ones, the same number of each, ``count`` in all."""
    domains: dict[str, list[Problem]] = {}
    for problem in problems:
        domains.setdefault(str(problem.fields[field]), []).append(problem)
    if count is not None:
        share = max(1, min(count // len(domains), *map(len, domains.values())))
        domains = {domain: first(members, share) for domain, members in domains.items()}
    return dict(sorted(domains.items()))


def _snapshot(run: Path, number: int, student: PeerStudent) -> Path:
    """The folder of a student's weights at the start of a round."""
    return run / "rounds" / str(number) / student.name


def _keep(trainer: Trainer, run: Path, number: int, student: PeerStudent) -> None:
    """Copy the weights of a student's last checkpoint as its snapshot for a round."""
    saved, snapshot = trainer.run / "checkpoints" / f"{trainer.state.update:06d}", _snapshot(run, number, student)

    def copy() -> None:
        if not (snapshot / CHECKPOINT_WEIGHTS).is_file():
            for folder in (snapshot.parent.parent, snapshot.parent):
                folder.mkdir(exist_ok=True)
            weights = {CHECKPOINT_WEIGHTS: read_tensors(saved, CHECKPOINT_WEIGHTS)}
            write_checkpoint(snapshot, weights, vars(trainer.state))

    on_main(copy)


def _begin(config: Config, student: PeerStudent, number: int, length: int) -> dict[str, Report]:
    """Score a student at the start of a round, by domain, and save its snapshot."""
    trainer = Trainer(student_config(config, student, None))
    trainer.train(number * length)
    _keep(trainer, Path(config.run), number, student)
    return _score(trainer, config)


def _score(trainer: Trainer, config: Config) -> dict[str, Report]:
    """Evaluate the current weights of a student, by domain."""
    peers = config.peers
    assert peers is not None
    problems_by_domain = by_domain(config.task.problems("dev"), peers.field, peers.problems)
    settings = replace(config, eval=replace(config.eval, attempts=peers.attempts, temperature=peers.temperature))
    with gathered(trainer.accelerator, trainer.module):
        return {
            domain: evaluate_run(trainer.policy, settings, problems, trainer.rank, trainer.world)
            for domain, problems in problems_by_domain.items()
        }
