"""What is taken from a run: sums and means of its log, and the accuracy of its last weights."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean

from dllm_sd.config import Config
from dllm_sd.evaluation.evaluate import evaluate_run, first
from dllm_sd.policies.loading import build_policy
from dllm_sd.policies.policy import Policy
from dllm_sd.tasks.task import Split
from dllm_sd.training.checkpoint import latest_checkpoint, load_weights
from dllm_sd.training.peers import ROUNDS, by_domain

LAST = 5
"""Updates over which the entropy at the end of a run is averaged."""


def run_folders(run: Path) -> dict[str, Path]:
    """The folders of a run by student: one without a name, or those of two peers."""
    students = sorted((run / "students").glob("*/metrics.jsonl"))
    return {file.parent.name: file.parent for file in students} or {"": run}


def values_of(run: Path) -> dict[str, float]:
    """Updates, generated tokens, seconds and the student's entropy at the end, of peers the mean over both.

    Of peers also ``tutored``, the share of phases in which the other one was allowed to comment.
    """
    logs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for folder in run_folders(run).values()
    ]
    values = {
        "updates": mean(log[-1]["update"] for log in logs),
        "generated": mean(_total(log, "rollouts/generated") for log in logs),
        "seconds": mean(_total(log, "time/rollouts") + _total(log, "time/learning") for log in logs),
    }
    entropies = [[line["student/entropy"] for line in log if line.get("student/entropy") is not None] for log in logs]
    if all(entropies):
        values["entropy"] = mean(mean(one[-LAST:]) for one in entropies)
    if (rounds := run / ROUNDS).is_file():
        tutors = [may for one in json.loads(rounds.read_text(encoding="utf-8")) for may in one["tutors"].values()]
        values["tutored"] = mean(map(float, tutors))
    return {key: round(value, 4) for key, value in values.items()}


def _total(log: list[Mapping[str, float]], key: str) -> float:
    return sum(line.get(key) or 0 for line in log)


def measured(config: Config, run: Path | None, split: Split, count: int) -> dict[str, float]:
    """Accuracy in percent and mean length of the last weights of a run, else of the model.

    Of peers these are means over both; their accuracies follow by student, and by student and domain.
    """
    problems = first(config.task.problems(split), count)
    accuracies, lengths = dict[str, float](), list[float]()
    domains = by_domain(problems, config.peers.field) if config.peers else {}
    for name, policy in _policies(config, run):
        for domain, asked in {"": problems, **domains}.items():
            report = evaluate_run(policy, config, asked, 0, 1)
            accuracies["/".join(filter(None, ("accuracy", name, domain)))] = round(100 * report.accuracy, 2)
            if not domain:
                lengths.append(report.length)
    of_students = [accuracy for key, accuracy in accuracies.items() if key.count("/") < 2]
    means = {"accuracy": round(mean(of_students), 2), "length": round(mean(lengths), 2)}
    return {**accuracies, **means, "n": float(len(problems))}


def _policies(config: Config, run: Path | None) -> Iterator[tuple[str, Policy]]:
    """The model with the weights that are asked for; of peers each student's."""
    if config.peers is None:
        yield "", _policy(config, run)
        return
    for student in config.peers.students:
        own = replace(config, model=replace(config.model, path=student.path))
        yield student.name, _policy(own, None if run is None else run / "students" / student.name)


def _policy(config: Config, run: Path | None) -> Policy:
    policy = build_policy(config.model)
    if run is not None:
        checkpoint = latest_checkpoint(run)
        assert checkpoint is not None, f"{run} has no checkpoint"
        load_weights(policy, checkpoint)
    return policy
