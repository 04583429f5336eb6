"""SGSD's released code: gap, polarity, gate, loss and gradient, on four rollouts with three teachers each."""

from typing import Any

import pytest
import torch
from einops import rearrange, repeat
from torch import Tensor

from dllm_sd.losses import Drawn, GatedGap, OutcomeValidated, drawn_gap, gate, local_support
from tests.oracles.fixtures import assert_same_grad, assert_same_loss, golden

TENSORS, FACTS = golden("sgsd")
CASES: list[dict[str, Any]] = FACTS["cases"]


def read(case: dict[str, Any], name: str) -> Tensor:
    return TENSORS[f"{case['id']}/{name}" if f"{case['id']}/{name}" in TENSORS else name]


def parts(case: dict[str, Any]) -> tuple[GatedGap, OutcomeValidated]:
    top = case["local_support_top_k"]
    local = None if top < 1 else top
    clip = case["polarity_clip"]
    return GatedGap(tau=case["gate_tau"], local=local), OutcomeValidated(
        clip=clip if clip and clip > 0 else torch.inf, threshold=case["polarity_threshold"], local=local
    )


@pytest.mark.fixture
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_loss_gradient_and_polarity_are_those_of_the_released_code(case):
    exact = case["local_support_top_k"] < 1
    divergence, trust = parts(case)
    logits = read(case, "student_logits").double().clone().requires_grad_()
    token = read(case, "completion_ids").long()
    counted = read(case, "token_mask").bool()
    examples, _ = token.shape
    canvas = repeat(torch.arange(examples), "b -> b s", s=token.shape[1])[counted]
    student = logits.log_softmax(-1)[counted]
    teachers = rearrange(read(case, "teacher_logits").double().log_softmax(-1), "b c s v -> c b s v")[:, counted]
    drawn = Drawn(token[counted], student.detach()[:, 0], student.detach()[:, 0], canvas)
    reward = (read(case, "reward").double() + 1) / 2
    weight = trust.rollout_weight(reward, torch.arange(examples))
    factor = trust(student, teachers, drawn, weight[canvas])
    context_weight = read(case, "alpha").double()[canvas].T
    size = counted.sum(1).clamp(min=1).double()[canvas]
    loss = (divergence(student, teachers, drawn.token) * factor * context_weight / size).sum() / examples

    first = torch.stack([(canvas == b).nonzero()[0, 0] for b in range(examples)])
    assert torch.equal(factor[:, first].T, read(case, "rho").double())
    support = trust.support(student, teachers, drawn)[:, first].T
    gap = drawn_gap(student, teachers, drawn.token, divergence.local)
    if exact:
        torch.testing.assert_close(support, read(case, "support_score").double(), atol=1e-10, rtol=0)
        expected = rearrange(read(case, "delta"), "b c s -> c b s")[:, counted].double()
        torch.testing.assert_close(gap, expected, atol=1e-10, rtol=0)
        expected = rearrange(read(case, "gate"), "b c s -> c b s")[:, counted].double()
        torch.testing.assert_close(gate(gap, divergence.tau), expected, atol=1e-10, rtol=0)
        assert_same_loss(loss, case["loss"], case["id"])
    else:
        torch.testing.assert_close(support, read(case, "support_score").double(), atol=2e-6, rtol=0)
        ours, theirs, _ = local_support(student, teachers, drawn.token, divergence.local or 0)
        kl = torch.where(theirs == -torch.inf, 0, theirs.exp() * (theirs - ours)).sum(-1)
        expected = rearrange(read(case, "local_divergence"), "b c s -> c b s")[:, counted].double()
        torch.testing.assert_close(kl, expected, atol=5e-6, rtol=0)
        assert abs(loss.item() - case["loss"]) < 2e-6
    loss.backward()
    if exact:
        assert_same_grad(logits.grad, read(case, "grad").double(), case["id"])
    else:
        torch.testing.assert_close(logits.grad, read(case, "grad").double(), atol=2e-6, rtol=0)
