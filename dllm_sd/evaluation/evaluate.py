"""Evaluation: decode held-out problems with the training sampler, grade them with the training grader, report."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from dllm_sd.config import Config
from dllm_sd.decoding.decoder import Decoder
from dllm_sd.decoding.decoder import decode as decode_prompts
from dllm_sd.decoding.settings import Decoding, Meter
from dllm_sd.errors import EmptySplit, InputError
from dllm_sd.evaluation.estimates import wilson_interval
from dllm_sd.evaluation.generations import measures, summarise
from dllm_sd.evaluation.recording import GENERATIONS, SETTINGS, GradedAttempt, Record, Verdict, begin, digest, finish
from dllm_sd.files.locking import FolderLock
from dllm_sd.files.writing import writable, write_file
from dllm_sd.parallel.processes import on_main, together
from dllm_sd.policies.policy import Policy
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.rules import encode_problem
from dllm_sd.settings import USUAL_FINAL_PROBLEMS, Evaluation
from dllm_sd.tasks.sources import final_split
from dllm_sd.tasks.task import Problem, Task
from dllm_sd.trajectory import Trajectory

REPORT = "report.json"


@dataclass(frozen=True)
class ProblemResult:
    """The attempts at one problem, in order."""

    problem: str
    texts: tuple[str, ...]
    correct: tuple[bool, ...]
    scores: tuple[float, ...]
    parsed: tuple[str | None, ...]
    lengths: tuple[int, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """Accuracy over ``n`` problems; `accuracy` averages over attempts (avg@k)."""

    n: int
    accuracy: float
    ci95: tuple[float, float]
    score: float
    pass_at_k: dict[int, float]
    maj_at_k: dict[int, float]
    """Accuracy of the answer that most of the attempts agree on."""
    length: float
    """Tokens of a completion, up to and including its end."""
    tokens_per_step: float
    """Tokens per forward of a row."""
    tokens_per_second: float
    """Over the time of this call; resumed attempts count neither in tokens nor in time."""
    occupancy: float
    """Share of the decoder's slots that held an active row; 0 where nothing was decoded."""
    too_long: int
    """Problems that were left out, and are not among the ``n``, because their prompt is longer than `max_prompt`."""
    cut: int
    """Attempts without an end token within `decode.length`; they are graded as they are."""
    unread: int
    """Attempts from which no answer could be parsed; they count as wrong."""
    seconds: float
    extra: Mapping[str, float]
    """What the task measures beside accuracy, and its chance level."""
    verdicts: tuple[Verdict, ...] = field(default=(), repr=False)
    """The verdicts on each problem, in order; not part of `tree`."""

    def tree(self) -> dict[str, Any]:
        """Return the metrics as they are written to report.json."""
        plain = ("n", "accuracy", "score", "length", "tokens_per_step", "occupancy", "too_long", "cut", "unread")
        tree = {
            **{name: getattr(self, name) for name in plain},
            "pass_at_k": {str(k): value for k, value in self.pass_at_k.items()},
            "maj_at_k": {str(k): value for k, value in self.maj_at_k.items()},
            **self.extra,
            "time/seconds": self.seconds,
            "time/tokens_per_second": self.tokens_per_second,
        }
        return tree | {"ci95": list(wilson_interval(tree["accuracy"], self.n))}  # of the task's own accuracy, if any


def trees(reports: Mapping[str, Report]) -> dict[str, Any]:
    """The metrics of reports by decoding schedule, as they are written to report.json."""
    return {name: report.tree() for name, report in reports.items()}


