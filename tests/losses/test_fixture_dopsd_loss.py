"""The losses of d-OPSD's and OPSD's released code, number by number (``fixtures/golden``)."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_sd.losses import FullVocabulary, GeneralisedJSD, Plain, TopK, clip_share, top_k_overlap
from tests.oracles.fixtures import assert_same_grad, assert_same_loss, golden

pytestmark = pytest.mark.fixture


def parts(settings: dict[str, Any]) -> tuple[FullVocabulary | TopK, GeneralisedJSD]:
    """Our parts for the reference's settings; its "token_clip" clips vocabulary entries."""
    support = FullVocabulary() if settings["top_k"] is None else TopK(k=settings["top_k"])
    clip_at = settings["token_clip"]
    if clip_at is None:
        return support, GeneralisedJSD(beta=settings["beta"])
    return support, GeneralisedJSD(beta=settings["beta"], clip="entry", clip_at=clip_at)


def divergence(student_logits: Tensor, teacher_logits: Tensor, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits ``[m v]``, ``[m v]`` to values ``[m]`` and clip shares ``[m]``, through the slots of a method."""
    support, part = parts(settings)
    student, teacher = support(student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)[None])
    target, token = Plain()(teacher), torch.zeros(len(student), dtype=torch.int64)
    return part(student, target, token)[0], clip_share(part.entries(student, target, token), part.clip, part.clip_at)[0]


def at_sites(logits: Tensor, sites: Tensor) -> Tensor:
    """``[rows l v]`` at ``[rows 2] -> [rows 2 v]``."""
    return torch.stack([row[where.long()] for row, where in zip(logits, sites, strict=True)])


def dopsd_cases() -> Iterator[tuple[dict[str, Any], Tensor, Tensor, Tensor]]:
    """Every case with student and teacher logits at its sites ``[rows 2 v]`` and the stored gradient there."""
    tensors, settings = golden("dopsd_sites_and_loss")
    for case in settings["cases"]:
        sites = tensors[f"sites_{case['sites']}"]
        student, teacher = (at_sites(tensors[name], sites) for name in ("student_logits", "teacher_logits"))
        yield case, student, teacher, tensors[f"{case['id']}/grad_at_sites"]


def test_losses_and_gradients_equal_those_of_d_opsd():
    for case, student, teacher, expected_grad in dopsd_cases():
        student.requires_grad_()
        value, _ = divergence(student.flatten(0, 1), teacher.flatten(0, 1), case)
        loss = value.sum() / len(student)
        loss.backward()
        assert_same_loss(loss.detach(), case["loss"], case["id"])
        assert_same_grad(student.grad, expected_grad, case["id"])


def test_clip_shares_and_overlaps_equal_those_of_d_opsd():
    for case, student, teacher, _ in dopsd_cases():
        _, share = divergence(student.flatten(0, 1), teacher.flatten(0, 1), case)
        assert share.mean().item() == pytest.approx(case["clip_ratio"], abs=1e-6), case["id"]
        if case["top_k"] is not None:
            overlap = top_k_overlap(student, teacher, case["top_k"])
            assert overlap.mean().item() == pytest.approx(case["top_k_overlap"], abs=1e-6), case["id"]


def test_losses_of_d_opsd_chunks_are_those_of_their_rows():
    tensors, settings = golden("dopsd_sites_and_loss")
    sites = tensors["sites_teacher_top2"]
    student, teacher = (at_sites(tensors[name], sites) for name in ("student_logits", "teacher_logits"))
    for key in (key for key in settings if key.startswith("chunks_")):
        found = re.fullmatch(r"chunks_beta([\d_]+)_k(\d+)_clip([\d_]+)", key)
        assert found, key
        beta, top_k, clip = (float(text.replace("_", ".")) for text in found.groups())
        loss_settings = {"beta": beta, "top_k": int(top_k), "token_clip": clip}
        for chunk in settings[key]:
            rows = slice(chunk["first_state"], chunk["first_state"] + chunk["states"])
            value, _ = divergence(student[rows].flatten(0, 1), teacher[rows].flatten(0, 1), loss_settings)
            assert_same_loss(value.sum() / chunk["states"], chunk["loss"], chunk)


def test_two_token_examples_show_that_the_entry_clip_can_be_negative():
    _, settings = golden("dopsd_sites_and_loss")
    for example in settings["two_token_examples"]:
        student = torch.tensor([example["student_probs"]], dtype=torch.float64).log().requires_grad_()
        teacher = torch.tensor([example["teacher_probs"]], dtype=torch.float64).log()
        value, _ = divergence(student, teacher, example | {"top_k": None})
        value.sum().backward()
        assert_same_loss(value.detach()[0], example["loss"], example["name"])
        assert_same_grad(student.grad, torch.tensor([example["grad"]], dtype=torch.float64), example["name"])


def test_losses_and_gradients_equal_those_of_opsd():
    tensors, settings = golden("opsd_jsd")
    valid = tensors["labels"] != -100
    for case in settings["cases"]:
        student = tensors["student_logits"].clone().requires_grad_()
        scaled = [(x / case["temperature"]).flatten(0, 1) for x in (student, tensors["teacher_logits"])]
        value = divergence(scaled[0], scaled[1], case)[0].view(valid.shape)
        entries = scaled[0].shape[-1] if case["top_k"] is None else case["top_k"]
        kept = value.where(valid, 0)
        loss = kept.sum() / valid.sum()
        loss.backward()
        sums = {
            "loss": loss,
            "loss_sum": kept.sum(),
            "loss_mean": loss / entries,
            "loss_batchmean_without_labels": value.sum() / len(value),
        }
        for name, ours in sums.items():
            assert_same_loss(ours.detach(), case[name], (case["id"], name))
        assert_same_loss(kept.detach(), tensors[f"{case['id']}/per_token"], case["id"])
        assert_same_grad(student.grad, tensors[f"{case['id']}/grad"], case["id"])
