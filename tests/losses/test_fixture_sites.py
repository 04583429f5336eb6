"""Sites, chunks and the whole objective of the released d-OPSD (``fixtures/golden/dopsd_sites_and_loss``)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_sd.canvases import Canvases, DecoderSteps
from dllm_sd.losses import FullVocabulary, GeneralisedJSD, ReverseKL, TopK
from dllm_sd.losses.sites import Revealed, TeacherTop, choose_sites
from dllm_sd.methods import METHODS
from dllm_sd.methods.method import Method
from dllm_sd.network.lazy_logits import LazyLogits
from dllm_sd.network.site_head import Head
from dllm_sd.network.view import View
from dllm_sd.objective.equation import grade_micro_batch
from dllm_sd.objective.plan import plan_update
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.rollouts.rules import PassAtK
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.trajectory import Trajectory
from tests.oracles.fixtures import golden
from tests.oracles.toy_denoiser import from_states, no_keys

pytestmark = pytest.mark.fixture

TENSORS, SETTINGS = golden("dopsd_sites_and_loss")
P = SETTINGS["prompt_length"]
RULE = DecoderSteps(last_block=False, last_state=False, remainder=False, prompt_ends=True)


def trajectory() -> Trajectory:
    """The stored states; tokens that no state shows are not stored and not needed (no loss here reads them)."""
    states = TENSORS["student_states"].long()
    final = torch.where(states[-1] == SETTINGS["mask_id"], 0, states[-1])
    no_end = -1
    return from_states(states[:, P:], final[P:], final[:P], SETTINGS["block_length"], SETTINGS["mask_id"], no_end)


def canvases(part: int = 0, parts: int = 1) -> Canvases:
    return RULE(trajectory(), no_keys(1), part, parts)


def stored_sites(variant: str, rows: slice = slice(None)) -> Tensor:
    """bool ``[rows l]`` on the completion side."""
    sites = TENSORS[f"sites_{variant}"][rows].long()
    return torch.zeros((len(sites), SETTINGS["gen_length"] + P), dtype=torch.bool).scatter_(1, sites, True)[:, P:]


def chosen(rule: TeacherTop) -> Tensor:
    """bool ``[rows l]``: what ``rule`` chooses by the stored teacher's logits."""
    ours = canvases()
    candidates, quota = rule(ours.masked, ours.active, ours.revealed)
    return choose_sites(candidates, quota, rule.score(TENSORS["teacher_logits"][:, P:][candidates]))


def test_our_canvases_are_the_trained_states():
    assert torch.equal(canvases().ids, TENSORS["student_states"][: SETTINGS["rows"]].long())


def test_the_two_most_confident_positions_by_raw_logit_are_those_of_d_opsd():
    assert torch.equal(chosen(TeacherTop(count=2, by="logit")), stored_sites("teacher_top2"))


def test_choosing_by_probability_differs_in_the_stated_number_of_rows():
    other = (chosen(TeacherTop(count=2, by="probability")) != stored_sites("teacher_top2")).any(1).sum()
    assert other == SETTINGS["rows_where_probability_would_choose_other_sites"]


def test_the_students_own_positions_are_those_of_d_opsd():
    ours = canvases()
    candidates, quota = Revealed()(ours.masked, ours.active, ours.revealed)
    assert torch.equal(candidates, stored_sites("diff_student_mask"))
    assert (quota == 2).all()


def chunks() -> list[dict[str, Any]]:
    return [chunk for key, listed in SETTINGS.items() if key.startswith("chunks_") for chunk in listed]


def test_passes_over_a_rollout_read_the_chunks_of_the_reference():
    for chunk in chunks():
        part = (chunk["step"] - 1) % chunk["batch_divide"]
        steps = canvases(part, chunk["batch_divide"]).steps
        assert steps.tolist() == list(range(chunk["first_state"], chunk["first_state"] + chunk["states"])), chunk


def reference(**parts: Any) -> Method:
    """The named method, with one pass over the rollout."""
    return replace(METHODS["d_opsd_reference"].method, **({"rollout": PassAtK(passes=1)} | parts))