def evaluate(
    policy: Policy,
    task: Task,
    problems: Sequence[Problem],
    decode: Decoding,
    *,
    temperature: float = 0.0,
    attempts: int = 1,
    seed: int = 0,
    max_prompt: int = 512,
    thinking: bool | None = None,
    rank: int = 0,
    world: int = 1,
    record: Record | None = None,
    decoder: Decoder | None = None,
    seen: Callable[[Trajectory], object] | None = None,
) -> tuple[Report, list[ProblemResult]]:
    """Decode and grade every problem; ``decoder`` decodes instead of the policy's own, and ``seen`` is shown the rows.

    Randomness is keyed by (seed, problem, attempt) and the model's mode is restored, so that an evaluation does not
    affect training. Problems are distributed over ``world`` processes, which all return the full result. With a
    ``record`` each attempt is written when it ends, and attempts that it already holds are not decoded again.

    Raises:
        InputError: if no problem is left to evaluate, or two have one id.
    """
    start = time.perf_counter()
    with together():
        check_ids(problems)
        prompted = [encode_problem(policy, task, problem, max_prompt, thinking) for problem in problems[rank::world]]
    mine = [item for item in prompted if item is not None]
    lines = dict(record.lines) if record else {}
    jobs = [(item, i) for item in mine for i in range(attempts) if (item.problem.id, i) not in lines]
    meter, fresh = Meter(), 0

    def write(rows: Tensor, trajectory: Trajectory) -> None:
        nonlocal fresh
        if seen is not None:
            seen(trajectory)
        lengths, steps, ended = (x.tolist() for x in (trajectory.length, trajectory.num_steps, trajectory.ended))
        for place, row in enumerate(rows.tolist()):
            item, attempt = jobs[row]
            text = policy.text(trajectory.tokens[place, : lengths[place]].tolist())
            grade = task.grade(item.problem, text)
            verdict = (grade.correct, grade.score, grade.parsed)
            ends = (lengths[place], steps[place], ended[place])
            line = GradedAttempt(item.problem.id, digest(item.problem), attempt, text, *verdict, *ends)
            lines[line.id, attempt], fresh = line, fresh + lengths[place]
            if record is not None:
                record.append(line)

    with together():
        if jobs:
            keys = [make_key(seed, item.problem.id, attempt, "evaluate") for item, attempt in jobs]
            settings = replace(decode, temperature=temperature)
            prompts = [item.prompt for item, _ in jobs]
            decode_prompts(decoder or policy.decoder, prompts, settings, keys, finished=write, meter=meter)
    own = [[lines[item.problem.id, i] for i in range(attempts)] for item in mine]
    dropped, counts = len(prompted) - len(mine), [meter.rows, meter.slots, fresh]
    if world > 1:
        own = [line for _, line in sorted(gather_object(list(enumerate(own))), key=lambda pair: pair[0])]
        dropped = sum(gather_object([dropped]))
        counts = [sum(column) for column in zip(*gather_object([counts]), strict=True)]
    if not own:
        raise _none_left(dropped, max_prompt)
    if record is not None:
        record.problems = [group[0].id for group in own]
    seconds = time.perf_counter() - start
    by_id = {problem.id: problem for problem in problems}
    graded = [(by_id[group[0].id], line.grade) for group in own for line in group]
    asked = list({problem.id: problem for problem, _ in graded}.values())
    return _report(own, dropped, counts, seconds, measures(task, graded, asked)), [_item(group) for group in own]


def evaluate_run(
    policy: Policy,
    config: Config,
    problems: Sequence[Problem],
    rank: int,
    world: int,
    schedule: str | None = None,
    record: Record | None = None,
    decoder: Decoder | None = None,
    seen: Callable[[Trajectory], object] | None = None,
) -> Report:
    """Evaluate with the settings of a run; training and ``dllm-sd eval`` both call this.

    ``schedule`` is one of `eval.schedules`; None takes the run's decoding settings for held-out problems. ``decoder``
    decodes instead of the policy's own, and ``seen`` is shown what this process decodes.
    """
    report, _ = evaluate(
        policy,
        config.task,
        problems,
        config.held_out(schedule),
        temperature=config.eval.temperature,
        attempts=config.eval.attempts,
        seed=config.seed,
        max_prompt=config.max_prompt,
        thinking=config.eval.thinking,
        rank=rank,
        world=world,
        record=record,
        decoder=decoder,
        seen=seen,
    )
    return report


