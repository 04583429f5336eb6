"""What named methods are made of, what a teacher with any weights learns of an update, and what is refused.

That a method's loss is finite and its gradient reaches every parameter, that its teachers keep to their rule, and that
no hint is in what the student reads, is asked of every named method on every backbone in test_contract.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
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
from dllm_sd.losses.sites import Revealed, TeacherTop
from dllm_sd.methods import METHODS
from dllm_sd.methods.method import Method
from dllm_sd.network.site_head import SiteReader, run_at_sites
from dllm_sd.network.view import View
from dllm_sd.objective.equation import Graded, grade_micro_batch
from dllm_sd.objective.plan import plan_update
from dllm_sd.policies.loading import AnyPolicy
from dllm_sd.policies.weights import (
    BaseWeights,
    CheckpointWeights,
    EmaWeights,
    LiveWeights,
    SnapshotWeights,
    TeacherModel,
    trained,
)
from dllm_sd.rollouts.gates import All, Correct, Mixed
from dllm_sd.rollouts.rollout import Prompted
from dllm_sd.rollouts.rules import Demonstrations, PassAtK, gather
from dllm_sd.skills import Bank, Mistake, Skill, SkillPair, retrieve
from dllm_sd.tasks.task import Problem
from dllm_sd.teachers import LaterStep, NoQuestion, Nothing, Reference, Sibling, Suffix
from dllm_sd.teachers.prompts import Sources, build_teacher_prompts
from dllm_sd.writers import Written
from tests.stub_task import StubTask
from tests.tiers import crossed

NAMES = pytest.mark.parametrize("name", METHODS)


def likelihood(**parts: Any) -> Method:
    """A method without a teacher."""
    return Method(**{"target": Sampled(), "divergence": TokenNLL(), "contexts": ()} | parts)


def group(**parts: Any) -> Method:
    """A method with group advantages."""
    rollout = PassAtK(keep="all", until_solved=False)
    return likelihood(**{"rollout": rollout, "gate": All(), "trust": GroupAdvantage()} | parts)


GROUP = PassAtK(keep="all", until_solved=False, attempts=4, temperature=1.0)
PROMPTED = [Prompted(Problem(f"p{i}", {"rubric": ["1+2", "3"]}), tuple(range(4, 6 + i))) for i in range(4)]


def analyse(context: int, prompts: Sequence[Sequence[int]], reasoning: Any, keys: Sequence[int]) -> list[str]:
    return [f"{context}{i}" for i in range(len(prompts))]


def write(writing: Any, requests: Sequence[Any]) -> list[Written]:
    """What any hint can use: a term of the problem, a step, a rubric and an answer."""
    return [Written('<concept>1</concept><step_1>7</step_1>["12"]<answer>3</answer>', None) for _ in requests]


BANK = Bank(
    tuple(Skill(f"gen_{i}", f"{i}", f"{i}{i}", "=") for i in range(8)),
    tuple(Mistake(f"err_{i}", f"{i}", "+", f"{i}*") for i in range(8)),
)


def pairs(problem: Problem, key: int) -> Sequence[SkillPair]:
    return retrieve(BANK, f"{problem.id[1:]}+1=", 8, key)


class Run:
    """One update of a method, up to the gradient."""

    def __init__(self, method: Method, policy: AnyPolicy, other: AnyPolicy | None = None) -> None:
        self.policy, task = policy, cast(Any, StubTask())
        decode = Decoding(length=16, block_length=4, tokens_per_step=1)
        tried = method.rollout(policy, task, PROMPTED, decode, 0, 0)
        rollouts = gather(method.rollout, method.gate, tried)
        self.rollouts = build_teacher_prompts(
            *(rollouts, method.contexts, task, policy, analyse, (0, 0)), Sources(write=write, pairs=pairs)
        )
        weights = method.weights() if method.contexts else ()
        self.teachers = [
            TeacherModel(one, policy, other=other if isinstance(one, CheckpointWeights) else None) for one in weights
        ]
        plan = plan_update(method, self.rollouts, self.rollouts.keys(0, 0))
        assert plan is not None
        self.plan = plan
        self.views: list[View] = []
        self.graded: Graded = grade_micro_batch(method, plan.micro_batch(), self.student, self.teachers)
        names, values = zip(*trained(policy).items(), strict=True)
        self.gradient = dict(zip(names, torch.autograd.grad(self.graded.loss, values, allow_unused=True), strict=True))

    def student(self, view: View, read: SiteReader) -> Any:
        self.views.append(view)
        return run_at_sites(self.policy.module, view, read)


@NAMES
def test_a_named_method_says_where_it_comes_from_and_builds_again(name):
    row = METHODS[name]
    assert row.source
    assert row.note
    assert len(row.method.weights()) in (len(row.method.contexts), 1)
    assert replace(row.method) == row.method  # builds again: nothing that it refuses


def accepted(name: str, weights: Any) -> bool:
    """Whether a row may have these weights: the student itself can neither teach nor be the reference unhinted."""
    try:
        return bool(replace(METHODS[name].method, teacher=(weights,)))
    except InputError:
        return False


WEIGHTED = [
    (name, weights)
    for name in METHODS
    for weights in (LiveWeights(), BaseWeights(), EmaWeights(), SnapshotWeights())
    if accepted(name, weights)
]


def test_the_student_itself_is_refused_only_where_it_sees_nothing_more():
    refused = {name for name in METHODS if (name, LiveWeights()) not in WEIGHTED}
    assert refused == {name for name in METHODS if METHODS[name].method.contexts == (Nothing(),)}
    assert len(WEIGHTED) == 4 * len(METHODS) - len(refused)


@pytest.mark.parametrize(
    ("weights", "name"),
    crossed([LiveWeights(), BaseWeights(), EmaWeights(), SnapshotWeights()], ["d_opsd", "opsd_pmi"]),
    ids=lambda one: one if isinstance(one, str) else type(one).__name__,
)
def test_no_gradient_and_no_change_reaches_a_teacher_of_any_weights(make_policy, name, weights):
    """Of one context and of several; test_contract asks it of each named method with its own weights."""
    policy = make_policy()
    before = {key: value.detach().clone() for key, value in trained(policy).items()}
    run = Run(replace(METHODS[name].method, teacher=(weights,)), policy)
    assert run.graded.loss.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in trained(policy).items())
    for teacher in run.teachers:
        assert not any(value.requires_grad or value.grad is not None for value in teacher.copy.values())
        assert all(torch.equal(value, before[key]) for key, value in teacher.copy.items())


@pytest.mark.parametrize(
    ("divergence", "support"),
    crossed(
        [ForwardKL(), ReverseKL(), GeneralisedJSD(0.5), GeneralisedJSD(0.1)],
        [FullVocabulary(), TopK(5), TopK(5, rest="bucket")],
    ),
    ids=repr,
)
def test_a_teacher_that_knows_nothing_more_teaches_nothing(policy, divergence, support):
    method = Method(gate=All(), contexts=(Nothing(),), divergence=divergence, support=support)  # not yet trained
    run = Run(method, policy)
    assert run.graded.value.abs().max() < 1e-15
    assert abs(run.graded.loss) < 1e-15
    assert max(float(gradient.abs().max()) for gradient in run.gradient.values()) < 1e-14
    assert (run.graded.agreement == 1).all()


def test_methods_read_only_the_rollouts_that_their_gate_lets_pass(policy):
    run = Run(METHODS["d_opsd"].method, policy)
    assert 0 < run.rollouts.size < len(PROMPTED) or run.rollouts.counts["solved"] == len(PROMPTED)
    assert all(rollout.grade.correct for rollout in run.rollouts.kept)


def test_contexts_share_one_set_of_weights_or_have_one_each():
    contexts = (Suffix(), Nothing())
    assert Method(contexts=contexts, target=Each()).weights() == (BaseWeights(), BaseWeights())
    assert Method(contexts=contexts, target=Each(), teacher=(EmaWeights(), BaseWeights())).weights() == (
        EmaWeights(),
        BaseWeights(),
    )


REFUSED: dict[str, tuple[Callable[[], Method], str]] = {
    "weights for other contexts": (
        lambda: Method(teacher=(BaseWeights(), LiveWeights(), EmaWeights())),
        "3 weights for 1 contexts",
    ),
    "a suffix on random masks": (lambda: Method(canvases=RandomMasks()), "decoder_steps"),
    "a later step on masks of everything": (
        lambda: Method(canvases=AllMaskedCanvas(), contexts=(LaterStep(),)),
        "decoder_steps",
    ),
    "decoding steps of demonstrations": (lambda: Method(rollout=Demonstrations()), "random_masks"),
    "a teacher's choice without a teacher": (lambda: likelihood(sites=TeacherTop()), "contexts is empty"),
    "one target of two teachers": (lambda: Method(contexts=(Suffix(), Nothing())), "lists 2"),
    "one target of no teacher": (lambda: Method(contexts=()), "contexts is empty"),
    "counting rejected rollouts in a mean over sites": (
        lambda: Method(gate=Correct(count_rejected=True)),
        "set method.average to steps",
    ),
    "a likelihood on part of the vocabulary": (lambda: likelihood(support=TopK()), "support to full"),
    "a likelihood with a teacher's target": (lambda: Method(divergence=TokenNLL()), "belong together"),
    "the sampled token with a divergence": (lambda: Method(target=Sampled()), "belong together"),
    "a teacher that nobody asks": (lambda: likelihood(contexts=(Suffix(),)), "asks no teacher"),
    "an advantage on a divergence": (lambda: Method(trust=GroupAdvantage()), "token_nll"),
    "an advantage without a group": (lambda: group(rollout=PassAtK()), "compares a group"),
    "an advantage in a group of one": (
        lambda: group(rollout=PassAtK(keep="all", until_solved=False, attempts=1)),
        "attempts 2 or more",
    ),
    "an advantage of demonstrations": (
        lambda: group(rollout=Demonstrations(), canvases=RandomMasks()),
        "compares a group",
    ),
    "an advantage within groups whose policy is the base's": (
        lambda: group(rollout=replace(GROUP, passes=4), contexts=(Nothing(),), teacher=(BaseWeights(),)),
        "set method.teacher.0 to a snapshot with every 4",
    ),
    "a snapshot that is renewed while its rollouts still serve": (
        lambda: group(rollout=replace(GROUP, passes=4), contexts=(Nothing(),), teacher=(SnapshotWeights(2),)),
        "set method.teacher.0 to a snapshot with every 4",
    ),
    "a snapshot of student's where the base rolls out": (
        lambda: group(
            rollout=replace(GROUP, passes=4, policy=BaseWeights()), contexts=(Nothing(),), teacher=(SnapshotWeights(4),)
        ),
        "method.rollout.policy to live",
    ),
    "a reference policy that reads a hint": (
        lambda: group(trust=GroupAdvantage(kl=0.1), contexts=(Reference(),)),
        "set method.contexts.0 to nothing",
    ),
    "a reference policy that is the student": (
        lambda: group(trust=GroupAdvantage(kl=0.1), contexts=(Nothing(),), teacher=(LiveWeights(),)),
        "set method.teacher.0 to base",
    ),
    "a policy gradient whose rollouts' policy is the base": (
        lambda: Method(contexts=(Suffix(), Nothing()), target=Each(), divergence=PolicyGradient()),
        "set method.teacher.1 to a snapshot with every 1",
    ),
    "a policy gradient whose rollouts' policy reads a suffix": (
        lambda: Method(
            contexts=(Suffix(), Suffix()),
            teacher=(BaseWeights(), SnapshotWeights(1)),
            target=Each(),
            divergence=PolicyGradient(),
        ),
        "set method.contexts.1 to nothing",
    ),
    "a policy gradient with the policy of demonstrations": (
        lambda: Method(
            rollout=Demonstrations(),
            canvases=RandomMasks(),
            contexts=(Nothing(), Nothing()),
            teacher=(BaseWeights(), SnapshotWeights(1)),
            target=Each(),
            divergence=PolicyGradient(),
        ),
        "demonstrations were not sampled",
    ),
    "the rollouts' support of an average": (
        lambda: Method(
            contexts=(Suffix(), Nothing()),
            teacher=(BaseWeights(), EmaWeights()),
            target=Each(),
            support=TopK(of="rollout"),
        ),
        "method.support takes teacher 1 for the policy that made the rollouts",
    ),
    "mixed groups of first attempts": (lambda: Method(gate=Mixed()), "method.gate mixed compares a group"),
    "mixed groups of demonstrations": (
        lambda: Method(rollout=Demonstrations(), canvases=RandomMasks(), gate=Mixed(), contexts=(Nothing(),)),
        "method.gate mixed compares a group",
    ),
    "an advantage among right rollouts": (lambda: group(gate=Correct()), "set method.gate to all or mixed"),
    "two teachers without a context": (
        lambda: likelihood(teacher=(BaseWeights(), EmaWeights())),
        "lists 2 weights for 0 contexts",
    ),
    "the student as its own teacher": (
        lambda: Method(contexts=(Nothing(),), teacher=(LiveWeights(),)),
        "method.teacher is the student itself",
    ),
    "an average that forgets everything as teacher": (
        lambda: Method(contexts=(Suffix(ratio=0.0),), teacher=(EmaWeights(0.0),)),
        "method.teacher is the student itself",
    ),
    "a later step that shows the graded tokens alone": (
        lambda: Method(contexts=(LaterStep(1),), teacher=(SnapshotWeights(1),)),
        "method.teacher is the student itself",
    ),
    "one renormalised entry": (lambda: Method(support=TopK(k=1)), "method.support.k 1 with rest renormalise"),
    "a penalty without a reference": (lambda: group(trust=GroupAdvantage(kl=0.1)), "needs 1 contexts"),
    "reused rollouts without a snapshot": (
        lambda: group(rollout=PassAtK(keep="all", until_solved=False, passes=4)),
        "needs 1 contexts",
    ),
    "a reference without a penalty": (lambda: group(contexts=(Nothing(),)), "needs 0 contexts"),
    "a suffix that leaves the teacher no site": (
        lambda: Method(contexts=(Suffix(scope="active_block", ratio=1.0),), sites=TeacherTop()),
        "no site",
    ),
    "a purified target of part of the vocabulary": (
        lambda: Method(contexts=(Reference(), NoQuestion(), Nothing()), target=PurifiedPMI(), support=TopK()),
        "set method.support to full",
    ),
    "a purified target of two views": (
        lambda: Method(contexts=(Reference(), Nothing()), target=PurifiedPMI()),
        "pmi is made of 3 teachers, but method.contexts lists 2",
    ),
    "a barycenter of one teacher": (
        lambda: Method(contexts=(Reference(),), target=Barycenter()),
        "barycenter is made of 2 teachers, but method.contexts lists 1",
    ),
    "a sibling without a group": (lambda: Method(contexts=(Sibling(),)), "looks at the other attempts"),
    "a sibling of the first success alone": (
        lambda: Method(contexts=(Sibling(),), rollout=PassAtK(until_solved=False)),
        "set rollout.keep to all",
    ),
    "a sibling in a group of one": (
        lambda: Method(contexts=(Sibling(),), rollout=replace(GROUP, attempts=1)),
        "attempts to 2 or more",
    ),
    "a sibling of demonstrations": (
        lambda: Method(contexts=(Sibling(),), rollout=Demonstrations(), canvases=RandomMasks()),
        "looks at the other attempts",
    ),
    "a sibling beside a suffix without a group": (
        lambda: Method(contexts=(Suffix(prompt=Sibling()),)),
        "looks at the other attempts",
    ),
    "a cap between two temperatures": (
        lambda: Method(trust=ImportanceCap(), rollout=PassAtK(temperature=0.9), temperature=1.0),
        "to the same value",
    ),
    "a cap on demonstrations": (
        lambda: likelihood(trust=ImportanceCap(), rollout=Demonstrations(), canvases=RandomMasks()),
        "to the same value",
    ),
    "a cap on random masks": (
        lambda: Method(trust=ImportanceCap(), rollout=GROUP, canvases=RandomMasks(), contexts=(Reference(),)),
        "set method.canvases to decoder_steps",
    ),
    "a cap where the teacher chooses": (
        lambda: Method(trust=ImportanceCap(), rollout=GROUP, contexts=(Reference(),), sites=TeacherTop()),
        "method.sites to revealed",
    ),
    "a support without a rest for a divergence": (
        lambda: Method(support=TopK(rest="keep")),
        "is for divergence policy_gradient",
    ),
    "a policy gradient on a support with a bucket": (
        lambda: Method(support=TopK(rest="bucket"), divergence=PolicyGradient()),
        "set both or neither",
    ),
    "sampled tokens on part of the vocabulary": (
        lambda: Method(support=TopK(rest="bucket"), divergence=PolicyGradient(tokens="sampled")),
        "tokens sampled reads any token",
    ),
    "a policy gradient to a purified target": (
        lambda: Method(contexts=(Suffix(), NoQuestion(), Nothing()), target=PurifiedPMI(), divergence=PolicyGradient()),
        "set method.target to plain or each",
    ),
    "a policy gradient of three teachers": (
        lambda: Method(contexts=(Suffix(), Nothing(), Nothing()), target=Each(), divergence=PolicyGradient()),
        "policy_gradient reads the teacher",
    ),
    "the rollouts' support without their policy": (
        lambda: Method(support=TopK(of="rollout", rest="keep"), divergence=PolicyGradient()),
        "add a snapshot context",
    ),
    "a temperature of nothing": (
        lambda: Method(temperature=0.0),
        "method.temperature is .*; give a number from 0.001 to 1000",
    ),
    "a negative temperature": (
        lambda: Method(temperature=-1.0),
        "method.temperature is .*; give a number from 0.001 to 1000",
    ),
    "a weight of a context that is merged with others": (
        lambda: Method(contexts=(Reference(), Nothing(weight=0.5)), target=Barycenter()),
        "contexts.1 has the weight 0.5, but method.target barycenter",
    ),
    "a weight of a context that is no teacher": (
        lambda: Method(
            contexts=(Suffix(), Nothing(weight=0.5)),
            teacher=(BaseWeights(), LiveWeights()),
            target=Each(),
            divergence=PolicyGradient(),
        ),
        "contexts.1 has the weight 0.5, but the loss uses this context as rollouts",
    ),
    "a weight of a policy that is no teacher": (
        lambda: group(trust=GroupAdvantage(kl=0.1), contexts=(Nothing(weight=0.5),)),
        "target sampled asks no teacher",
    ),
    "a weight of the only context": (
        lambda: Method(contexts=(Nothing(weight=0.5),), target=Each()),
        "no other context",
    ),
    "a penalty to the student itself": (
        lambda: Method(contexts=(Reference(), Nothing()), teacher=(LiveWeights(),), target=Each()),
        "contexts.1 shows nothing, .*; set it to base",
    ),
    "a penalty that is not least at its target": (
        lambda: Method(contexts=(Reference(), Nothing()), target=Each(), divergence=ForwardKL(clip="entry")),
        "contexts.1 shows nothing, .* set method.divergence.clip to none",
    ),
    "a penalty whose sign the outcome turns": (
        lambda: Method(
            contexts=(Reference(), Nothing()), target=Each(), divergence=GatedGap(), trust=OutcomeValidated()
        ),
        "contexts.1 shows nothing, .* outcome_validated turns its sign",
    ),
    # Accepted, these fail at the first update or skip all of them.
    "each of no teachers": (lambda: Method(contexts=(), target=Each()), "context"),
    "the end of the trajectory with a teacher's choice": (
        lambda: Method(contexts=(LaterStep(ahead=None),), sites=TeacherTop()),
        "site",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_combinations_without_a_meaning_are_refused_in_a_sentence(name):
    build, says = REFUSED[name]
    with pytest.raises(InputError, match=says) as refusal:
        build()
    assert "method." in str(refusal.value) or "suffix" in str(refusal.value)


def test_the_policy_that_made_the_rollouts_is_a_snapshot_of_their_passes_or_who_rolls_out():
    off = replace(GROUP, passes=4)
    group(rollout=off, contexts=(Nothing(),), teacher=(SnapshotWeights(4),))
    group(rollout=replace(off, policy=BaseWeights()), contexts=(Nothing(),), teacher=(BaseWeights(),))
    group(
        rollout=off,
        contexts=(Nothing(), Nothing()),
        teacher=(BaseWeights(), SnapshotWeights(4)),
        trust=GroupAdvantage(kl=0.1),
    )
    for weights in (LiveWeights(), SnapshotWeights(1)):  # pointless, but true
        Method(
            contexts=(Suffix(), Nothing()), teacher=(BaseWeights(), weights), target=Each(), divergence=PolicyGradient()
        )


def test_unpublished_combinations_are_one_line():
    Method(contexts=(LaterStep(), Suffix(scope="all_masked")), target=Each(), teacher=(EmaWeights(), BaseWeights()))
    Method(canvases=RandomMasks(), contexts=(Nothing(),), divergence=GeneralisedJSD(), sites=Revealed())
    Method(rollout=Demonstrations(), canvases=AllMaskedCanvas(), contexts=(Nothing(),), trust=Equal(), target=Plain())
    group(canvases=DecoderSteps())
