"""The verdict of a probe: the rules that make it from the findings, and their thresholds."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dllm_sd.probing.accuracy import Gap, Rate
from dllm_sd.probing.signal import Shares, SiteGroup

FEW = 8
"""Fewest problems on which accuracies are compared, and fewest sites at which probabilities are."""
MIN_GAP = 0.02
"""By how much the accuracy of a teacher must exceed that of the student, and its own with a wrong hint."""
MIN_RISE = 0.02
"""By how much the target must raise the probability of the reference's token at the first deviation."""
MOST = 0.5
"""The share of the divergence from which a part of the loss is said to remove most of it."""
FORM = 2 / 3
"""The share of the probability added by the teacher from which, if the hint of another problem adds it too, the signal
is said to concern form. In a vocabulary of few tokens two hints agree by chance."""
SOLVED = 0.95
"""Accuracy of a student that has little left to learn."""


@dataclass(frozen=True)
class Teacher:
    """A teacher, decoding under its hint."""

    context: int
    """Index in `method.contexts`."""
    name: str
    taught: bool
    """Whether the loss pulls the student towards it; the others only take part in the target."""
    gap: Gap
    revealed: float | None
    """Mean share of the completion's positions that it is shown; None where none are."""


@dataclass(frozen=True)
class Control:
    """The first teacher with one of its inputs replaced (`controls.ControlKind`)."""

    accuracy: Rate | None
    """None where it did not decode."""
    against: Rate | None
    """Accuracy of the teacher with its own inputs on the same problems."""
    divergence: float | None
    """KL(student || control), the mean over sites in nats."""
    form: float | None
    """Of the probability that the teacher adds to the student's, the share that the control adds too."""


@dataclass(frozen=True)
class Findings:
    """What a probe has measured."""

    problems: int
    student: Rate | None
    """On all problems."""
    rollouts: Mapping[str, int]
    """How many rollouts were made, are correct, pass the gate, and have a hint (of those that pass)."""
    teachers: tuple[Teacher, ...] = ()
    controls: Mapping[str, Control] = field(default_factory=dict)
    groups: Mapping[str, SiteGroup] = field(default_factory=dict)
    shares: Shares | None = None
    premise: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """Mean probabilities of the reference's token in rollouts that pass the gate (`signal.premise`)."""
    premise_sites: Mapping[str, int] = field(default_factory=dict)
    """Over how many sites these are taken, by place."""
    has_teacher: bool = True
    judged_by_outcome: bool = False
    """Whether the outcome of each rollout decides if the student is pulled towards a teacher or away from it (SGSD)."""
    imitated: Gap | None = None
    """Of a method that imitates what other weights write: these in the place of the teacher, against the student."""

    @property
    def best(self) -> Teacher | None:
        """Of the teachers that the student is pulled towards, the one with the largest gap."""
        taught = [teacher for teacher in self.teachers if teacher.taught]
        return max(taught, key=lambda teacher: teacher.gap.gap, default=None)

    @property
    def metrics(self) -> dict[str, float]:
        """The main numbers, as a run logs them, without those that are not known."""
        best, another, at = self.best, self.controls.get("another"), "mistake"
        reader = "target" if "target" in self.premise else f"teacher {best.context}" if best else ""
        numbers = {
            "probe/student": self.student and self.student.accuracy,
            "probe/teacher": best and best.gap.teacher.accuracy,
            "probe/gap": best and best.gap.gap,
            "probe/imitated": self.imitated and self.imitated.teacher.accuracy,
            "probe/imitated_gap": self.imitated and self.imitated.gap,
            "probe/divergence": (group := self.groups.get("all")) and group.divergence,
            "probe/form": another and another.form,
            "probe/kept": self.shares and self.shares.left,
            "probe/mistake/student": self.premise.get("student", {}).get(at),
            "probe/mistake/target": self.premise.get(reader, {}).get(at),
        }
        return {name: float(number) for name, number in numbers.items() if number is not None}

    def tree(self) -> dict[str, Any]:
        """The findings and the verdict, as JSON values."""
        promising, sentences = verdict(self)
        tree = asdict(self)
        if self.shares is not None:
            tree["shares"]["left"] = self.shares.left
        tree["verdict"] = {"promising": promising, "because": [asdict(sentence) for sentence in sentences]}
        return tree


@dataclass(frozen=True)
class Sentence:
    """The sentence of a rule that applies."""

    rule: str
    says: str
    promising: bool | None
    """What follows: False, nothing can be learnt; True, the teacher knows more; None, neither."""


Rule = Callable[[Findings], tuple[str, bool | None] | None]


