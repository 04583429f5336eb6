"""Horizons: their formulas, what they cut on either backbone, and that nothing beyond is generated."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch

from dllm_sd.config import build_config
from dllm_sd.decoding.settings import Decoding, Meter
from dllm_sd.errors import InputError
from dllm_sd.losses import Sampled, TokenNLL
from dllm_sd.methods import METHODS
from dllm_sd.methods.method import Method
from dllm_sd.objective.plan import plan_update
from dllm_sd.policies.loading import AnyPolicy
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.gates import GATES, All
from dllm_sd.rollouts.horizons import HORIZONS, Complete, Progressive, Truncated
from dllm_sd.rollouts.rollout import Prompted, Rollout
from dllm_sd.rollouts.rules import Demonstrations, PassAtK, gather
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.trajectory import StopAfter, Trajectory
from tests.tiers import later

PROMPTS = [(4, 5, 14, 6), (7,), (8, 9, 10, 11, 12, 13, 4), (5, 16, 5)]
KEYS = [make_key("row", i) for i in range(len(PROMPTS))]
PROMPTED = [Prompted(Problem(f"p{i}", {}), prompt) for i, prompt in enumerate(PROMPTS)]
CANVAS = Decoding(length=24, block_length=4, tokens_per_step=1, temperature=1.0)


@dataclass
class Extent:
    """A policy of so many blocks and steps."""

    blocks: int = 8
    steps: int = 15360

    def extent(self, unit: str, settings: Decoding) -> int:
        return {"blocks": self.blocks, "steps": self.steps}[unit]


class Judge:
    """Judges by the last character."""

    def grade(self, problem: Problem, completion: str) -> Grade:
        return Grade(bool(completion) and ord(completion[-1]) % 2 == 0, 0.0, None)


@pytest.fixture(scope="module", params=["denoiser", "autoregressive", *later("blocks")])
def each(request: pytest.FixtureRequest, make_policy: Callable[..., Any]) -> AnyPolicy:
    """A policy of each kind."""
    options: dict[str, Any] = {"denoiser": {}, "blocks": {"block_length": 4}}
    return make_policy(**options.get(request.param, {"as_": "autoregressive"}))


def roll(
    policy: AnyPolicy, horizon: Any, update: int = 0, settings: Decoding = CANVAS, **options: Any
) -> list[list[Rollout]]:
    rule = PassAtK(attempts=3, temperature=1.0, horizon=horizon, **options)
    task: Any = Judge()
    return rule(policy, task, PROMPTED, settings, 3, update)


def trajectories(tried: Sequence[Sequence[Rollout]]) -> list[Trajectory]:
    return [rollout.trajectory for attempts in tried for rollout in attempts]


def equal(ours: Trajectory, theirs: Trajectory, atol: float = 0.0) -> None:
    for name, value in ours.tensors().items():
        other = getattr(theirs, name)
        if value.is_floating_point():
            torch.testing.assert_close(value, other, atol=atol, rtol=0, equal_nan=True)
        else:
            assert torch.equal(value, other), name


@contextmanager
def counted(policy: AnyPolicy) -> Iterator[list[int]]:
    """The tokens read in every forward pass inside."""
    passes: list[int] = []
    hook = policy.module.network.base_model.register_forward_hook(lambda _, __, out: passes.append(out[0].shape[1]))
    try:
        yield passes
    finally:
        hook.remove()


def test_the_table_names_every_horizon():
    assert {"complete": Complete, "truncated": Truncated, "progressive": Progressive} == HORIZONS


@pytest.mark.parametrize(
    ("ratio", "unit", "count"),
    [
        (0.1, "steps", 1536),
        (0.25, "blocks", 2),
        (0.3, "blocks", 2),
        (0.32, "blocks", 3),
        (1e-6, "blocks", 1),
        (1e-6, "steps", 1),
        (1.0, "blocks", 8),
        (0.00017, "steps", 3),
    ],
)
def test_truncation_takes_a_share_of_the_whole_and_at_least_one(ratio, unit, count):
    policy: Any = Extent()
    for update in (0, 7, 5000):
        assert Truncated(ratio, unit)(policy, CANVAS, update) == StopAfter(unit, count)


def test_a_progressive_horizon_grows_by_the_formula_up_to_the_whole():
    policy: Any = Extent(blocks=10)
    horizon = Progressive(0.3, 0.2, every=4)
    counts = [horizon(policy, CANVAS, update) for update in range(20)]
    assert counts == [StopAfter("blocks", n) for n in [3] * 4 + [5] * 4 + [7] * 4 + [9] * 4 + [10] * 4]
    paper = METHODS["popd"].method.rollout
    assert isinstance(paper, PassAtK)
    assert isinstance(paper.horizon, Progressive)
    steps = replace(paper.horizon, unit="steps")
    assert [getattr(steps(policy, CANVAS, update), "count", 0) for update in (0, 1, 100, 1553, 1554)] == [
        *(1382, 1391, 2282, 15359, 15360)
    ]
    assert Progressive(0.2, 0.0)(policy, CANVAS, 99) == StopAfter("blocks", 2)
    assert Complete()(policy, CANVAS, 3) is None


@pytest.mark.parametrize(
    "build",
    [
        lambda: Truncated(ratio=0),
        lambda: Truncated(ratio=1.01),
        lambda: Truncated(ratio=-0.1),
        lambda: Progressive(initial_ratio=0),
        lambda: Progressive(initial_ratio=3),
        lambda: Progressive(every=0),
        lambda: Progressive(ratio_step=-1),
        lambda: Progressive(ratio_step=9),
    ],
)
def test_impossible_horizons_are_refused(build):
    with pytest.raises(InputError, match=r"^method\.rollout\.horizon"):
        build()


def test_the_extent_of_a_denoiser_is_its_blocks_and_its_steps(policy):
    assert policy.extent("blocks", CANVAS) == 6
    assert policy.extent("steps", CANVAS) == 24
    assert policy.extent("steps", replace(CANVAS, tokens_per_step=3)) == 12  # 3 and 1 in each block
    assert policy.extent("steps", replace(CANVAS, steps=12)) == 12
    assert policy.extent("steps", replace(CANVAS, threshold=0.9)) == 24
    done = policy.decode(PROMPTS, replace(CANVAS, tokens_per_step=3, early_end=False), KEYS)
    assert done.num_steps.tolist() == [12] * 4


@pytest.mark.parametrize("unit", ["blocks", "steps"])
@pytest.mark.parametrize("count", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 5))])
@pytest.mark.parametrize("changes", [{"tokens_per_step": 3}, *later({}, {"batch_size": 2})], ids=str)
def test_a_cut_rollout_is_the_start_of_the_whole_one(each, unit, count, changes):
    settings, stop_after = replace(CANVAS, **changes), StopAfter(unit, count)
    whole = each.decode(PROMPTS, settings, KEYS)
    cut = each.decode(PROMPTS, settings, KEYS, stop_after=stop_after)
    equal(cut, whole.within(stop_after), 1e-5)
    assert int(cut.written.sum()) < int(whole.written.sum())


def test_blocks_and_steps_cut_a_denoiser_in_different_places(policy):
    settings = replace(CANVAS, tokens_per_step=3, early_end=False)
    blocks = policy.decode(PROMPTS, settings, KEYS, stop_after=StopAfter("blocks", 2))
    steps = policy.decode(PROMPTS, settings, KEYS, stop_after=StopAfter("steps", 3))
    assert ((blocks.reveal_step >= 0).sum(1) == 8).all()
    assert ((steps.reveal_step >= 0).sum(1) == 7).all()  # 3 + 1, and 3 of the next block
    assert (blocks.num_steps == 4).all()
    assert (steps.num_steps == 3).all()


def test_passes_beyond_the_horizon_are_never_made(each):
    whole = Meter()
    each.decode(PROMPTS, CANVAS, KEYS, meter=whole)
    for stop_after, most in ((StopAfter("steps", 3), 3), (StopAfter("blocks", 1), 1 if each.causal else 4)):
        meter = Meter()
        with counted(each) as passes:
            each.decode(PROMPTS, CANVAS, KEYS, meter=meter, stop_after=stop_after)
        assert meter.forwards <= most < whole.forwards
        assert len(passes) <= most + 4 * (each.block_length is not None)  # and the prompts, which a cache reads first


@pytest.mark.parametrize("horizon", [Progressive(1.0, unit="blocks"), *later(Truncated(1.0, "steps"))])
def test_the_whole_ratio_is_the_complete_rollout_bit_for_bit(each, horizon):
    short = replace(CANVAS, length=8)
    plain = trajectories(roll(each, Complete(), settings=short))
    horizoned = trajectories(roll(each, horizon, settings=short))
    assert len(plain) == len(horizoned)
    for one, other in zip(plain, horizoned, strict=True):
        equal(one, other)


def test_what_is_counted_is_what_was_generated(each):
    tried = roll(each, Truncated(0.25), keep="all", until_solved=False)
    counts = gather(PassAtK(keep="all", until_solved=False), All(), tried).counts
    by_hand = 0
    for rollout in (rollout for attempts in tried for rollout in attempts):
        known = rollout.trajectory.reveal_step[0] >= 0
        length = int(rollout.trajectory.length)
        by_hand += int(known[:length].sum())
        assert int(known.sum()) <= 8  # a quarter of the canvas, and what a block of the prompt adds to it
    assert counts["tokens"] == counts["generated"] == by_hand
    assert 0 < by_hand <= 12 * 8
    whole = gather(
        PassAtK(keep="all", until_solved=False), All(), roll(each, Complete(), keep="all", until_solved=False)
    )
    assert by_hand < whole.counts["tokens"] / 1.5


def test_a_rollout_without_a_horizon_reaches_to_the_end(each):
    assert PassAtK().stop_after(each, CANVAS, 3) is None
    assert Demonstrations().stop_after(each, CANVAS, 3) is None


def test_the_horizon_advances_with_the_updates_that_the_batches_serve(each):
    def counts(passes: int, every: int) -> list[int]:
        one = 1 / each.extent("blocks", CANVAS)
        rule = PassAtK(passes=passes, horizon=Progressive(one, one, every=every))
        return [stop_after.count for batch in range(4) if (stop_after := rule.stop_after(each, CANVAS, batch))]

    whole = each.extent("blocks", CANVAS)
    assert whole == (24 if each.causal else 7 if each.block_length else 6)  # 7: a prompt may begin a block
    assert counts(1, 1) == [1, 2, 3, 4]
    assert counts(2, 1) == [min(whole, n) for n in (1, 3, 5, 7)]
    assert counts(2, 4) == [1, 1, 2, 2]
    assert counts(3, 2) == [1, 2, 4, 5]
    later = trajectories(roll(each, Progressive(1 / whole, 1 / whole), update=2))
    first = trajectories(roll(each, Progressive(1 / whole, 1 / whole), update=0))
    place = (lambda one: one.reveal_step) if each.causal else (lambda one: one.block)
    for some, count in ((first, 1), (later, 3)):
        reached = [int(place(one).masked_fill(one.reveal_step < 0, -1).max()) + 1 for one in some]
        assert max(reached) == count


def test_horizons_are_keys_of_the_rollout():
    tree: dict[str, Any] = {"task": "sudoku", "method": {"name": "opsd"}}
    tree["method"]["rollout"] = {"horizon": {"name": "progressive", "initial_ratio": 0.2, "unit": "steps"}}
    rollout = build_config(tree).method.rollout
    assert isinstance(rollout, PassAtK)
    assert rollout.horizon == Progressive(0.2, unit="steps")
    paper = METHODS["topd"].method.rollout
    assert isinstance(paper, PassAtK)
    assert paper.horizon == Truncated(0.1)
    tree["method"]["rollout"] = {"horizon": "half"}
    with pytest.raises(InputError, match=r"method\.rollout\.horizon\.name 'half' is unknown"):
        build_config(tree)
    assert Method().rollout == PassAtK(horizon=Complete())


@pytest.mark.parametrize(("key", "name"), [("start", "initial_ratio"), ("step", "ratio_step")])
def test_numbers_of_tokens_are_refused_with_the_share_named(key, name):
    with pytest.raises(InputError, match=rf"^method\.rollout\.horizon\.{key} is now {name}, a share of the length"):
        build_config({"task": "sudoku", "method": {"name": "popd", "rollout": {"horizon": {key: 8}}}})


@pytest.mark.parametrize("length", [72, 150, 1024, 15360])
def test_the_published_schedule_is_the_same_share_of_any_length(length):
    policy: Any = Extent(steps=length)
    rollout = METHODS["popd"].method.rollout
    assert isinstance(rollout, PassAtK)
    steps: Any = replace(rollout.horizon, unit="steps")
    counts = [steps(policy, CANVAS, update).count for update in (0, 540)]
    assert counts[0] == round(0.09 * length) < length
    assert counts[1] / length == pytest.approx(0.09 + 540 * 9 / 15360, abs=1 / length)


CUTS = [Truncated(0.5), Truncated(0.5, unit="steps"), Progressive(), Progressive(0.5, 0.0)]


def judged(method: Method) -> bool:
    """Whether anything in a method depends on the grades of its rollouts, found by giving them others."""
    rollout, hints = method.rollout, [context.hint for context in method.contexts]
    by_gate = [grades for grades in ((0.0, 0.0), (1.0, 1.0), (0.0, 1.0)) if method.gate(list(map(graded, grades)))]
    tries = isinstance(rollout, PassAtK) and rollout.attempts > 1 and (rollout.until_solved or rollout.keep == "best")
    return len(by_gate) < 3 or tries or method.trust.needs_outcome or any(hint and hint.needs_outcome for hint in hints)


def graded(score: float) -> Any:
    return replace(EXAMPLE, grade=Grade(score == 1, score, None))


EXAMPLE = Rollout(PROMPTED[0].problem, 0, "", Grade(True, 1.0, None), trajectory=None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", METHODS)
def test_a_horizon_that_cuts_is_refused_with_what_asks_for_outcomes(name):
    method = METHODS[name].method
    if not isinstance(method.rollout, PassAtK):
        return
    rollouts = (method.rollout, replace(method.rollout, attempts=1))
    for horizon, gate, rollout in product(CUTS, GATES, rollouts):
        try:
            whole = replace(method, gate=GATES[gate](), rollout=rollout)
        except InputError:  # never, horizon or not
            continue
        cut = replace(rollout, horizon=horizon)
        if judged(whole):
            with pytest.raises(InputError, match=r"^method\.(gate|rollout|trust|contexts) .*horizon to complete$"):
                replace(whole, rollout=cut)
        else:
            replace(whole, rollout=cut)
        replace(whole, rollout=replace(rollout, horizon=Truncated(1.0)))


@pytest.mark.parametrize("horizon", CUTS[:3], ids=str)
def test_what_a_horizon_leaves_is_trained_on(policy, horizon):
    """Where the pair is accepted no update is skipped, right or wrong."""
    for name in ("d_opsd", "d_opsd_pmi", "d_demo_psd", "rft", "later_step"):
        rollout = PassAtK(attempts=1, temperature=1.0, horizon=horizon)
        method = replace(METHODS[name].method, gate=All(), rollout=rollout)
        task: Any = Wrong()
        rollouts = gather(rollout, method.gate, rollout(policy, task, PROMPTED, CANVAS, 3, 0))
        assert rollouts.size == len(PROMPTED)
        plan = plan_update(replace(method, contexts=(), target=Sampled(), divergence=TokenNLL()), rollouts, KEYS)
        assert plan is not None
        assert plan.num_sites > 0


class Wrong:
    """Nobody is right."""

    def grade(self, problem: Problem, completion: str) -> Grade:
        return Grade(False, 0.0, None)
