"""A fixed sample of all combinations of parts: what is accepted learns something, what has no meaning is refused."""

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, cast

import pytest
import torch

from dllm_sd.canvases import AllMaskedCanvas, DecoderSteps, RandomMasks
from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError
from dllm_sd.losses import (
    Barycenter,
    Each,
    Equal,
    ForwardKL,
    FullVocabulary,
    GatedGap,
    GeneralisedJSD,
    GroupAdvantage,
    ImportanceCap,
    OutcomeValidated,
    Plain,
    PolicyGradient,
    PurifiedPMI,
    ReverseKL,
    Sampled,
    TokenNLL,
    TopK,
)
from dllm_sd.losses.sites import AllMaskedSites, Revealed, TeacherTop
from dllm_sd.methods.method import Method
from dllm_sd.network.site_head import run_at_sites
from dllm_sd.objective.equation import grade_micro_batch
from dllm_sd.objective.plan import plan_update
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.policies.weights import BaseWeights, EmaWeights, LiveWeights, SnapshotWeights, TeacherModel, trained
from dllm_sd.rollouts.gates import All, Correct, Mixed, Score
from dllm_sd.rollouts.horizons import Truncated
from dllm_sd.rollouts.rollout import Prompted, Rollout
from dllm_sd.rollouts.rules import Demonstrations, PassAtK, gather
from dllm_sd.tasks.task import Problem
from dllm_sd.teachers import LaterStep, NoQuestion, Nothing, Reference, Sibling, Suffix
from dllm_sd.teachers.prompts import Sources, build_teacher_prompts
from tests.stub_task import StubTask
from tests.tiers import later

SLOTS: dict[str, list[Any]] = {
    "rollout": [
        PassAtK(attempts=4, temperature=1.0),
        PassAtK(attempts=4, temperature=1.0, keep="best"),
        *(PassAtK(attempts=4, temperature=1.0, keep="all", until_solved=False, passes=n) for n in (1, 1, 2)),
        PassAtK(attempts=4, temperature=1.0, keep="all", until_solved=False, policy=BaseWeights()),
        PassAtK(attempts=4, temperature=1.0, keep="all", until_solved=False, horizon=Truncated(0.5)),
        *(Demonstrations(),) * 4,
    ],
    "gate": [All(), All(), Correct(), Score(at_least=0.5), Mixed(), Correct(count_rejected=True)],
    "canvases": [
        DecoderSteps(),
        DecoderSteps(subset=3),
        DecoderSteps(end_padding=True),
        RandomMasks(),
        AllMaskedCanvas(),
    ],
    "sites": [Revealed(), AllMaskedSites(), AllMaskedSites(block=True), TeacherTop(), TeacherTop(count=2)],
    "trust": [Equal(), Equal(), ImportanceCap(), GroupAdvantage(), GroupAdvantage(kl=0.1), OutcomeValidated()],
    "average": ["sites", "canvases", "steps", "step_sums", "rollouts"],
}
FAMILIES: list[dict[str, list[Any]]] = [
    {
        "support": [FullVocabulary(), FullVocabulary(), TopK(k=3), TopK(k=1), TopK(k=1, rest="bucket")],
        "target": [Plain(), Each(), PurifiedPMI(), Barycenter()],
        "divergence": [ForwardKL(), ReverseKL(clip="token", clip_at=1e3), GeneralisedJSD(), GatedGap()],
        "contexts": [1, 1, 2, 3],
    },
    {
        "support": [FullVocabulary(), *(TopK(k=3, of=of, rest="keep") for of in ("student", "teacher", "rollout"))],
        "target": [Plain(), Each()],
        "divergence": [PolicyGradient(), PolicyGradient(tokens="sampled"), PolicyGradient(surrogate="log")],
        "contexts": [1, 2],
    },
    {
        "support": [FullVocabulary()],
        "target": [Sampled()],
        "divergence": [TokenNLL()],
        "contexts": [0, 0, 1, 2],
        "trust": [Equal(), GroupAdvantage(), GroupAdvantage(kl=0.1)],
    },
]
"""Distillation, policy gradient, likelihood: parts that go together, and numbers of contexts."""
CONTEXTS: list[Any] = [Nothing(), Nothing(), Suffix(), Suffix("active_block", 0.5), Suffix(ratio=0.0), LaterStep(2)]
CONTEXTS += [LaterStep(1), LaterStep(0), Reference(), NoQuestion(), Sibling(), Suffix(prompt=Reference())]
WEIGHTS: list[Any] = [
    LiveWeights(),
    BaseWeights(),
    BaseWeights(),
    EmaWeights(0.5),
    EmaWeights(0.0),
    SnapshotWeights(1),
    SnapshotWeights(2),
]
TASK_PROBLEMS = [Prompted(Problem(f"p{i}", {}), tuple(range(4, 6 + i))) for i in range(4)]