def no_teacher(findings: Findings) -> tuple[str, bool | None] | None:
    """The method has no teacher, and imitates no other weights either."""
    if findings.has_teacher or findings.imitated is not None:
        return None
    return "this method has no teacher, so there is nothing to compare the student with", None


def writer_against_student(findings: Findings) -> tuple[str, bool | None] | None:
    """Rollouts of the weights that a method without a teacher imitates, against the student's, sampled alike."""
    if (imitated := findings.imitated) is None:
        return None
    if imitated.teacher.n < FEW:
        return _too_few(imitated.teacher.n), None
    figures = _figures(imitated)
    if imitated.ci95[1] < 0:
        return (
            "the weights that write the rollouts are less accurate than the student with the same sampling, so it "
            f"would learn mistakes that are not its own ({figures})"
        ), False
    if imitated.ci95[0] > 0:
        return (
            f"the weights that write the rollouts are more accurate than the student with the same sampling ({figures})"
        ), True
    return (
        "the weights that write the rollouts are neither clearly more nor clearly less accurate than the student with "
        f"the same sampling ({figures})"
    ), None


def nothing_passes(findings: Findings) -> tuple[str, bool | None] | None:
    """No rollout passes the gate, or none of those that do has a hint."""
    counts = findings.rollouts
    if not findings.has_teacher or not counts["made"] or counts["hinted"]:
        return None
    remedy = "take easier problems, raise method.rollout.attempts, or begin with method=sft"
    if not counts["passing"]:
        return (
            f"none of {counts['made']} rollouts passes method.gate, so every update would be skipped: {remedy}",
            False,
        )
    without = f"none of the {counts['passing']} rollouts that pass method.gate has a hint"
    if not counts["right"]:
        return f"{without}, and none is correct, so every update would be skipped: {remedy}", False
    return f"{without}, so every update would be skipped; see what the hints of method.contexts need", False


def too_few(findings: Findings) -> tuple[str, bool | None] | None:
    """Fewer than `FEW` problems."""
    best = findings.best
    if best is None or best.gap.teacher.n >= FEW:
        return None
    return _too_few(best.gap.teacher.n), None


def teacher_against_student(findings: Findings) -> tuple[str, bool | None] | None:
    """The gap and its interval, against 0 and `MIN_GAP`."""
    best = findings.best
    if best is None or best.gap.teacher.n < FEW:
        return None
    low, high = best.gap.ci95
    figures = _figures(best.gap)
    if high < 0:
        return f"the teacher is less accurate than the student, so nothing can be learnt from it ({figures})", False
    if best.gap.gap < MIN_GAP:
        return f"the teacher is not more accurate than the student, so nothing can be learnt from it ({figures})", False
    if low <= 0:
        return (
            f"the teacher may be more accurate than the student, but the interval contains 0 ({figures}): raise "
            "--problems",
            None,
        )
    return f"the teacher is more accurate than the student ({figures})", True


def hint_unused(findings: Findings) -> tuple[str, bool | None] | None:
    """With the hint of another problem the teacher is as accurate, within `MIN_GAP`."""
    pair = _accuracies(findings, "another")
    if pair is None or pair[1] < pair[0] - MIN_GAP:
        return None
    return (
        "the teacher does not use its hint: with the hint of another problem it is as accurate "
        f"({_percent(pair[1])} against {_percent(pair[0])})"
    ), False


def hint_copied(findings: Findings) -> tuple[str, bool | None] | None:
    """Without the question the teacher is as accurate, within `MIN_GAP`, and more accurate than the student."""
    pair, best = _accuracies(findings, "no_question"), findings.best
    if pair is None or best is None or best.gap.gap < MIN_GAP or pair[1] < pair[0] - MIN_GAP:
        return None
    return (
        f"the teacher does not need the question: with the hint alone it is as accurate ({_percent(pair[1])} against "
        f"{_percent(pair[0])}), so it may only copy the hint, which the student does not have"
    ), None


def about_form(findings: Findings) -> tuple[str, bool | None] | None:
    """The hint of another problem adds at least `FORM` of the probability that the teacher adds."""
    control = findings.controls.get("another")
    if control is None or control.form is None or control.form < FORM:
        return None
    return (
        "most of the signal concerns the form of the answer, not its content: the hint of another problem adds "
        f"{_percent(control.form)} of the probability that the teacher's own hint adds"
    ), None


