"""Intervals over seeds, and what they say of a claim's statements."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt
from statistics import mean, variance

from tools.lab.claims import BASE, Claim, Comparison, Setting, Statement
from tools.lab.records import Record, Records

STUDENT_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""Two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom."""
NOT_RUN, NO_PREMISE, REPRODUCED = "not run yet", "premise not met", "reproduced"
NOT_REPRODUCED, UNDECIDED = "not reproduced", "not reproduced, undecided"
"""An undecided statement may still be shown by more seeds or longer runs: no interval lies on the wrong side."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, or a difference of two such means, with its 95 % interval."""

    value: float
    half: float
    """Half the width of the interval; infinite where one run says nothing about others."""

    @property
    def low(self) -> float:
        """The lower end."""
        return self.value - self.half

    @property
    def high(self) -> float:
        """The upper end."""
        return self.value + self.half

    def __str__(self) -> str:
        return f"{self.value:.1f}" if self.half in (0, inf) else f"{self.value:.1f} ± {self.half:.1f}"


def interval(values: Sequence[float]) -> Estimate:
    """The mean of one row's seeds, by Student's t."""
    if len(values) == 1:
        return Estimate(values[0], inf)
    return Estimate(mean(values), _quantile(len(values) - 1) * sqrt(variance(values) / len(values)))


def difference(a: Sequence[float], b: Sequence[float], exact: bool = False) -> Estimate:
    """Mean of ``a`` less that of ``b``, by Student's t with a common variance.

    With ``exact``, ``b`` is one number without spread between seeds, such as the accuracy of the model before training.
    """
    if exact:
        return Estimate(mean(a) - b[0], interval(a).half)
    freedom = len(a) + len(b) - 2
    if min(len(a), len(b)) == 1:
        return Estimate(mean(a) - mean(b), inf)
    common = ((len(a) - 1) * variance(a) + (len(b) - 1) * variance(b)) / freedom
    return Estimate(mean(a) - mean(b), _quantile(freedom) * sqrt(common * (1 / len(a) + 1 / len(b))))


def _quantile(freedom: int) -> float:
    return STUDENT_95[freedom - 1] if freedom <= len(STUDENT_95) else 1.96 + 2.5 / freedom


def chosen(claim: Claim, records: Records, row: str) -> Setting | None:
    """The setting with the highest dev accuracy, the earlier one of two; None until all are tried.

    A row with one setting has no choice, and is not tuned.
    """
    if (like := claim.rows[row].like) is not None:
        return chosen(claim, records, like)
    if len(settings := claim.settings(row)) == 1:
        return settings[0]
    accuracies = {one.setting: one.values["accuracy"] for one in records.of("tune", row)}
    if not all(setting.name in accuracies for setting in settings):
        return None
    return max(settings, key=lambda setting: accuracies[setting.name])


def finals(claim: Claim, records: Records, row: str) -> list[Record]:
    """The final runs of a row at its best setting, in the order of seeds; of the base its one measurement."""
    if row == BASE:
        return records.of("base", BASE)[:1]
    if (setting := chosen(claim, records, row)) is None:
        return []
    by_seed = {one.seed: one for one in records.of("final", row) if one.setting == setting.name}
    return [by_seed[seed] for seed in claim.seeds if seed in by_seed]


def is_finished(claim: Claim, records: Records, row: str) -> bool:
    """Whether a row has all of its final runs."""
    return len(finals(claim, records, row)) == (1 if row == BASE else len(claim.seeds))


def gain(claim: Claim, records: Records, row: str) -> Estimate | None:
    """Accuracy that a row gained over the model before training; None unless both are measured."""
    return compared(Comparison(row, BASE), claim, records)


def premise_met(claim: Claim, records: Records, row: str) -> bool | None:
    """Whether a row may be trained; None if it has to be probed before."""
    if not claim.rows[row].gated or claim.probe == 0:
        return True
    nothing = found_nothing(records, row)
    return None if nothing is None else not nothing


def found_nothing(records: Records, row: str) -> bool | None:
    """Whether the last probe of a row found that nothing can be learnt; None without a probe."""
    probes = records.of("probe", row)
    return probes[-1].found["verdict"]["promising"] is False if probes else None


def compared(one: Comparison, claim: Claim, records: Records) -> Estimate | None:
    """The difference of a comparison; None unless both rows have all of their runs and the value."""
    if not (is_finished(claim, records, one.row) and is_finished(claim, records, one.against)):
        return None
    a, b = ([run.values.get(one.value) for run in finals(claim, records, row)] for row in (one.row, one.against))
    known_a, known_b = ([value for value in values if value is not None] for values in (a, b))
    if not known_a or not known_b:
        return None
    if one.row == BASE:
        return Estimate(-(turned := difference(known_b, known_a, exact=True)).value, turned.half)
    return difference(known_a, known_b, exact=one.against == BASE)


def verdict(statement: Statement, claim: Claim, records: Records) -> str:
    """What the runs say of a statement."""
    if any(premise_met(claim, records, row) is False for row in statement.rows):
        return NO_PREMISE
    estimates = [compared(one, claim, records) for one in statement.holds]
    if any(estimate is None for estimate in estimates):
        return NOT_RUN
    pairs = [(one.margin, estimate) for one, estimate in zip(statement.holds, estimates, strict=True) if estimate]
    if all(estimate.low > -margin for margin, estimate in pairs):
        return REPRODUCED
    return NOT_REPRODUCED if any(estimate.high <= -margin for margin, estimate in pairs) else UNDECIDED


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation with mean ranks of equal values; None if there is none."""
    x, y = (_ranks([pair[i] for pair in pairs]) for i in (0, 1))
    if len(pairs) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    mean_x, mean_y = mean(x), mean(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]