def drawn(seed: int) -> dict[str, Any]:
    """The parts of one method, all slots at random."""
    rng = random.Random(seed)
    parts = {slot: rng.choice(choices) for slot, choices in (SLOTS | rng.choice(FAMILIES)).items()}
    count = parts["contexts"]
    contexts = tuple(rng.choice(CONTEXTS) for _ in range(count))
    weights = tuple(rng.choice(WEIGHTS) for _ in range(rng.choice([1, count])))
    return parts | {"contexts": contexts, "teacher": weights or (BaseWeights(),)}


def accepted(seeds: Sequence[int]) -> dict[int, Method]:
    """Those of the drawn methods that are not refused."""
    found = {}
    for seed in seeds:
        with suppress(InputError):
            found[seed] = Method(**drawn(seed))
    return found


class Student:
    """A policy that has moved away from its initial weights, and its rollouts by rule."""

    def __init__(self, policy: MaskedDiffusion) -> None:
        self.policy = policy
        models: list[Any] = [
            BaseWeights(),
            EmaWeights(0.5),
            EmaWeights(0.0),
            SnapshotWeights(1),
            SnapshotWeights(2),
            LiveWeights(),
        ]
        self.teachers = {weights: TeacherModel(weights, policy) for weights in models}
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in trained(policy).values():
                value.add_(0.05 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
        for teacher in self.teachers.values():
            teacher.after_update(1)
        self.rolled: Callable[[Any], list[list[Rollout]]] = cache(self._roll)

    def _roll(self, rollout: Any) -> list[list[Rollout]]:
        decode = Decoding(length=16, block_length=4, tokens_per_step=1)
        return rollout(self.policy, cast(Any, StubTask()), TASK_PROBLEMS, decode, 0, 0)

    def update(self, method: Method) -> tuple[int, int, float]:
        """Rollouts kept, sites, and the largest number in the gradient of an update."""
        rollouts = gather(method.rollout, method.gate, self.rolled(method.rollout))
        sources = Sources(write=lambda *_: [], pairs=lambda *_: [])
        rollouts = build_teacher_prompts(
            rollouts, method.contexts, cast(Any, StubTask()), self.policy, lambda *_: [], (0, 0), sources
        )
        plan = plan_update(method, rollouts, rollouts.keys(0, 0))
        if plan is None:
            return rollouts.size, 0, 0.0
        teachers = [self.teachers[weights] for weights in method.weights()]
        loss = grade_micro_batch(
            method, plan.micro_batch(), lambda view, read: run_at_sites(self.policy.module, view, read), teachers
        ).loss
        assert torch.isfinite(loss)
        gradient = torch.autograd.grad(loss, [*trained(self.policy).values()], allow_unused=True)
        return rollouts.size, plan.num_sites, max(float(one.abs().max()) for one in gradient if one is not None)


@pytest.fixture(scope="module")
def student(make_policy) -> Student:
    return Student(make_policy())


SAMPLE = accepted(range(900))


def kinds(method: Method) -> set[tuple[str, Any]]:
    """The kinds of parts of a method by slot, and how many contexts it has."""
    slots = ("support", "target", "divergence", *SLOTS)
    return {(slot, type(getattr(method, slot))) for slot in slots} | {("contexts", len(method.contexts))}


def covering() -> list[int]:
    """Every method of the sample that has a kind of part that none before it has: those of the first tier."""
    met, found = set(), []
    for seed, method in SAMPLE.items():
        found += [seed] * bool(kinds(method) - met)
        met |= kinds(method)
    return found


QUICK = covering()


def test_every_kind_of_part_is_in_a_method_that_is_accepted():
    quick = [SAMPLE[seed] for seed in QUICK]
    for slot in (*SLOTS, "support", "target", "divergence"):
        choices = SLOTS.get(slot) or [part for family in FAMILIES for part in family[slot]]
        assert {type(getattr(method, slot)) for method in quick} == {type(part) for part in choices}
    assert {len(method.contexts) for method in quick} == {0, 1, 2, 3}


@pytest.mark.parametrize("seed", [*QUICK, *later(*sorted(SAMPLE.keys() - set(QUICK)))])
def test_what_is_accepted_has_sites_and_a_gradient(student, seed):
    kept, sites, gradient = student.update(SAMPLE[seed])
    assert kept > 0
    assert sites > 0
    assert gradient > 1e-12
