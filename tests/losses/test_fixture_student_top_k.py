"""The student top-k policy gradient of thunlp/OPD through the slots of a method, number by number."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_sd.losses import Each, FullVocabulary, PolicyGradient, TopK
from tests.oracles.aggregation import aggregate, flat_logp
from tests.oracles.fixtures import golden

pytestmark = pytest.mark.fixture

WEIGHT: dict[str, Any] = {
    "student_p": "student",
    "teacher_p": "teacher",
    "none": "uniform",
    "sampled_token": "student",
}


def parts(case: dict[str, Any], settings: dict[str, Any]) -> tuple[FullVocabulary | TopK, PolicyGradient]:
    """Our parts for the reference's settings."""
    sampled = case["top_k"] == 0
    of: Any = "student" if case["on_policy"] else "rollout"
    support = FullVocabulary() if sampled else TopK(k=case["top_k"], of=of, rest="keep")
    return support, PolicyGradient(
        tokens="sampled" if sampled else "support",
        weight=WEIGHT[case["weight"]],
        ratio_clip=settings["clip_ratio"],
        dual_clip=settings["dual_clip_c"],
    )


def graded() -> Iterator[tuple[dict[str, Any], Tensor, Tensor, PolicyGradient, tuple[Tensor, Tensor, Tensor]]]:
    """Every case with the student's logits, its full log-probabilities ``[m v]``, our part and what it is given."""
    tensors, settings = golden("opd_student_topk")
    for case in settings["cases"]:
        student = tensors["student_logits"].clone().requires_grad_()
        logp = flat_logp(student, case["student_temperature"])
        teachers = [flat_logp(tensors["teacher_logits"], case["teacher_temperature"])]
        if not case["on_policy"]:
            teachers.append(flat_logp(tensors["old_student_logits"], case["student_temperature"]))
        support, part = parts(case, settings)
        student_u, teachers_u = support(logp, torch.stack(teachers))
        yield case, student, logp, part, (student_u, Each()(teachers_u), tensors["responses"].long().flatten())


def test_losses_and_gradients_equal_those_of_thunlp_opd():
    tensors, _ = golden("opd_student_topk")
    mask = tensors["response_mask"]
    modes = set()
    for case, student, _, part, given in graded():
        loss = aggregate(part(*given).view(mask.shape), mask, case["loss_agg_mode"])
        loss.backward()
        modes.add((case["on_policy"], case["loss_agg_mode"]))
        assert loss.item() == pytest.approx(case["loss"], abs=0, rel=2e-8), case["id"]
        torch.testing.assert_close(student.grad, tensors[f"{case['id']}/grad"], atol=1e-10, rtol=2e-8)
    assert {on_policy for on_policy, _ in modes} == {True, False}
    assert len(modes) == 4


def test_advantages_equal_those_of_thunlp_opd():
    tensors, _ = golden("opd_student_topk")
    mask = tensors["response_mask"]
    for case, _, logp, part, given in graded():
        ours, expected = part.advantage(*given), tensors[f"{case['id']}/advantages"]
        if case["top_k"]:
            wanted = logp.detach().gather(-1, tensors[f"{case['id']}/topk_ids"].long().flatten(0, 1))
            place = (wanted[:, :, None] == given[0].detach()[:, None, :]).long().argmax(-1)
            ours = ours.gather(-1, place)
            torch.testing.assert_close(wanted.sort(-1).values, given[0].detach().sort(-1).values, atol=0, rtol=0)
        ours = ours.view(expected.shape) * (mask[..., None] if case["top_k"] else mask)
        torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-8)


def test_off_policy_cases_reach_both_clips():
    for case, _, _, part, given in graded():
        clipped, plain = part(*given), part.entries(*given).sum(-1)
        assert torch.equal(clipped, plain) == case["on_policy"], case["id"]
