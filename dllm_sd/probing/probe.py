"""The probe: rollouts on held-out problems, exams, signal and controls, put together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dllm_sd.config import Config
from dllm_sd.experience.pipeline import RolloutPipeline
from dllm_sd.losses.divergences import ReverseKL
from dllm_sd.losses.supports import FullVocabulary
from dllm_sd.losses.targets import Each
from dllm_sd.losses.trust import Equal
from dllm_sd.methods.method import Method
from dllm_sd.network.site_head import evaluating, run_at_sites
from dllm_sd.objective.plan import Plan, plan_update
from dllm_sd.parallel.sharding import gathered
from dllm_sd.parts import name_of
from dllm_sd.policies.weights import TeacherModel, Weights
from dllm_sd.probing.accuracy import Exam, Rate, VerdictById, gap, prompt_of, rate, revealed
from dllm_sd.probing.controls import ControlKind, Name, control, find_donors, kinds_for, name_of_rollout
from dllm_sd.probing.deviations import find_deviations
from dllm_sd.probing.signal import (
    Models,
    Sites,
    groups,
    measure_sites,
    of_controls,
    of_method,
    premise,
    premise_places,
    shares,
)
from dllm_sd.probing.verdict import Control, Findings, Teacher
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.gates import All
from dllm_sd.rollouts.rollout import Prompted, Rollout, Rollouts, with_occurrences
from dllm_sd.rollouts.rules import RolloutRule, encode_problem, gather
from dllm_sd.tasks.task import Problem
from dllm_sd.teachers import CONTEXTS, HINTS
from dllm_sd.teachers.suffix import answer_spans
from dllm_sd.trajectory import NEVER


@dataclass(frozen=True)
class _Material:
    """Rollouts with the briefs of some teachers, and the canvases on which these are read."""

    method: Method
    rollouts: Rollouts
    keys: Sequence[int]
    plans: Sequence[Plan]


class Probe:
    """Measures what the method of a run has to teach its student; all processes call it together, each does all of it.

    It takes no step, and all its random numbers have keys of their own, so that a run that is probed stays the same.
    """

    def __init__(
        self,
        config: Config,
        pipeline: RolloutPipeline,
        module: nn.Module,
        models: Mapping[Weights, TeacherModel],
        accelerator: Accelerator,
    ) -> None:
        """Keep the parts of a run.

        Args:
            config: the config of the run.
            pipeline: makes rollouts and teachers' prompts.
            module: the student's network as the accelerator has prepared it.
            models: the models of all weights that the method needs.
            accelerator: what joins the processes of the run.
        """
        self.config, self.method, self.pipeline, self.module = config, config.method, pipeline, module
        self.policy, self.accelerator = pipeline.policy, accelerator
        self.teachers = [models[weights] for weights in self.method.weights()] if self.method.contexts else []
        self.seed = make_key(config.seed, "probe")
        settings = replace(config.held_out(), temperature=config.eval.temperature)
        if any(context.reveals for context in self.method.contexts):
            settings = replace(settings, length=config.decode.length)  # positions are those of the rollouts
        self.exam = Exam(config.task, settings, config.seed)

    def __call__(self, problems: Sequence[Problem], controls: bool = True) -> Findings:
        """Probe with the weights of now; without ``controls`` these are measured at sites, but do not decode."""
        with evaluating(self.policy.module):
            return self._findings(problems, controls)

    def _findings(self, problems: Sequence[Problem], controls: bool) -> Findings:
        config = self.config
        found = (encode_problem(self.policy, config.task, problem, config.max_prompt) for problem in problems)
        prompted = with_occurrences(item for item in found if item is not None)
        student = self._examine([item.problem for item in prompted], [item.prompt for item in prompted])
        roles = self.method.roles()
        teachers = [i for i, role in enumerate(roles) if role == "teacher"]
        if not teachers or not self.method.rollout.decodes or not self.method.target.asks_teachers:
            return self._without_teacher(prompted, student)
        rule = self.method.rollout.unselected()
        tried = self.pipeline.attempts(rule, prompted, self.seed, 0)
        rollouts = gather(rule, All(), tried)
        passing = {name_of_rollout(one) for group in tried for one in self._passing(rule, group)}
        material = self._material(self.method, rollouts)
        subjects = self._subjects(material.rollouts, passing)
        counts = {
            "made": len(rollouts.kept),
            "right": sum(one.grade.correct for one in rollouts.kept),
            "passing": sum(name_of_rollout(one) in passing for one in rollouts.kept),
            "hinted": sum(name_of_rollout(one) in passing for one in material.rollouts.kept),
        }
        graded, verdicts = self._teachers(material, subjects, teachers, student)
        sites = self._sites(material, of_method(self.method, teachers), self.teachers)
        trained = None if sites is None else sites.of(
            torch.tensor([name_of_rollout(one) in passing for one in material.rollouts.kept])
        )  # fmt: skip
        informed = next((i for i in teachers if _adds(self.method, i)), teachers[0])
        spoilt = self._controls(material, informed, passing, verdicts.get(informed, {}), controls)
        found_premise = {} if trained is None else premise(trained)
        places = {} if trained is None else premise_places(trained)
        return Findings(
            problems=len(prompted),
            student=rate(student),
            rollouts=counts,
            teachers=graded,
            controls={kind: one for kind, (one, _) in spoilt.items()},
            groups={} if sites is None else groups(sites),
            shares=None if trained is None else shares(trained, self.method),
            premise=found_premise | {kind: probabilities for kind, (_, probabilities) in spoilt.items()},
            premise_sites={place: int(where.sum()) for place, where in places.items()},
            judged_by_outcome=self.method.trust.judges_each_teacher,
        )

    def _examine(
        self, problems: Sequence[Problem], prompts: Sequence[Sequence[int]], **options: Any
    ) -> dict[str, bool]:
        with gathered(self.accelerator, self.module), self.accelerator.autocast():
            return self.exam(self.policy, problems, prompts, **options)

    def _passing(self, rule: RolloutRule, group: Sequence[Rollout]) -> list[Rollout]:
        counted = [rollout for rollout in group if rollout.counted]
        return self.method.gate(rule.choose(counted)) if counted else []

    def _without_teacher(self, prompted: Sequence[Prompted], student: VerdictById) -> Findings:
        """If other weights write what is imitated: their rollouts, against the student's with the same sampling."""
        none: dict[str, int] = dict.fromkeys(("made", "right", "passing", "hinted"), 0)
        found = Findings(len(prompted), rate(student), none, has_teacher=False)
        if not self.method.imitates_other_weights:
            return found
        rule, verdicts = self.method.rollout.unselected(), list[VerdictById]()
        for by_student in (True, False):
            tried = self.pipeline.attempts(rule, prompted, self.seed, 0, by_student=by_student)
            verdicts.append({group[0].problem.id: group[0].grade.correct for group in tried if group})
        return replace(found, imitated=gap(*verdicts))

    def _material(self, method: Method, rollouts: Rollouts, informed: int | None = None) -> _Material:
        """Add the briefs, and lay out the canvases of all passes."""
        hinted = self.pipeline.informed(rollouts, method.contexts, (self.seed, 0), informed)
        keys = hinted.keys(self.seed, 0)
        answers = answer_spans(self.policy, method.contexts, hinted.kept)
        parts = range(method.rollout.passes)
        plans = [plan_update(method, hinted, keys, part, answers, self.policy.formatting) for part in parts]
        return _Material(method, hinted, keys, [plan for plan in plans if plan is not None])

    def _subjects(self, rollouts: Rollouts, passing: set[Name]) -> list[int]:
        """Of each problem the first rollout that passes the gate and has its hints, as an index."""
        first: dict[str, int] = {}
        for row, rollout in enumerate(rollouts.kept):
            if name_of_rollout(rollout) in passing:
                first.setdefault(rollout.problem.id, row)
        return list(first.values())

    def _verdicts(
        self, material: _Material, context: int, subjects: Sequence[int], teacher: TeacherModel
    ) -> tuple[VerdictById, float | None]:
        """Let the teacher of a context decode, with what it sees at the first canvas of each rollout."""
        kept, given, share = material.rollouts.kept, None, None
        if material.method.contexts[context].reveals:
            seen = revealed(material.plans[0], context) if material.plans else {}
            subjects = [row for row in subjects if row in seen]
            given = [seen[row] for row in subjects]
            share = sum(float((x != NEVER).double().mean()) for x in given) / len(given) if given else None
        problems, prompts = [kept[row].problem for row in subjects], [prompt_of(kept[row], context) for row in subjects]
        return self._examine(problems, prompts, given=given, teacher=teacher), share

    def _teachers(
        self, material: _Material, subjects: Sequence[int], teachers: Sequence[int], student: VerdictById
    ) -> tuple[tuple[Teacher, ...], dict[int, VerdictById]]:
        method, graded, verdicts = self.method, list[Teacher](), dict[int, VerdictById]()
        for i in teachers:
            share = None
            if self.teachers[i].weights.is_student and not _adds(method, i):
                names = [material.rollouts.kept[row].problem.id for row in subjects]
                verdicts[i] = {name: student[name] for name in names}
            else:
                verdicts[i], share = self._verdicts(material, i, subjects, self.teachers[i])
            taught = method.target.keeps_contexts or i == teachers[0]
            if (found := gap(student, verdicts[i])) is not None:
                hint, context = method.contexts[i].hint, method.contexts[i]
                name = name_of(CONTEXTS | HINTS, context if hint is None or context.reveals else hint)
                graded.append(Teacher(i, name, taught, found, share))
        return tuple(graded), verdicts

    def _sites(self, material: _Material, observe: Any, teachers: Sequence[TeacherModel]) -> Sites | None:
        if not material.plans:
            return None
        student = partial(run_at_sites, self.module)
        models = Models(student, teachers, self.accelerator.device, self.config.optim.tokens_per_batch)
        deviations = find_deviations(self.policy, self.config.task, self.method.contexts, material.rollouts)
        return measure_sites(material.method, material.plans, models, material.rollouts, deviations, observe)

    def _controls(
        self, material: _Material, informed: int, passing: set[Name], verdicts: VerdictById, decode: bool
    ) -> dict[str, tuple[Control, dict[str, float | None]]]:
        """The first teacher with privileged information, with one of its inputs replaced at a time."""
        if not material.rollouts.kept:  # no rollout has its hints
            return {}
        context, teacher = self.method.contexts[informed], self.teachers[informed]
        donors = find_donors(material.rollouts, material.keys, informed)
        kinds = kinds_for(context, donors, self.policy.module.block_length is None)
        if len(kinds) == 1:
            return {}
        contexts: tuple[Any, ...] = tuple(control(context, kind, donors) for kind in kinds)
        plain = replace(material.rollouts, kept=tuple(replace(one, briefs=()) for one in material.rollouts.kept))
        changed = self._material(controlled(self.method, contexts, informed), plain, informed)
        sites = self._sites(changed, of_controls(kinds), [teacher] * len(kinds))
        if sites is None:
            return {}
        trained = sites.of(torch.tensor([name_of_rollout(one) in passing for one in changed.rollouts.kept]))
        subjects, places, found = self._subjects(changed.rollouts, passing), premise(trained), {}
        for i, kind in enumerate(kinds[1:], 1):
            spoilt = self._verdicts(changed, i, subjects, teacher)[0] if decode else {}
            found[kind] = self._control(kind, trained, spoilt, verdicts), places[kind]
        return found

    def _control(self, kind: ControlKind, sites: Sites, spoilt: VerdictById, verdicts: VerdictById) -> Control:
        shared = spoilt.keys() & verdicts.keys()
        accuracy: Rate | None = rate({name: spoilt[name] for name in shared})
        gained = sites.total("gained")
        return Control(
            accuracy,
            rate({name: verdicts[name] for name in shared}),
            sites.mean(f"divergence/{kind}", torch.ones_like(sites.right)),
            sites.total(f"gained/{kind}") / gained if gained else None,
        )


def controlled(method: Method, contexts: tuple[Any, ...], informed: int) -> Method:
    """The method with a teacher and its controls as contexts, each compared with the student by itself."""
    return replace(
        method,
        contexts=contexts,
        teacher=(method.weights()[informed],),
        support=FullVocabulary(),
        target=Each(),
        divergence=ReverseKL(),
        trust=Equal(),
        skill_bank=None,
    )


def _adds(method: Method, context: int) -> bool:
    """Whether a context shows its teacher anything beyond the student's view."""
    return method.contexts[context].hint is not None or method.contexts[context].reveals
