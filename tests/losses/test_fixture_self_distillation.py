"""The losses of SDPO, Purified OPSD and DemoPSD through the slots of a method, number by number."""

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from dllm_sd.losses import (
    Barycenter,
    Drawn,
    Equal,
    ForwardKL,
    FullVocabulary,
    GeneralisedJSD,
    ImportanceCap,
    Plain,
    PolicyGradient,
    PurifiedPMI,
    ReverseKL,
    TopK,
)
from dllm_sd.policies.weights import EmaWeights
from tests.oracles.aggregation import aggregate, flat_logp
from tests.oracles.fixtures import assert_same_grad, assert_same_loss, golden

pytestmark = pytest.mark.fixture

DIVERGENCES: dict[str, Any] = {"jsd": GeneralisedJSD(), "forward_kl": ForwardKL(), "reverse_kl": ReverseKL()}


def drawn_at(logp: Tensor, token: Tensor, old_logp: Tensor) -> Drawn:
    """``[m v]``, ``[n l]``, ``[n l]`` to what the trust reads."""
    token = token.long().flatten()
    picked = logp.detach().gather(-1, rearrange(token, "m -> m 1"))
    return Drawn(
        token=token, logp=rearrange(picked, "m 1 -> m"), old_logp=old_logp.flatten(), canvas=torch.arange(len(token))
    )


def sdpo_support(name: str, k: int) -> FullVocabulary | TopK:
    """Our support for the reference's."""
    if name == "topk_tail":
        return TopK(k=k, of="student", rest="bucket")
    return TopK(k=k, of="student") if name == "topk_renorm" else FullVocabulary()


def trust_of(is_clip: float | None) -> Equal | ImportanceCap:
    """Without a cap nothing is weighed."""
    return Equal() if is_clip is None else ImportanceCap(cap=is_clip)


def test_losses_and_gradients_equal_those_of_sdpo():
    tensors, settings = golden("sdpo_loss")
    mask = tensors["response_mask"] * tensors["self_distillation_mask"][:, None]
    for case in settings["cases"]:
        student = tensors["student_logits"].clone().requires_grad_()
        logp, teacher = (flat_logp(x, settings["temperature"]) for x in (student, tensors["teacher_logits"]))
        part: Any = GeneralisedJSD(beta=case["alpha"])
        if case["support"] == "sampled_token":
            part = PolicyGradient(tokens="sampled", surrogate="log")
        weight = tensors["rollout_is_weights"] if case["rollout_is_weights"] else torch.ones_like(mask)
        drawn = drawn_at(logp, tensors["responses"], tensors["old_log_probs"])

        student_u, teacher_u = sdpo_support(case["support"], settings["top_k"])(logp, teacher[None])
        target = Plain()(teacher_u)
        factor = trust_of(case["is_clip"])(student_u, target, drawn, weight.flatten())
        per_token = (part(student_u, target, drawn.token) * factor).view(mask.shape)
        loss = aggregate(per_token, mask, case["loss_agg_mode"])
        loss.backward()
        assert_same_loss(per_token.detach(), tensors[f"{case['id']}/per_token"], case["id"])
        assert_same_loss(loss.detach(), case["loss"], case["id"])
        assert_same_grad(student.grad, tensors[f"{case['id']}/grad"], case["id"])


def test_the_kept_entries_are_those_of_sdpo():
    tensors, settings = golden("sdpo_loss")
    logp = flat_logp(tensors["student_logits"], settings["temperature"])
    ids = tensors["topk_indices"].long().flatten(0, 1)
    kept, _ = TopK(k=settings["top_k"], of="student", rest="keep")(logp, logp[None])
    assert torch.equal(kept.sort(-1).values, logp.gather(-1, ids).sort(-1).values)


def test_the_moving_average_is_that_of_sdpo():
    tensors, settings = golden("sdpo_loss")
    copy = {"w": tensors["ema/teacher_before"].clone()}
    EmaWeights(decay=1 - settings["ema_update_rate"]).after_update(copy, {"w": tensors["ema/student"]}, 1)
    expected = tensors["ema/teacher_after"]
    assert not torch.allclose(expected, tensors["ema/teacher_before"])
    torch.testing.assert_close(copy["w"], expected, atol=1e-10, rtol=1e-9)


