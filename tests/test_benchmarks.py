from argparse import Namespace
from typing import Any

import pytest
import torch

from dllm_sd.methods import METHODS
from dllm_sd.objective.plan import plan_update
from tools import bench_decode, bench_loss, bench_update
from tools.naive import body


@pytest.mark.parametrize("loss", bench_loss.METHODS)
def test_the_forms_of_a_loss_that_are_timed_have_one_gradient(loss):
    sizes = {"rows": 2, "prompt": 3, "tokens": 5, "width": 8, "vocabulary": 30}
    case = bench_loss.case(Namespace(**sizes, loss=loss, device="cpu", dtype="float32"))
    forms = bench_loss.ours, bench_loss.bare, bench_loss.naive
    found = [torch.autograd.grad(form(case), (case.student, case.head)) for form in forms]
    assert all(gradient.abs().max() > 1e-4 for gradient in found[0])
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_the_forms_of_an_update_that_are_timed_have_one_loss_and_gradient():
    options = Namespace(body="tiny", vocabulary=30, dtype="float32", device="cpu", canvases=4, sites=2, tokens=14)
    options.blocks = None
    policy = body(options, options.vocabulary)
    method: Any = METHODS["d_opsd"].method
    rollouts = bench_update.rollout(options, policy)
    plan = plan_update(method, rollouts, rollouts.keys(0, 0))
    assert plan is not None
    found = []
    for form in (bench_update.ours, *bench_update.OTHERS.values()):
        policy.module.zero_grad()
        loss = form(policy, method, plan, 28, bench_update.Clock())
        head = policy.module.network.get_output_embeddings().weight.grad.clone()
        found.append((loss, head))
    assert found[0][1].abs().max() > 0
    for loss, head in found[1:]:
        torch.testing.assert_close(loss, found[0][0], atol=1e-7, rtol=1e-3)
        torch.testing.assert_close(head, found[0][1], atol=1e-6, rtol=1e-3)


def test_both_sides_of_the_decoding_benchmark_make_the_same_attempts():
    options = Namespace(body="tiny", vocabulary=30, dtype="float32", device="cpu", problems=3, attempts=3, rate=0.3)
    vars(options).update(length=8, block=4, tokens_per_step=2, batch=4, early_end=False, temperature=0.9, ahead=0)
    policy = body(options, options.vocabulary)
    mine, theirs = (form(policy, options, 3) for form in (bench_decode.ours, bench_decode.published))
    assert mine.rollouts == theirs.rollouts > 3
    assert mine.flops > 0
    assert 0 <= mine.idle < 1