def target_against_student(findings: Findings) -> tuple[str, bool | None] | None:
    """At the student's mistakes the target must raise the probability of the reference's token by `MIN_RISE` at least.

    A mistake is a first deviation of a wrong rollout. If no rollout that passes the gate has one, the sites count at
    which the student gives the reference's token less than one half. Fewer than `FEW` sites settle nothing.
    """
    places = {
        "mistake": "at the student's first mistakes",
        "doubts": "where the student gives the reference's token less than one half",
    }
    readers, taught = findings.premise, [f"teacher {x.context}" for x in findings.teachers if x.taught]
    place = next((place for place in places if readers and readers["student"][place] is not None), None)
    if place is None:
        return None
    who = ["target"] if "target" in readers else taught
    known = [value for name in who if (value := readers[name][place]) is not None]
    student = readers["student"][place]
    if student is None or not known or max(known) >= student + MIN_RISE:
        return None
    name, figures = "target" if "target" in readers else "teacher", f"{max(known):.3f} against {student:.3f}"
    sites = findings.premise_sites.get(place, 0)
    if sites < FEW:
        return (
            f"{places[place]}, the {name} does not give the reference's token clearly more probability than the "
            f"student does ({figures}), but there are only {sites} such sites, which is too few: raise --problems"
        ), None
    if max(known) < student:
        return (
            f"{places[place]}, the {name} gives the reference's token a lower probability than the student does "
            f"({figures}), so the loss pulls the student away from it"
        ), False
    return (
        f"{places[place]}, the {name} gives the reference's token hardly more probability than the student does "
        f"({figures})"
    ), None


def taken_away(findings: Findings) -> tuple[str, bool | None] | None:
    """Support, purification or clip removes `MOST` of the divergence."""
    shares = findings.shares
    parts = {} if shares is None else {
        "support": shares.support, "purification": shares.purification, "clip": shares.clip
    }  # fmt: skip
    most = [f"the {name} removes {_percent(share)}" for name, share in parts.items() if share >= MOST]
    return (
        (f"most of the signal does not reach the loss: {' and '.join(most)} of the divergence", None) if most else None
    )


def judged_by_outcome(findings: Findings) -> tuple[str, bool | None] | None:
    """The outcome gives each teacher its sign, so that teachers may teach which are no better than the student."""
    if not findings.judged_by_outcome or not findings.teachers:
        return None
    return (
        "the outcome of each rollout decides whether a teacher is followed or avoided, so one that is wrong, or whose "
        "hint is the same for every problem, can teach as well"
    ), None


def little_left(findings: Findings) -> tuple[str, bool | None] | None:
    """The student solves `SOLVED` of the problems."""
    student = findings.student
    if student is None or student.n < FEW or student.accuracy < SOLVED:
        return None
    return f"the student already solves {_percent(student.accuracy)} of the problems, so little is left to learn", None


RULES: tuple[Rule, ...] = (
    no_teacher,
    writer_against_student,
    nothing_passes,
    too_few,
    teacher_against_student,
    hint_unused,
    hint_copied,
    target_against_student,
    about_form,
    taken_away,
    judged_by_outcome,
    little_left,
)
ABOUT_TEACHERS = {"teacher_against_student", "hint_unused", "target_against_student"}
"""Rules that find that teachers teach nothing; they settle nothing where the outcome judges each teacher."""


def verdict(findings: Findings) -> tuple[bool | None, list[Sentence]]:
    """Whether the method can be expected to help, and the sentences of the rules that apply.

    False if a rule finds that nothing can be learnt; else True if the teacher is more accurate; else None.
    """
    said = [(rule.__name__, rule(findings)) for rule in RULES]
    sentences = [Sentence(name, *answer) for name, answer in said if answer is not None]
    if findings.judged_by_outcome:
        sentences = [
            replace(one, promising=None) if one.rule in ABOUT_TEACHERS and one.promising is False else one
            for one in sentences
        ]
    settled = {sentence.promising for sentence in sentences}
    return (False if False in settled else True if True in settled else None), sentences


def _accuracies(findings: Findings, kind: str) -> tuple[float, float] | None:
    """The accuracies of the first teacher and of a control on the same problems."""
    control = findings.controls.get(kind)
    if control is None or control.accuracy is None or control.against is None or control.accuracy.n < FEW:
        return None
    return control.against.accuracy, control.accuracy.accuracy


def _too_few(problems: int) -> str:
    return f"only {problems} problems could be compared, which is too few: raise --problems"


def _figures(compared: Gap) -> str:
    low, high = compared.ci95
    return (
        f"{_percent(compared.teacher.accuracy)} against {_percent(compared.student.accuracy)} of "
        f"{compared.teacher.n} problems; difference {_points(compared.gap)} points, 95 % interval {_points(low)} to "
        f"{_points(high)}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"