def test_targets_losses_and_gradients_equal_those_of_purified_opsd():
    tensors, settings = golden("purified_pmi")
    mask = tensors["mask"]
    for case in settings["cases"]:
        student = tensors["student_logits"].clone().requires_grad_()
        names = ("teacher_logits", "reference_only_logits", "base_logits")
        contexts = torch.stack([flat_logp(tensors[name], case["temperature"]) for name in names])
        target = PurifiedPMI(beta=case["pmi_beta"], bound=case["clip_c"])
        student_u, contexts_u = FullVocabulary()(flat_logp(student, case["temperature"]), contexts)
        merged, centred = target(contexts_u), target.centred(contexts_u)
        value = DIVERGENCES[case["divergence"]](student_u, merged, torch.zeros(0, dtype=torch.int64)).view(mask.shape)
        loss = aggregate(value, mask, "token-mean")
        loss.backward()

        stored = {
            "delta_centred": centred,
            "delta_clipped": target.bounded(centred),
            "target_log_probs": merged[0],
            "per_token": value.detach(),
        }
        for name, ours in stored.items():
            expected = tensors[f"{case['id']}/{name}"]
            assert_same_loss(ours.reshape(expected.shape), expected, (case["id"], name))
        assert_same_loss(centred.abs().max(), case["max_abs_delta_centred"], case["id"])
        assert_same_loss(loss.detach(), case["loss"], case["id"])
        assert_same_grad(student.grad, tensors[f"{case['id']}/grad"], case["id"])


def test_targets_losses_and_gradients_equal_those_of_demopsd():
    tensors, settings = golden("demopsd")
    mask = tensors["response_mask"] * tensors["demopsd_mask"][:, None]
    for case in settings["cases"]:
        student = tensors["student_logits"].clone().requires_grad_()
        logp = flat_logp(student)
        contexts = torch.stack([flat_logp(tensors[name]) for name in ("ema_teacher_logits", "ema_student_logits")])
        full = case["support"] == "full"
        support = FullVocabulary() if full else TopK(k=case["top_k"], of="student", rest="bucket")
        target = Barycenter(beta=case["beta"], alpha_max=case["alpha_max"], floor=case["prob_floor"])
        drawn = drawn_at(logp, tensors["sampled_ids"], tensors["old_log_probs"])

        student_u, contexts_u = support(logp, contexts)
        merged = target(contexts_u)
        factor = trust_of(case["is_clip"])(student_u, merged, drawn, torch.ones(mask.numel(), dtype=torch.float64))
        value = ReverseKL()(student_u, merged, drawn.token)
        loss = aggregate((value * factor).view(mask.shape), mask, "token-mean")
        loss.backward()

        measured = target.measures(contexts_u)
        stored = {
            "disagreement": measured["target/disagreement"],
            "alpha": measured["target/alpha"],
            "is_weight": factor[0],
            "per_token_kl": value[0].detach(),
        }
        for name, ours in stored.items():
            assert_same_loss(ours.view(mask.shape), tensors[f"{case['id']}/{name}"], (case["id"], name))
        expected = tensors[f"{case['id']}/target_log_probs"].flatten(0, 1)
        assert_same_loss(in_order(merged[0], student_u, logp, tensors["topk_ids"], full), expected, case["id"])
        assert_same_loss(loss.detach(), case["loss"], case["id"])
        assert_same_grad(student.grad, tensors[f"{case['id']}/grad"], case["id"])


def in_order(merged: Tensor, student_u: Tensor, logp: Tensor, ids: Tensor, full: bool) -> Tensor:
    """The target ``[m u]`` in the order of the stored ids; the support promises none for the kept entries."""
    if full:
        return merged
    wanted = logp.gather(-1, ids.long().flatten(0, 1))
    place = (wanted[:, :, None] == student_u[:, None, :-1]).long().argmax(-1)
    return torch.cat([merged.gather(-1, place), merged[:, -1:]], dim=-1)
