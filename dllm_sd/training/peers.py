"""Two students that teach each other (OPCoD, arXiv 2606.14368, Algorithm 1), by means of the one trainer.

A round: both are scored, each is frozen as the other's tutor, and then each learns for as many updates; at the end both
are scored once more. All that the rounds decide is in `rounds.json`, its scores also in `metrics.jsonl`, all else in
the students' own run folders; the same command goes on from there.
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
from dllm_sd.training.metrics import LOG_FILES, check_logs
from dllm_sd.training.trainer import Trainer

ROUNDS = "rounds.json"
Scores = Mapping[str, Mapping[str, float]]
"""Name of a student: domain: accuracy."""


def train(config: Config) -> dict[Path, dict[str, Any]]:
    """Train what the config says, one model or two students; their reports by run folder."""
    if config.peers is None:
        return {Path(config.run): Trainer(config).train()}
    report = train_peers(config)
    return {Path(config.run) / "students" / one.name: report[one.name] for one in config.peers.students}


def train_peers(config: Config) -> dict[str, Any]:
    """Train both students and return the report, which has that of each under its name."""
    peers = config.peers
    assert peers is not None
    with together():
        check_peers(config)
        problems = config.task.problems("train")
        for student in peers.students:
            own = student_config(config, student, None)
            check_data(own, problems)
            check_references(own, check_model(own), problems)
    folder = RunFolder(config)
    if (sentence := alike(peers.students)) is not None:
        on_main(lambda: print(f"dllm-sd: {sentence}", file=sys.stderr))
    try:
        if config.resume != "fresh":
            _check_students(config, peers)
        with ExitStack() as refusable:
            refusable.enter_context(folder.changing())
            rounds, reports = _train_rounds(config, peers, refusable.close)
        report = {"rounds": rounds, **reports, "settings": to_tree(config)}
        on_main(lambda: write_file(folder.run / REPORT, json.dumps(report, indent=1)))
    finally:
        folder.release()
    return report


def _train_rounds(
    config: Config, peers: Peers, begun: Callable[[], None]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All rounds, and the students' reports; ``begun`` is called once neither student can be refused any more."""
    run, length, reports = Path(config.run), config.updates // peers.rounds, {}
    rounds = on_main(lambda: _read_rounds(run, peers))
    met: set[str] = set()
    ended: dict[str, dict[str, Report]] = {}
    for number in range(peers.rounds):
        if number == len(rounds):
            found = {student.name: _begin(config, student, number, length) for student in peers.students}
            scores = _accuracies(found)
            too_long = {name: {domain: one.too_long for domain, one in own.items()} for name, own in found.items()}
            begun()
            lag = lags(scores)
            tutors = {name: may_tutor(scores[name], value, peers.tolerance) for name, value in lag.items()}
            for former in rounds[-1:]:
                former["after"] = scores
            rounds.append({"round": number, "scores": scores, "too_long": too_long, "lag": lag, "tutors": tutors})
            on_main(lambda: _write_rounds(run, rounds, length))
        for student, other in zip(peers.students, reversed(peers.students), strict=True):
            done = _snapshot(run, number + 1, student) / CHECKPOINT_WEIGHTS
            if on_main(done.is_file) and number + 1 < peers.rounds:
                continue
            changed = peers.freeze == "phase" and other is peers.students[0]
            frozen = _snapshot(run, number + changed, other)
            tutor = PeerWeights(str(frozen)) if rounds[number]["tutors"][other.name] else None
            trainer = Trainer(student_config(config, student, tutor))
            met.add(student.name)
            if len(met) == len(peers.students):
                begun()
            reports[student.name] = trainer.train((number + 1) * length)
            _keep(trainer, run, number + 1, student)
            if number + 1 == peers.rounds and "after" not in rounds[-1]:
                load_weights(trainer.policy, _snapshot(run, number + 1, student))  # the report left the best ones there
                ended[student.name] = _score(trainer, config)
    if ended:
        rounds[-1]["after"] = _accuracies(ended)
        on_main(lambda: _write_rounds(run, rounds, length))
    return rounds, reports