def of_case(case: dict[str, Any]) -> Method:
    """The named method with the settings of one case."""
    clip = {} if case["token_clip"] is None else {"clip": "entry", "clip_at": case["token_clip"]}
    return reference(
        sites=TeacherTop(count=2, by="logit") if case["sites"] == "teacher_top2" else Revealed(),
        support=FullVocabulary() if case["top_k"] is None else TopK(k=case["top_k"]),
        divergence=GeneralisedJSD(beta=case["beta"], **clip),
    )


def stored_logits(logits: Tensor, rows: slice) -> Callable[[View], LazyLogits]:
    """A teacher that gives the stored logits, row by row."""
    return lambda view: LazyLogits(logits[rows][view.sites])


def graded(method: Method, part: int, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient at all positions ``[rows l v]``, and the sites ``[rows l]``."""
    rollout = Rollout(Problem("0", {}), 0, "", Grade(True, 1.0, None), trajectory())
    plan = plan_update(method, Rollouts((rollout,), {"rejected": 0.0}), no_keys(1), part)
    assert plan is not None
    student = TENSORS["student_logits"].clone().requires_grad_()
    said = stored_logits(student, rows)
    reads = lambda view, read: read(said(view).hidden, Head(said(view).head))  # noqa: E731
    out = grade_micro_batch(method, plan.micro_batch(), reads, [stored_logits(TENSORS["teacher_logits"], rows)])
    (gradient,) = torch.autograd.grad(out.loss, student)
    return out.loss.detach(), gradient[rows], out.sites


def assert_is_loss(ours: Tensor, expected: float, where: object) -> None:
    """The README's tolerance."""
    torch.testing.assert_close(
        ours, torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=1e-9, msg=lambda text: f"{where}: {text}"
    )


def test_the_named_reference_method_has_the_released_codes_loss_and_gradient():
    method = reference()
    assert method.support == TopK(20)
    assert method.divergence == ReverseKL(clip="entry", clip_at=0.05)
    (case,) = [case for case in SETTINGS["cases"] if case["id"] == "teacher_top2_b1_k20_c0.05"]
    loss, gradient, sites = graded(method, 0, slice(None))
    assert_is_loss(loss, case["loss"], case["id"])
    assert torch.equal(sites, stored_sites("teacher_top2"))
    at_sites = gradient[:, P:][sites].view(-1, 2, SETTINGS["logits_vocab_size"])
    torch.testing.assert_close(at_sites, TENSORS[f"{case['id']}/grad_at_sites"], atol=1e-11, rtol=1e-8)
    assert not gradient[:, :P].any()
    assert not gradient[:, P:][~sites].any()


def test_every_case_of_the_released_code_goes_through_the_objective():
    for case in SETTINGS["cases"]:
        loss, gradient, sites = graded(of_case(case), 0, slice(None))
        assert_is_loss(loss, case["loss"], case["id"])
        assert torch.equal(sites, stored_sites(case["sites"])), case["id"]
        ours, expected = gradient[:, P:][sites], TENSORS[f"{case['id']}/grad_at_sites"].flatten(0, 1)
        torch.testing.assert_close(
            ours, expected, atol=1e-11, rtol=1e-8, msg=lambda text, name=case["id"]: f"{name}: {text}"
        )


def test_every_chunk_of_the_named_reference_method_has_its_stored_loss():
    for chunk in chunks():
        method = reference(rollout=PassAtK(passes=chunk["batch_divide"]))
        rows = slice(chunk["first_state"], chunk["first_state"] + chunk["states"])
        loss, _, _ = graded(method, (chunk["step"] - 1) % chunk["batch_divide"], rows)
        assert_is_loss(loss, chunk["loss"], chunk)


def test_a_trajectory_shorter_than_its_passes_has_nothing_to_learn_from():
    """Upstream raises a ValueError there; we skip the update."""
    method = reference(rollout=PassAtK(passes=SETTINGS["states"]))
    rollout = Rollout(Problem("0", {}), 0, "", Grade(True, 1.0, None), trajectory())
    rollouts = Rollouts((rollout,), {"rejected": 0.0})
    assert all(plan_update(method, rollouts, no_keys(1), part) is None for part in range(SETTINGS["states"]))
