"""What every metric of a run means, and how trackers group it: one table, for TensorBoard and for docs/metrics.md.

`metrics.jsonl` holds the names of the table. Trackers get the same numbers under `shown_name`, whose first word is one
of `GROUPS`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dllm_sd.training.left_out import LEFT_OUT_WORDS, REASONS

GROUPS = ("eval", "rollouts", "student", "teacher", "test", "time", "train")
"""The first word of every name in a tracker."""
_GROUP_OF = {
    "advantage": "teacher",
    "bank": "teacher",
    "calibration": "rollouts",
    "data": "rollouts",
    "engine": "rollouts",
    "probe": "teacher",
    "target": "teacher",
    "trust": "train",
    "writers": "teacher",
}
"""The group of metrics whose name in metrics.jsonl begins with another word."""
_OTHER_THAN_NAMES = re.compile(r"[^\w\-./ ]", re.ASCII)


@dataclass(frozen=True)
class Metric:
    """A metric: its meaning in one sentence, and when it is sent to trackers."""

    meaning: str
    sent: Literal["always", "once above 0", "once it changes"] = "always"
    """Counts of rare events, and values that follow from the config, are sent to trackers only from the first update
    at which they change, since they say nothing before. `metrics.jsonl` has every value."""


def _rare(meaning: str) -> Metric:
    return Metric(meaning, "once above 0")


METRICS = {
    "loss": Metric("The loss of the update, over all processes; null if the update was skipped."),
    "sites": Metric("Graded sites of the update, over all processes."),
    "canvases": Metric("Canvases of the update that have a site."),
    "lr": Metric("Learning rate of the update."),
    "grad_norm": Metric("Norm of the gradient before it is clipped to optim.max_grad_norm."),
    "divergence": Metric("Mean over sites of the divergence, before clip and trust, summed over targets; in nats."),
    "clip_share": Metric(
        "Share of the divergence that its clip removes, from the sums over all sites. It is above 1 where clip `entry` "
        "makes the sum negative, and below 0 where the clip of the ratio raises the loss of `policy_gradient`."
    ),
    "weights_unchanged": _rare("1 for an update whose step changed no weight (lost in rounding, or a gradient of 0)."),
    "updates_skipped": _rare("Updates since the start that were skipped because no rollout was left to train on."),
    "trust/clipped": Metric(
        "Share of sites where the clip of the ratio makes the gradient 0 (trust `group_advantage`), or where "
        "the weight is above the cap (`importance_cap`)."
    ),
    "student/entropy": Metric("Mean over sites of the student's entropy over the full vocabulary, in nats."),
    "teacher/entropy": Metric("Mean over sites of the first teacher's entropy over the full vocabulary, in nats."),
    "teacher/agreement": Metric("Share of sites where student and first teacher rank the same token first."),
    "teacher/advantage": Metric(
        "Mean over sites of the drawn token's log-probability under the first teacher minus that under the student."
    ),
    "target/shift": Metric("Target `pmi`: mean over sites of KL(target || plain distribution)."),
    "target/bound_share": Metric("Target `pmi`: share of vocabulary entries whose log-ratio is beyond the bound."),
    "target/disagreement": Metric(
        "Target `barycenter`: mean over sites of the Jensen-Shannon divergence of its two teachers."
    ),
    "target/alpha": Metric("Target `barycenter`: mean share of the plain distribution in the exponent."),
    "advantage/prefix": Metric("Mean advantage before the first wrong step, of rollouts with a critique."),
    "advantage/error": Metric("Mean advantage in the first wrong step; a good critique makes it negative."),
    "advantage/after": Metric("Mean advantage after the first wrong step."),
    "advantage/right": Metric("Mean advantage in correct rollouts."),
    "advantage/localisation": Metric(
        "Mean absolute advantage in the first wrong step, divided by that of all other sites."
    ),
    "writers/written": Metric("Texts that were requested for hints."),
    "writers/cached": _rare("Requested texts that were found in the cache."),
    "bank/skills": Metric("Skills in the bank."),
    "bank/mistakes": Metric("Mistakes in the bank."),
    "bank/updated": Metric("1 if the bank of skills changed."),
    "bank/successes": Metric("Correct attempts from which the bank was made or updated."),
    "bank/failures": Metric("Wrong attempts from which the bank was made or updated."),
    "bank/candidates/": Metric("Entries that were proposed for the bank, by kind."),
    "bank/layers/": Metric("Entries that joined the bank, by layer."),
    "bank/unmerged/": _rare("Entries of the bank that could not be merged, by reason."),
    "rollouts/problems": Metric("Problems of this batch of rollouts.", "once it changes"),
    "rollouts/attempts": Metric(
        "Attempts that count: up to the first correct one, if method.rollout.until_solved is set.", "once it changes"
    ),
    "rollouts/decoded": Metric(
        "Attempts that were decoded; more than rollouts/attempts only with method.rollout.ahead.", "once it changes"
    ),
    "rollouts/pass_rate": Metric("Share of problems with a correct attempt; none for references."),
    "rollouts/first_try": Metric("Share of problems whose first attempt was correct; none for references."),
    "rollouts/kept": Metric("Rollouts that passed the gate and have all hints."),
    "rollouts/cut_hint": _rare("Kept rollouts whose teacher reads a hint without its end (`overflow: cut`)."),
    "rollouts/generated": Metric("Tokens that were decoded, in all attempts, end tokens included."),
    "rollouts/horizon": Metric(
        "Most blocks, steps or tokens of these rollouts, where the horizon is not `complete`.", "once it changes"
    ),
    "rollouts/length": Metric("Mean tokens of the counted attempts up to the horizon, end token included."),
    "rollouts/steps": Metric("Mean decoding steps of the counted attempts."),
    "rollouts/lag": Metric(
        "With method.rollout.lag: updates between the weights that made this batch and those that are trained on it.",
        "once it changes",
    ),
    "rollouts/behind_end": Metric(
        "Share of the positions revealed in the kept rollouts that come after their end token."
    ),
    "rollouts/unknown_prompts": _rare("Share of the unknown token in the prompts, for tokenizers that have one."),
    "rollouts/unknown_completions": _rare(
        "Share of the unknown token in the references that are imitated, for tokenizers that have one."
    ),
    "rollouts/unknown_hints": _rare(
        "Share of the unknown token in the teachers' prompts, for tokenizers that have one."
    ),
    "calibration/used": Metric("Examples from which the subspace was computed."),
    "calibration/cut": _rare("Examples of the subspace that were cut."),
    "engine/retried": _rare("Requests to rollout servers that were sent again, since the start."),
    "engine/found": _rare("Completions of a stopped run that were found on disk and not made again."),
    "engine/logp_gap": Metric("Mean difference of the log-probabilities of servers and trainer, in nats a token."),
    "engine/logp_gap_max": Metric("Largest difference of the log-probabilities of servers and trainer, in nats."),
    "engine/eval_logp_gap": Metric("As engine/logp_gap, for the completions of an evaluation."),
    "eval/accuracy": Metric("Accuracy on the dev split, as a mean over attempts."),
    "eval/accuracy/": Metric("Accuracy of two peers by student and domain, before each round and after the last."),
    "eval/score": Metric("Mean score on the dev split, with partial credit."),
    "eval/length": Metric("Mean length on the dev split, in tokens."),
    "eval/cut": _rare("Attempts without an end token within decode.length, graded as they are."),
    "eval/unread": _rare("Attempts that no answer could be read from, which count as wrong."),
    "probe/student": Metric("Probe: accuracy of the student on eval.probe_problems dev problems."),
    "probe/teacher": Metric(
        "Probe: accuracy of the best teacher with its hint, on problems with a rollout that passes the gate and "
        "has a hint."
    ),
    "probe/gap": Metric("Probe: accuracy of that teacher minus that of the student on the same problems."),
    "probe/imitated": Metric(
        "Probe: accuracy of rollouts that other weights than the student's write for a method that imitates them (SPD)."
    ),
    "probe/imitated_gap": Metric("Probe: that accuracy minus that of the student's rollouts with the same sampling."),
    "probe/divergence": Metric("Probe: mean over sites of the divergence from the target, before the clip."),
    "probe/form": Metric(
        "Probe: of the probability that the teacher adds to the student's, the share that another problem's "
        "hint adds too."
    ),
    "probe/kept": Metric(
        "Probe: share of the divergence from the teacher that is left after support, purification and clip."
    ),
    "probe/mistake/student": Metric(
        "Probe: mean probability of the reference's token under the student, at the first mistakes of rollouts."
    ),
    "probe/mistake/target": Metric("Probe: mean probability of the same tokens under the target."),
    "time/rollouts": Metric("Seconds for rollouts; about 0 where the rollouts of the previous update are used again."),
    "time/learning": Metric("Seconds from the plan to the optimizer step."),
    "time/eval": Metric("Seconds for the evaluation."),
    "time/probe": Metric("Seconds for the probe."),
    **{name: _rare(f"Left out: {words}.") for name, words in LEFT_OUT_WORDS.items()},
    **{prefix: _rare(f"Left out: {words}, by reason.") for prefix, words in REASONS.items()},
}
"""Every metric by its name in metrics.jsonl; a name that ends in / stands for all names that begin with it."""
RESULTS = {
    "test/before/": "of the initial weights",
    "test/after/": "of the last weights",
    "test/best/": "of the weights that are best on the dev split",
}
"""The beginnings of the names of test results in trackers, and the weights that they are of."""
FIGURES = {"accuracy": "Accuracy on the test split", "score": "Mean score on the test split"}
"""The figures of a test report that trackers get."""


def described(name: str) -> Metric | None:
    """The metric of a name in metrics.jsonl; None if the table lacks it."""
    starts = (start for start in METRICS if start.endswith("/") and name.startswith(start))
    return METRICS.get(name) or METRICS.get(next(starts, ""))


def shown_name(name: str) -> str:
    """The name of a metric in trackers, such as ``train/loss`` for ``loss``; it begins with one of `GROUPS`."""
    first, slash, _ = name.partition("/")
    group = _GROUP_OF.get(first, first if slash and first in GROUPS else "train")
    return _OTHER_THAN_NAMES.sub("_", name if slash and group == first else f"{group}/{name}")


def result_values(which: str, reports: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Test reports by decoding schedule as values for trackers; ``which`` is before, after or best."""
    values: dict[str, float] = {}
    for schedule, report in reports.items():
        end = "" if schedule == "trained" else _OTHER_THAN_NAMES.sub("_", f"/{schedule}")
        values |= {f"test/{which}/{figure}{end}": report[figure] for figure in FIGURES if figure in report}
    return values