def _accuracies(found: Mapping[str, Mapping[str, Report]]) -> dict[str, dict[str, float]]:
    return {name: {domain: one.accuracy for domain, one in own.items()} for name, own in found.items()}


def _write_rounds(run: Path, rounds: Sequence[Mapping[str, Any]], length: int) -> None:
    """Write down what the rounds have decided, and as metrics the scores at the start of each and at the end of all."""
    scored = [one["scores"] for one in rounds] + [one["after"] for one in rounds[-1:] if "after" in one]
    lines = [
        {"update": number * length}
        | {f"eval/accuracy/{name}/{domain}": value for name, own in scores.items() for domain, value in own.items()}
        for number, scores in enumerate(scored)
    ]
    write_file(run / LOG_FILES[0], "".join(json.dumps(line) + "\n" for line in lines))
    write_file(run / ROUNDS, json.dumps(rounds, indent=1))


def _check_students(config: Config, peers: Peers) -> None:
    """Read all that both students have on the disk, so that neither changes where the other would be refused.

    Raises:
        InputError: naming what is missing, damaged or of another run.
    """
    run, length = Path(config.run), config.updates // peers.rounds
    begun = len(on_main(lambda: _read_rounds(run, peers)))
    for student in peers.students:
        own = student_config(config, student, None)
        if on_main(Path(own.run).exists):
            RunFolder(own).release()
        on_main(lambda own=own: _check_student(Path(own.run), begun, length, config.resume == "force"))
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
    check_logs(run, update, None if forced else saved_log_sums(checkpoint))
    least, most = 0 if state.stopped else max(0, begun - 1) * length, begun * length
    if not forced and not least <= update <= most:
        raise InputError(
            f"{checkpoint} is of update {update}, but {run.parents[1] / ROUNDS} says that it is from {least} to "
            f"{most}; put back what is missing, or use resume=fresh to begin anew"
        )


def _check_snapshots(run: Path, begun: int, student: PeerStudent) -> None:
    """The student as it was when rounds began: the last one's is read, and earlier ones show that theirs is done."""
    for number in range(begun + 1):
        kept = _snapshot(run, number, student)
        if number < begun - 1 and (kept / CHECKPOINT_WEIGHTS).is_file():
            continue
        if number < begun or (kept / CHECKPOINT_WEIGHTS).exists():
            check_checkpoint(kept)


def _read_rounds(run: Path, peers: Peers) -> list[dict[str, Any]]:
    """The rounds that have begun.

    Raises:
        InputError: if the file holds something else.
    """
    file, remedy = run / ROUNDS, "put back a copy of it, or use resume=fresh to begin the rounds anew"
    if not os.path.lexists(file):
        return []
    rounds, names = read_json(file, tuple[_Round, ...], remedy), {student.name for student in peers.students}
    for number, one in enumerate(rounds):
        if one.round != number or not one.tutors.keys() == one.scores.keys() == one.lag.keys() == names:
            raise damaged_file(
                file, f"entry {number} is not of round {number} of {' and '.join(sorted(names))}", remedy
            )
    return own_json(read_own(file, remedy))


@dataclass(frozen=True)
class _Round:
    """What every version has written of a round."""

    partial: ClassVar[bool] = True
    round: int
    scores: Mapping[str, Mapping[str, float]]
    lag: Mapping[str, float]
    tutors: Mapping[str, bool]


def student_config(config: Config, student: PeerStudent, tutor: PeerWeights | None) -> Config:
    """The config of one student; without a ``tutor`` its rollouts get no feedback."""
    lora = replace(config.model.lora, start=student.start) if config.model.lora and student.start else config.model.lora
    contexts = tuple(_tutored(config, one, student, tutor) for one in config.method.contexts)
    return replace(
        config,
        run=str(Path(config.run) / "students" / student.name),
        model=replace(config.model, path=student.path or config.model.path, lora=lora),
        method=replace(config.method, contexts=contexts),
        peers=None,
        cache=config.cache or str(Path(config.run) / "written"),
        resume="force",
    )