def evaluate_into(folder: Path, policy: Policy, config: Config, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate on the test split under the run's own decoding and under each of `eval.schedules`; resumable.

    Args:
        folder: gets generations.jsonl and report.json. What it holds of an evaluation with the same settings is kept
            and completed; anything else is replaced.
        policy: the model.
        config: task, decoding and evaluation settings.
        settings: everything needed to repeat the evaluation; written into the report.

    Returns:
        The report of the run's own decoding, with those of all schedules under ``schedules``.

    Raises:
        InputError: if no problem is left to evaluate, or the folder is in use, holds other files or cannot be written.
    """
    processes = PartialState()
    with together():
        wanted = test_problems(config)
        longest, thinking = config.max_prompt, config.eval.thinking
        if all(encode_problem(policy, config.task, problem, longest, thinking) is None for problem in wanted):
            raise _none_left(len(wanted), config.max_prompt)
    lock = FolderLock(folder, "evaluation folder", "give another --out")
    asked = hashlib.sha256("".join(f"{problem.id} {digest(problem)}\n" for problem in wanted).encode()).hexdigest()
    on_main(lambda: _claim(folder, lock, {**settings, "problems": asked}))
    try:
        reports, evaluated = dict[str, Any](), list[str]()
        for schedule in (None, *config.eval.schedules):
            name = schedule or "trained"
            with together():
                record = Record(folder, name, processes.process_index)
            report = evaluate_run(
                policy, config, wanted, processes.process_index, processes.num_processes, schedule, record
            )
            reports[name], evaluated = report.tree(), record.problems
        split = {"split": "dev"} if final_split(config.task) == "dev" else {}
        tree = {
            "task": settings["task"]["name"],
            **split,
            **reports["trained"],
            "schedules": reports,
            "settings": settings,
        }
        among = set(evaluated)
        order = [problem.id for problem in wanted if problem.id in among]
        on_main(lambda: finish(folder, order, list(reports), config.eval.attempts))
        on_main(lambda: write_file(folder / REPORT, json.dumps(tree, indent=1)))
    finally:
        lock.release()
    return tree


def test_problems(config: Config) -> list[Problem]:
    """Return the problems that an evaluation uses, those of the `final_split` of the task.

    Raises:
        InputError: if there are none, or two of them have one id.
    """
    problems = config.task.problems(final_split(config.task))
    wanted = first(problems, config.eval.final_problems or len(problems))
    check_ids(wanted)
    return wanted


def final_problems(config: Config) -> tuple[list[Problem], str | None]:
    """The test problems on which a run is compared before and after training.

    Returns:
        The problems, and a sentence if there are none although the config does not ask for that.

    Raises:
        InputError: if the config asks for problems and there are none, or they cannot be read.
    """
    wanted = config.eval.final_problems
    if wanted == 0:
        return [], None
    try:
        problems = config.task.problems(final_split(config.task))
        return first(problems, USUAL_FINAL_PROBLEMS if wanted is None else wanted), None
    except EmptySplit as reason:
        if wanted is not None:
            raise
        return [], f"there will be no test results: {reason} Set eval.final_problems=0 to skip the test."


def about_counts(
    asked: Evaluation, dev: Sequence[Problem], test: Sequence[Problem], probed: Sequence[Problem] = ()
) -> list[str]:
    """Say where a config asks for more problems than a split holds; an empty split is not used, a default not meant."""
    splits = {"problems": dev, "final_problems": test, "probe_problems": probed}
    wanted = {name: count for name in splits if (count := getattr(asked, name)) != getattr(Evaluation(), name)}
    return [
        f"eval.{name} is {count:,}, but there are {len(splits[name]):,} such problems; all of them are taken"
        for name, count in wanted.items()
        if count is not None and 0 < len(splits[name]) < count
    ]


def check_ids(*splits: Sequence[Problem]) -> None:
    """Refuse two problems of a split with the same id, since attempts are stored and metrics computed by id.

    Raises:
        InputError: naming the id, and what differs.
    """
    for problems in splits:
        by_id: dict[str, Problem] = {}
        for problem in problems:
            if (earlier := by_id.get(problem.id)) is not None:
                names = [*{**earlier.fields, **problem.fields}]
                differ = [name for name in names if earlier.fields.get(name) != problem.fields.get(name)]
                words = f"with another {differ[0]!r:.60}" if differ else "with the same fields"
                raise InputError(f"problem {problem.id!r} occurs twice, {words}; give every problem an id of its own")
            by_id[problem.id] = problem


def _claim(folder: Path, lock: FolderLock, settings: Mapping[str, Any]) -> None:
    """Lock an evaluation folder, and remove the files of an evaluation with other settings from it."""
    with writable(repr(str(folder)), "give another --out"):
        lock.acquire()
        try:
            _refuse_others(folder)
            begin(folder, settings)
        except BaseException:
            lock.release()
            raise


def _refuse_others(folder: Path) -> None:
    """Refuse to overwrite what is not an evaluation, and to write through symbolic links."""
    if (folder / "checkpoints").is_dir() and (folder / "config.yaml").is_file():
        raise InputError(f"{str(folder)!r} is a run folder; give another --out, such as eval/TASK in it")
    if (folder / REPORT).exists() and not (folder / SETTINGS).exists():
        raise InputError(f"{str(folder / REPORT)!r} is the report of something else; give another --out")
    for path in (folder / REPORT, folder / SETTINGS, folder / GENERATIONS, *folder.glob(".generations.*")):
        if path.is_symlink():
            raise InputError(f"{str(path)!r} is a symbolic link, which is not followed; give another --out")
        if path.exists() and not path.is_file():
            raise InputError(
                f"{str(path)!r} is not a file, and an evaluation writes one there; move it away, or give another --out"
            )


def _none_left(dropped: int, max_prompt: int) -> InputError:
    return InputError(f"no problem is left to evaluate ({dropped} prompts exceed max_prompt {max_prompt}); raise it")


def _item(group: Sequence[GradedAttempt]) -> ProblemResult:
    names = ("generation", "correct", "score", "parsed", "length", "steps")
    return ProblemResult(group[0].id, *(tuple(getattr(line, name) for line in group) for name in names))


def _report(
    groups: Sequence[Sequence[GradedAttempt]],
    dropped: int,
    counts: Sequence[int],
    seconds: float,
    extra: Mapping[str, float],
) -> Report:
    figures = summarise([[line.grade for line in group] for group in groups])
    lines = [line for group in groups for line in group]
    tokens, (rows, slots, fresh) = sum(line.length for line in lines), counts
    low, high = figures["ci95"]
    return Report(
        n=figures["n"],
        accuracy=figures["accuracy"],
        ci95=(low, high),
        score=figures["score"],
        pass_at_k={int(k): share for k, share in figures["pass_at_k"].items()},
        maj_at_k={int(k): share for k, share in figures.get("maj_at_k", {}).items()},
        length=tokens / len(lines),
        tokens_per_step=tokens / max(1, sum(line.steps for line in lines)),
        tokens_per_second=fresh / seconds,
        occupancy=rows / max(1, slots),
        too_long=dropped,
        cut=sum(line.ended is False for line in lines),
        unread=sum(line.parsed is None for line in lines),
        seconds=seconds,
        extra=extra,
        verdicts=tuple(Verdict(g[0].id, g[0].digest, tuple(line.correct for line in g)) for g in groups),
    )


def first(problems: Sequence[Problem], count: int) -> list[Problem]:
    """The first ``count`` problems of a split (all of them if there are fewer)."""
    return [problems[i] for i in range(min(count, len(problems)))]
