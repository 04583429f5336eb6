"""No site stands where nothing was written, nor behind the end unless the rule of canvases grades its padding.

Every rule, under every horizon, on every kind of trajectory, compared with what loops over positions say.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dllm_sd.canvases import CANVASES, AllMaskedCanvas, DecoderSteps, RandomMasks
from dllm_sd.losses.sites import AllMaskedSites, Revealed, TeacherTop
from dllm_sd.methods.method import Method
from dllm_sd.objective.plan import Plan, plan_update
from dllm_sd.rollouts.gates import All
from dllm_sd.rollouts.horizons import Complete, Progressive, Truncated
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.teachers import Nothing
from dllm_sd.training.metrics import rollout_metrics
from dllm_sd.trajectory import NEVER, Trajectory, completion_length
from tests.tiers import crossed

LENGTH = 12
RULES: dict[str, DecoderSteps | RandomMasks | AllMaskedCanvas] = {
    "decoder_steps": DecoderSteps(),
    "decoder_steps with padding": DecoderSteps(end_padding=True),
    "random_masks": RandomMasks(draws=3, t_min=0.999, end_padding=False),
    "random_masks with padding": RandomMasks(draws=3, t_min=0.999),
    "random_masks that hide some": RandomMasks(draws=3),
    "all_masked": AllMaskedCanvas(),
}
HORIZONS: dict[str, Any] = {
    "complete": Complete(),
    "half of the blocks": Truncated(0.5),
    "one block": Progressive(0.01),
    "some steps": Truncated(0.4, unit="steps"),
    "one step": Progressive(0.01, unit="steps"),
    "two steps more at each update": Progressive(0.01, 0.125, unit="steps"),
}
KINDS = ("denoiser", "denoiser that writes on behind the end", "blocks", "autoregressive")
SITES = (Revealed(), AllMaskedSites(), AllMaskedSites(block=True), TeacherTop(), TeacherTop(count=2))


class Extent:
    """A policy of as many blocks and steps as the trajectories have."""

    def extent(self, unit: str, settings: Any) -> int:
        return {"blocks": 3, "steps": LENGTH // 2}[unit]


def whole(noise: Callable[..., Trajectory], kind: str) -> Trajectory:
    """Some rollouts with an end token, and some without one."""
    settings: dict[str, Any] = {"early_end": kind != KINDS[1], "blocks_of_prompt": kind == "blocks"}
    trajectory = noise(b=16, length=LENGTH, block_length=4, tokens_per_step=2, **settings)
    tokens, reveal_step = trajectory.tokens.clone(), trajectory.reveal_step
    if kind == "autoregressive":
        reveal_step = torch.arange(LENGTH).expand(16, -1)
    tokens[::2] = tokens[::2].masked_fill(tokens[::2] == 10, 3)  # no end token there
    length = completion_length(tokens, (10,), reveal_step != NEVER)
    if kind == "autoregressive":
        reveal_step = reveal_step.masked_fill(reveal_step >= length[:, None], NEVER)
        return replace(trajectory, tokens=tokens, reveal_step=reveal_step, length=length, causal=True, block_length=1)
    return replace(trajectory, tokens=tokens, length=length)


def cut(trajectory: Trajectory, horizon: Any) -> Trajectory:
    policy: Any = Extent()
    stop_after = horizon(policy, None, 1)
    return trajectory if stop_after is None else trajectory.within(stop_after)


def allowed(trajectory: Trajectory, rule: Any, row: int) -> set[int]:
    """The positions of a rollout that may ever be graded."""
    reveal, tokens = trajectory.reveal_step[row].tolist(), trajectory.tokens[row].tolist()
    known = {i for i in range(LENGTH) if reveal[i] >= 0}
    end = min((i for i in known if tokens[i] == 10), default=LENGTH)
    padding = set()
    if getattr(rule, "end_padding", False) and not trajectory.causal:
        padding = set(range(end + 1, LENGTH)) & (known if isinstance(rule, DecoderSteps) else set(range(LENGTH)))
    return {i for i in known if i <= end} | padding


def planned(trajectory: Trajectory, rule: Any, sites: Any) -> Plan | None:
    kept = [
        Rollout(Problem(str(row), {}), 0, "", Grade(True, 1.0, None), one)
        for row, one in enumerate(trajectory.unstack())
    ]
    method = Method(gate=All(), canvases=rule, sites=sites, contexts=(Nothing(),))
    return plan_update(method, Rollouts(tuple(kept), {"rejected": 0.0}), list(range(len(kept))))


def expected_sites(trajectory: Trajectory, rule: Any, sites: Any, row: int, step: int) -> tuple[set[int], int]:
    """What may be chosen on a canvas of the decoder (or on a whole sequence), and how many."""
    may = allowed(trajectory, rule, row)
    if trajectory.causal:
        return may, min(len(may), getattr(sites, "count", None) or len(may))
    reveal, blocks = trajectory.reveal_step[row].tolist(), trajectory.block[row].tolist()
    masked = [i for i in range(LENGTH) if reveal[i] >= step or reveal[i] == NEVER]
    now, active = {i for i in may if reveal[i] == step}, {i for i in masked if blocks[i] == blocks[masked[0]]}
    if isinstance(sites, TeacherTop):
        return may & active, min(len(may & active), len(now) if sites.count is None else sites.count)
    found = now if isinstance(sites, Revealed) else may & (active if sites.block else set(masked))
    return found, len(found)


@pytest.mark.parametrize(("horizon", "kind"), crossed(HORIZONS, KINDS))
def test_sites_stand_on_what_was_written_or_on_the_padding_that_is_asked_for(noise, kind, horizon):
    trajectory = cut(whole(noise, kind), HORIZONS[horizon])
    assert {type(rule) for rule in RULES.values()} == set(CANVASES.values())
    for rule in RULES.values():
        for sites in SITES:
            plan = planned(trajectory, rule, sites)
            assert plan is not None
            candidates = plan.micro_batch().candidates
            met: dict[tuple[int, int], tuple[set[int], int]] = {}
            for n in range(plan.size):
                row, step = int(plan.rows[n]), int(plan.steps[n])
                found = set(candidates[n].nonzero()[:, 0].tolist())
                assert found <= allowed(trajectory, rule, row)
                met[row, step] = found, int(plan.quota[n])
            if isinstance(rule, DecoderSteps) or trajectory.causal:
                for (row, step), found in met.items():
                    assert found == expected_sites(trajectory, rule, sites, row, step)


@pytest.mark.parametrize(("horizon", "kind"), crossed(HORIZONS, KINDS))
def test_canvases_that_no_decoder_saw_hide_and_count_what_may_be_graded(noise, kind, horizon):
    trajectory = cut(whole(noise, kind), HORIZONS[horizon])
    for rule in (RULES["random_masks"], RULES["random_masks with padding"], RULES["all_masked"]):
        canvases = rule(trajectory, list(range(16)), 0, 1)
        for n in range(len(canvases.rows)):
            row = int(canvases.rows[n])
            may, hidden = allowed(trajectory, rule, row), set(canvases.masked[n].nonzero()[:, 0].tolist())
            assert set(canvases.gradable[n].nonzero()[:, 0].tolist()) == may
            assert hidden <= may
            blocks = trajectory.block[row].tolist()
            count = len({blocks[i] for i in may}) if trajectory.blocks_of_prompt else 1
            if isinstance(rule, RandomMasks) and not trajectory.causal:
                assert float(canvases.weight[n]) == pytest.approx(count / len(may), rel=2e-3)
            if trajectory.blocks_of_prompt and isinstance(rule, RandomMasks):
                (block,) = {blocks[i] for i in hidden}
                may = {i for i in may if blocks[i] == block}
            assert hidden == may
            shown = canvases.ids[n, -LENGTH:] != trajectory.mask_id
            if not trajectory.causal:
                assert set(shown.nonzero()[:, 0].tolist()) == (allowed(trajectory, rule, row) - hidden)


def test_the_share_behind_the_end_is_that_of_all_that_the_kept_rollouts_revealed(noise):
    trajectory = whole(noise, KINDS[1])
    behind = known = 0
    for row in range(trajectory.size):
        tokens = trajectory.tokens[row].tolist()
        end = tokens.index(10) if 10 in tokens else LENGTH
        behind, known = behind + max(0, LENGTH - end - 1), known + LENGTH
    kept = tuple(
        Rollout(Problem(str(row), {}), 0, "", Grade(True, 1.0, None), one)
        for row, one in enumerate(trajectory.unstack())
    )
    names = ("problems", "attempts", "decoded", "solved", "first_try", "kept", "rejected", "no_hint", "long_hint")
    counts: dict[str, float] = dict.fromkeys((*names, "generated", "tokens", "steps"), 1.0)
    assert 0 < behind < known
    assert rollout_metrics(Rollouts(kept, counts))["rollouts/behind_end"] == pytest.approx(behind / known)
    assert "rollouts/behind_end" not in rollout_metrics(Rollouts((), counts))