def meaning(shown: str, name: str | None = None) -> str:
    """The sentence about a value that trackers call ``shown``, and that metrics.jsonl calls ``name`` if it holds it."""
    metric = described(name) if name is not None else None
    if metric is not None:
        return metric.meaning
    start = next((start for start in RESULTS if shown.startswith(start)), None)
    if start is None:
        return ""
    figure, _, schedule = shown.removeprefix(start).partition("/")
    return f"{FIGURES[figure]} {RESULTS[start]}{f', with the decoding of eval.schedules.{schedule}' * bool(schedule)}."


class Sent:
    """Chooses the values that say something; see `Metric.sent`."""

    def __init__(self, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        """Begin with the lines that a run has logged before it was stopped."""
        self._first: dict[str, float] = {}
        self._told: set[str] = set()
        for line in earlier:
            self(line)

    def __call__(self, values: Mapping[str, Any]) -> dict[str, int | float]:
        """The numbers among ``values`` that trackers get, by their names in metrics.jsonl."""
        numbers = {name: x for name, x in values.items() if isinstance(x, int | float) and name != "update"}
        for name, value in numbers.items():
            first = self._first.setdefault(name, value)
            metric = described(name)
            rest = {"once above 0": 0, "once it changes": first}.get(metric.sent if metric else "always")
            if rest is None or value != rest:
                self._told.add(name)
        return {name: value for name, value in numbers.items() if name in self._told}