def _tutored(config: Config, context: Context, student: PeerStudent, tutor: PeerWeights | None) -> Context:
    if not context.by_peer:
        return context
    writing = None if context.hint is None else context.hint.writing
    assert writing is not None
    assert config.peers is not None
    (other,) = (one for one in config.peers.students if one != student)
    asked = Writing(tutor, writing.sampling, writing.tolerance) if tutor else None
    return context.tutored(other.domain, student.domain, asked)


def lags(scores: Scores) -> dict[str, float]:
    """How far each student is behind the better one, relatively and summed over domains (Eq. 2).

    Rounded, so that a lag of just the tolerance is not above it by the last digit of a float.
    """
    best = {domain: max(own[domain] for own in scores.values()) for domain in next(iter(scores.values()))}
    return {
        name: round(sum((best[domain] - own[domain]) / best[domain] for domain in best if best[domain] > 0), 9)
        for name, own in scores.items()
    }


def may_tutor(own: Mapping[str, float], lag: float, tolerance: float) -> bool:
    """Whether a student may comment in a round (Eq. 2); one that has solved nothing never may.

    Where nobody has solved anything the paper's lag is 0 / 0, and here 0: nobody knows enough to say anything. Two
    equally good students have no lag, and both may.
    """
    return lag <= tolerance and any(own.values())


def alike(students: Sequence[PeerStudent]) -> str | None:
    """A sentence on students that begin with the same weights."""
    first, second = ((one.path, one.start) for one in students)
    if first != second:
        return None
    return (
        f"students {students[0].name} and {students[1].name} begin with the same weights, and a student has nothing to "
        "learn from its like; give each the adapter or checkpoint of a model that is better in its own domain, in "
        "peers.students.N.start or .path"
    )


def by_domain(problems: Sequence[Problem], field: str, count: int) -> dict[str, list[Problem]]:
    """The first problems of each domain, the same number of each, ``count`` in all."""
    found: dict[str, list[Problem]] = {}
    for problem in problems:
        found.setdefault(str(problem.fields[field]), []).append(problem)
    share = max(1, min(count // len(found), *map(len, found.values())))
    return {domain: first(some, share) for domain, some in sorted(found.items())}


def _snapshot(run: Path, number: int, student: PeerStudent) -> Path:
    """Where a student is kept as it was when a round began."""
    return run / "rounds" / str(number) / student.name


def _keep(trainer: Trainer, run: Path, number: int, student: PeerStudent) -> None:
    """Keep a student as it is after the last update that it saved."""
    saved, kept = trainer.run / "checkpoints" / f"{trainer.state.update:06d}", _snapshot(run, number, student)

    def copy() -> None:
        if not (kept / CHECKPOINT_WEIGHTS).is_file():
            for folder in (kept.parent.parent, kept.parent):
                folder.mkdir(exist_ok=True)
            write_checkpoint(kept, {CHECKPOINT_WEIGHTS: read_tensors(saved, CHECKPOINT_WEIGHTS)}, vars(trainer.state))

    on_main(copy)


def _begin(config: Config, student: PeerStudent, number: int, length: int) -> dict[str, Report]:
    """Score a student for a round, by domain, and keep it as a tutor."""
    trainer = Trainer(student_config(config, student, None))
    trainer.train(number * length)
    _keep(trainer, Path(config.run), number, student)
    return _score(trainer, config)


def _score(trainer: Trainer, config: Config) -> dict[str, Report]:
    """How good a student is as it stands, by domain."""
    peers = config.peers
    assert peers is not None
    asked = by_domain(config.task.problems("dev"), peers.field, peers.problems)
    settings = replace(config, eval=replace(config.eval, attempts=peers.attempts, temperature=peers.temperature))
    with gathered(trainer.accelerator, trainer.module):
        return {
            domain: evaluate_run(trainer.policy, settings, problems, trainer.rank, trainer.world)
            for domain, problems in asked.items()
        }
